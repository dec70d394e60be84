"""Evaluators on clear numbers that watch a circuit, values to feed one with, and what attention is, in NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner import ckks

Array = npt.NDArray[Any]

PARAMETERS = ckks.Parameters.INSECURE(40)
SLOTS = PARAMETERS.slots


class Watched(ckks.ClearEvaluator):
    """Counts rotations and relinearisations. A bound that a circuit assumes must hold in slots without a token too."""

    def __init__(self, parameters=PARAMETERS, noise=None):
        super().__init__(parameters, noise)
        self.rotated: list[int] = []
        self.held: list[int] = []  # results of each call with several steps

    def rotate(self, x, steps):
        if isinstance(steps, int):
            self.rotated.append(steps)
        else:
            self.held.append(len(steps) * x.shape[1])
            self.rotated.extend(steps)
        return super().rotate(x, steps)

    def assume(self, x, bound, error=None):
        y = super().assume(x, bound, error)
        assert np.abs(y._slots).max() <= y.bound * (1 + 1e-9)
        return y

    def work(self) -> dict[str, float]:
        """What was done so far: kind -> amount, at whatever level."""
        amounts: dict[str, float] = {}
        for kind, _, amount in self._core.work():
            amounts[kind] = amounts.get(kind, 0) + amount
        return amounts


class Renewing(Watched):
    """Notes what is refreshed: features, and the bound."""

    def __init__(self, parameters=PARAMETERS, noise=None):
        super().__init__(parameters, noise)
        self.renewed: list[tuple[int, float]] = []

    def refresh(self, x, level=None, *, packed=False):
        self.renewed.append((x.shape[1], x.bound))
        return super().refresh(x, level, packed=packed)


def attended(secret: ckks.SecretKey, plan: ckks.Plan) -> ckks.Evaluator:
    """An evaluator on ciphertexts with a plan's keys, and the owner of the key at hand, who follows its schedule."""

    def messages() -> Iterator[tuple[int, int]]:
        for refresh in plan.refreshes:
            batch = plan.parameters.refresh_batch(refresh.level)
            for begin in range(0, refresh.ciphertexts, batch):
                yield min(batch, refresh.ciphertexts - begin), refresh.level

    schedule = messages()

    def exchange(masked: Iterable[bytes]) -> Iterator[bytes]:
        for message in masked:
            count, level = next(schedule)
            yield secret.refresh(message, level, count)

    return ckks.Evaluator(plan.parameters, plan.keys(secret), ckks.Refresher(secret.public_key(), exchange))


def tensor(evaluator, values, level=None, bound=None, domain=(-1.0, 1.0)):
    """A tensor of the scale at which a polynomial on the domain takes no level for it."""
    level = evaluator.parameters.depth if level is None else level
    scale = evaluator.parameters.scale(level) / max(1.0, (domain[1] - domain[0]) / 2)
    bound = float(np.abs(values).max()) if bound is None else bound
    return evaluator.tensor(values, bound=bound, level=level, scale=scale)


def random(*shape: int, seed: int = 3, low: float = -1.0, high: float = 1.0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(low, high, shape)


def spread(low: float, high: float, tokens: int = 50) -> npt.NDArray[np.float64]:
    """Values over the whole interval, ends included, as one feature; the slots after them are not in use."""
    return np.geomspace(low, high, tokens)[:, None]


def arrange(sequences: Array) -> Array:
    """(sequence, token, feature) to slots: token i of sequence s in slot ``i * sequences + s``."""
    return sequences.transpose(1, 0, 2).reshape(-1, sequences.shape[2])


def by_diagonals(tables: Array) -> Array:
    """(sequence, head, query, key) to slots, feature ``head * period + d`` at token i of key ``(i + d) mod period``."""
    sequences, heads, period, _ = tables.shape
    token, d = np.arange(period)[:, None], np.arange(period)
    moved = tables[:, :, token, (token + d) % period]
    return arrange(moved.transpose(0, 2, 1, 3).reshape(sequences, period, heads * period))

"""The plan of a sealed model: schedules of both passes, keys, bytes, memory and seconds, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from privtuner.ckks import EncryptedTensor, Evaluator, Parameters, Timings
from privtuner.ckks.keys import rotations_of
from privtuner.errors import CkksError
from privtuner.sealed.adapters import BOUND, GRADIENT_BOUND, OUTER_LEVEL, EncryptedAdapters, take_step
from privtuner.sealed.block import Saved, Stages
from privtuner.sealed.clear_adapters import ClearAdapters
from privtuner.sealed.clipping import clip
from privtuner.sealed.encoder import Encoder
from privtuner.sealed.public import Keys, packed_layout
from privtuner.sealed.schedule import Costs, Refresh, Schedule, choose, measure, visits

__all__ = ["Plan", "make_plan"]

FLOORS = {"residual1": 4, "residual2": 4, "d_output1": 3, "d_output2": 3, "d_query": 4}
"""Least levels behind points: what layer norms take, and gradients of adapters."""
FLOOD_BITS = 6
"""By how many bits the noise on revealed vectors exceeds their error."""
REVEALED = 2.0**-9
"""What revealed vectors may be off by, as a part of their bound."""


@dataclass(frozen=True)
class Plan:
    """Refreshes, keys, bytes, memory and seconds of the passes of a sealed model.

    Attributes:
        parameters: of the encryption.
        forward: a forward pass.
        backward: a backward pass and the step after it; None without adapters.
        kept: the level of everything that a forward pass keeps for the backward one, by name.
        pooled: what is revealed, planned.
        keys: the evaluation keys.
        key_bytes: of the keys on the wire.
        traffic: bytes (to the owner, from it) of a forward pass, and of a backward pass: inputs, refreshes, results.
    """

    parameters: Parameters
    forward: Schedule
    backward: Schedule | None
    kept: Mapping[str, int]
    pooled: EncryptedTensor
    keys: Keys
    key_bytes: int
    traffic: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        passes = [("forward", self.forward), *([("backward", self.backward)] if self.backward else [])]
        lines = [f"{self.parameters!r}"]
        for (name, schedule), (down, up) in zip(passes, self.traffic, strict=True):
            count = sum(refresh.ciphertexts for refresh in schedule.refreshes)
            lines += [
                f"{name}: {schedule.seconds:.3g} s predicted, {schedule.peak_bytes / 1e9:.3g} GB of tensors at most, "
                f"{len(schedule.refreshes)} refreshes of {count} ciphertexts, {down / 1e6:.3g} MB to the owner, "
                f"{up / 1e6:.3g} MB from it; sent at level {schedule.start}",
                f"  {'point':24}{'features':>9}{'arrives':>9}{'refreshed':>11}",
            ]
            lines += [
                f"  {point:24}{features:9}{arrival:9}{'-' if level is None else level:>11}"
                for point, features, arrival, level in schedule.table[1:]
            ]
        keys = f"{len(self.keys.rotations)} rotations"
        keys += ", conjugation" * self.keys.conjugation + ", packing" * self.keys.packing
        lines.append(f"keys: relinearisation, {keys}: {self.key_bytes / 1e6:.3g} MB")
        return "\n".join(lines)


class _Passes:
    """The passes on planned tensors."""

    def __init__(self, encoder: Encoder, parameters: Parameters, kept: Mapping[str, int]) -> None:
        self.parameters, self.kept, self.shape = parameters, kept, encoder.shape
        # Levels and refreshes are the same whatever the adapters.
        self.encoder = encoder.with_adapters(ClearAdapters.fresh(self.shape)) if self.shape.clear else encoder
        self.saved: list[Saved[EncryptedTensor]] = []

    def adapters(self) -> EncryptedAdapters[EncryptedTensor] | None:
        if not self.shape.rank or self.shape.clear:
            return None
        return EncryptedAdapters(*(packed_layout(self.parameters, self.shape, b) for b in (BOUND, GRADIENT_BOUND)))

    def forward(self, ev: Evaluator, start: int, stages: Stages[EncryptedTensor]) -> Any:
        adapters, slots = self.adapters(), ev.slots
        x = ev.planned(slots, self.shape.width, bound=self.encoder.input_bound, level=start)
        mask = ev.planned(slots, 1, bound=1.0)
        levels = self.kept if self.shape.rank else None
        values = None if adapters is None else adapters.values
        pooled, saved = self.encoder.forward(ev, x, mask, values, stages, levels)
        return reveal(ev, pooled), saved

    def backward(self, ev: Evaluator, start: int, stages: Stages[EncryptedTensor]) -> Any:
        return self._backward(ev, start, stages, self.saved)

    def backward_from_full(self, ev: Evaluator, start: int, stages: Stages[EncryptedTensor]) -> Any:
        full = [
            {name: ev.planned(ev.slots, x.shape[1], bound=x.bound) for name, x in saved.items()} for saved in self.saved
        ]
        return self._backward(ev, start, stages, full)

    def _backward(
        self, ev: Evaluator, start: int, stages: Stages[EncryptedTensor], saved: list[Saved[EncryptedTensor]]
    ) -> Any:
        adapters = self.adapters()
        gradient = ev.planned(ev.slots, self.shape.width, bound=self.encoder.gradient_bound, level=start)
        values = None if adapters is None else adapters.values
        gradients = self.encoder.backward(ev, saved, gradient, values, stages)
        if adapters is None:
            return clip(ev, gradients, 1.0)
        return take_step(ev, self.shape, adapters, gradients, 1e-2, 0.9, self.parameters.depth)


def reveal(ev: Any, pooled: Any) -> Any:
    """The pooled vectors, flooded."""
    return ev.reveal(pooled, FLOOD_BITS, error=pooled.bound * REVEALED)


def make_plan(
    encoder: Encoder,
    parameters: Parameters,
    timings: Timings | None = None,
    price: float | None = None,
    progress: Callable[[int, int, str], object] | None = None,
) -> Plan:
    """Plan both passes.

    What is kept for the backward pass may be low, which costs refreshes there, or high, which costs them in the forward
    pass; least levels are tried until they cost more.

    Args:
        encoder: the circuits.
        parameters: of the encryption.
        timings: seconds of the units of work on the server's machine; None estimates them by counted transforms.
        price: seconds a byte, as for `Costs`.
        progress: called with the passes that are planned, the most there may be, and what comes next.

    Raises:
        CkksError: the parameters are not deep enough.
    """
    costs = Costs(parameters, timings) if price is None else Costs(parameters, timings, price)
    shape, depth = encoder.shape, parameters.depth
    kept = {f"{i}.{name}": OUTER_LEVEL for i in range(shape.layers) for name in ("input", "inner_query", "inner_value")}
    passes = _Passes(encoder, parameters, kept)

    def first(level: int) -> float:
        return costs.price * 8 * parameters.ring_dimension * shape.width * (level + 1)

    tell = progress or (lambda *_: None)
    attempts = range(4, depth - 2) if shape.rank else range(1)
    tell(0, 1 + 2 * len(attempts), "what the forward pass takes")
    stretches = measure(parameters, passes.forward)
    if not shape.rank:
        forward, (pooled, _) = choose(parameters, passes.forward, costs, FLOORS, first=first, stretches=stretches)
        return _plan(encoder, parameters, forward, None, {}, pooled)
    points, (_, saved) = visits(parameters, passes.forward, depth - 2)
    best: tuple[float, Schedule, Schedule, dict[str, int], EncryptedTensor] | None = None
    trouble: CkksError | None = None
    for attempt, least in enumerate(attempts):
        tell(1 + 2 * attempt, 1 + 2 * len(attempts), f"forward, at least {least} levels kept")
        floors = dict(FLOORS)
        for point, floor in _floors(saved, points, depth - 2, least).items():
            floors[point] = max(floors.get(point, 0), FLOORS.get(point.rsplit(".", 1)[-1], 0), min(floor, depth))
        try:
            forward, (pooled, passes.saved) = choose(
                parameters, passes.forward, costs, floors, first=first, stretches=stretches
            )
            tell(2 + 2 * attempt, 1 + 2 * len(attempts), f"backward, at least {least} levels kept")
            backward, _ = choose(
                parameters, passes.backward, costs, FLOORS, full=passes.backward_from_full, first=first
            )
        except CkksError as error:
            trouble = error
            continue
        total = sum(
            s.seconds + sum(costs.traffic(r.ciphertexts, r.level) for r in s.refreshes) for s in (forward, backward)
        )
        if best is None or total < best[0]:
            best = total, forward, backward, kept, pooled
        else:
            break
    if best is None:
        raise trouble or CkksError(f"{parameters.name} is not deep enough for a backward pass")
    return _plan(encoder, parameters, *best[1:])


def _floors(saved: list[Saved[EncryptedTensor]], points: list[str], level: int, least: int) -> dict[str, int]:
    """What the level behind each point must be for all that is saved after it, found with all points at one level."""
    floors: dict[str, int] = {}
    for index, tensors in enumerate(saved):
        entry = f"{index - 1}.output" if index else "start"
        shares = [point for point in points if point.startswith(f"{index}.softmax.divide")][-1]
        origins = {"query": entry, "key": entry, "value": entry, "probabilities": shares}
        origins |= {"centred1": f"{index}.residual1", "centred2": f"{index}.residual2"}
        for name, tensor in tensors.items():
            point = origins.get(name, f"{index}.up" if name.startswith("slope") else None)
            if point is not None:
                # The derivative is deep, and used once.
                floors[point] = max(floors.get(point, 0), level - tensor.level + (4 if point.endswith("up") else least))
    return floors


def _plan(
    encoder: Encoder,
    parameters: Parameters,
    forward: Schedule,
    backward: Schedule | None,
    kept: Mapping[str, int],
    pooled: EncryptedTensor,
) -> Plan:
    core = parameters._core
    elements = set(forward.elements) | set(backward.elements if backward else ())
    packing = encoder.shape.rank > 0
    keys = Keys(
        tuple(sorted(rotations_of(parameters, elements - set(core.packing_elements) if packing else elements))),
        core.conjugation_element in elements,
        packing,
    )
    count = 1 + len(elements | set(core.packing_elements if packing else ()))
    traffic = [_traffic(parameters, forward.refreshes, encoder.shape.width, forward.start, pooled.message_bytes)]
    if backward is not None:
        traffic.append(_traffic(parameters, backward.refreshes, encoder.shape.width, backward.start, 0))
    return Plan(parameters, forward, backward, kept, pooled, keys, parameters.key_bytes(count), tuple(traffic))


def _traffic(
    parameters: Parameters, refreshes: tuple[Refresh, ...], width: int, level: int, result: int
) -> tuple[int, int]:
    """Bytes to the owner and from it: masked ciphertexts and the result, fresh ones and what is sent first."""
    core = parameters._core
    down, up = result, width * core.refreshed_bytes(1, max(level, 2))
    for _, ciphertexts, target in refreshes:
        batch = parameters.refresh_batch(target)
        whole, rest = divmod(ciphertexts, batch)
        for count, times in ((batch, whole), (rest, 1 if rest else 0)):
            if times:
                down += times * core.refresh_bytes(count)
                up += times * core.refreshed_bytes(count, target)
    return down, up

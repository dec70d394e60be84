"""The plan of a sealed model: schedules of both passes, keys, bytes, memory and seconds, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from privtuner.ckks import EncryptedTensor, Evaluator, Parameters, Timings
from privtuner.ckks.keys import rotations_of
from privtuner.errors import CkksError
from privtuner.sealed.adapters import BOUND, GRADIENT_BOUND, OUTER_LEVEL, EncryptedAdapters, take_step
from privtuner.sealed.block import Saved, Stages, kind_of
from privtuner.sealed.clear_adapters import ClearAdapters
from privtuner.sealed.clipping import clip
from privtuner.sealed.encoder import Encoder
from privtuner.sealed.programme import Choice, Costs, Programme, Stretch
from privtuner.sealed.public import Keys, packed_layout
from privtuner.sealed.schedule import (
    DEEP,
    Confirmed,
    Pass,
    Refresh,
    Schedule,
    confirm,
    everywhere,
    measure,
    retrace,
    weigh,
)

__all__ = ["Plan", "holds", "make_plan"]

FLOORS = {"residual1": 4, "residual2": 4, "d_output1": 3, "d_output2": 3, "d_query": 4, "d_value": 4}
"""Least levels behind points: what layer norms take, and gradients of adapters."""
KINDS = ("centred2", "slope", "centred1", "projected", "probabilities")
"""What is saved at levels of their own, in the order of its use: queries, keys and values together."""
STEPS = (-2, -1, 1, 2, 3)
"""By how many levels what is saved is raised in the search for the best ones."""
LEAST_KEPT = 4
"""The least level of what is saved: layer norms take as much."""
_ATTEMPTS = 200  # choices that dry runs may refuse
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
        kept: the level of what a forward pass keeps for the backward one, by the block's number and `kind_of`: the
            least one with which the backward pass is the same.
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
    """The passes on planned tensors.

    Attributes:
        parameters, shape: as given.
        encoder: with clear adapters, where there are such: levels and refreshes are the same whatever these.
        kept: as in `Plan`; of the next forward pass.
    """

    def __init__(self, encoder: Encoder, parameters: Parameters) -> None:
        self.parameters, self.shape = parameters, encoder.shape
        self.encoder = encoder.with_adapters(ClearAdapters.fresh(self.shape)) if self.shape.clear else encoder
        self.kept: dict[str, int] = {}

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

    def backward(self, saved: list[Saved[EncryptedTensor]]) -> Pass:
        """The backward pass and the step, from what a forward pass saved."""

        def run(ev: Evaluator, start: int, stages: Stages[EncryptedTensor]) -> Any:
            adapters = self.adapters()
            gradient = ev.planned(ev.slots, self.shape.width, bound=self.encoder.gradient_bound, level=start)
            values = None if adapters is None else adapters.values
            gradients = self.encoder.backward(ev, saved, gradient, values, stages)
            if adapters is None:
                return clip(ev, gradients, 1.0)
            return take_step(ev, self.shape, adapters, gradients, 1e-2, 0.9, self.parameters.depth)

        return run

    def backward_from(self, saved: list[Saved[EncryptedTensor]], lowered: str = "") -> Pass:
        """The same from fresh tensors of the full depth in place of what was saved; one kind of them is lower."""
        depth, ev = self.parameters.depth, Evaluator(self.parameters)

        def fresh(name: str, x: EncryptedTensor) -> EncryptedTensor:
            level = depth - DEEP if kind_of(name) == lowered else depth
            return ev.planned(ev.slots, x.shape[1], bound=x.bound, level=level)

        return self.backward([{name: fresh(name, x) for name, x in block.items()} for block in saved])


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

    What is saved for the backward pass may be low, which costs refreshes there, or high, which costs them in the
    forward pass: both are chosen together. Levels depend on no width, so that they are found with a narrow encoder; the
    real one is run once to count its work, and once to confirm.

    Args:
        encoder: the circuits.
        parameters: of the encryption.
        timings: seconds of the units of work on the server's machine; None estimates them by counted transforms.
        price: seconds a byte, as for `Costs`.
        progress: called with the steps that are done, how many there are, and what comes next.

    Raises:
        CkksError: the parameters are not deep enough.
    """
    costs = Costs(parameters, timings) if price is None else Costs(parameters, timings, price)
    shape, tell = encoder.shape, progress or (lambda *_: None)
    real, twin = _Passes(encoder, parameters), _Passes(encoder.narrow(), parameters)

    def first(level: int) -> float:
        return costs.price * 8 * parameters.ring_dimension * shape.width * (level + 1)

    tell(0, 4, "what passes take between refreshes")
    forward = measure(parameters, twin.forward, FLOORS)
    _, saved = everywhere(parameters, twin.forward, parameters.depth - 2)
    backward: list[Stretch] = []
    if shape.rank:
        kinds = sorted({kind_of(name) for block in saved for name in block})
        lowered = {kind: twin.backward_from(saved, kind) for kind in kinds}
        backward = measure(parameters, twin.backward_from(saved), FLOORS, lowered)
    tell(1, 4, "how much they work")
    _, all_saved = weigh(parameters, real.forward, forward)
    if shape.rank:
        weigh(parameters, real.backward_from(all_saved), backward)
    together = _Together(parameters, saved, forward, backward)
    trouble = ""
    for _ in range(_ATTEMPTS):
        tell(2, 4, "where to refresh")
        ahead, back, kept = together.choose(costs, first, trouble)
        for passes in (twin, real):
            tell(3, 4, "dry runs")
            passes.kept = kept
            schedule = confirm(parameters, passes.forward, costs, forward, ahead)
            returned: Confirmed | str | None = None
            if back is not None and not isinstance(schedule, str):
                returned = confirm(parameters, passes.backward(schedule.result[1]), costs, backward, back)
            wrong = [text for text in (schedule, returned) if isinstance(text, str)]
            if wrong:
                trouble = wrong[0]
                break
        else:
            assert isinstance(schedule, Confirmed)  # noqa: S101 - nothing was wrong
            assert not isinstance(returned, str)  # noqa: S101
            return _plan(encoder, parameters, schedule, returned, kept)
    raise CkksError(f"no schedule of refreshes is confirmed by its dry run: {trouble}")


def holds(plan: Plan, encoder: Encoder, parameters: Parameters) -> bool:
    """Whether the circuits refresh as a plan says that was made before: dry runs of a narrow encoder find out."""
    twin = _Passes(encoder.narrow(), parameters)
    twin.kept = dict(plan.kept)
    if plan.parameters != parameters or (plan.backward is None) != (encoder.shape.rank == 0):
        return False
    try:
        same, (pooled, saved) = retrace(parameters, twin.forward, plan.forward)
        if plan.backward is not None:
            same = retrace(parameters, twin.backward(saved), plan.backward)[0] and same
    except CkksError:
        return False
    return same and (pooled.level, pooled.bound) == (plan.pooled.level, plan.pooled.bound)


class _Together:
    """Refreshes of both passes, and the levels of what is saved between them.

    Args:
        parameters: of the encryption.
        saved: of a forward pass with every point at two levels below the depth.
        forward, backward: stretches.
    """

    def __init__(
        self,
        parameters: Parameters,
        saved: list[Saved[EncryptedTensor]],
        forward: list[Stretch],
        backward: list[Stretch],
    ) -> None:
        self.parameters, self.forward, self.backward = parameters, forward, backward
        points = [stretch.name for stretch in forward]
        self.origins: dict[tuple[int, str], tuple[str, int]] = {}
        for index, tensors in enumerate(saved):
            entry = f"{index - 1}.output" if index else "start"
            shares = [point for point in points if point.startswith(f"{index}.softmax.divide")][-1]
            origins = {"query": entry, "key": entry, "value": entry, "probabilities": shares}
            origins |= {"centred1": f"{index}.residual1", "centred2": f"{index}.residual2", "slope": f"{index}.up"}
            for name, x in tensors.items():
                kind = kind_of(name)
                if kind in origins:
                    self.origins[index, kind] = origins[kind], parameters.depth - 2 - x.level

    def choose(
        self, costs: Costs, first: Callable[[int], float], trouble: str
    ) -> tuple[Choice, Choice | None, dict[str, int]]:
        """The refreshes of both passes that cost least together, and `Plan.kept`.

        From the best common level on, what is saved is raised or lowered while that helps.
        """
        ahead = Programme(self.parameters, costs, self.forward, first)
        if not self.backward:
            return ahead.solve(trouble=trouble), None, {}
        back = Programme(self.parameters, costs, self.backward, first)
        known: dict[tuple[int, ...], tuple[float, Choice, Choice] | None] = {}

        def attempt(least: tuple[int, ...]) -> float:
            if least not in known:
                try:
                    known[least] = self._solve(ahead, back, dict(zip(KINDS, least, strict=True)), trouble)
                except CkksError as error:
                    known[least], troubles[:] = None, [error]
            found = known[least]
            return math.inf if found is None else found[0]

        troubles: list[CkksError] = []
        # A refresh in the backward pass carries over several kinds: neighbours are moved together too.
        runs = [range(i, j) for i in range(len(KINDS)) for j in range(i + 1, len(KINDS) + 1)]
        best = min(((level,) * len(KINDS) for level in range(LEAST_KEPT, self.parameters.depth)), key=attempt)
        while True:
            near = [tuple(level + step * (i in run) for i, level in enumerate(best)) for run in runs for step in STEPS]
            near = [least for least in near if min(least) >= LEAST_KEPT and max(least) < self.parameters.depth]
            better = min(near, key=attempt)
            if attempt(better) >= attempt(best):
                break
            best = better
        found = known[best]
        if found is None:
            raise troubles[0]
        _, forward, backward = found
        return forward, backward, self._kept(backward)

    def _solve(
        self, ahead: Programme, back: Programme, least: dict[str, int], trouble: str
    ) -> tuple[float, Choice, Choice]:
        floors: dict[str, int] = {}
        for (_, kind), (point, below) in self.origins.items():
            needed = below + least["projected" if kind in ("query", "key", "value") else kind]
            floors[point] = max(floors.get(point, 0), min(needed, self.parameters.depth))
        forward = ahead.solve(floors, trouble=trouble)
        backward = back.solve(saved=self._saved(forward), trouble=trouble)
        return forward.cost + backward.cost, forward, backward

    def _saved(self, forward: Choice) -> Callable[[str, str], int]:
        """The level of what a forward pass saved, by the point in the backward pass and the kind."""

        def level(point: str, kind: str) -> int:
            where, below = self.origins.get((self._layer(point), kind), ("", 0))
            return forward.ends[where][0] - below if where else self.parameters.depth

        return level

    def _kept(self, backward: Choice) -> dict[str, int]:
        """The least levels with which the backward pass is the same."""
        kept: dict[str, int] = {}
        for index in range(len({layer for layer, _ in self.origins})):
            kept |= {f"{index}.{name}": OUTER_LEVEL for name in ("input", "inner_query", "inner_value")}
        for stretch in self.backward:
            level, end = backward.ends[stretch.name]
            limits = {kind: end + below for kind, below in stretch.saved.items()}
            if stretch.join is not None:
                limits |= {kind: level + below for kind, below in stretch.join.saved.items()}
            for kind, needed in limits.items():
                name = f"{self._layer(stretch.name)}.{kind}"
                kept[name] = max(kept.get(name, 0), needed, LEAST_KEPT)
        return kept

    def _layer(self, point: str) -> int:
        number = point.split(".")[0]
        return int(number) if number.isdigit() else max(layer for layer, _ in self.origins)


def _plan(
    encoder: Encoder,
    parameters: Parameters,
    ahead: Confirmed,
    back: Confirmed | None,
    kept: Mapping[str, int],
) -> Plan:
    core = parameters._core
    forward, backward = ahead.schedule, back and back.schedule
    pooled: EncryptedTensor = ahead.result[0]
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

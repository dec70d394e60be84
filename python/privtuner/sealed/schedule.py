"""Where tensors of many features are refreshed, and to which level: chosen before any key exists.

A pass is run on planned tensors a few times, with every point refreshed, and what each stretch between two points takes
of levels and work is noted. Dynamic programming over the level at each point then chooses the refreshes that cost least
(`Costs`). A dry run with them confirms the choice, level by level; where it finds a stretch that takes more than was
thought, the programme is corrected and run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from privtuner.ckks import Evaluator, Parameters, Timings
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import CkksError
from privtuner.sealed.block import Stages

__all__ = ["Costs", "Pass", "Refresh", "Schedule", "Stretch", "choose", "measure", "visits"]

Work = dict[tuple[str, int], float]
Pass = Callable[[Evaluator, int, Stages[EncryptedTensor]], Any]
"""A pass on planned tensors: takes the evaluator, the level of what is sent first, and the points."""

_States = dict[tuple[int, int], tuple[float, tuple[Any, ...]]]

REFRESH_FROM = 3
"""From this level on a refresh brings a tensor to the chain's scale, and two features travel together."""


class Refresh(NamedTuple):
    """One masked refresh: where in the pass, how many ciphertexts go to the owner, and the level they come back at."""

    stage: str
    ciphertexts: int
    level: int


@dataclass(frozen=True)
class Costs:
    """What is to be least: seconds, and bytes at their price.

    Attributes:
        parameters: of the encryption.
        timings: seconds of the units of work; None takes numbers of transforms in their place.
        price: seconds a byte; the default is 100 MB/s.
    """

    parameters: Parameters
    timings: Timings | None = None
    price: float = 1e-8

    def seconds(self, work: Mapping[tuple[str, int], float]) -> float:
        """Seconds of some work by kind and limbs."""
        return sum(self._unit(kind, limbs) * amount for (kind, limbs), amount in work.items())

    def traffic(self, ciphertexts: int, level: int) -> float:
        """The price of a refresh's bytes."""
        row = 8 * self.parameters.ring_dimension
        return self.price * ciphertexts * row * (2 * (REFRESH_FROM) + level + 1)

    def _unit(self, kind: str, limbs: int) -> float:
        if self.timings is not None and kind in self.timings.seconds:
            return self.timings.seconds_of(kind, limbs, 1.0)
        return _NOMINAL * self.parameters.ring_dimension / 2**15 * _passes(kind, limbs)


_NOMINAL = 3.5e-4
"""Seconds of a transform of 2^15 words and what goes with it, on one core."""


def _passes(kind: str, limbs: int) -> float:
    """About how many transforms a unit of work is worth, with digits of six primes in key switching."""
    raised = limbs + 6
    digits = -(-limbs // 6)
    return {
        "product": 0.25 * limbs,
        "relinearise": (digits + 1) * raised,
        "decompose": digits * raised,
        "rotate": 1.3 * raised,
        "rescale": 1.2 * limbs,
        "term": 0.1 * limbs,
        "plain": 1.5 * limbs,
        "matrix": 1.0,
        "mask": 10.0,
        "unmask": 1.2 * limbs,
        "refresh": 8 + 2.0 * limbs,
    }[kind]


@dataclass(frozen=True)
class Schedule:
    """What was chosen for one pass, and what it takes by the dry run.

    Attributes:
        start: the level of what is sent first.
        levels: the points where a refresh is, with the level it leads to.
        table: (point, features, level on arrival, level refreshed to or None), in order.
        refreshes: all masked refreshes in order, those of few features too, with the last point before each.
        work: units of work by kind and limbs.
        seconds: predicted.
        peak_bytes: most bytes of tensors alive at once.
        elements: the automorphisms used.
    """

    start: int
    levels: dict[str, int]
    table: tuple[tuple[str, int, int, int | None], ...]
    refreshes: tuple[Refresh, ...]
    work: Work = field(repr=False)
    seconds: float
    peak_bytes: int
    elements: tuple[int, ...] = field(repr=False)


@dataclass
class _Event:
    """One point of a run, its visits together: the work until the next one, and levels before and after."""

    name: str
    features: int
    arrival: int
    settles: bool
    work: Work = field(default_factory=dict)


class _Probe(Stages[EncryptedTensor]):
    """Points that note what passes them."""

    def __init__(self, ev: Evaluator, decide: Callable[[str], int | None]) -> None:
        super().__init__(ev, {})
        self.decide, self.events = decide, [_Event("start", 0, 0, settles=False)]
        self._by_name: dict[str, _Event] = {"start": self.events[0]}
        self._current = self.events[0]
        self._settling = False
        self._before: Work = {}
        self.refreshes: list[Refresh] = []

    def at(self, name: str, x: EncryptedTensor) -> EncryptedTensor:
        self.close()
        event = self._by_name.get(name)
        if event is None:
            event = self._by_name[name] = _Event(name, 0, x.level, self._settling)
            self.events.append(event)
        event.features += x.shape[1]
        event.arrival = min(event.arrival, x.level)
        self._current = event
        level = self.decide(name)
        return x if level is None else self.ev.refresh(x, level)

    def settle(self, name: str, x: EncryptedTensor) -> EncryptedTensor:
        self._settling = True
        try:
            return super().settle(name, x)
        finally:
            self._settling = False

    def level_with(self, name: str, x: EncryptedTensor, other: EncryptedTensor) -> EncryptedTensor:
        self.close()
        return super().level_with(name, x, other)

    def close(self) -> None:
        """Put the work since the last point down to it."""
        now = {(kind, limbs): amount for kind, limbs, amount in self.ev._core.work()}  # type: ignore[attr-defined]
        for key, amount in now.items():
            more = amount - self._before.get(key, 0.0)
            if more:
                self._current.work[key] = self._current.work.get(key, 0.0) + more
        self._before = now
        fresh = self.ev._core.refreshes()[len(self.refreshes) :]  # type: ignore[attr-defined]
        self.refreshes += [Refresh(self._current.name, ciphertexts, level) for ciphertexts, level in fresh]


def _run(parameters: Parameters, run: Pass, start: int, decide: Callable[[str], int | None]) -> tuple[_Probe, Any]:
    """Run a pass; what it cannot do is raised as CkksError with the events so far as its second argument."""
    ev = Evaluator(parameters)
    probe = _Probe(ev, decide)
    try:
        result = run(ev, start, probe)
    except CkksError as error:
        probe.close()
        raise _StuckError(str(error), probe) from error
    probe.close()
    probe.events[0].arrival = start
    return probe, result


class _StuckError(CkksError):
    def __init__(self, text: str, probe: _Probe) -> None:
        super().__init__(text)
        self.probe = probe


def visits(parameters: Parameters, run: Pass, level: int) -> tuple[list[str], Any]:
    """The names of a pass's points in order, and what it returns with every point at a level."""
    probe, result = _run(parameters, run, level, lambda _: level)
    return [event.name for event in probe.events], result


@dataclass
class Stretch:
    """From one point to the next.

    Attributes:
        name, features, settles: of the point it begins at.
        anchor: whether the level there is the one that later joins are limited by.
        takes: levels below the one it begins at.
        held: levels below the last anchor that it ends at the most; None where it does not depend on it.
        cap: the level it ends at the most, whatever it begins at.
        floor: the least level it can begin at.
        work: by kind and limbs below those at its beginning.
    """

    name: str
    features: int
    settles: bool
    anchor: bool
    takes: int = 0
    held: int | None = None
    cap: int = 99
    floor: int = 2
    work: dict[tuple[str, int], float] = field(default_factory=dict)

    def end(self, level: int, anchor: int) -> int:
        """The level on arrival at the next point."""
        ends = [level - self.takes, self.cap]
        if self.held is not None:
            ends.append(anchor - self.held)
        return min(ends)

    def cost(self, costs: Costs, level: int) -> float:
        """Of the work, begun at a level."""
        work: Work = {}
        for (kind, below), amount in self.work.items():
            key = (kind, max(level + 1 - below, 1))
            work[key] = work.get(key, 0.0) + amount
        return costs.seconds(work)


def is_anchor(name: str) -> bool:
    """Whether a residual leaves at this point, to be added later."""
    return name == "start" or name.rsplit(".", 1)[-1] in (
        "output",
        "output1",
        "d_output2",
        "d_residual1",
        "d_residual2",
    )


def measure(parameters: Parameters, run: Pass, full: Pass | None = None) -> list[Stretch]:
    """Find the stretches of a pass. ``full`` is the same pass with all that was saved at the full depth."""
    depth, step = parameters.depth, 2
    free = full or run

    def everywhere(others: int, anchors: int, which: Pass) -> list[_Event]:
        return _run(parameters, which, anchors, lambda name: anchors if is_anchor(name) else others)[0].events

    top = everywhere(depth, depth, free)
    low = everywhere(depth - step, depth, free)
    held = everywhere(depth, depth - step, free)
    capped = top if full is None else everywhere(depth, depth, run)
    found = []
    for index, event in enumerate(top):
        anchor = is_anchor(event.name)
        stretch = Stretch(event.name, event.features, event.settles, anchor)
        if index + 1 < len(top):
            ends = [events[index + 1].arrival for events in (top, low, held, capped)]
            moved = ends[2] if anchor else ends[1]  # the run in which this stretch began lower
            stretch.takes = depth - step - moved
            if not anchor and ends[2] < ends[0]:
                stretch.held = depth - step - ends[2]
            if moved == ends[0] or ends[3] < ends[0]:  # something else decides
                stretch.cap = ends[3]
        for (kind, limbs), amount in event.work.items():
            if kind not in ("mask", "unmask", "refresh"):
                stretch.work[kind, depth + 1 - limbs] = amount
        found.append(stretch)
    return found


def choose(
    parameters: Parameters,
    run: Pass,
    costs: Costs,
    floors: Mapping[str, int],
    full: Pass | None = None,
    first: Callable[[int], float] | None = None,
    stretches: list[Stretch] | None = None,
) -> tuple[Schedule, Any]:
    """Choose the refreshes of a pass.

    Args:
        parameters: of the encryption.
        run: the pass.
        costs: what is to be least.
        floors: the least level behind some points.
        full: as for `measure`.
        first: the cost of what is sent first at a level.
        stretches: of `measure`, if they are known.

    Returns:
        The schedule, and what its dry run returned.

    Raises:
        CkksError: the pass cannot be done with these parameters, however often tensors are refreshed.
    """
    stretches = measure(parameters, run, full) if stretches is None else [_copy(s) for s in stretches]
    for stretch in stretches:
        stretch.floor = max(stretch.floor, floors.get(stretch.name, floors.get(stretch.name.rsplit(".", 1)[-1], 2)))
    trouble = ""
    for _ in range(200):
        start, levels = _programme(parameters, stretches, costs, first or _nothing, trouble)
        try:
            probe, result = _run(parameters, run, start, levels.get)
        except _StuckError as stuck:
            trouble = str(stuck)
            if not _correct(stretches, stuck.probe, levels):
                _raise_floor(stretches, stuck.probe, levels)
            continue
        if not _correct(stretches, probe, levels):
            break
    else:
        raise CkksError(f"no schedule of refreshes is confirmed by its dry run: {trouble}")
    core = probe.ev._core  # type: ignore[attr-defined]
    work = {(kind, limbs): amount for kind, limbs, amount in core.work()}
    table = tuple((e.name, e.features, e.arrival, levels.get(e.name)) for e in probe.events)
    schedule = Schedule(
        start,
        {name: levels[name] for name, *_ in table if name in levels},
        table,
        tuple(probe.refreshes),
        work,
        costs.seconds(work),
        core.peak_bytes,
        tuple(core.needed_elements()),
    )
    return schedule, result


def _copy(stretch: Stretch) -> Stretch:
    return Stretch(**vars(stretch))


def _correct(stretches: list[Stretch], probe: _Probe, levels: Mapping[str, int]) -> bool:
    """Take over what a run found stretches to take that was thought to be less; whether there was one."""
    level = anchor = probe.events[0].arrival or max(levels.get("start", 0), 0)
    for index, event in enumerate(probe.events[:-1]):
        stretch = stretches[index]
        if index:
            level = levels.get(event.name, event.arrival - int(event.settles))
        if stretch.anchor:
            anchor = level
        arrival = probe.events[index + 1].arrival
        if index == 0 and not probe.events[0].arrival:
            continue
        if arrival < stretch.end(level, anchor):
            stretch.takes = level - arrival
            return True
    return False


def _raise_floor(stretches: list[Stretch], probe: _Probe, levels: Mapping[str, int]) -> None:
    """The last stretch of a run that got stuck needs more levels than it began with."""
    event = probe.events[-1]
    index = len(probe.events) - 1
    level = levels.get(event.name, event.arrival - int(event.settles))
    if index == 0:
        level = stretches[0].floor
    stretches[index].floor = max(stretches[index].floor, level) + 1


def _programme(
    parameters: Parameters, stretches: list[Stretch], costs: Costs, first: Callable[[int], float], trouble: str
) -> tuple[int, dict[str, int]]:
    """The level at the start, and the refreshes with their levels, of least cost."""
    depth = parameters.depth
    # (level behind the point, level at the last anchor) -> cost, and the way there
    states: _States = {
        (level, level): (first(level), ("start", level, None)) for level in range(stretches[0].floor, depth + 1)
    }
    for before, stretch in pairwise(stretches):
        spent = [before.cost(costs, level) for level in range(depth + 1)]
        masked = [_refresh_cost(costs, stretch.features, level) for level in range(depth + 1)]
        settled = [
            costs.seconds({("term", level + 1): stretch.features, ("rescale", level + 1): stretch.features})
            for level in range(depth + 1)
        ]
        following: _States = {}

        for (level, anchor), (cost, way) in states.items():
            arrival = before.end(level, anchor)
            if arrival < 0:
                continue
            total = cost + spent[level]
            kept = arrival - int(stretch.settles)
            if kept >= 0:
                more = settled[arrival] if stretch.settles else 0.0
                _offer(following, stretch, kept, anchor, total + more, (stretch.name, None, way))
            if arrival >= REFRESH_FROM:
                for target in range(max(stretch.floor, 2), depth + 1):
                    _offer(following, stretch, target, anchor, total + masked[target], (stretch.name, target, way))
        if not following:
            raise CkksError(
                f"{parameters.name} is not deep enough: no schedule of refreshes leads past {stretch.name}"
                + (f" ({trouble})" if trouble else "")
            )
        states = following
    back: tuple[Any, ...] | None = min(states.values(), key=lambda state: state[0])[1]
    chosen: list[tuple[str, int]] = []
    while back:
        name, level, back = back
        if level is not None:
            chosen.append((name, level))
    (_, start), *levels = reversed(chosen)
    return start, dict(levels)


def _offer(states: _States, stretch: Stretch, level: int, anchor: int, cost: float, way: tuple[Any, ...]) -> None:
    """Take a way to a level behind a point if it is the cheapest so far."""
    key = (level, level if stretch.anchor else anchor)
    if level >= stretch.floor and (key not in states or cost < states[key][0]):
        states[key] = cost, way


def _nothing(_level: int) -> float:
    return 0.0


def _refresh_cost(costs: Costs, features: int, level: int) -> float:
    pairs = features // 2
    ciphertexts = pairs + features % 2
    work: Work = {
        ("rescale", REFRESH_FROM + 1): features,
        ("mask", REFRESH_FROM): ciphertexts,
        ("refresh", level + 1): ciphertexts,
        ("unmask", level + 1): ciphertexts,
        ("rotate", level + 1): pairs,
        ("decompose", level + 1): pairs,
    }
    return costs.seconds(work) + costs.traffic(ciphertexts, level)

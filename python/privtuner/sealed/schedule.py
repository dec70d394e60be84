"""Where tensors of many features are refreshed, and to which level: chosen before any key exists.

A pass is run on planned tensors a few times, with every point refreshed, and what each stretch between two points takes
of levels and work is noted. `Programme` then chooses the refreshes that cost least. A dry run with them confirms the
choice, level by level; where it finds a stretch that takes more than was thought, that is corrected and chosen again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from privtuner.ckks import Evaluator, Parameters
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import CkksError
from privtuner.sealed.block import Stages
from privtuner.sealed.programme import Choice, Costs, Join, Stretch, Work

__all__ = ["DEEP", "Confirmed", "Pass", "Refresh", "Schedule", "confirm", "everywhere", "measure", "retrace", "weigh"]

Pass = Callable[[Evaluator, int, Stages[EncryptedTensor]], Any]
"""A pass on planned tensors: takes the evaluator, the level of what is sent first, and the points."""


class Refresh(NamedTuple):
    """One masked refresh: where in the pass, how many ciphertexts go to the owner, and the level they come back at."""

    stage: str
    ciphertexts: int
    level: int


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
    """One point of a run, its visits together: the work until the next one, the level before, what joins behind."""

    name: str
    features: int
    arrival: int
    settles: bool
    joined: tuple[int, int] | None = None
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
        self._current.joined = x.shape[1], x.level
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


def is_anchor(name: str) -> bool:
    """Whether a residual leaves at this point, to be added later."""
    return name == "start" or name.rsplit(".", 1)[-1] in (
        "output",
        "output1",
        "d_output2",
        "d_residual1",
        "d_residual2",
    )


_STEP = 2  # levels by which points are lowered to see what depends on them
DEEP = 6
"""By how many levels what was saved is lowered for the same purpose: more than a stretch takes."""


def measure(
    parameters: Parameters, run: Pass, floors: Mapping[str, int], lowered: Mapping[str, Pass] | None = None
) -> list[Stretch]:
    """Find the stretches of a pass, without their work.

    Args:
        parameters: of the encryption.
        run: the pass, with all that was saved at the full depth.
        floors: the least levels behind some points, by their names without a block's number.
        lowered: by names of what was saved, the same with that `DEEP` levels lower.
    """
    depth = parameters.depth

    def events(others: int, anchors: int, which: Pass) -> list[_Event]:
        return _run(parameters, which, anchors, lambda name: anchors if is_anchor(name) else others)[0].events

    top = events(depth, depth, run)
    low = events(depth - _STEP, depth, run)
    held = events(depth, depth - _STEP, run)
    deep = {name: events(depth, depth, which) for name, which in (lowered or {}).items()}
    stretches = []
    for index, event in enumerate(top):
        anchor = is_anchor(event.name)
        floor = floors.get(event.name.rsplit(".", 1)[-1], 2)
        stretch = Stretch(event.name, event.features, event.settles, anchor, floor=floor)
        if index + 1 < len(top):
            ends = [found[index + 1].arrival for found in (top, low, held)]
            moved = ends[2] if anchor else ends[1]  # the run in which this stretch began lower
            stretch.takes = depth - _STEP - moved
            if not anchor and ends[2] < ends[0]:
                stretch.held = depth - _STEP - ends[2]
            stretch.cap = ends[0]
            arrivals = {name: found[index + 1].arrival for name, found in deep.items()}
            stretch.saved = {name: depth - DEEP - end for name, end in arrivals.items() if end < ends[0]}
        if event.joined is not None:
            features, level = event.joined
            joined = {name: found[index].joined for name, found in deep.items()}
            limits = {name: depth - DEEP - other[1] for name, other in joined.items() if other and other[1] < level}
            stretch.join = Join(features, depth - level, limits)
        stretches.append(stretch)
    return stretches


def everywhere(parameters: Parameters, run: Pass, level: int) -> Any:
    """What a pass returns with every point at a level."""
    return _run(parameters, run, level, lambda _: level)[1]


def weigh(parameters: Parameters, run: Pass, stretches: list[Stretch]) -> Any:
    """Put down the features and the work of a pass to its stretches, which may be those of a smaller one.

    Returns:
        What the pass returned with every point refreshed to the full depth.
    """
    depth = parameters.depth
    probe, result = _run(parameters, run, depth, lambda _: depth)
    for event, stretch in zip(probe.events, stretches, strict=True):
        stretch.features = event.features
        if stretch.join is not None and event.joined is not None:
            stretch.join = stretch.join._replace(features=event.joined[0])
        stretch.work = {
            (kind, depth + 1 - limbs): amount
            for (kind, limbs), amount in event.work.items()
            if kind not in ("mask", "unmask", "refresh")
        }
    return result


class Confirmed(NamedTuple):
    """A choice that its dry run confirmed; ``result`` is what that returned."""

    schedule: Schedule
    result: Any


def confirm(
    parameters: Parameters, run: Pass, costs: Costs, stretches: list[Stretch], choice: Choice
) -> Confirmed | str:
    """Run a pass with the refreshes that were chosen.

    Returns:
        The schedule and the result; or, where a stretch takes more than was thought, which is corrected, what is wrong.
    """
    try:
        probe, result = _run(parameters, run, choice.start, choice.levels.get)
    except _StuckError as stuck:
        if not _correct(stretches, stuck.probe, choice):
            _raise_floor(stretches, stuck.probe, choice)
        return str(stuck)
    if _correct(stretches, probe, choice):
        return "a stretch takes more levels than it did"
    core = probe.ev._core  # type: ignore[attr-defined]
    work = {(kind, limbs): amount for kind, limbs, amount in core.work()}
    table = tuple((e.name, e.features, e.arrival, choice.levels.get(e.name)) for e in probe.events)
    schedule = Schedule(
        choice.start,
        choice.levels,
        table,
        tuple(probe.refreshes),
        work,
        costs.seconds(work),
        core.peak_bytes,
        tuple(core.needed_elements()),
    )
    return Confirmed(schedule, result)


def retrace(parameters: Parameters, run: Pass, schedule: Schedule) -> tuple[bool, Any]:
    """Run a pass, which may be a narrower one, with the refreshes of a schedule.

    Returns:
        Whether it refreshes at the same points to the same levels, and what it returned.

    Raises:
        CkksError: it cannot be done with these refreshes.
    """
    probe, result = _run(parameters, run, schedule.start, schedule.levels.get)
    found, expected = ({(r.stage, r.level) for r in refreshes} for refreshes in (probe.refreshes, schedule.refreshes))
    return found == expected, result


def _correct(stretches: list[Stretch], probe: _Probe, choice: Choice) -> bool:
    """Take over what a run found stretches to take that was thought to be less; whether there was one."""
    level = choice.start
    for index, event in enumerate(probe.events[:-1]):
        stretch = stretches[index]
        if index:
            level = choice.levels.get(event.name, event.arrival - int(event.settles))
        arrival = probe.events[index + 1].arrival
        if arrival < choice.ends[event.name][1]:
            stretch.takes = level - arrival
            return True
    return False


def _raise_floor(stretches: list[Stretch], probe: _Probe, choice: Choice) -> None:
    """The last stretch of a run that got stuck needs more levels than it began with."""
    index = len(probe.events) - 1
    event = probe.events[-1]
    level = choice.levels.get(event.name, event.arrival - int(event.settles)) if index else choice.start
    stretches[index].floor = max(stretches[index].floor, level) + 1

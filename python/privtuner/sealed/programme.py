"""Choosing where to refresh, and to which level: dynamic programming over what the stretches of a pass take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from privtuner.ckks import Parameters, Timings
from privtuner.errors import CkksError

__all__ = ["REFRESH_FROM", "Choice", "Costs", "Join", "Programme", "Stretch", "Work"]

Work = dict[tuple[str, int], float]
"""Units of work by kind and limbs."""
_States = dict[tuple[int, int], tuple[float, tuple[Any, ...]]]
_NONE: Mapping[str, int] = {}

REFRESH_FROM = 3
"""From this level on a refresh brings a tensor to the chain's scale, and two features travel together."""


@dataclass(frozen=True)
class Costs:
    """What is to be least: seconds, and bytes at their price.

    Attributes:
        parameters: of the encryption.
        timings: seconds of the units of work; None takes numbers of transforms in their place.
        price: seconds a byte; the default is 3.3 MB/s, what a data owner's line carries.
    """

    parameters: Parameters
    timings: Timings | None = None
    price: float = 3e-7

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


class Join(NamedTuple):
    """What is brought in behind a point, and refreshed if it is lower than what is there.

    Attributes:
        features: of it.
        held: levels below the last anchor that it has.
        saved: levels below that of what was saved under a name that it has at the most.
    """

    features: int
    held: int
    saved: dict[str, int]

    def level(self, anchor: int, saved: Callable[[str], int] | None) -> int:
        """The level it comes at."""
        return min([anchor - self.held, *(saved(name) - below for name, below in self.saved.items() if saved)])


@dataclass
class Stretch:
    """From one point to the next.

    Attributes:
        name, features, settles: of the point it begins at.
        anchor: whether the level there is the one that later joins are limited by.
        takes: levels below the one it begins at.
        held: levels below the last anchor that it ends at the most; None where it does not depend on it.
        saved: levels below that of what was saved under a name that it ends at the most.
        cap: the level it ends at the most, where it begins at the full depth.
        floor: the least level it can begin at.
        join: what is brought in behind its point.
        work: by kind and limbs below those at its beginning.
    """

    name: str
    features: int
    settles: bool
    anchor: bool
    takes: int = 0
    held: int | None = None
    saved: dict[str, int] = field(default_factory=dict)
    cap: int = 99
    floor: int = 2
    join: Join | None = None
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


class Choice(NamedTuple):
    """Refreshes of a pass: what they and its work cost, the level of what is sent first, and of every refresh.

    ``levels`` has the points where a refresh is; ``ends`` the level behind every point and on arrival at the next one.
    """

    cost: float
    start: int
    levels: dict[str, int]
    ends: dict[str, tuple[int, int]]


class Programme:
    """Dynamic programming over the level behind each point and that at the last anchor.

    Args:
        parameters: of the encryption.
        costs: what is to be least.
        stretches: of `measure` and `weigh`.
        first: the cost of what is sent first at a level.
    """

    def __init__(
        self, parameters: Parameters, costs: Costs, stretches: list[Stretch], first: Callable[[int], float]
    ) -> None:
        self.name, self.stretches = parameters.name, stretches
        self._levels = range(parameters.depth + 1)
        self._first = [first(level) for level in self._levels]
        self._spent = [[stretch.cost(costs, level) for level in self._levels] for stretch in stretches]
        sizes = {s.features for s in stretches} | {s.join.features for s in stretches if s.join}
        self._masked = {n: [_refresh_cost(costs, n, level) for level in self._levels] for n in sizes}
        self._settled = {
            n: [costs.seconds({("term", level + 1): n, ("rescale", level + 1): n}) for level in self._levels]
            for n in sizes
        }

    def solve(
        self, floors: Mapping[str, int] = _NONE, saved: Callable[[str, str], int] | None = None, trouble: str = ""
    ) -> Choice:
        """The refreshes of least cost.

        Args:
            floors: the least level behind some points, beside those of the stretches.
            saved: the level of what was saved under a name, for the stretch that begins at a point; default the depth.
            trouble: what was wrong with choices before, for the error.

        Raises:
            CkksError: there is no way.
        """
        states: _States = {
            (level, level): (self._first[level], ("start", level, level, 0, None))
            for level in self._levels
            if level >= max(self.stretches[0].floor, floors.get("start", 0))
        }
        for index, (before, stretch) in enumerate(pairwise(self.stretches)):
            spent, masked = self._spent[index], self._masked[stretch.features]
            floor = max(stretch.floor, floors.get(stretch.name, 0))
            limits = [saved(before.name, name) - below for name, below in before.saved.items()] if saved else []
            limit = min([before.cap, *limits])
            arrivals: dict[int | None, tuple[float, int, Any]] = {}
            following: _States = {}
            for (level, anchor), (cost, way) in states.items():
                arrival = min(before.end(level, anchor), limit)
                if arrival < 0:
                    continue
                total = cost + spent[level]
                kept = arrival - int(stretch.settles)
                if kept >= floor:
                    more = self._settled[stretch.features][arrival] if stretch.settles else 0.0
                    self._offer(following, stretch, kept, anchor, total + more, (None, arrival, way), saved)
                place = None if stretch.anchor else anchor
                if arrival >= REFRESH_FROM and (place not in arrivals or total < arrivals[place][0]):
                    arrivals[place] = total, arrival, way
            for place, (total, arrival, way) in arrivals.items():
                for target in range(max(floor, 2), len(self._levels)):
                    anchor = target if place is None else place
                    self._offer(
                        following, stretch, target, anchor, total + masked[target], (target, arrival, way), saved
                    )
            if not following:
                raise CkksError(
                    f"{self.name} is not deep enough: no schedule of refreshes leads past {stretch.name}"
                    + (f" ({trouble})" if trouble else "")
                )
            states = following
        cost, back = min(states.values(), key=lambda state: state[0])
        return _choice(cost, back)

    def _offer(
        self,
        states: _States,
        stretch: Stretch,
        level: int,
        anchor: int,
        cost: float,
        way: tuple[int | None, int, Any],
        saved: Callable[[str, str], int] | None,
    ) -> None:
        """Take a way to a level behind a point if it is the cheapest so far."""
        if stretch.join is not None:
            there = stretch.join.level(anchor, (lambda name: saved(stretch.name, name)) if saved else None)
            if there < level:
                if there < REFRESH_FROM:
                    return
                cost += self._masked[stretch.join.features][level]
        key = (level, level if stretch.anchor else anchor)
        if key not in states or cost < states[key][0]:
            target, arrival, back = way
            states[key] = cost, (stretch.name, target, level, arrival, back)


def _choice(cost: float, back: Any) -> Choice:
    """Follow the way back to the start."""
    levels: dict[str, int] = {}
    ends: dict[str, tuple[int, int]] = {}
    following = 0
    while back is not None:
        name, target, level, arrival, back = back
        ends[name] = level, following
        following = arrival
        if target is not None:
            levels[name] = target
    start = levels.pop("start")
    return Choice(cost, start, dict(reversed(levels.items())), dict(reversed(ends.items())))


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

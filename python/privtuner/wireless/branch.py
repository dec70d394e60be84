"""Branch and bound on the tiers, with the dual as the bound.

A node allows each device some of the tiers, and may limit how many devices of a group take one. Its bound is the dual's
maximum; rounding the weights there and solving the convex problem of the tiers so fixed gives allocations. With P
prices about P devices are left undecided, so few nodes are needed; a tier whose reduced cost lifts the bound past the
best allocation is barred for good.

Devices that ask for about as much as each other can trade places at next to no cost, so which of them takes a tier is
hardly worth a node, while how many do is. A node is therefore split by their number, and by single devices where that
is whole. No device needs to equal another for it: the limits hold for any group, and how alike its devices are decides
how much is gained.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from privtuner.wireless.arrays import BoolArray, FloatArray, IntArray
from privtuner.wireless.counts import Limit, Limits, tighten
from privtuner.wireless.dual import BALANCE, TIGHT_BALANCE, Bound, Market, maximise

__all__ = ["Game", "Outcome", "branch_and_bound"]

Solution = TypeVar("Solution", covariant=True)
_ACCURACY = 0.02  # of a node's bound, as a part of the gap to reach
_NODE_HEAT = 1e-2  # temperature to begin a node with, as a part of a device's share of the cost
_ALIKE = (0.2, 0.02, 0.002)  # of demands: by how much the devices of a group may differ, relative
_WHOLE = 1e-3  # by which a count may be off a whole number
_DECIDED = 1 - 1e-6  # weight of a tier


class Game(Protocol[Solution]):
    """A problem over tiers whose part for fixed tiers is convex."""

    offset: FloatArray
    """(devices, tiers), J: less the reward of a tier; inf for a tier that a device cannot take."""
    ceiling: float
    """J that no allocation costs more than: a bound above it says there is none."""

    def market(self) -> Market:
        """All tiers at once."""
        ...

    def fixed(self, tiers: IntArray) -> Market:
        """One tier a device."""
        ...

    def recover(self, tiers: IntArray, bound: Bound) -> tuple[float, float, Solution | None]:
        """Objective and energy (J, inf where a deadline is missed) of the allocation that a dual solution suggests."""
        ...


@dataclass
class Outcome(Generic[Solution]):
    """Result of a search.

    Attributes:
        objective, energy: J, of the best allocation; inf if none was found.
        solution: that allocation. tiers: its tiers.
        prices: the prices of the shared goods there.
        bound: J, a lower bound on every allocation; inf where none exists.
        nodes, evaluations: nodes of the search, evaluations of the dual.
        history: (objective, bound) after each node.
        complete: no node was left open for want of nodes.
    """

    objective: float
    energy: float
    solution: Solution | None
    tiers: IntArray
    prices: FloatArray
    bound: float
    nodes: int = 0
    evaluations: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)
    complete: bool = True


@dataclass(order=True)
class _Node:
    bound: float
    place: int
    offset: FloatArray = field(compare=False)
    limits: tuple[Limit, ...] = field(compare=False)
    prices: FloatArray = field(compare=False)


def branch_and_bound(
    game: Game[Solution],
    *,
    tolerance: float,
    max_nodes: int,
    progress: Callable[[float, float, int], None] | None = None,
) -> Outcome[Solution]:
    """Search until objective - bound <= tolerance * energy, or until ``max_nodes`` nodes were looked at.

    Args:
        game: the problem.
        tolerance: the tolerance of the gap, as a part of the energy.
        max_nodes: at least 1.
        progress: called with objective, bound and number of nodes after each node that is split, and at the end.
    """
    devices, tiers = game.offset.shape
    market = game.market() if tiers > 1 else game.fixed(np.zeros(devices, dtype=np.intp))
    search = _Search(game, tolerance)
    best = search.best
    open_nodes = [_Node(-np.inf, 0, game.offset, (), market.start())]
    count, told = 1, 0
    heat: float | None = None
    while open_nodes and best.nodes < max_nodes:
        node = heapq.heappop(open_nodes)
        if node.bound > search.enough():
            heapq.heappush(open_nodes, node)
            break
        best.nodes += 1
        bound = maximise(
            market,
            node.offset,
            limits=Limits(node.limits) if node.limits else None,
            prices=node.prices,
            temperature=heat,
            accuracy=_ACCURACY * tolerance,
            enough=search.enough(),
            balance=TIGHT_BALANCE if tiers == 1 else BALANCE,
        )
        best.evaluations += bound.steps
        value = max(bound.value, node.bound)
        if value > search.enough():
            search.closed = min(search.closed, value)
            continue
        chosen = _round(node.offset, bound)
        decided = bool((np.isfinite(node.offset).sum(axis=1) == 1).all())
        leaf = search.polish(chosen, bound)
        if heat is None:
            heat = _NODE_HEAT * best.energy / devices if np.isfinite(best.energy) else None
        if decided:
            search.closed = min(search.closed, max(value, leaf))
            continue
        offset = search.narrow(node.offset, bound)
        for part, limits in _split(offset, node.limits, bound):
            heapq.heappush(open_nodes, _Node(value, count, part, limits, bound.prices))
            count += 1
        best.bound = min(open_nodes[0].bound, search.closed, best.objective)
        best.history.append((best.objective, best.bound))
        if progress is not None:
            told = best.nodes
            progress(best.objective, best.bound, told)
    lowest = open_nodes[0].bound if open_nodes else np.inf
    best.complete = lowest > search.enough()
    best.bound = min(lowest, search.closed, best.objective)
    best.history.append((best.objective, best.bound))
    if progress is not None and told < best.nodes:
        progress(best.objective, best.bound, best.nodes)
    return best


class _Search(Generic[Solution]):
    """The best allocation so far, and what has been tried."""

    def __init__(self, game: Game[Solution], tolerance: float) -> None:
        self.game, self.tolerance = game, tolerance
        self.tried: dict[bytes, float] = {}
        self.closed = np.inf  # lowest bound of a node that needs no more work
        nothing = np.empty(0)
        self.best: Outcome[Solution] = Outcome(np.inf, np.inf, None, nothing.astype(np.intp), nothing, -np.inf)

    def enough(self) -> float:
        """A node with a bound above this needs no more work."""
        if not np.isfinite(self.best.objective):
            return self.game.ceiling
        return self.best.objective - 0.9 * self.tolerance * self.best.energy

    def polish(self, tiers: IntArray, bound: Bound) -> float:
        """Solve the convex problem for fixed tiers, keep the allocation if it is the best; returns its dual bound."""
        key = tiers.tobytes()
        if key in self.tried:
            return self.tried[key]
        if self.game.offset.shape[1] > 1:
            market, offset = self.game.fixed(tiers), np.take_along_axis(self.game.offset, tiers[:, None], axis=1)
            bound = maximise(market, offset, prices=bound.prices, enough=self.game.ceiling, balance=TIGHT_BALANCE)
            self.best.evaluations += bound.steps
        self.tried[key] = bound.value
        if bound.value <= self.game.ceiling:
            objective, energy, solution = self.game.recover(tiers, bound)
            if objective < self.best.objective:
                self.best.objective, self.best.energy, self.best.solution = objective, energy, solution
                self.best.tiers, self.best.prices = tiers, bound.prices
        return bound.value

    def narrow(self, offset: FloatArray, bound: Bound) -> FloatArray:
        """Bar the tiers that cannot be part of a better allocation."""
        least = bound.value + bound.costs - bound.costs.min(axis=1, keepdims=True)
        barred = least > self.enough()
        self.closed = min(self.closed, float(least[barred & np.isfinite(offset)].min(initial=np.inf)))
        return np.where(barred, np.inf, offset)


def _find_alike(device: int, candidates: IntArray, open_tiers: BoolArray, bound: Bound, reach: float) -> IntArray:
    """The candidates that ask for as much as the device in each of its open tiers, to within ``reach``."""
    own = np.flatnonzero(open_tiers[device])
    near = np.ones(len(candidates), dtype=bool)
    for demand in bound.response.demand:
        ratio = demand[np.ix_(candidates, own)] / demand[device, own]
        near &= (np.abs(np.log(ratio)) <= reach).all(axis=1)
    return candidates[near]


def _round(offset: FloatArray, bound: Bound) -> IntArray:
    """A tier for every device: the heaviest, and among undecided ones that are alike as many of each as they weigh."""
    open_tiers = np.isfinite(offset)
    weights = np.where(open_tiers, bound.weights, -1.0)
    chosen: IntArray = np.argmax(weights, axis=1)
    left = np.flatnonzero(weights.max(axis=1) < _DECIDED)
    while left.size > 1:
        device = int(left[np.argmin(weights[left].max(axis=1))])
        group = _find_alike(device, left, open_tiers, bound, _ALIKE[0])
        total = np.maximum(weights[group], 0.0).sum(axis=0)
        room = np.floor(total + _WHOLE)
        more = np.argsort(room - total, kind="stable")[: max(len(group) - int(room.sum()), 0)]
        room[more] += 1
        free = set(group.tolist())
        for place in np.argsort(-weights[group], axis=None, kind="stable"):
            row, tier = divmod(int(place), weights.shape[1])
            member = int(group[row])
            if member in free and room[tier] >= 1 and open_tiers[member, tier]:
                room[tier] -= 1
                chosen[member] = tier
                free.remove(member)
        left = np.setdiff1d(left, group, assume_unique=True)
    return chosen


def _split(offset: FloatArray, limits: tuple[Limit, ...], bound: Bound) -> list[tuple[FloatArray, tuple[Limit, ...]]]:
    """Two nodes: by how many devices like the most undecided one take a tier, or by whether it takes its heaviest."""
    open_tiers = np.isfinite(offset)
    weights = np.where(open_tiers, bound.weights, 0.0)
    several = open_tiers.sum(axis=1) > 1
    undecided = np.where(several, 1 - weights.max(axis=1), -1.0)
    if undecided.max() < 0:
        return [(offset, limits)]
    device = int(np.argmax(undecided))
    if undecided[device] < 1e-6:  # decided in all but name: by the smallest difference in cost
        costs = np.where(open_tiers, bound.costs, np.inf)
        second = np.sort(costs, axis=1)[:, 1] - costs.min(axis=1)
        device = int(np.argmin(second))
    found = _fraction(device, np.flatnonzero(several), open_tiers, weights, bound)
    if found is None:
        tier = int(np.argmax(weights[device]))
        group, count = np.array([device]), 0
    else:
        group, tier, count = found
    parts = (tighten(offset, (*limits, Limit(group, tier, *limit))) for limit in ((count + 1, -1), (count, 1)))
    return [part for part in parts if part is not None]


def _fraction(
    device: int, several: IntArray, open_tiers: BoolArray, weights: FloatArray, bound: Bound
) -> tuple[IntArray, int, int] | None:
    """The largest group like the device of which no whole number takes some tier: group, tier, the number below."""
    for reach in _ALIKE:
        group = _find_alike(device, several, open_tiers, bound, reach)
        if len(group) < 2:
            break
        counts = weights[group].sum(axis=0)
        tier = int(np.argmax(np.abs(counts - np.rint(counts))))
        if abs(counts[tier] - np.rint(counts[tier])) > _WHOLE:
            return group, tier, int(counts[tier])
    return None

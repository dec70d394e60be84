"""Branch and bound on the tiers, with the dual as the bound.

A node allows each device some of the tiers. Its bound is the dual's maximum; rounding the weights there and solving the
convex problem of the tiers so fixed gives allocations. With P prices about P devices are left undecided, so few nodes
are needed; a tier whose reduced cost lifts the bound past the best allocation is barred for good.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from .arrays import FloatArray, IntArray
from .dual import BALANCE, TIGHT_BALANCE, Bound, Market, maximise

__all__ = ["Game", "Outcome", "branch_and_bound"]

Solution = TypeVar("Solution", covariant=True)
_ACCURACY = 0.02  # of a node's bound, as a part of the gap to reach
_NODE_HEAT = 1e-2  # temperature to begin a node with, as a part of a device's share of the cost


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
        prices: of the shared goods there.
        bound: J, a lower bound on every allocation; inf where none exists.
        nodes, evaluations: of the search, and of the dual.
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
        tolerance: of the gap, as a part of the energy.
        max_nodes: at least 1.
        progress: called with objective, bound and number of nodes after each node that is split, and at the end.
    """
    devices, tiers = game.offset.shape
    market = game.market() if tiers > 1 else game.fixed(np.zeros(devices, dtype=np.intp))
    search = _Search(game, tolerance)
    best = search.best
    open_nodes = [_Node(-np.inf, 0, game.offset, market.start())]
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
        chosen = np.argmax(np.where(np.isfinite(node.offset), bound.weights, -1.0), axis=1)
        decided = bool((np.isfinite(node.offset).sum(axis=1) == 1).all())
        leaf = search.polish(chosen, bound)
        if heat is None:
            heat = _NODE_HEAT * best.energy / devices if np.isfinite(best.energy) else None
        if decided:
            search.closed = min(search.closed, max(value, leaf))
            continue
        offset = search.narrow(node.offset, bound)
        for part in _split(offset, bound):
            heapq.heappush(open_nodes, _Node(value, count, part, bound.prices))
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
        reduced = bound.costs - bound.costs.min(axis=1, keepdims=True)
        return np.where(bound.value + reduced > self.enough(), np.inf, offset)


def _split(offset: FloatArray, bound: Bound) -> list[FloatArray]:
    """Two nodes: the most undecided device's heaviest tier, and its others."""
    open_tiers = np.isfinite(offset)
    weights = np.where(open_tiers, bound.weights, 0.0)
    undecided = np.where(open_tiers.sum(axis=1) > 1, 1 - weights.max(axis=1), -1.0)
    if undecided.max() < 0:
        return [offset]
    device = int(np.argmax(undecided))
    if undecided[device] < 1e-6:  # decided in all but name: by the smallest difference in cost
        costs = np.where(open_tiers, bound.costs, np.inf)
        second = np.sort(costs, axis=1)[:, 1] - costs.min(axis=1)
        device = int(np.argmin(second))
    tier = int(np.argmax(weights[device]))
    alone, others = offset.copy(), offset.copy()
    alone[device] = np.where(np.arange(offset.shape[1]) == tier, offset[device], np.inf)
    others[device, tier] = np.inf
    return [alone, others]

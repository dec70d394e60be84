"""The methods of allocation: the global optimum, the alternating method of the paper, and what they are compared with.

Each is a function of a system, its problem and `Options`, and returns a `Found`. `METHODS` names them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from privtuner.errors import InfeasibleError, InputError
from privtuner.wireless.arrays import BoolArray, IntArray
from privtuner.wireless.branch import branch_and_bound
from privtuner.wireless.model import System
from privtuner.wireless.problem import Choices, Problem, respond
from privtuner.wireless.shortage import deadline_error, shared_error
from privtuner.wireless.stages import Computation, communicate
from privtuner.wireless.whole import Whole

__all__ = ["METHODS", "Found", "Options"]

_MAX_ROUNDS = 100  # of the alternating method
_STANDSTILL = 1e-10  # gain of a round, as a part of the energy, at which it stops
_MAX_DRAWS = 200  # of the random method
_MAX_COMBINATIONS = 100_000  # of brute force


@dataclass(frozen=True)
class Options:
    """Options of `allocate` that the methods take.

    Attributes:
        allowed: (devices, tiers), the tiers that may be taken.
        tolerance: the tolerance of the gap, as a part of the energy.
        max_nodes: most nodes of branch and bound.
        seed: the seed of the random method.
        progress: called with objective, bound and nodes.
    """

    allowed: BoolArray
    tolerance: float
    max_nodes: int
    seed: int
    progress: Callable[[float, float, int], None] | None = None


@dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
        tiers: the tiers of the devices. choices: all else, shapes (devices, 1).
        bound: J, a lower bound on every allocation (-inf where the method has none).
        prices: the prices of bandwidth and server at the optimum, J/Hz and J s/cycle; None where the method has none.
        iterations: rounds, nodes or combinations. evaluations: of the dual.
        history: J, the objective after each step; with a bound beside it where there is one.
        complete: no search ended for want of nodes, short of its tolerance.
    """

    tiers: IntArray
    choices: Choices
    bound: float = -math.inf
    prices: tuple[float, float] | None = None
    iterations: int = 1
    evaluations: int = 0
    history: list[tuple[float, float]] = field(default_factory=list)
    complete: bool = True


def _globally(system: System, problem: Problem, options: Options) -> Found:
    alone = problem.possible() & options.allowed
    if not alone.any(axis=1).all():
        whole = problem.bandwidth, problem.server_frequency
        how = "even with the whole bandwidth and the whole server to itself"
        raise deadline_error(system, problem, options.allowed, *whole, how)
    # Only as many columns as the device with most choices has tiers.
    columns = np.argsort(~alone, axis=1, kind="stable")[:, : int(alone.sum(axis=1).max())]
    best = branch_and_bound(
        Whole(problem.take(columns), np.take_along_axis(alone, columns, axis=1)),
        tolerance=options.tolerance,
        max_nodes=options.max_nodes,
        progress=options.progress,
    )
    if best.solution is None and not best.complete:
        raise InfeasibleError(
            f"no allocation was found in max_nodes = {options.max_nodes} nodes, nor shown not to exist: allow more",
            "max_nodes",
            "",
            0.0,
        )
    if best.solution is None:
        raise shared_error(system, problem, alone)
    return Found(
        tiers=columns[np.arange(len(columns)), best.tiers],
        choices=best.solution,
        bound=best.bound,
        prices=(float(best.prices[0]), float(best.prices[1])),
        iterations=best.nodes,
        evaluations=best.evaluations,
        history=best.history,
        complete=best.complete,
    )


def _objective(problem: Problem, tiers: IntArray, choices: Choices) -> float:
    return float(choices.energy.sum()) - float(problem.take(tiers).reward.sum())


def _equally(system: System, problem: Problem, options: Options) -> Found:
    count = problem.shape[0]
    shares = problem.bandwidth / count, problem.server_frequency / count
    choices = respond(problem, *shares)
    costs = np.where(options.allowed, choices.energy - problem.reward, np.inf)
    if not np.isfinite(costs).any(axis=1).all():
        raise deadline_error(system, problem, options.allowed, *shares, "with an equal share of what there is")
    tiers = np.argmin(costs, axis=1)
    return Found(tiers, choices.take(tiers))


def _randomly(system: System, problem: Problem, options: Options) -> Found:
    rng = np.random.default_rng(options.seed)
    count, tiers = problem.shape
    for draw in range(1, _MAX_DRAWS + 1):
        bandwidth, server = (
            rng.dirichlet(np.ones(count))[:, None] * total for total in (problem.bandwidth, problem.server_frequency)
        )
        choices = respond(problem, bandwidth, server)
        can = np.isfinite(choices.energy) & options.allowed
        if can.any(axis=1).all():
            chosen = np.argmax(np.where(can, rng.random((count, tiers)), -1.0), axis=1)
            return Found(chosen, choices.take(chosen), iterations=draw)
    how = f"with the last of {_MAX_DRAWS} random shares"
    raise deadline_error(system, problem, options.allowed, bandwidth, server, how)


def _compute(problem: Problem, tiers: IntArray, choices: Choices, options: Options) -> tuple[IntArray, Choices, bool]:
    """The best tier, processor speed and server share at this bandwidth and power; never worse than what was.

    Also whether the search for them was complete.
    """
    game = Computation(problem, choices.bandwidth, choices.power)
    game.offset = np.where(options.allowed, game.offset, np.inf)
    best = branch_and_bound(game, tolerance=0.01 * options.tolerance, max_nodes=options.max_nodes)
    if best.solution is None or best.objective >= _objective(problem, tiers, choices):
        return tiers, choices, best.complete
    return best.tiers, best.solution, best.complete


def _communicate(problem: Problem, tiers: IntArray, choices: Choices) -> Choices:
    """The best bandwidth and power with all else as it is; never worse than what was."""
    better = communicate(problem.take(tiers), choices)
    return better if float(better.energy.sum()) < float(choices.energy.sum()) else choices


def _alternating(system: System, problem: Problem, options: Options) -> Found:
    """The halves in turn. Both keep the upload's time, so only a tier or spare time moves it: two rounds are usual."""
    start = _equally(system, problem, options)
    tiers, choices = start.tiers, start.choices
    history = [_objective(problem, tiers, choices)]
    rounds, complete = 0, True
    while rounds < _MAX_ROUNDS:
        rounds += 1
        tiers, choices, found = _compute(problem, tiers, choices, options)
        complete &= found
        history.append(_objective(problem, tiers, choices))
        choices = _communicate(problem, tiers, choices)
        history.append(_objective(problem, tiers, choices))
        if history[-3] - history[-1] <= _STANDSTILL * float(choices.energy.sum()):
            break
    steps = [(value, -math.inf) for value in history]
    return Found(tiers, choices, iterations=rounds, history=steps, complete=complete)


def _communication(system: System, problem: Problem, options: Options) -> Found:
    start = _equally(system, problem, options)
    return Found(start.tiers, _communicate(problem, start.tiers, start.choices))


def _computation(system: System, problem: Problem, options: Options) -> Found:
    start = _equally(system, problem, options)
    tiers, choices, complete = _compute(problem, start.tiers, start.choices, options)
    return Found(tiers, choices, complete=complete)


def _by_degree(largest: bool) -> Callable[[System, Problem, Options], Found]:
    def method(system: System, problem: Problem, options: Options) -> Found:
        degrees = np.array([tier.ring_dimension for tier in system.tiers], dtype=np.float64)
        can = problem.possible() & options.allowed
        order = np.where(can, degrees if largest else -degrees, -np.inf)
        allowed = can & (order == order.max(axis=1, keepdims=True))
        narrowed = Options(allowed, options.tolerance, options.max_nodes, options.seed)
        found = _globally(system, problem, narrowed if can.any(axis=1).all() else options)
        return replace(found, bound=-math.inf, prices=None, history=[])

    return method


def _brute_force(system: System, problem: Problem, options: Options) -> Found:
    can = problem.possible() & options.allowed
    ways = [np.flatnonzero(row) for row in can]
    count = math.prod(len(way) for way in ways)
    if count > _MAX_COMBINATIONS:
        raise InputError(
            f"brute force over {count} combinations of tiers: at most {_MAX_COMBINATIONS} are tried; "
            "use method='global'"
        )
    best: Found | None = None
    least = math.inf
    for combination in itertools.product(*ways):
        tiers = np.array(combination, dtype=np.intp)
        one = problem.take(tiers)
        whole = Whole(one, np.ones(one.shape, dtype=bool))
        found = branch_and_bound(whole, tolerance=options.tolerance, max_nodes=1)
        if found.solution is not None and found.objective < least:
            least = found.objective
            best = Found(tiers, found.solution, iterations=count)
    return best if best is not None else _globally(system, problem, options)  # which says why there is none


METHODS: dict[str, Callable[[System, Problem, Options], Found]] = {
    "global": _globally,
    "alternating": _alternating,
    "equal": _equally,
    "random": _randomly,
    "communication": _communication,
    "computation": _computation,
    "largest": _by_degree(largest=True),
    "smallest": _by_degree(largest=False),
    "brute-force": _brute_force,
}
"""Name -> method.

global: everything at once, with a certificate. alternating: computation and communication in turn, from the equal
split. equal: the same limits of bandwidth and server share for all, each device at its best within them. random: random
limits and tiers, each device at its best otherwise. communication, computation: the equal split with only that half
optimised. largest, smallest: every device in the largest or smallest ring it can manage, all else optimal. brute-force:
every combination of tiers.
"""

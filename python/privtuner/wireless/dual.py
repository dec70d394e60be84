"""Prices at which the devices together take what there is: the dual problem, maximised by Newton's method.

For prices pi of the shared goods R, the devices' costs V_nj(pi) give the lower bound

    D(pi) = sum_n min_j V_nj(pi) - pi . R

on every allocation. D is concave with kinks where a device is undecided between tiers. Newton's method climbs the
smooth minorant in which min is replaced by -T ln sum_j exp(-V_nj / T), for falling temperatures T: its weights say
which devices are undecided, and T times their entropy bounds what the smoothing may still hide. Steps are taken in
ln pi, where demand is close to a power law. Limits on how many devices take a tier (`counts`) have prices of their own,
which are settled anew at each pi and follow it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from privtuner.wireless.arrays import BoolArray, FloatArray
from privtuner.wireless.counts import Limits
from privtuner.wireless.priced import Response

__all__ = ["BALANCE", "TIGHT_BALANCE", "Bound", "Market", "maximise"]

_STEPS = 60  # of Newton's method at one temperature
_COOLING = 10.0
_COARSEST = 1e-2  # accuracy of the devices' answers while prices are far off
_LONGEST_RISE = 4.0  # of ln pi in one step, where demand depends on it
_LONGEST_FALL = 30.0
BALANCE = 1e-7
TIGHT_BALANCE = 1e-12
_SMALLEST_PRICE = 1e-14  # of a good that is left over, as a part of the cost


class Market(Protocol):
    """What the devices do at given prices."""

    resources: FloatArray

    def start(self) -> FloatArray:
        """Prices to begin with."""
        ...

    def respond(self, prices: FloatArray, accuracy: float) -> Response:
        """Costs and demands at positive prices; lower bounds and estimates where ``accuracy`` is coarse."""
        ...


@dataclass
class Bound:
    """The best lower bound found.

    Attributes:
        value: J; no allocation costs less. Infinite where no allocation exists.
        prices: at which it was found.
        costs: V_nj there, what the limits charge included; inf for tiers that are not allowed.
        weights: the weights of the tiers, rows that add up to one; what the smoothed devices would mix.
        response: at the last prices.
        steps: evaluations.
    """

    value: float
    prices: FloatArray
    costs: FloatArray
    weights: FloatArray
    response: Response
    steps: int


@dataclass(slots=True)
class _Point:
    prices: FloatArray
    accuracy: float
    response: Response
    costs: FloatArray
    exact: float
    smooth: float
    weights: FloatArray | None
    entropy: float
    demand: FloatArray
    slope: FloatArray
    warming: FloatArray


def maximise(
    market: Market,
    offset: FloatArray,
    *,
    limits: Limits | None = None,
    prices: FloatArray | None = None,
    temperature: float | None = None,
    accuracy: float = 1e-9,
    enough: float = np.inf,
    balance: float = BALANCE,
) -> Bound:
    """Climb the dual.

    Args:
        market: the devices.
        offset: added to the costs, (devices, tiers), J: less the reward of a tier, inf for one that is not allowed.
        limits: on how many devices take a tier; with more tiers than one.
        prices: to begin with; the market's own otherwise.
        temperature: to begin with, J; from the costs otherwise. Of no effect where one tier is left to each device.
        accuracy: the accuracy of the bound, as a part of the cost.
        enough: J; stop at any bound above it.
        balance: relative tolerance of demand and supply. Sharing out anew what is out of balance costs its square.
    """
    climb = _Climb(market, offset, limits, enough, balance)
    point = climb.at(market.start() if prices is None else prices, 1.0)
    scale = float(np.where(np.isfinite(offset), point.response.value, 0.0).max(axis=1).sum())
    climb.floor = _SMALLEST_PRICE * scale / market.resources
    climb.negligible = 1e-12 * scale
    if (point.prices < climb.floor).any():
        point = climb.at(np.maximum(point.prices, climb.floor), 1.0)
    if point.weights is None:
        point = climb.balance(point, 0.0)
    else:
        heat = 0.1 * scale / len(point.costs) if temperature is None else temperature
        point = climb.balance(climb.at(point.prices, heat), heat)
        while heat * point.entropy > accuracy * scale and climb.best.exact <= enough:
            last, heat = heat, heat / _COOLING
            point = climb.balance(climb.cool(point, heat, last), heat)
    best = climb.best
    weights = np.ones_like(best.costs) if point.weights is None else point.weights
    return Bound(best.exact, best.prices, best.costs, weights, point.response, climb.steps)


class _Climb:
    def __init__(self, market: Market, offset: FloatArray, limits: Limits | None, enough: float, target: float) -> None:
        self.market, self.offset, self.limits, self.enough, self.target = market, offset, limits, enough, target
        self.single = offset.shape[1] == 1
        self.floor = np.zeros_like(market.resources)
        self.negligible = 0.0
        self.accuracy = _COARSEST
        self.steps = 0
        self.best: _Point

    def at(self, prices: FloatArray, heat: float) -> _Point:
        """Evaluate both duals and the derivatives of the smooth one."""
        response = self.market.respond(prices, self.accuracy)
        self.steps += 1
        costs = response.value + self.offset
        spent = float(prices @ self.market.resources)
        weights, entropy = None, 0.0
        demand, slope = response.demand, response.slope
        warming = np.zeros_like(prices)
        if self.single:
            exact = smooth = float(costs.sum()) - spent
            total = np.array([d.sum() for d in demand])
            bend = np.array([[d.sum() for d in row] for row in slope])
        else:
            barrier = 0.0
            if self.limits is not None:
                barrier = self.limits.settle(costs, heat, prices)
                costs, income = self.limits.charge(costs)
                spent += income
            least = costs.min(axis=1)
            exact = float(least.sum()) - spent
            gap = np.minimum((costs - least[:, None]) / heat, 700.0)
            weights = np.exp(-gap)
            mass = weights.sum(axis=1)
            weights /= mass[:, None]
            log_mass = np.log(mass)
            mean_gap = (weights * gap).sum(axis=1)
            smooth = exact - heat * float(log_mass.sum()) + barrier
            entropy = float((log_mass + mean_gap).sum())
            means = [(weights * d).sum(axis=1) for d in demand]
            total = np.array([m.sum() for m in means])
            warming = np.array(
                [((weights * gap * d).sum() - m @ mean_gap) / heat for d, m in zip(demand, means, strict=True)]
            )
            bend = np.array(
                [
                    [
                        (weights * slope[i][j]).sum()
                        - prices[j] / heat * ((weights * demand[i] * demand[j]).sum() - means[i] @ means[j])
                        for j in range(len(demand))
                    ]
                    for i in range(len(demand))
                ]
            )
            if self.limits is not None:
                kept = self.limits.respond(weights, demand, gap, heat, prices)
                bend += kept[:-1, :-1] * (prices / heat)
                warming -= kept[:-1, -1] / heat
                entropy += len(self.limits.price)
        point = _Point(prices, self.accuracy, response, costs, exact, smooth, weights, entropy, total, bend, warming)
        if self.steps == 1 or exact > self.best.exact:
            self.best = point
        return point

    def cool(self, point: _Point, heat: float, last: float) -> _Point:
        """Follow the path of the maximum down to a lower temperature: devices that mix tiers go on mixing them."""
        free = (point.prices > self.floor).tolist()
        step = _solve(point.slope.tolist(), (point.warming * (last - heat)).tolist(), free)
        return self.at(point.prices if step is None else point.prices * np.exp(step), heat)

    def balance(self, point: _Point, heat: float) -> _Point:
        """Newton's method at one temperature."""
        for _ in range(_STEPS):
            error, free, worst = self._error(point)
            if (worst <= self.target and self.accuracy <= self.target) or self.best.exact > self.enough:
                break
            self.accuracy = min(max(0.01 * worst * worst, 0.1 * self.target), _COARSEST)
            step = self._step(point, error, free)
            slope = float((point.prices * (point.demand - self.market.resources)) @ step)
            if slope <= 1e-4 * heat and worst <= 1e3 * self.target:
                break
            found = self._search(point, heat, step, slope)
            if found is None:
                break  # as high as the arithmetic can tell
            point = found
        return point

    def _search(self, point: _Point, heat: float, step: FloatArray, slope: float) -> _Point | None:
        """The first point along the step that climbs enough; near the top, where rounding hides it, balances better."""
        length = 1.0
        while length > 1e-6:
            found = self.at(np.maximum(point.prices * np.exp(length * step), self.floor), heat)
            climbed = found.smooth - point.smooth
            if slope > self.negligible:
                if climbed >= 1e-4 * length * slope:
                    return found if climbed > 0 else None
            elif climbed >= -self.negligible:
                finer = found.accuracy < point.accuracy
                closer = self._error(found)[2] <= 0.5 * self._error(point)[2]
                return found if closer or finer or climbed > self.negligible else None
            length *= 0.4
        return None

    def _error(self, point: _Point) -> tuple[FloatArray, BoolArray, float]:
        """ln(demand / supply), which prices may still fall or must rise, and the worst error among those."""
        error = np.log(point.demand / self.market.resources)
        free = (point.prices > self.floor) | (error > 0)
        return error, free, float(np.abs(error[free]).max(initial=0.0))

    def _step(self, point: _Point, error: FloatArray, free: BoolArray) -> FloatArray:
        """Newton's step in ln pi: on ln(demand / supply) if that climbs, else on the dual itself."""
        gain = point.prices * (point.demand - self.market.resources)
        for unit, right in ((1 / point.demand, -error), (point.prices, -gain)):
            found = _solve((point.slope * unit[:, None]).tolist(), right.tolist(), free.tolist())
            if found is not None and float(gain @ found) > 0:
                return np.array(found)
        return np.where(free, np.clip(error, -1.0, 1.0), 0.0)


def _solve(matrix: list[list[float]], right: list[float], free: list[bool]) -> list[float] | None:
    """Solve one or two equations for the free entries; the others are 0.

    An entry that would go beyond the longest step makes that step, and the other its own.
    """
    step = [0.0] * len(right)
    at = [i for i in range(len(right)) if free[i]]
    while at:
        if len(at) == 2:
            (a, b), (c, d) = matrix
            det = a * d - b * c
            if det == 0:
                return None
            move = [(d * right[0] - b * right[1]) / det, (a * right[1] - c * right[0]) / det]
        else:
            (i,) = at
            if matrix[i][i] == 0:
                return None
            move = [(right[i] - sum(m * s for m, s in zip(matrix[i], step, strict=True))) / matrix[i][i]]
        if not all(map(math.isfinite, move)):
            return None
        # Where demand hardly depends on a price, Newton's step in the price itself is the better one: ln(1 + m).
        within = [min(max(m, -_LONGEST_FALL), max(_LONGEST_RISE, math.log1p(max(m, 0.0)))) for m in move]
        beyond = [abs(m - w) for m, w in zip(move, within, strict=True)]
        farthest = beyond.index(max(beyond))
        if beyond[farthest] == 0:
            for i, m in zip(at, move, strict=True):
                step[i] = m
            break
        step[at[farthest]] = within[farthest]
        del at[farthest]
    return step

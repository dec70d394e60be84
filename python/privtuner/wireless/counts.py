"""Limits on how many devices of a group take a tier, and the prices that keep them.

Devices that are alike can be exchanged, so saying tier by tier which of them takes what leaves a search as many
equivalent answers as there are orders of the devices. Their number says all that matters. A limit on it holds for any
group, alike or not: priced into the costs, sign * price for every device of the group in that tier, it leaves a lower
bound, whatever the prices. `Limits.settle` finds those of the best bound, smoothed as in `dual`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from privtuner.wireless.arrays import FloatArray, IntArray

__all__ = ["Limit", "Limits", "tighten"]

_MISS = 1e-8  # of a count, as a part of the group
_STEPS = 12  # of Newton's method at one temperature
_HEATING = 30.0  # where Newton's method gets lost
_RISES = 8
_COOLING = 0.2
_USUAL = 10.0  # price, as a part of the costs' spread, to which two limits that leave one count only tend
_MOST = 1e4  # likewise, beyond which the limits cannot be kept
_RIDGE = 1e-13
_SHORTEST = 1e-3  # part of a step


@dataclass(frozen=True)
class Limit:
    """At most (``sign`` 1) or at least (-1) ``count`` devices of ``group`` (int, (members,)) take ``tier``."""

    group: IntArray
    tier: int
    count: int
    sign: int


class Limits:
    """Several limits at once, as arrays.

    Args:
        limits: at least one.
    """

    def __init__(self, limits: Sequence[Limit]) -> None:
        self.rows = np.unique(np.concatenate([limit.group for limit in limits]))
        self.inside = np.array([np.isin(self.rows, limit.group, assume_unique=True) for limit in limits])
        self.tier = np.array([limit.tier for limit in limits], dtype=np.intp)
        self.count = np.array([limit.count for limit in limits], dtype=np.float64)
        self.sign = np.array([limit.sign for limit in limits], dtype=np.float64)
        self._same = self.tier[:, None] == self.tier
        self._signed = self.inside.T * self.sign  # (rows, limits)
        self._members = self.inside.sum(axis=1).astype(np.float64)
        self._spread = 0.0  # of the costs, J: when first seen
        self._drift: tuple[FloatArray, FloatArray, float] | None = None
        self.price = np.zeros(len(limits))
        """J a device, positive: as `settle` left them."""

    def charge(self, costs: FloatArray) -> tuple[FloatArray, float]:
        """Costs (devices, tiers) with the prices in them, and what they bring in at the limits, J."""
        charged = costs.copy()
        charged[self.rows] += self._charges(self.price, costs.shape[1])
        return charged, float(self.price @ (self.sign * self.count))

    def settle(self, costs: FloatArray, heat: float, goods: FloatArray) -> float:
        """Set the prices that are best at these costs (devices, tiers; inf where barred); returns the barrier's part.

        ``goods``, the prices of the goods, and the temperature tell how far the last ones have to move.

        The smooth bound has heat * (ln(price) - price / a usual one) added, which keeps the prices positive and finite
        and hides little as it cools.
        """
        own = costs[self.rows]
        if self._spread == 0:
            spread = np.ptp(np.where(np.isfinite(own), own, own.min(axis=1, keepdims=True)), axis=1)
            self._spread = max(float(spread.max()), heat)
        if self._drift is not None:
            drift, last_goods, last_heat = self._drift
            far = last_goods * np.clip(np.log(goods / last_goods), -1.0, 1.0)
            self.price = np.maximum(self.price - drift @ np.append(far, last_heat - heat), 0.1 * self.price)
        if self._newton(own, heat):
            return heat * self._barrier(self.price)
        self._place(own)
        warm, rises = heat, 0
        while not self._newton(own, warm) and rises < _RISES:  # to where it is soft enough
            warm, rises = warm * _HEATING, rises + 1
        while warm > heat * (1 + 1e-9):
            warm = max(warm * _COOLING, heat)
            self._newton(own, warm)
        return heat * self._barrier(self.price)

    def respond(
        self, weights: FloatArray, demand: Sequence[FloatArray], gap: FloatArray, heat: float, goods: FloatArray
    ) -> FloatArray:
        """Return how much less the demands react because these prices follow: to prices of goods, last to temperature.

        Args:
            weights: (devices, tiers).
            demand: likewise, one a good.
            gap: likewise, cost above a device's least, in units of the temperature.
            heat: temperature.
            goods: the prices of the goods.

        Returns:
            (goods + 1, goods + 1), to be multiplied by price / heat and 1 / heat.
        """
        own = weights[self.rows]
        moved = np.empty((len(demand) + 1, len(self.price)))
        for row, values in zip(moved, (*demand, gap), strict=True):
            near = values[self.rows]
            apart = own * (near - (own * near).sum(axis=1, keepdims=True))
            row[:] = (apart[:, self.tier] * self._signed).sum(axis=0)
        moved[-1] += heat * self._push(self.price)
        drift = _solve(self._stiffness(own, heat), moved.T)
        self._drift = drift, goods, heat
        return np.asarray(moved @ drift)

    def _barrier(self, price: FloatArray) -> float:
        return float(np.log(price).sum() - price.sum() / (_USUAL * self._spread))

    def _push(self, price: FloatArray) -> FloatArray:
        """The barrier's slope."""
        return 1 / price - 1 / (_USUAL * self._spread)

    def _charges(self, price: FloatArray, tiers: int) -> FloatArray:
        charges = np.zeros((len(self.rows), tiers))
        np.add.at(charges.T, self.tier, (self._signed * price).T)
        return charges

    def _stiffness(self, weights: FloatArray, heat: float) -> FloatArray:
        taken = weights[:, self.tier] * self._signed
        stiffness: FloatArray = self._same * (taken.T @ self._signed) - taken.T @ taken
        stiffness[np.diag_indices_from(stiffness)] += (heat / self.price) ** 2
        return stiffness

    def _smooth(self, own: FloatArray, heat: float, price: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        """The bound at these prices up to a constant, its slopes, and the weights."""
        charged = own + self._charges(price, own.shape[1])
        least = charged.min(axis=1, keepdims=True)
        weights = np.exp(-np.minimum((charged - least) / heat, 700.0))
        mass = weights.sum(axis=1, keepdims=True)
        weights /= mass
        limit = self.sign * self.count
        value = float((least - heat * np.log(mass)).sum() - price @ limit) + heat * self._barrier(price)
        slope = (weights[:, self.tier] * self._signed).sum(axis=0) - limit
        return value, slope + heat * self._push(price), weights

    def _place(self, own: FloatArray) -> None:
        """Set each price in turn to where its limit is just kept, without heat: exact for a limit alone."""
        for place, (tier, count) in enumerate(zip(self.tier, self.count.astype(int), strict=True)):
            self.price[place] = 0.0
            charged = (own + self._charges(self.price, own.shape[1]))[self.inside[place]]
            cost = charged[:, tier].copy()
            charged[:, tier] = np.inf
            ahead = np.sort(charged.min(axis=1) - cost)[::-1]  # of a device that the tier suits by so much
            self.price[place] = max(0.0, self.sign[place] * 0.5 * float(ahead[count - 1] + ahead[count]))

    def _newton(self, own: FloatArray, heat: float) -> bool:
        """Newton's method from the prices as they are; whether it got there."""
        most = _MOST * self._spread
        self.price = np.clip(self.price, heat / self._members, most)
        value, slope, weights = self._smooth(own, heat, self.price)
        for _ in range(_STEPS):
            if ((np.abs(slope) <= _MISS * self._members) | ((self.price == most) & (slope > 0))).all():
                return True
            step = _solve(self._stiffness(weights, heat), heat * slope)
            length = 1.0
            while True:
                price = np.clip(self.price + length * step, 0.01 * self.price, most)
                new, new_slope, new_weights = self._smooth(own, heat, price)
                if new - value >= 1e-4 * float(slope @ (price - self.price)):
                    break
                length *= 0.3
                if length < _SHORTEST:
                    return False
            self.price, value, slope, weights = price, new, new_slope, new_weights
        return False


def _solve(stiffness: FloatArray, right: FloatArray) -> FloatArray:
    """Solve equations whose unknowns differ in scale, and of which some may say the same."""
    scale = np.sqrt(np.diagonal(stiffness))
    scaled = stiffness / np.outer(scale, scale)
    scaled[np.diag_indices_from(scaled)] += _RIDGE
    solved: FloatArray = (np.linalg.solve(scaled, (right.T / scale).T).T / scale).T
    return solved


def tighten(offset: FloatArray, limits: Sequence[Limit]) -> tuple[FloatArray, tuple[Limit, ...]] | None:
    """Bar (inf) what the limits leave no room for, and keep of them what is not settled; None if they cannot be kept.

    Args:
        offset: (devices, tiers), inf where a tier is barred.
        limits: to keep.
    """
    offset = offset.copy()
    kept = tuple(limits)
    while True:
        left = []
        for limit in kept:
            open_tiers = np.isfinite(offset[limit.group])
            can = open_tiers[:, limit.tier]
            free = can & (open_tiers.sum(axis=1) > 1)
            group, count = limit.group[free], limit.count - int((can & ~free).sum())
            if (count if limit.sign > 0 else len(group) - count) < 0:
                return None
            if limit.sign > 0 and count == 0:
                offset[group, limit.tier] = np.inf
            elif limit.sign < 0 and count == len(group):
                offset[np.ix_(group, np.flatnonzero(np.arange(offset.shape[1]) != limit.tier))] = np.inf
            elif 0 < count < len(group):
                left.append(Limit(group, limit.tier, count, limit.sign))
        if len(left) == len(kept):
            return offset, tuple(left)
        kept = tuple(left)

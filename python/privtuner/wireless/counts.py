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

from .arrays import FloatArray, IntArray

__all__ = ["Limit", "Limits", "tighten"]

_MISS = 1e-9  # of a count, as a part of the group
_STEPS = 12  # of Newton's method at one temperature
_HEATING = 30.0  # where Newton's method gets lost
_RISES = 8
_COOLING = 0.2
_MOST = 1e4  # of a price, as a part of the costs' spread: beyond, the limits cannot be kept
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
        self._most = np.inf
        self.price = np.zeros(len(limits))
        """J a device, positive: as `settle` left them."""

    def charge(self, costs: FloatArray) -> tuple[FloatArray, float]:
        """Costs (devices, tiers) with the prices in them, and what they bring in at the limits, J."""
        charged = costs.copy()
        charged[self.rows] += self._charges(self.price, costs.shape[1])
        return charged, float(self.price @ (self.sign * self.count))

    def settle(self, costs: FloatArray, heat: float) -> float:
        """Set the prices that are best at these costs (devices, tiers; inf where barred); returns the barrier's part.

        The smooth bound has heat * ln(price) added, which keeps the prices positive and hides little as it cools.
        """
        own = costs[self.rows]
        spread = np.ptp(np.where(np.isfinite(own), own, own.min(axis=1, keepdims=True)), axis=1)
        self._most = _MOST * max(float(spread.max()), heat)
        warm, rises = heat, 0
        while not self._newton(own, warm) and rises < _RISES:  # to where it is soft enough
            warm, rises = warm * _HEATING, rises + 1
        while warm > heat * (1 + 1e-9):
            warm = max(warm * _COOLING, heat)
            self._newton(own, warm)
        return heat * float(np.log(self.price).sum())

    def moved(self, weights: FloatArray, values: FloatArray) -> FloatArray:
        """Covariance of the counts with ``values`` (devices, tiers) under the weights, (limits,)."""
        own, values = weights[self.rows], values[self.rows]
        apart = own * (values - (own * values).sum(axis=1, keepdims=True))
        return np.asarray((apart[:, self.tier] * self._signed).sum(axis=0))

    def kept(self, weights: FloatArray, moved: FloatArray, heat: float) -> FloatArray:
        """What the prices' own moves take back of changes that move the counts: (changes, changes).

        Args:
            weights: (devices, tiers).
            moved: (changes, limits), how each change moves the counts.
            heat: temperature.
        """
        return np.asarray(moved @ _solve(self._stiffness(weights[self.rows], heat), moved.T))

    def _charges(self, price: FloatArray, tiers: int) -> FloatArray:
        charges = np.zeros((len(self.rows), tiers))
        np.add.at(charges.T, self.tier, (self._signed * price).T)
        return charges

    def _stiffness(self, weights: FloatArray, heat: float) -> FloatArray:
        taken = weights[:, self.tier] * self._signed
        stiffness = self._same * (taken.T @ self._signed) - taken.T @ taken
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
        value = float((least - heat * np.log(mass)).sum() - price @ limit + heat * np.log(price).sum())
        return value, (weights[:, self.tier] * self._signed).sum(axis=0) - limit + heat / price, weights

    def _newton(self, own: FloatArray, heat: float) -> bool:
        """Newton's method from the prices as they are; whether it got there."""
        self.price = np.clip(self.price, heat / self._members, self._most)
        value, slope, weights = self._smooth(own, heat, self.price)
        for _ in range(_STEPS):
            if ((np.abs(slope) <= _MISS * self._members) | ((self.price == self._most) & (slope > 0))).all():
                return True
            step = _solve(self._stiffness(weights, heat), heat * slope)
            length = 1.0
            while True:
                price = np.clip(self.price + length * step, 0.01 * self.price, self._most)
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
    return np.asarray(np.linalg.solve(scaled, (right.T / scale).T).T / scale).T


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

"""The whole problem to its global optimum, with a certificate.

For fixed tiers it is jointly convex: once the power is eliminated the upload's energy is A h(k / (B t)), a convex and
decreasing function of sqrt(B t), which is concave; the power cap k <= t B ln(1 + g p_max / (N0 B)) is a convex set. So
the dual has no gap there, and branch and bound on the tiers closes the rest.
"""

from __future__ import annotations

import numpy as np

from privtuner.wireless.arrays import BoolArray, IntArray
from privtuner.wireless.dual import Bound
from privtuner.wireless.priced import Priced
from privtuner.wireless.problem import Choices, Problem, respond

__all__ = ["Whole"]


class Whole:
    """Bandwidth, power, processor speed, server share and tier, all at once.

    Args:
        problem: of shape (devices, tiers).
        allowed: the tiers that a device may take; at least one a device.
    """

    def __init__(self, problem: Problem, allowed: BoolArray) -> None:
        self.problem = problem.without(~allowed)
        self.offset = np.where(allowed, -problem.reward, np.inf)
        p = self.problem
        most = p.energy(p.server_frequency, p.frequency_max, p.power_max, p.time)
        self.ceiling = float((most - p.reward).max(axis=1).sum())

    def market(self) -> Priced:
        """All tiers at once."""
        return Priced(self.problem)

    def fixed(self, tiers: IntArray) -> Priced:
        """One tier a device."""
        return Priced(self.problem.take(tiers))

    def recover(self, tiers: IntArray, bound: Bound) -> tuple[float, float, Choices | None]:
        """Share out all there is as the dual asks: shares are limits, and slack in one good mends want of another."""
        problem = self.problem.take(tiers)
        bandwidth, server = bound.response.demand
        bandwidth = bandwidth * (problem.bandwidth / float(bandwidth.sum()))
        server = server * (problem.server_frequency / float(server.sum()))
        shares = respond(problem, bandwidth, server, x=bound.response.x)
        energy = float(shares.energy.sum())
        return energy - float(problem.reward.sum()), energy, shares if np.isfinite(energy) else None

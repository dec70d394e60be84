"""Independent answers to the allocator's questions: CVXPY with Clarabel for fixed tiers, and plain formulas."""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np

from privtuner.wireless import System

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
NODES, WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2
"""Gauss-Legendre on [0, 1]: h(x) = (e^x - 1) / x is the integral of e^(x s) over s, which makes it a sum of cones."""


class Conic:
    """The problem with every device's tier fixed, as CVXPY sees it; `solve` may be called again and again.

    Units are chosen so that a typical share is 1, for the sake of the solver's accuracy.
    """

    def __init__(self, system: System, tiers: list[int]) -> None:
        self.system = system
        devices, channel, server = system.devices, system.channel, system.server
        count = len(devices)
        chosen = [system.tiers[tier] for tier in tiers]
        samples = np.array([device.samples for device in devices])
        encrypt = samples * [tier.encrypt_cycles for tier in chosen]
        evaluate = samples * [tier.evaluate_cycles for tier in chosen]
        nats = samples * [tier.upload_bits for tier in chosen] * math.log(2)
        down = 0.0
        if channel.downlink_rate is not None:
            down = samples * [tier.download_bits for tier in chosen] / channel.downlink_rate
        deadline = np.array([device.deadline for device in devices]) - down
        gain = np.array([device.gain for device in devices])
        reach = gain * [device.power_max for device in devices] / channel.noise_density
        low = np.array([device.frequency_min for device in devices])
        high = np.array([device.frequency_max for device in devices])
        kappa = np.array([device.capacitance for device in devices])
        band, cycles = channel.bandwidth / count, server.frequency / count
        self.offset = -system.privacy_price * sum(
            device.privacy_weight * tier.security for device, tier in zip(devices, chosen, strict=True)
        )
        # b, s in shares of an equal split; t in deadlines; f in f_max.
        b, t, f, s = (cp.Variable(count, pos=True) for _ in range(4))
        u, x, v = cp.Variable(count), cp.Variable(count), cp.Variable(count)
        ratio = nats / (band * deadline)
        energy = (
            cp.sum(cp.multiply(kappa * encrypt * high**2, cp.square(f)))
            + cp.sum(cp.multiply(channel.noise_density * nats / gain, cp.exp(cp.outer(x, NODES)) @ WEIGHTS))
            + cp.sum(cp.multiply(server.capacitance * evaluate * cycles**2, cp.square(s)))
        )
        constraints = [
            cp.SOC(b + t, cp.vstack([2 * u, b - t])),  # u^2 <= b t
            v >= cp.power(u, -2),
            x >= cp.multiply(ratio, v),
            cp.multiply(encrypt / (high * deadline), cp.inv_pos(f)) + t + cp.multiply(evaluate / (cycles * deadline), cp.inv_pos(s)) <= 1,
            cp.multiply(ratio, cp.inv_pos(t)) <= -cp.rel_entr(b, b + reach / band),
            f >= low / high,
            f <= 1,
            cp.sum(b) <= count,
            cp.sum(s) <= count,
        ]
        self.scale = float(np.sum(kappa * encrypt * high**2))
        self.problem = cp.Problem(cp.Minimize(energy / self.scale), constraints)
        self.shares = b, s
        self.units = band, cycles

    def solve(self) -> float:
        """The optimal objective, J."""
        self.problem.solve(
            solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10, max_iter=200
        )
        if self.problem.status not in ("optimal", "optimal_inaccurate"):
            raise RuntimeError(self.problem.status)
        return self.problem.value * self.scale + self.offset

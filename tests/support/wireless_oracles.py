"""Independent answers to the allocator's questions: CVXPY with Clarabel for fixed tiers, and plain formulas."""

from __future__ import annotations

import math
import warnings

import cvxpy as cp
import numpy as np

from privtuner.wireless import System

ORDERS = (16, 20, 32, 12, 24, 14)
"""Of the quadrature, in the order in which they are tried."""


class Conic:
    """The problem with every device's tier fixed, as CVXPY sees it; `solve` may be called again and again.

    h(x) = (e^x - 1) / x is the integral of e^(x s) over s in [0, 1], which Gauss-Legendre makes a sum of cones. Units
    are chosen so that a typical share is 1, for the sake of the solver's accuracy.

    Args:
        system: with devices and what is shared.
        tiers: of the devices.
        order: of the quadrature; 12 is exact to 1e-12 for x up to 14.
    """

    def __init__(self, system: System, tiers: list[int], order: int = ORDERS[0]) -> None:
        self.order = order
        nodes, weights = np.polynomial.legendre.leggauss(order)
        nodes, weights = (nodes + 1) / 2, weights / 2
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
            + cp.sum(cp.multiply(channel.noise_density * nats / gain, cp.exp(cp.outer(x, nodes)) @ weights))
            + cp.sum(cp.multiply(server.capacitance * evaluate * cycles**2, cp.square(s)))
        )
        constraints = [
            cp.SOC(b + t, cp.vstack([2 * u, b - t])),  # u^2 <= b t
            v >= cp.power(u, -2),
            x >= cp.multiply(ratio, v),
            cp.multiply(encrypt / (high * deadline), cp.inv_pos(f))
            + t
            + cp.multiply(evaluate / (cycles * deadline), cp.inv_pos(s))
            <= 1,
            # b ln(1 + r / b), written so that no number is as large as r
            cp.multiply(ratio, cp.inv_pos(t))
            <= cp.multiply(np.log(reach / band), b) - cp.rel_entr(b, cp.multiply(band / reach, b) + 1),
            f >= low / high,
            f <= 1,
            cp.sum(b) <= count,
            cp.sum(s) <= count,
        ]
        self.scale = float(np.sum(kappa * encrypt * high**2))
        self.problem = cp.Problem(cp.Minimize(energy / self.scale), constraints)
        self.shares = b, s
        self.units = band, cycles

    @classmethod
    def solvable(cls, system: System, tiers: list[int]) -> tuple[Conic, float]:
        """The statement of the first order that Clarabel solves to its tolerance (it fails on a few), and J."""
        for order in ORDERS:
            conic = cls(system, tiers, order)
            objective = conic.solve()
            if objective is not None:
                return conic, objective
        raise RuntimeError(f"Clarabel solves no statement of orders {ORDERS}")

    def solve(self) -> float | None:
        """The optimal objective, J; None where Clarabel falls short of its tolerance."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says again what the status says
            try:
                self.problem.solve(
                    solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10, max_iter=200
                )
            except cp.SolverError:
                return None
        if self.problem.status != "optimal":
            return None
        return self.problem.value * self.scale + self.offset

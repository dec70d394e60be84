"""Why a system has no allocation: which constraint of which device fails, and by how much."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.optimize import minimize_scalar

from privtuner.errors import InfeasibleError
from privtuner.wireless.arrays import BoolArray, FloatArray
from privtuner.wireless.model import System
from privtuner.wireless.problem import Problem

__all__ = ["deadline_error", "shared_error"]

_MARGIN = 1e-4  # of the factor, when one resource alone is tried
_GOLDEN = 0.6180339887498949


def deadline_error(
    system: System,
    problem: Problem,
    allowed: BoolArray,
    bandwidth: FloatArray | float,
    server: FloatArray | float,
    how: str,
) -> InfeasibleError:
    """Return the error for the device that misses its deadline most, in every tier with the given shares.

    Args:
        system: with the names.
        problem: of shape (devices, tiers).
        allowed: the tiers that count.
        bandwidth: what each device has, Hz.
        server: likewise, cycles/s.
        how: how it came to have that, for the message.
    """
    late = np.where(allowed, problem.least_time(bandwidth, server) - problem.time, np.inf)
    part = late / np.array([[device.deadline] for device in system.devices])
    worst = int(np.argmax(part.min(axis=1)))
    tier = int(np.argmin(late[worst]))
    device, best = system.devices[worst], system.tiers[tier]
    encrypt, upload, serve = (part[worst, tier] for part in problem.least_times(bandwidth, server))
    parts = {
        f"encryption at {device.frequency_max:.4g} cycles/s": encrypt,
        f"upload at {device.power_max:.4g} W": upload,
        "server": serve,
        "download": device.deadline - problem.time[worst, tier],
    }
    total = sum(parts.values())
    spelled = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in parts.items() if seconds > 0)
    return InfeasibleError(
        f"device {device.name!r} cannot meet its deadline of {device.deadline:.6g} s: {how} it takes {total:.6g} s in "
        f"its fastest tier {best.name!r} ({spelled}), {total - device.deadline:.4g} s too long; lengthen its deadline, "
        "give it fewer samples or a faster processor, or add a lighter tier",
        "deadline",
        device.name,
        float((total - device.deadline) / device.deadline),
    )


def shared_error(system: System, problem: Problem, allowed: BoolArray) -> InfeasibleError:
    """Return the error for devices that cannot all meet their deadlines together.

    The least factor by which bandwidth and server would both have to grow is the maximum over w in [0, 1] of what the
    devices need at the prices w / B and (1 - w) / F, at full power and processor speed, each in its best tier.
    """
    problem = problem.without(~allowed)
    factor, each = _factor(problem, allowed)
    worst = system.devices[int(np.argmax(each))]
    if factor <= 1:  # each tier alone would do, but no combination fits
        return InfeasibleError(
            "no choice of tiers lets all devices meet their deadlines together, though mixtures of tiers would; add "
            f"bandwidth or server cycles, or lengthen deadlines, first that of {worst.name!r}, which needs most",
            "bandwidth and server",
            worst.name,
            0.0,
        )
    grown = factor * (1 + _MARGIN)
    alone = {
        "bandwidth": replace(problem, bandwidth=grown * problem.bandwidth),
        "server": replace(problem, server_frequency=grown * problem.server_frequency),
    }
    enough = (name for name, larger in alone.items() if _factor(larger, allowed)[0] <= 1)
    constraint = next(enough, "bandwidth and server")
    have = {
        "bandwidth": f"channel.bandwidth = {problem.bandwidth:.6g} Hz",
        "server": f"server.frequency = {problem.server_frequency:.6g} cycles/s",
    }
    what = " and ".join(text for name, text in have.items() if name in constraint)
    return InfeasibleError(
        "the devices cannot all meet their deadlines: even at full power and processor speed, each in its lightest "
        f"tier, they need {factor:.6g} times {what}; add {100 * (factor - 1):.3g} % of that, or lengthen deadlines, "
        f"first that of {worst.name!r}, which needs {100 * float(each.max()) / factor:.3g} % of it",
        constraint,
        worst.name,
        factor - 1,
    )


def _factor(problem: Problem, allowed: BoolArray) -> tuple[float, FloatArray]:
    """The factor, and each device's part of it."""

    def needs(weight: float) -> tuple[float, FloatArray]:
        each: FloatArray = np.where(allowed, _need(problem, weight), np.inf).min(axis=1)
        return float(each.sum()), each

    found = minimize_scalar(lambda w: -needs(w)[0], bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-5})
    return max((needs(weight) for weight in (0.0, 1.0, float(found.x))), key=lambda result: result[0])


def _need(problem: Problem, weight: float) -> FloatArray:
    """Least w B / B_total + (1 - w) F / F_total of each choice, by golden section over the upload's x = k / (B t)."""
    p = problem
    left = p.time - p.encrypt / p.frequency_max
    shortest = p.nats / p.reach  # with all the bandwidth in the world; at x, (e^x - 1) / x times as long

    def cost(x: FloatArray) -> FloatArray:
        growth = np.expm1(x)
        serve = left - shortest * growth / x
        bandwidth, server = p.reach / growth, p.evaluate / serve
        total = weight * bandwidth / p.bandwidth + (1 - weight) * server / p.server_frequency
        return np.where(serve > 0, total, np.inf)

    high = 2 * np.log(left / shortest)  # too long an upload, for (e^x - 1) / x > e^(x / 2)
    a, b = 1e-9 * high, high
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # there
        for _ in range(50):
            c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
            less = cost(c) <= cost(d)  # also where both are inf
            a, b = np.where(less, a, c), np.where(less, d, b)
        return cost(a)  # finite, unlike b's

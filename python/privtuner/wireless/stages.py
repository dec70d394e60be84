"""The two halves of the problem, each with the other half given: what the alternating method solves in turn.

Computation: with bandwidth and power given, an upload takes a known time and energy in each tier; processor speed,
server share and tier remain, coupled by the server alone. Communication: with tier, processor and server given, the
time left for the upload is known, and using all of it is best. The sum of ratios p / r is then separable and convex in
the bandwidth, and stationary at the price mu where x = 1 + W((mu k / (A t) - 1) / e), W being Lambert's function: the
fixed point that fractional programming (Jong's method, the quadratic transform) iterates to, in closed form.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy.special import lambertw

from privtuner.wireless.arrays import FloatArray, IntArray
from privtuner.wireless.dual import TIGHT_BALANCE, Bound, maximise
from privtuner.wireless.priced import Response, server_share
from privtuner.wireless.problem import Choices, Problem, excess
from privtuner.wireless.roots import falling_root

__all__ = ["Computation", "communicate"]

_FINEST = 1e-13
_COARSE = 1e-9
_LEAST = -700.0  # of ln lambda, above where it underflows


class _ServerMarket:
    """Server cycles for sale, to devices whose uploads are given; `left` is the time that remains, s."""

    def __init__(self, problem: Problem, left: FloatArray) -> None:
        self.problem, self.left = problem, left
        self.resources = np.array([problem.server_frequency])
        self._typical = 2 * problem.capacitance * (2 * problem.encrypt / left) ** 3  # lambda, half to encrypt
        self._y = np.log(self._typical)  # ln lambda

    def start(self) -> FloatArray:
        """The price at which half of the time goes to an equal share of the server."""
        p = self.problem
        share = p.server_frequency / p.shape[0]
        saved = self._typical * p.evaluate
        worth = saved / share**2 - 2 * p.server_capacitance * p.evaluate * share
        return np.array([max(float(np.median(worth)), 1e-6 * float(np.median(saved)) / share**2)])

    def respond(self, prices: FloatArray, accuracy: float) -> Response:
        p, (nu,) = self.problem, prices

        def evaluate(y: FloatArray) -> tuple[FloatArray, ...]:
            time_price = np.exp(np.maximum(y, _LEAST))
            frequency, free = p.processor_speed(time_price)
            z, rho, sigma = server_share(nu / p.evaluate, p.server_capacitance, time_price)
            encrypt, serve = p.encrypt / frequency, p.evaluate * z
            yielding = free * encrypt * (1 / 3) + serve * rho
            return time_price, frequency, z, rho, sigma, encrypt + serve, yielding

        def miss(y: FloatArray) -> tuple[FloatArray, FloatArray]:
            *_, taken, yielding = evaluate(y)
            return np.log(taken / self.left), -yielding / taken

        with np.errstate(all="ignore"):  # a step that overflows is taken back
            high = np.full(p.shape, 600.0)
            self._y = falling_root(miss, self._y, high, max(_FINEST, min(accuracy, _COARSE)))
            time_price, frequency, z, rho, sigma, taken, yielding = evaluate(self._y)
            server = 1 / z
            value = (
                p.capacitance * p.encrypt * frequency**2
                + p.server_capacitance * p.evaluate * server**2
                + nu * server
                + time_price * (taken - self.left)
            )
            slope = server * (rho * (p.evaluate * z * sigma / yielding) - sigma)
        return Response(value, (server,), ((slope,),), self._y)


class Computation:
    """Tier, processor speed and server share, with bandwidth and power given.

    Args:
        problem: of shape (devices, tiers).
        bandwidth, power: Hz and W, shape (devices, 1).
    """

    def __init__(self, problem: Problem, bandwidth: FloatArray, power: FloatArray) -> None:
        rate = bandwidth * np.log1p(power * problem.reach / (problem.power_max * bandwidth))  # nats/s
        upload_time = problem.nats / rate
        left = problem.time - upload_time
        least = problem.encrypt / problem.frequency_max + problem.evaluate / problem.server_frequency
        impossible = left < least
        self.problem = problem.without(impossible)
        self.upload_time = self.problem.nats / rate
        self.left = self.problem.time - self.upload_time
        self.bandwidth, self.power = bandwidth, power
        p = self.problem
        self.offset = np.where(impossible, np.inf, power * self.upload_time - p.reward)
        most = p.energy(p.server_frequency, p.frequency_max, power, self.upload_time)
        self.ceiling = float((most - p.reward).max(axis=1).sum())

    def market(self) -> _ServerMarket:
        """All tiers at once."""
        return _ServerMarket(self.problem, self.left)

    def fixed(self, tiers: IntArray) -> _ServerMarket:
        """One tier a device."""
        return _ServerMarket(self.problem.take(tiers), np.take_along_axis(self.left, tiers[:, None], axis=1))

    def recover(self, tiers: IntArray, bound: Bound) -> tuple[float, float, Choices | None]:
        """Scale the server's shares to what there is; the processor takes the time that is left."""
        p = self.problem.take(tiers)
        upload_time = np.take_along_axis(self.upload_time, tiers[:, None], axis=1)
        (server,) = bound.response.demand
        server = server * min(1.0, p.server_frequency / float(server.sum()))
        left = p.time - upload_time - p.evaluate / server
        with np.errstate(divide="ignore"):
            wish = np.where(left > 0, p.encrypt / left, np.inf)
        late = wish > p.frequency_max * (1 + 1e-9)
        frequency = np.minimum(np.maximum(wish, p.frequency_min), p.frequency_max)
        each = np.where(late, np.inf, p.energy(server, frequency, self.power, upload_time))
        energy = float(each.sum())
        objective = energy - float(p.reward.sum())
        choices = Choices(self.bandwidth, server, frequency, self.power, upload_time, each, np.zeros_like(each))
        return objective, energy, choices if math.isfinite(energy) else None


class _BandMarket:
    """Bandwidth for sale, to devices that have to upload within given times; one tier a device."""

    def __init__(self, problem: Problem, upload_time: FloatArray) -> None:
        self.problem, self.upload_time = problem, upload_time
        self.resources = np.array([problem.bandwidth])
        # Full power: (e^x - 1) / x = c, so x = -1/c - W_-1(-e^(-1/c) / c).
        inverse = problem.nats / (problem.reach * upload_time)
        self.x_max = np.real(-inverse - lambertw(-inverse * np.exp(-inverse), k=-1))
        self.least = problem.nats / (self.x_max * upload_time)

    def start(self) -> FloatArray:
        """The price at which a typical device takes an equal share."""
        p = self.problem
        bandwidth = p.bandwidth / p.shape[0]
        x = np.minimum(p.nats / (bandwidth * self.upload_time), self.x_max)
        saved = p.noise_energy * excess(x, np.expm1(x)) / x
        return np.array([float(np.sqrt(saved).mean()) ** 2 / bandwidth])

    def respond(self, prices: FloatArray, accuracy: float) -> Response:  # noqa: ARG002 - exact at any accuracy
        p, (mu,) = self.problem, prices
        wanted = mu * p.nats / (p.noise_energy * self.upload_time)  # m(x)
        x = 1 + np.real(lambertw((wanted - 1) / math.e))
        # Lambert's function loses half the digits at its branch point; one Newton step on m(x) gives them back.
        growth = np.expm1(x)
        x = np.minimum(x - (excess(x, growth) - wanted) / (x * (growth + 1)), self.x_max)
        growth = np.expm1(x)
        bandwidth = p.nats / (x * self.upload_time)
        value = p.noise_energy * growth / x + mu * bandwidth
        q = x * x * (growth + 1) / excess(x, growth)
        slope = np.where(x < self.x_max, -bandwidth / q, 0.0)
        return Response(value, (bandwidth,), ((slope,),), x)


def communicate(problem: Problem, choices: Choices) -> Choices:
    """Bandwidth and power of least energy, with tier, processor and server as they are; one tier a device.

    Args:
        problem: of shape (devices, 1).
        choices: feasible; the processor's and the server's parts are kept.
    """
    upload_time = problem.time - problem.encrypt / choices.frequency - problem.evaluate / choices.server
    market = _BandMarket(problem, upload_time)
    room = problem.bandwidth - float(market.least.sum())
    if room <= 1e-12 * problem.bandwidth:
        return choices  # full power leaves no choice
    bound = maximise(market, np.zeros(problem.shape), balance=TIGHT_BALANCE)
    (bandwidth,) = bound.response.demand
    above = np.maximum(bandwidth - market.least, 0.0)
    bandwidth = market.least + above * (room / float(above.sum()))
    power = problem.power(bandwidth, upload_time)
    energy = problem.energy(choices.server, choices.frequency, power, upload_time)
    return replace(choices, bandwidth=bandwidth, power=power, upload_time=upload_time, energy=energy)

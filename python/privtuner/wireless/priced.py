"""What each device does at given prices, in closed form along one curve: the inner problem of the dual.

At a price mu of bandwidth (J/Hz), nu of server cycles (J s/cycle) and lambda of its own time (J/s), a device minimises

    kappa C f^2 + A h(k / (B t)) + kappa_s S F^2 + mu B + nu F + lambda (C / f + t + S / F - T)

over f, B, t, F, with p <= p_max. Every part has a closed form. The processor runs at f^3 = lambda / (2 kappa), within
its range. The server's 1 / F solves a cubic. The uplink is stationary along x = k / (B t),

    B = A m(x) / (x mu),   lambda = A^2 m(x)^2 / (k x mu),   m(x) = x e^x - (e^x - 1),

until p reaches p_max at x_c, and from there back along the curve of full power,

    B = r / (e^x - 1),   t = k (e^x - 1) / (r x),   lambda + p_max = mu r^2 x^2 e^x / (k m(x) (e^x - 1)^2),

with r = g p_max / N0. So the one unknown left is x in (0, x_c], on either side, and the time taken is monotone in it:
Newton's method in ln x, warm-started, inside a bracket where that fails. Whatever x it stops at, the value reported is
that of the Lagrange function at its exact minimum for the lambda of that x: never above the device's true cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from privtuner.wireless.arrays import BoolArray, FloatArray
from privtuner.wireless.problem import Problem, excess
from privtuner.wireless.roots import falling_root

__all__ = ["Priced", "Response", "server_share"]

_FINEST = 1e-13  # of the time taken, relative
_WARM_STEPS = 10
_START_STEPS = 3
_TINY = 1e-150


@dataclass(slots=True)
class Response:
    """The devices' answer to prices; arrays of the problem's shape.

    Attributes:
        value: cost with everything bought at the prices, without the reward, J: a lower bound.
        demand: what is bought of each good; one array a price.
        slope: derivatives of the demands by the logarithms of the prices; slope[i][j] is that of demand i by price j.
        x: nats a second and Hz, to begin the devices' own choices with.
    """

    value: FloatArray
    demand: tuple[FloatArray, ...]
    slope: tuple[tuple[FloatArray, ...], ...]
    x: FloatArray


def server_share(
    unit: FloatArray, capacitance: float, time_price: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The z = 1 / F of least kappa_s S / z^2 + nu / z + lambda S z: the root of lambda z^3 = (nu / S) z + 2 kappa_s.

    Args:
        unit: nu / S.
        capacitance: kappa_s.
        time_price: lambda.

    Returns:
        z, and the derivatives -d ln z / d ln lambda (in [1/3, 1/2]) and d ln z / d ln nu.
    """
    third = unit / (3 * time_price)
    half = capacitance / time_price
    inside = half * half - third * third * third
    large = np.cbrt(half + np.sqrt(np.maximum(inside, 0.0)))
    z = large + third / np.maximum(large, _TINY)  # 0 without a capacitance, where the other form takes over
    three = inside < 0  # real roots, of which the largest is positive
    if np.count_nonzero(three):
        root = np.sqrt(third)
        angle = np.arccos(np.minimum(half / (third * root), 1.0))
        np.copyto(z, 2 * root * np.cos(angle * (1 / 3)), where=three)
    steep = time_price * z * z
    across = 3 * steep - unit
    return z, steep / across, unit / across


class Priced:
    """Both goods for sale: bandwidth and server cycles. Keeps the last answer to start the next from.

    Args:
        problem: of shape (devices, tiers); each choice must be able to meet its deadline with enough of both goods.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.resources = np.array([problem.bandwidth, problem.server_frequency])
        self._steepness = problem.noise_energy**2 / problem.nats
        self._reach_reach = problem.reach**2 / problem.nats
        self._per_evaluate = 1 / problem.evaluate
        self._y: FloatArray = np.empty(0)  # ln x
        self._full: BoolArray = np.zeros(problem.shape, dtype=bool)  # at full power
        self._log_prices = np.zeros(2)
        self._drift: tuple[FloatArray | float, ...] = (0.0, 0.0)  # derivatives of y by the logarithms of the prices

    def start(self) -> FloatArray:
        """Prices to begin with: what the goods are worth to the devices in about an equal split."""
        p = self.problem
        bandwidth, server = p.bandwidth / p.shape[0], p.server_frequency / p.shape[0]
        second = p.nats / bandwidth
        x_max = np.log1p(p.reach / bandwidth)
        noise = p.noise(bandwidth)
        longest = np.maximum(p.time - p.encrypt / p.frequency_max - p.evaluate / server, 0.1 * p.time)
        upload = longest
        for _ in range(_START_STEPS):  # all times are worth the same
            x = np.minimum(second / upload, x_max)
            growth = np.expm1(x)
            m = excess(x, growth)
            time_price = noise * m
            frequency, _ = p.processor_speed(time_price)
            used, _ = p.server_speed(time_price, server)
            upload = np.maximum(p.time - p.encrypt / frequency - p.evaluate / used, 0.3 * longest)
        worth = p.noise_energy * m / (x * bandwidth)
        mu = float(np.sqrt(worth).mean()) ** 2  # demand is close to a power -1/2 of the price
        nu = float(np.maximum((time_price / server**2 - 2 * p.server_capacitance * server) * p.evaluate, 0.0).mean())
        prices = np.array([mu, max(nu, 1e-6 * mu * p.bandwidth / p.server_frequency)])
        # In the same time, m(x) is in proportion to the price.
        self._y, self._full = np.log(x) + np.log(mu / worth) * m / (x * x * (growth + 1)), np.zeros(p.shape, dtype=bool)
        self._log_prices, self._drift = np.log(prices), (0.0, 0.0)
        return prices

    def respond(self, prices: FloatArray, accuracy: float = _FINEST) -> Response:
        """The answer to prices (J/Hz, J s/cycle), both positive.

        Args:
            prices: one a good.
            accuracy: the accuracy of costs and demands, relative. The costs are lower bounds at any accuracy.
        """
        with np.errstate(all="ignore"):  # a step that overflows is taken back
            state = None
            if self._y.size:
                mu, nu = np.clip(np.log(prices) - self._log_prices, -1.0, 1.0)
                self._y = self._y + (self._drift[0] * mu + self._drift[1] * nu)
                # What is reported is right to second order in the miss: values by duality, demands by correction.
                state = self._newton(prices, max(math.sqrt(accuracy), 10 * _FINEST))
            if state is None:
                self._search(prices)
                state = self._evaluate(prices)
            return self._response(prices, state)

    def _newton(self, prices: FloatArray, accuracy: float) -> _State | None:
        """Newton's method from where the last answer lies, as far as it goes without a bracket."""
        for _ in range(_WARM_STEPS):
            state = self._evaluate(prices)
            worst = np.abs(state.miss).max()
            if not worst < 12.0:
                return None
            beyond = state.draw > prices[0] * (1 + 1e-12)
            some_beyond = np.count_nonzero(beyond)
            if worst <= accuracy and not some_beyond:
                return state
            step = state.miss / state.slope
            if some_beyond:  # back to x_c at least; power is full from there on if time is still short
                back = np.log(state.draw / prices[0]) / (state.q + state.x * (1 + 1 / state.growth) - 1)
                self._full = np.where(beyond, state.miss > state.slope * back, self._full)
                step = np.where(beyond, np.where(self._full, back, np.maximum(back, step)), step)
            self._y = self._y - step
        return None

    def _search(self, prices: FloatArray) -> None:
        """Find y from anywhere: first where full power begins, then on the side where the time is right."""
        p, mu = self.problem, prices[0]
        # x_c: (m(x) / x) (e^x - 1) = r mu / A, from a point above it, so that Newton's method comes down to it.
        wanted = np.log(p.reach * mu / p.noise_energy)
        x = np.minimum(np.exp(0.5 * (wanted + np.log(2.0))), np.maximum(2.0, 0.5 * wanted + 1.0))
        for _ in range(50):
            growth = np.expm1(x)
            m = excess(x, growth)
            error = np.log(m / x) + np.log(growth) - wanted
            x = x * np.exp(-error / (x * (growth + 1) * (x / m + 1 / growth) - 1))
            if np.abs(error).max() <= 1e-14 * np.maximum(1.0, np.abs(wanted)).max():
                break
        high = np.log(x)
        self._y, self._full = high, np.zeros(p.shape, dtype=bool)
        self._full = self._evaluate(prices).miss > 0
        sign = np.where(self._full, -1.0, 1.0)  # along x the time taken falls on the one side and grows on the other

        def miss(y: FloatArray) -> tuple[FloatArray, FloatArray]:
            self._y = y
            state = self._evaluate(prices)
            return sign * state.miss, sign * state.slope

        falling_root(miss, high, high, _FINEST)

    def _evaluate(self, prices: FloatArray) -> _State:
        p, (mu, nu) = self.problem, prices
        x = np.exp(self._y)
        growth = np.expm1(x)
        m = excess(x, growth)
        grown = x * growth + x  # x e^x
        ratio = m / x
        q = grown / ratio
        noise_ratio = p.noise_energy * ratio
        time_price = self._steepness * (m * ratio) / mu
        bandwidth = noise_ratio / mu
        t_y, l_y, b_y = -q, 2 * q - 1, q - 1
        t_mu: FloatArray | float = 1.0
        l_mu: FloatArray | float = -1.0
        b_mu: FloatArray | float = -1.0
        if np.count_nonzero(self._full):
            full = self._full
            total = mu * self._reach_reach * grown / (growth * growth * ratio)
            b = m / growth
            capped = np.maximum(total - p.power_max, 1e-12 * p.power_max)
            lever = total / capped
            np.copyto(time_price, capped, where=full)
            np.copyto(bandwidth, p.reach / growth, where=full)
            np.copyto(t_y, b, where=full)
            np.copyto(l_y, lever * (x - 2 * b - q), where=full)
            np.copyto(b_y, -1 - b, where=full)
            t_mu, b_mu = np.where(full, 0.0, 1.0), np.where(full, 0.0, -1.0)
            l_mu = np.where(full, lever, -1.0)
        upload = p.nats / (bandwidth * x)
        frequency, free = p.processor_speed(time_price)
        encrypt = p.encrypt / frequency
        z, rho, sigma = server_share(nu * self._per_evaluate, p.server_capacitance, time_price)
        serve = p.evaluate * z
        taken = encrypt + upload + serve
        # -d(time) / d ln lambda of processor and server
        yielding = serve * rho + free * encrypt * (1 / 3)
        along = upload * t_y - yielding * l_y
        return _State(
            x=x,
            growth=growth,
            q=q,
            miss=np.log(taken / p.time),
            slope=along / taken,
            draw=noise_ratio * growth / p.reach,
            bandwidth=bandwidth,
            upload=upload,
            frequency=frequency,
            z=z,
            serve=serve,
            time_price=time_price,
            taken=taken,
            yielding=yielding,
            along=along,
            b_y=b_y,
            b_mu=b_mu,
            l_y=l_y,
            l_mu=l_mu,
            t_mu=t_mu,
            rho=rho,
            sigma=sigma,
        )

    def _response(self, prices: FloatArray, s: _State) -> Response:
        p, (mu, nu) = self.problem, prices
        server = 1 / s.z
        value = (
            p.capacitance * p.encrypt * (s.frequency * s.frequency)
            + p.noise_energy * (s.growth / s.x)
            + p.evaluate * (p.server_capacitance * server * server)
            + mu * s.bandwidth
            + nu * server
            + s.time_price * (s.taken - p.time)
        )
        # How y moves with the prices while the time stays right.
        y_mu = (s.yielding * s.l_mu - s.upload * s.t_mu) / s.along
        y_nu = -s.serve * s.sigma / s.along
        rest = -s.miss / s.slope
        self._y = self._y + rest
        bandwidth, server = s.bandwidth * np.exp(s.b_y * rest), server * np.exp(s.rho * s.l_y * rest)
        slope = (
            (bandwidth * (s.b_y * y_mu + s.b_mu), bandwidth * (s.b_y * y_nu)),
            (server * s.rho * (s.l_y * y_mu + s.l_mu), server * (s.rho * s.l_y * y_nu - s.sigma)),
        )
        self._log_prices, self._drift = np.log(prices), (y_mu, y_nu)
        return Response(value, (bandwidth, server), slope, s.x)


@dataclass(slots=True)
class _State:
    """One evaluation along the curve: the equation, its derivatives, and the choices there."""

    x: FloatArray
    growth: FloatArray  # e^x - 1
    q: FloatArray  # x^2 e^x / m(x)
    miss: FloatArray  # ln(time taken / time given)
    slope: FloatArray  # its derivative by y
    draw: FloatArray  # the price of bandwidth at which full power begins here
    bandwidth: FloatArray
    upload: FloatArray
    frequency: FloatArray
    z: FloatArray
    serve: FloatArray
    time_price: FloatArray
    taken: FloatArray
    yielding: FloatArray
    along: FloatArray
    # Derivatives of ln B, ln lambda and ln t by y and by ln mu.
    b_y: FloatArray
    b_mu: FloatArray | float
    l_y: FloatArray
    l_mu: FloatArray | float
    t_mu: FloatArray | float
    rho: FloatArray
    sigma: FloatArray

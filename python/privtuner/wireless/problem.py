"""The system as arrays, one row a device and one column a tier, and the physics that the solvers share.

With k = d L_up ln 2 and x = k / (B t), the rate equation k = B t ln(1 + g p / (N0 B)) gives the power
p = (N0 B / g) (e^x - 1), and the energy of an upload is p t = A h(x) with A = N0 k / g and h(x) = (e^x - 1) / x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from privtuner.wireless.arrays import BoolArray, FloatArray, IntArray
from privtuner.wireless.model import System
from privtuner.wireless.roots import falling_root

__all__ = ["Choices", "Problem", "excess", "respond"]

_SERIES = tuple((j + 1) / math.factorial(j + 2) for j in range(9))  # of (x e^x - e^x + 1) / x^2
_PAST = 3.0  # d ln lambda / dy beyond full power, where only a monotone path is needed
_BY_TIER = ("encrypt", "evaluate", "nats", "noise_energy", "time", "reward")


@dataclass(frozen=True)
class Problem:
    """Coefficients of every choice; shapes (devices, tiers) or (devices, 1), SI units.

    Attributes:
        encrypt: C = c_enc d, cycles. evaluate: S = c_srv d, cycles. nats: k, the upload in nats.
        noise_energy: A = N0 k / g, J: the energy of an upload that has all the time and bandwidth there is.
        reach: g p_max / N0, Hz: the bandwidth in which full power arrives as strong as the noise.
        time: T less the download, s. reward: alpha omega s, J.
        capacitance, frequency_min, frequency_max, power_max: limits and constants of the devices.
        server_capacitance, server_frequency, bandwidth: the same of what is shared, scalars.
    """

    encrypt: FloatArray
    evaluate: FloatArray
    nats: FloatArray
    noise_energy: FloatArray
    reach: FloatArray
    time: FloatArray
    reward: FloatArray
    capacitance: FloatArray
    frequency_min: FloatArray
    frequency_max: FloatArray
    power_max: FloatArray
    server_capacitance: float
    server_frequency: float
    bandwidth: float

    @classmethod
    def of(cls, system: System) -> Problem:
        """Tabulate a system."""
        devices, tiers, channel = system.devices, system.tiers, system.channel

        def column(name: str) -> FloatArray:
            return np.array([getattr(device, name) for device in devices], dtype=np.float64)[:, None]

        def row(name: str) -> FloatArray:
            return np.array([getattr(tier, name) for tier in tiers], dtype=np.float64)[None, :]

        samples, gain, power_max = column("samples"), column("gain"), column("power_max")
        nats = samples * row("upload_bits") * math.log(2)
        time = np.broadcast_to(column("deadline"), nats.shape)
        if channel.downlink_rate is not None:
            time = time - samples * row("download_bits") / channel.downlink_rate
        return cls(
            encrypt=samples * row("encrypt_cycles"),
            evaluate=samples * row("evaluate_cycles"),
            nats=nats,
            noise_energy=channel.noise_density * nats / gain,
            reach=gain * power_max / channel.noise_density,
            time=time,
            reward=system.privacy_price * column("privacy_weight") * row("security"),
            capacitance=column("capacitance"),
            frequency_min=column("frequency_min"),
            frequency_max=column("frequency_max"),
            power_max=power_max,
            server_capacitance=system.server.capacitance,
            server_frequency=system.server.frequency,
            bandwidth=channel.bandwidth,
        )

    def possible(self) -> BoolArray:
        """Say where a device could meet its deadline if it had the whole bandwidth and the whole server to itself."""
        possible: BoolArray = self.least_time(self.bandwidth, self.server_frequency) <= self.time
        return possible

    def least_times(
        self, bandwidth: FloatArray | float, server: FloatArray | float
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Seconds of encryption, upload and server at full power and processor speed with these shares."""
        upload = self.nats / (bandwidth * np.log1p(self.reach / bandwidth))
        return self.encrypt / self.frequency_max, upload, self.evaluate / server

    def least_time(self, bandwidth: FloatArray | float, server: FloatArray | float) -> FloatArray:
        """The sum of `least_times`."""
        encrypt, upload, serve = self.least_times(bandwidth, server)
        return encrypt + upload + serve

    def processor_speed(self, time_price: FloatArray) -> tuple[FloatArray, BoolArray]:
        """The f at which a second is worth ``time_price`` (J/s), 2 kappa f^3, and where it is within its range."""
        wish = np.cbrt(time_price / (2 * self.capacitance))
        frequency: FloatArray = np.minimum(np.maximum(wish, self.frequency_min), self.frequency_max)
        return frequency, frequency == wish

    def server_speed(self, time_price: FloatArray, most: FloatArray | float) -> tuple[FloatArray, BoolArray]:
        """The server's F at which a second is worth ``time_price``, 2 kappa_s F^3, or ``most``; where it is less."""
        wish = np.cbrt(time_price / max(2 * self.server_capacitance, 1e-300))
        return np.minimum(wish, most), wish < most

    def noise(self, bandwidth: FloatArray | float) -> FloatArray:
        """N0 B / g, W: the power that arrives as strong as the noise."""
        return self.noise_energy * bandwidth / self.nats

    def power(self, bandwidth: FloatArray, upload_time: FloatArray) -> FloatArray:
        """W that bring the upload through in that time; no more than there is."""
        wish = self.noise(bandwidth) * np.expm1(self.nats / (bandwidth * upload_time))
        power: FloatArray = np.minimum(wish, self.power_max)
        return power

    def without(self, impossible: BoolArray) -> Problem:
        """The problem with those choices made harmless copies of the device's first possible one.

        Their costs are finite then, and mean nothing: the caller bars them.
        """
        if not impossible.any():
            return self
        stand_in = np.broadcast_to(np.argmin(impossible, axis=1)[:, None], self.shape)
        place = np.where(impossible, stand_in, np.arange(self.shape[1]))
        return self._gather(place)

    def _gather(self, place: IntArray) -> Problem:
        rows = np.arange(len(place))[:, None]
        return replace(self, **{name: getattr(self, name)[rows, place] for name in _BY_TIER})

    def energies(
        self,
        server: FloatArray | float,
        frequency: FloatArray,
        power: FloatArray,
        upload_time: FloatArray,
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Energy of encryption, upload and server, J."""
        return (
            self.capacitance * self.encrypt * frequency**2,
            power * upload_time,
            self.server_capacitance * self.evaluate * server**2,
        )

    def energy(
        self, server: FloatArray | float, frequency: FloatArray, power: FloatArray, upload_time: FloatArray
    ) -> FloatArray:
        """The sum of `energies`."""
        encrypt, upload, serve = self.energies(server, frequency, power, upload_time)
        return encrypt + upload + serve

    @property
    def shape(self) -> tuple[int, int]:
        """(devices, tiers)."""
        return self.nats.shape[0], self.nats.shape[1]

    def take(self, tiers: IntArray) -> Problem:
        """The problem with the given tiers of each device: an array (devices, tiers), or (devices,) for one each."""
        if self.shape[1] == 1:
            return self
        return self._gather(tiers.reshape(len(tiers), -1))


def excess(x: FloatArray, growth: FloatArray) -> FloatArray:
    """x e^x - (e^x - 1) for x > 0, with ``growth`` = e^x - 1 as expm1 gives it; no cancellation for small x."""
    value: FloatArray = x * (growth + 1) - growth
    small = x < 0.05
    if np.count_nonzero(small):
        series = np.zeros_like(x)
        for coefficient in reversed(_SERIES):
            series = series * x + coefficient
        value = np.where(small, x * x * series, value)
    return value


@dataclass(frozen=True)
class Choices:
    """Everything that is chosen but the tier; arrays of the problem's shape.

    Attributes:
        bandwidth, server: the shares, Hz and cycles/s.
        frequency: the frequency of the processor, cycles/s. power: W. upload_time: s.
        energy: J, of encryption, upload and server together; inf where the deadline cannot be met.
        late: s by which the deadline is missed at full processor speed and power; 0 where it is met.
    """

    bandwidth: FloatArray
    server: FloatArray
    frequency: FloatArray
    power: FloatArray
    upload_time: FloatArray
    energy: FloatArray
    late: FloatArray

    def take(self, tiers: IntArray) -> Choices:
        """The choices for one tier a device; shapes (devices, 1)."""
        place = tiers[:, None]
        return Choices(**{name: np.take_along_axis(value, place, axis=1) for name, value in vars(self).items()})


def respond(
    problem: Problem,
    bandwidth: npt.ArrayLike,
    server: npt.ArrayLike,
    *,
    x: FloatArray | None = None,
    tolerance: float = 1e-9,
) -> Choices:
    """Choose processor speed, power and the use of the server within given shares, each device by itself.

    Minimises kappa C f^2 + A h(k / (B t)) + kappa_s S F^2 over C / f + t + S / F = T. A second is worth
    lambda = (N0 B / g) m(x) to the upload, m(x) = x e^x - (e^x - 1), and 2 kappa f^3 and 2 kappa_s F^3 to the others:
    along x all times fall, and at full power along lambda, so one monotone equation remains.

    Args:
        problem: of shape (devices, tiers).
        bandwidth: Hz; a shape that broadcasts to the problem's.
        server: cycles/s at most; likewise.
        x: to begin with.
        tolerance: the tolerance of the deadline, relative: misses up to it are let pass.
    """
    p, shape = problem, problem.shape
    bandwidth, server = np.broadcast_to(bandwidth, shape), np.broadcast_to(server, shape)
    second = p.nats / bandwidth
    x_max = np.log1p(p.reach / bandwidth)
    least = p.least_time(bandwidth, server)
    miss = least - p.time
    met = miss <= tolerance * p.time
    time = np.where(met, np.maximum(p.time, least), least)
    noise = p.noise(bandwidth)

    def slow(y: FloatArray) -> tuple[FloatArray, FloatArray]:
        past = y > full
        x = np.exp(np.minimum(y, full))
        growth = np.expm1(x)
        m = excess(x, growth)
        time_price = noise * m * np.where(past, np.exp(_PAST * (y - full)), 1.0)
        frequency, free = p.processor_speed(time_price)
        used, server_free = p.server_speed(time_price, server)
        encrypt, upload, serve = p.encrypt / frequency, second / x, p.evaluate / used
        taken = encrypt + upload + serve
        steep = np.where(past, _PAST, x * x * (growth + 1) / m)  # d ln lambda / dy
        falling = np.where(past, 0.0, upload) + steep * (1 / 3) * (free * encrypt + server_free * serve)
        return np.log(taken / time), -falling / taken

    full = np.log(x_max)
    price_full = noise * excess(x_max, np.expm1(x_max))
    # Beyond this price there is nothing left to speed up.
    price_all = np.maximum(2 * p.capacitance * p.frequency_max**3, 2 * p.server_capacitance * server**3)
    high = full + np.log(np.maximum(price_all / price_full, 1.0)) / _PAST
    with np.errstate(divide="ignore", invalid="ignore"):
        y = falling_root(slow, np.minimum(full, np.log(3 * second / time if x is None else x)), high, 1e-13)
    at = np.exp(np.minimum(y, full))
    time_price = noise * excess(at, np.expm1(at)) * np.exp(_PAST * np.maximum(y - full, 0.0))
    frequency, _ = p.processor_speed(time_price)
    used, _ = p.server_speed(time_price, server)
    upload = np.maximum(time - p.encrypt / frequency - p.evaluate / used, second / x_max)
    power = p.power(bandwidth, upload)
    energy = np.where(met, p.energy(used, frequency, power, upload), np.inf)
    return Choices(bandwidth, used, frequency, power, upload, energy, np.where(met, 0.0, miss))

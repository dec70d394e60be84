"""The system as arrays, one row a device and one column a tier, and the physics that the solvers share.

With k = d L_up ln 2 and x = k / (B t), the rate equation k = B t ln(1 + g p / (N0 B)) gives the power
p = (N0 B / g) (e^x - 1), and the energy of an upload is p t = A h(x) with A = N0 k / g and h(x) = (e^x - 1) / x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .model import System

__all__ = ["FloatArray", "IntArray", "Problem", "Shares", "excess", "respond"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

_SERIES = tuple((j + 1) / math.factorial(j + 2) for j in range(9))  # of (x e^x - e^x + 1) / x^2
_NEWTON_STEPS = 60
_BY_TIER = ("encrypt", "evaluate", "nats", "noise_energy", "time", "reward")


@dataclass(frozen=True)
class Problem:
    """Coefficients of every choice; shapes (devices, tiers) or (devices, 1), SI units.

    Attributes:
        encrypt: C = c_enc d, cycles. evaluate: S = c_srv d, cycles. nats: k, the upload in nats.
        noise_energy: A = N0 k / g, J: the energy of an upload that has all the time and bandwidth there is.
        reach: g p_max / N0, Hz: the bandwidth in which full power arrives as strong as the noise.
        time: T less the download, s. reward: alpha omega s, J.
        capacitance, frequency_min, frequency_max, power_max: of the devices.
        server_capacitance, server_frequency, bandwidth: of what is shared, scalars.
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

    def possible(self) -> npt.NDArray[np.bool_]:
        """Where a device could meet its deadline if it had the whole bandwidth and the whole server to itself."""
        possible: npt.NDArray[np.bool_] = respond(self, self.bandwidth, self.server_frequency).late == 0
        return possible

    def without(self, impossible: npt.NDArray[np.bool_]) -> Problem:
        """The problem with those choices made harmless copies of the device's first possible one.

        Their costs are finite then, and mean nothing: the caller bars them.
        """
        if not impossible.any():
            return self
        stand_in = np.broadcast_to(np.argmin(impossible, axis=1)[:, None], self.shape)
        place = np.where(impossible, stand_in, np.arange(self.shape[1]))
        return replace(self, **{name: np.take_along_axis(getattr(self, name), place, axis=1) for name in _BY_TIER})

    @property
    def shape(self) -> tuple[int, int]:
        """(devices, tiers)."""
        return self.nats.shape[0], self.nats.shape[1]

    def take(self, tiers: IntArray) -> Problem:
        """The problem with the tier of every device fixed; shapes (devices, 1)."""
        place = tiers[:, None]
        return replace(self, **{name: np.take_along_axis(getattr(self, name), place, axis=1) for name in _BY_TIER})

    def only(self, devices: Sequence[int] | IntArray) -> Problem:
        """The problem of some of the devices, with all that is shared to themselves."""
        narrow = [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]
        return replace(self, **{name: getattr(self, name)[devices] for name in narrow})


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
class Shares:
    """The best each device can do with given shares of bandwidth and server; arrays of the problem's shape.

    Attributes:
        bandwidth, server: the shares, Hz and cycles/s.
        frequency: cycles/s. power: W. upload_time: s.
        energy: J, of encryption, upload and server together; inf where the deadline cannot be met.
        late: s by which the deadline is missed at full processor speed and power; 0 where it is met.
        price: lambda, J that a second more would save; the server's part of the time is given.
    """

    bandwidth: FloatArray
    server: FloatArray
    frequency: FloatArray
    power: FloatArray
    upload_time: FloatArray
    energy: FloatArray
    late: FloatArray
    price: FloatArray


def respond(
    problem: Problem,
    bandwidth: npt.ArrayLike,
    server: npt.ArrayLike,
    *,
    x: FloatArray | None = None,
    tolerance: float = 1e-9,
) -> Shares:
    """Choose processor speed, power and upload time for given shares, each device by itself.

    Minimises kappa C f^2 + A h(k / (B t)) over C / f + t = T - S / F. Stationary where 2 kappa f^3 = (N0 B / g) m(x),
    m(x) = x e^x - (e^x - 1): along x both times fall, so one monotone equation in ln x remains, solved by Newton's
    method inside a bracket.

    Args:
        problem: of shape (devices, tiers).
        bandwidth, server: Hz and cycles/s; shapes that broadcast to the problem's.
        x: to begin with.
        tolerance: of the deadline, relative: misses up to it are met by cutting the times to fit.
    """
    shape = problem.shape
    bandwidth, server = np.broadcast_to(bandwidth, shape), np.broadcast_to(server, shape)
    left = problem.time - problem.evaluate / server
    encrypt_min = problem.encrypt / problem.frequency_max
    x_max = np.log1p(problem.reach / bandwidth)
    upload_min = problem.nats / (bandwidth * x_max)
    miss = encrypt_min + upload_min - left
    late = np.where(miss > tolerance * problem.time, miss, 0.0)
    met = late == 0
    left = np.where(met, np.maximum(left, encrypt_min + upload_min), encrypt_min + upload_min)

    noise = problem.noise_energy * bandwidth / problem.nats  # N0 B / g
    high = np.log(x_max)
    low = np.full(shape, -np.inf)
    y = np.minimum(high, np.log(3 * problem.nats / (bandwidth * left) if x is None else x))
    for _ in range(_NEWTON_STEPS):
        x = np.exp(y)
        growth = np.expm1(x)
        m = excess(x, growth)
        wish = np.cbrt(noise * m / (2 * problem.capacitance))
        f = np.minimum(np.maximum(wish, problem.frequency_min), problem.frequency_max)
        encrypt, upload = problem.encrypt / f, problem.nats / (bandwidth * x)
        g = np.log((encrypt + upload) / left)
        done = (np.abs(g) <= 1e-13) | ((y >= high) & (g > 0)) | (high - low <= 1e-15)
        if done.all():
            break
        low, high = np.where(g > 0, np.maximum(low, y), low), np.where(g < 0, np.minimum(high, y), high)
        slope = (upload + np.where(f == wish, x * x * (growth + 1) / (3 * m), 0.0) * encrypt) / (encrypt + upload)
        step = y + g / slope
        middle = np.where(np.isfinite(low), 0.5 * (low + high), high - 2.0)
        y = np.where(done, y, np.where((step > low) & (step < high), step, np.where(step >= high, high, middle)))
    # Times that fit exactly: the upload gets what encryption leaves, down to what full power can do.
    frequency = np.maximum(f, problem.encrypt / (left - upload_min) * (1 - 1e-15))
    frequency = np.minimum(frequency, problem.frequency_max)
    upload = np.maximum(left - problem.encrypt / frequency, upload_min)
    x = problem.nats / (bandwidth * upload)
    power = np.minimum(noise * np.expm1(x), problem.power_max)
    energy = (
        problem.capacitance * problem.encrypt * frequency**2
        + power * upload
        + problem.server_capacitance * problem.evaluate * server**2
    )
    price = noise * excess(x, np.expm1(x))
    return Shares(bandwidth, server, frequency, power, upload, np.where(met, energy, np.inf), late, price)

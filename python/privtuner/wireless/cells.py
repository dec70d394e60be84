"""Random cells for experiments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from privtuner.errors import InputError
from privtuner.wireless.files import default_tiers
from privtuner.wireless.model import Channel, Device, Server, System, Tier, check_integer, is_number

__all__ = ["Cell", "rings"]

_NEAREST = 10.0  # m
_PATH_LOSS, _PER_DECADE = 128.1, 37.6  # dB at 1 km, and a decade of distance (3GPP TR 36.814, table A.2.1.1.3-1)
_NOISE_DBM = -174.0  # a Hz, at room temperature
_RINGS = ("ckks-8192", "ckks-16384", "ckks-32768")


def rings(tiers: Sequence[Tier]) -> tuple[Tier, ...]:
    """Return the CKKS sets of a calibrated table, which differ in the ring alone; all tiers of any other table."""
    return tuple(tier for tier in tiers if tier.name in _RINGS) or tuple(tiers)


def _default_rings() -> tuple[Tier, ...]:
    return rings(default_tiers())


@dataclass(frozen=True)
class Cell:
    """A base station and devices around it, uniformly in a disc: `draw` gives a system.

    Path loss is 128.1 + 37.6 log10(distance in km) dB, at no less than 10 m, with log-normal shadowing; noise is -174
    dBm/Hz.

    Attributes:
        devices: how many.
        radius: the radius of the cell, m.
        shadowing: standard deviation, dB.
        bandwidth: Hz. power_max: transmit power of a device, W.
        frequency_min, frequency_max: range of a device's processor, cycles/s. capacitance: J s^2 / cycle^3.
        server_frequency: cycles/s. server_capacitance: J s^2 / cycle^3.
        samples: samples of a device, a round. deadline: s.
        privacy_price: J a bit of security.
        tiers: to choose from; default the package's CKKS sets of one depth in three rings.

    Raises:
        InputError: a value is out of range (also `draw`, for those that `System` checks).
    """

    devices: int = 10
    radius: float = 250.0
    shadowing: float = 8.0
    bandwidth: float = 20e6
    power_max: float = 0.2
    frequency_min: float = 1e8
    frequency_max: float = 2.5e9
    capacitance: float = 1e-28
    server_frequency: float = 10e9
    server_capacitance: float = 1e-28
    samples: float = 64.0
    deadline: float = 100.0
    privacy_price: float = 0.02
    tiers: tuple[Tier, ...] = field(default_factory=_default_rings, repr=False)

    def __post_init__(self) -> None:
        check_integer("devices", self.devices, 1)
        if not is_number(self.radius) or not _NEAREST <= self.radius <= 1e5:
            raise InputError(f"radius = {self.radius!r}: must be in [{_NEAREST:g}, 100000], in m")
        if not is_number(self.shadowing) or not 0 <= self.shadowing <= 30:
            raise InputError(f"shadowing = {self.shadowing!r}: must be in [0, 30], in dB")

    def draw(self, seed: int) -> System:
        """The system of a seed. Larger cells of the same seed begin with the same devices at the same places."""
        check_integer("seed", seed, 0)
        area = np.random.default_rng([seed, 0]).random(self.devices)  # part of the disc inside; angles do not matter
        shadow = np.random.default_rng([seed, 1]).normal(size=self.devices) * self.shadowing
        nearest = (_NEAREST / self.radius) ** 2
        distance = self.radius * np.sqrt(np.maximum(area, nearest))
        gains = 10 ** (-(_PATH_LOSS + _PER_DECADE * np.log10(distance / 1e3) + shadow) / 10)
        devices = [
            Device(
                name=f"device-{number}",
                samples=self.samples,
                gain=float(gain),
                power_max=self.power_max,
                capacitance=self.capacitance,
                frequency_min=self.frequency_min,
                frequency_max=self.frequency_max,
                deadline=self.deadline,
            )
            for number, gain in enumerate(gains, start=1)
        ]
        return System(
            devices=tuple(devices),
            tiers=self.tiers,
            server=Server(self.server_frequency, self.server_capacitance),
            channel=Channel(self.bandwidth, 10 ** (_NOISE_DBM / 10) / 1e3),
            privacy_price=self.privacy_price,
        )

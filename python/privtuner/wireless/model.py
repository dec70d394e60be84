"""What is given: devices, server, channel, tiers, and the system of them. SI units throughout.

The model is that of `privtuner.wireless`: device n encrypts d_n samples at f_n cycles a second, uploads them in a band
B_n at power p_n, and the server evaluates them at F_n cycles a second, within the deadline T_n.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from privtuner import security
from privtuner.errors import InputError

__all__ = ["SECURITY_CEILING", "SECURITY_FLOOR", "Channel", "Device", "Server", "System", "Tier"]

SECURITY_FLOOR = 128.0
"""Bits of security below which a tier is refused."""
SECURITY_CEILING = 256.0
"""Bits beyond which more count for nothing: the highest level of the Homomorphic Encryption Standard."""

_LARGEST = sys.float_info.max
_LEAST_SIGMA, _LARGEST_SIGMA = 3.0, 1e9  # the standard's error has 3.19
_SECRETS = {"ternary": security.SIGMA_TERNARY}


def _positive(unit: str, *, zero: bool = False, default: Any = ...) -> Any:
    """A dataclass field for a finite number above zero (or from zero on), with its unit."""
    metadata = {"unit": unit, "zero": zero}
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def is_number(value: object) -> bool:
    """Whether this is a finite real number that a double holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -_LARGEST <= value <= _LARGEST


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise `InputError` unless this is an integer (and no bool) in the range."""
    in_range = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not in_range or (most is not None and value > most):  # type: ignore[operator]
        allowed = f"of at least {least}" if most is None else f"in [{least}, {most}]"
        raise InputError(f"{name} = {value!r}: must be an integer {allowed}")


def _check(record: Any) -> None:
    """Hold every numeric field to its range; the message names field, value and range."""
    for entry in fields(record):
        if "unit" not in entry.metadata:
            continue
        value, zero, unit = getattr(record, entry.name), entry.metadata["zero"], entry.metadata["unit"]
        if value is None and entry.default is None:
            continue
        if not is_number(value) or not (value >= 0 if zero else value > 0):
            raise InputError(f"{entry.name} = {value!r}: must be a number in {'[' if zero else '('}0, inf), in {unit}")


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name or len(name) > 100 or not name.isprintable():
        raise InputError(f"name = {name!r}: must be a printable string of 1 to 100 characters")


@dataclass(frozen=True)
class Device:
    """A mobile device that fine-tunes on data of its own.

    Attributes:
        name: for tables and messages.
        samples: d, samples a round.
        gain: g, power gain of the channel to the server, path loss and fading included; linear, not dB.
        power_max: p_max, largest transmit power, W.
        capacitance: kappa, effective switched capacitance, J s^2 / cycle^3: a cycle at f cycles/s takes kappa f^2 J.
        frequency_min, frequency_max: range of the processor, cycles/s.
        deadline: T, for encrypting, uploading, evaluating and downloading one round, s.
        privacy_weight: omega, how much this device's security counts in the objective.

    Raises:
        InputError: a value is out of range.
    """

    name: str
    samples: float = _positive("samples a round")
    gain: float = _positive("1 (a linear power gain, not dB)")
    power_max: float = _positive("W")
    capacitance: float = _positive("J s^2 / cycle^3")
    frequency_min: float = _positive("cycles/s")
    frequency_max: float = _positive("cycles/s")
    deadline: float = _positive("s")
    privacy_weight: float = _positive("1", zero=True, default=1.0)

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check(self)
        if self.frequency_min > self.frequency_max:
            raise InputError(
                f"frequency_min = {self.frequency_min:g}: must be in (0, frequency_max], in cycles/s; "
                f"frequency_max = {self.frequency_max:g}"
            )


@dataclass(frozen=True)
class Server:
    """The server that all devices share.

    Attributes:
        frequency: F, cycles/s to hand out among the devices.
        capacitance: kappa_s, effective switched capacitance, J s^2 / cycle^3; 0 leaves the server's energy out.

    Raises:
        InputError: a value is out of range.
    """

    frequency: float = _positive("cycles/s")
    capacitance: float = _positive("J s^2 / cycle^3", zero=True)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Channel:
    """The uplink that all devices share by frequency division.

    Attributes:
        bandwidth: B, Hz to hand out among the devices.
        noise_density: N0, W/Hz.
        downlink_rate: bit/s at which each device receives; None leaves the download out of the deadline.

    Raises:
        InputError: a value is out of range.
    """

    bandwidth: float = _positive("Hz")
    noise_density: float = _positive("W/Hz")
    downlink_rate: float | None = _positive("bit/s", default=None)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Tier:
    """A set of parameters of the encryption: what it protects and what it costs.

    Attributes:
        name: for tables and messages.
        ring_dimension: N, a power of two.
        log2_modulus: log2 of the largest modulus anything is encrypted under, special primes included (log2 QP).
        encrypt_cycles: c_enc, cycles a sample that a device takes to encrypt and decrypt.
        evaluate_cycles: c_srv, cycles a sample that the server takes.
        upload_bits, download_bits: L_up and L_down, bits a sample.
        error_sigma: standard deviation of the error, of a coefficient.
        secret: distribution of the secret; ``"ternary"`` (uniform) is the one the estimate covers.

    Raises:
        InputError: a value is out of range, or the estimate does not cover the set.
    """

    name: str
    ring_dimension: int
    log2_modulus: float = _positive("bits")
    encrypt_cycles: float = _positive("cycles a sample")
    evaluate_cycles: float = _positive("cycles a sample")
    upload_bits: float = _positive("bits a sample")
    download_bits: float = _positive("bits a sample", zero=True, default=0.0)
    error_sigma: float = _positive("1", default=3.2)
    secret: str = "ternary"  # noqa: S105 - a distribution

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check(self)
        n = self.ring_dimension
        if isinstance(n, bool) or not isinstance(n, int) or not 256 <= n <= 1 << 20 or n & (n - 1):
            raise InputError(f"ring_dimension = {n!r}: must be a power of two in [256, 1048576]")
        if not isinstance(self.secret, str) or self.secret not in _SECRETS:
            raise InputError(f"secret = {self.secret!r}: the estimate covers {', '.join(map(repr, _SECRETS))}")
        if not _LEAST_SIGMA <= self.error_sigma <= _LARGEST_SIGMA:
            raise InputError(
                f"error_sigma = {self.error_sigma!r}: the estimate covers [{_LEAST_SIGMA:g}, {_LARGEST_SIGMA:g}]"
            )
        try:
            _ = self.security
        except InputError as error:
            raise InputError(f"log2_modulus = {self.log2_modulus!r}: no estimate of its security: {error}") from None

    @cached_property
    def security(self) -> float:
        """s, bits of classical security: `privtuner.security.bits` in whole bits, at most `SECURITY_CEILING`."""
        sigma = _SECRETS[self.secret]
        return min(
            float(round(security.bits(self.ring_dimension, self.log2_modulus, self.error_sigma, sigma))),
            SECURITY_CEILING,
        )


@dataclass(frozen=True)
class System:
    """Everything the allocator is given.

    Attributes:
        devices: at least one, names all different.
        tiers: at least one, names all different; every device may take any of them.
        server, channel: what is shared.
        privacy_price: alpha, J that one bit of security of a device of weight 1 is worth.
        INSECURE_security_floor: bits that take the place of `SECURITY_FLOOR`. Tiers under 128 bits do not protect data.

    Raises:
        InputError: no devices or tiers, a name twice, a tier under the floor.
    """

    devices: tuple[Device, ...]
    tiers: tuple[Tier, ...]
    server: Server
    channel: Channel
    privacy_price: float = _positive("J a bit of security", zero=True, default=0.0)
    INSECURE_security_floor: float | None = _positive("bits", zero=True, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        object.__setattr__(self, "tiers", tuple(self.tiers))
        _check(self)
        _check_names("devices", [device.name for device in self.devices])
        _check_names("tiers", [tier.name for tier in self.tiers])
        floor = SECURITY_FLOOR if self.INSECURE_security_floor is None else self.INSECURE_security_floor
        for tier in self.tiers:
            if tier.security < floor:
                raise InputError(
                    f"tier {tier.name!r} has {tier.security:.0f} bits of security by its ring dimension "
                    f"{tier.ring_dimension} and modulus of {tier.log2_modulus:g} bits, where {floor:g} are required: "
                    "take a smaller modulus or a larger ring, or, for experiments without data to protect, set "
                    f"INSECURE_security_floor = {tier.security:.0f}"
                )


def _check_names(what: str, names: Sequence[str]) -> None:
    if not names:
        raise InputError(f"{what} is empty: at least one is needed")
    seen: dict[str, int] = {}
    for place, name in enumerate(names):
        other = seen.setdefault(name, place)
        if other != place:
            raise InputError(f"{what}[{place}].name = {name!r}: {what}[{other}] has that name already")

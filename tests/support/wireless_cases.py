"""Systems for the allocator's tests, random (feasible by construction) and as files, and what all answers must keep."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from privtuner.errors import InfeasibleError
from privtuner.wireless import Channel, Device, Server, System, Tier, allocate

PHONE_TOML = """
privacy_price = 0.02
[channel]
bandwidth = 4e6
noise_density = 4e-21
[server]
frequency = 5_000_000_000
capacitance = 1e-28
[[devices]]
name = "phone"
samples = 64
gain = 3e-12
power_max = 0.2
capacitance = 1e-28
frequency_min = 1e8
frequency_max = 2.5e9
deadline = 120
"""
"""A system of one device, as a file."""
TABLET_TOML = """[[devices]]
name = "tablet"
samples = 96
gain = 4e-13
power_max = 0.2
capacitance = 1e-28
frequency_min = 1e8
frequency_max = 3e9
deadline = 120
privacy_weight = 2
"""
"""A second device for it."""

ROUNDING = 1e-12  # of sums of a few terms
MISS = 1e-9  # by which a deadline may be missed, relative; what it is worth is about as much of the energy
RINGS = ((8192, 210.0), (16384, 300.0), (32768, 520.0), (65536, 1200.0))


def random_system(seed: int, devices: int, tiers: int, *, tight: float = 3.0, downlink: bool = False) -> System:
    """Deadlines are 1.05 to ``tight`` times what an equal split at full speed and power needs in the lightest tier."""
    rng = np.random.default_rng([seed, devices, tiers])

    def spread(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(math.log(low), math.log(high))))

    weight = 1.0
    chosen = []
    for ring, log2_modulus in RINGS[:tiers]:
        chosen.append(
            Tier(
                name=f"ring-{ring}",
                ring_dimension=ring,
                log2_modulus=log2_modulus,
                encrypt_cycles=weight * spread(1e7, 5e7),
                evaluate_cycles=weight * spread(3e7, 3e8),
                upload_bits=weight * spread(1e5, 2e6),
                download_bits=1e5 if downlink else 0.0,
            )
        )
        weight *= spread(1.2, 2.5)
    channel = Channel(spread(2e5, 2e6) * devices, 10**-20.4, downlink_rate=1e8 if downlink else None)
    server = Server(spread(3e8, 6e9) * devices, float(rng.choice([0.0, spread(1e-29, 1e-27)])))
    made = []
    for number in range(devices):
        gain, power = spread(1e-14, 1e-10), spread(0.05, 0.5)
        samples, frequency = float(rng.integers(8, 128)), spread(1e9, 4e9)
        band, reach = channel.bandwidth / devices, gain * power / channel.noise_density
        light = chosen[0]
        least = samples * (
            light.encrypt_cycles / frequency
            + light.upload_bits * math.log(2) / (band * math.log1p(reach / band))
            + light.evaluate_cycles * devices / server.frequency
            + (light.download_bits / 1e8 if downlink else 0.0)
        )
        made.append(
            Device(
                name=f"d{number}",
                samples=samples,
                gain=gain,
                power_max=power,
                capacitance=spread(3e-29, 3e-28),
                frequency_min=frequency * spread(0.02, 0.5),
                frequency_max=frequency,
                deadline=least * spread(1.05, tight),
                privacy_weight=float(rng.choice([0.0, spread(0.3, 3.0)])),
            )
        )
    return System(tuple(made), tuple(chosen), server, channel, privacy_price=spread(1e-3, 0.3))


def columns(system, *names):
    return [np.array([getattr(device, name) for device in system.devices]) for name in names]


def scaled(system, bandwidth=1.0, server=1.0):
    channel = dataclasses.replace(system.channel, bandwidth=system.channel.bandwidth * bandwidth)
    machine = dataclasses.replace(system.server, frequency=system.server.frequency * server)
    return dataclasses.replace(system, channel=channel, server=machine)


def with_deadlines(system, factor):
    devices = [dataclasses.replace(device, deadline=device.deadline * factor) for device in system.devices]
    return dataclasses.replace(system, devices=tuple(devices))


def feasible(system, **options):
    try:
        allocate(system, **options)
    except InfeasibleError:
        return False
    return True


def check(found):
    """Every constraint and every sum, from the system."""
    system = found.system
    channel, server, chosen = system.channel, system.server, [system.tiers[tier] for tier in found.tier]
    samples, gain, deadline, power_max, low, high, kappa, weight = columns(
        system,
        "samples",
        "gain",
        "deadline",
        "power_max",
        "frequency_min",
        "frequency_max",
        "capacitance",
        "privacy_weight",
    )
    encrypt, evaluate, bits, down, security = (
        np.array([getattr(tier, name) for tier in chosen])
        for name in ("encrypt_cycles", "evaluate_cycles", "upload_bits", "download_bits", "security")
    )
    for share in (found.bandwidth, found.server_frequency, found.power, found.frequency):
        assert (share > 0).all()
        assert np.isfinite(share).all()
    assert found.bandwidth.sum() <= channel.bandwidth * (1 + ROUNDING)
    assert found.server_frequency.sum() <= server.frequency * (1 + ROUNDING)
    assert (found.power <= power_max).all()
    assert ((low <= found.frequency) & (found.frequency <= high)).all()
    rate = found.bandwidth * np.log2(1 + gain * found.power / (channel.noise_density * found.bandwidth))
    assert (found.upload_time >= samples * bits / rate * (1 - MISS)).all()
    np.testing.assert_allclose(found.encrypt_time, samples * encrypt / found.frequency, rtol=ROUNDING)
    np.testing.assert_allclose(found.server_time, samples * evaluate / found.server_frequency, rtol=ROUNDING)
    download = 0.0 if channel.downlink_rate is None else samples * down / channel.downlink_rate
    np.testing.assert_allclose(found.download_time, np.broadcast_to(download, deadline.shape), atol=1e-15 * deadline[0])
    assert (found.encrypt_time + found.upload_time + found.server_time + download <= deadline * (1 + MISS)).all()
    parts = (
        kappa * samples * encrypt * found.frequency**2,
        found.power * found.upload_time,
        server.capacitance * samples * evaluate * found.server_frequency**2,
    )
    for part, given in zip(parts, (found.encrypt_energy, found.upload_energy, found.server_energy), strict=True):
        np.testing.assert_allclose(given, part, rtol=ROUNDING)
    assert found.energy == pytest.approx(sum(part.sum() for part in parts), rel=ROUNDING)
    np.testing.assert_array_equal(found.security, security)
    assert found.privacy == pytest.approx(weight @ security, rel=ROUNDING)
    reward = system.privacy_price * found.privacy
    assert abs(found.objective - (found.energy - reward)) <= ROUNDING * (found.energy + reward)
    assert found.bound <= found.objective

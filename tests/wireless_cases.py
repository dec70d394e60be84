"""Random systems for the allocator's tests: devices, server and channel over wide ranges, feasible by construction."""

from __future__ import annotations

import math

import numpy as np

from privtuner.wireless import Channel, Device, Server, System, Tier

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

"""More of anything never costs energy, and neither units nor the order of the devices matter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="SciPy is not installed: the allocator needs it")

from privtuner.errors import InfeasibleError
from privtuner.wireless import Channel, Device, Server, System, Tier, allocate
from wireless_cases import random_system

TOLERANCE = 1e-9  # of the search; a deadline may be missed by 1e-9 of its length too, which is worth about as much
SEEDS, FACTORS = st.integers(0, 100_000), st.floats(1.0, 10.0)
SCALES = st.floats(-3.0, 3.0).map(lambda exponent: 10**exponent)
RESOURCES = (
    ("channel", ["bandwidth"]),
    ("server", ["frequency"]),
    ("devices", ["power_max"]),
    ("devices", ["frequency_min", "frequency_max"]),
    ("devices", ["deadline"]),
)
OF_A_DEVICE = ("power_max", "frequency_max", "deadline")


@st.composite
def systems(draw):
    devices, tiers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return random_system(draw(SEEDS), devices, tiers, tight=6, downlink=draw(st.booleans()))


def change(record, **factors):
    """With the named fields times their factors; a field that is None stays."""
    values = {name: getattr(record, name) for name in factors}
    return dataclasses.replace(
        record, **{name: value * factors[name] for name, value in values.items() if value is not None}
    )


def rescale(system, *, devices=None, tiers=None, server=None, channel=None, price=1.0):
    """The system in other units; each argument maps names of fields to factors."""
    return dataclasses.replace(
        system,
        devices=tuple(change(device, **(devices or {})) for device in system.devices),
        tiers=tuple(change(tier, **(tiers or {})) for tier in system.tiers),
        server=change(system.server, **(server or {})),
        channel=change(system.channel, **(channel or {})),
        privacy_price=system.privacy_price * price,
    )


def check_no_worse(before, after):
    """The optimum after is at most that before, and each is known to its gap."""
    one, two = allocate(before, tolerance=TOLERANCE), allocate(after, tolerance=TOLERANCE)
    slip = TOLERANCE * one.energy
    assert two.bound <= one.objective + slip
    assert two.objective <= one.objective + two.gap + slip
    assert two.gap <= TOLERANCE * two.energy


@given(systems(), FACTORS)
def test_more_bandwidth(system, factor):
    check_no_worse(system, rescale(system, channel={"bandwidth": factor}))


@given(systems(), FACTORS)
def test_a_faster_server(system, factor):
    check_no_worse(system, rescale(system, server={"frequency": factor}))


@given(st.sampled_from(OF_A_DEVICE), systems(), FACTORS, st.data())
def test_one_device_may_do_more(name, system, factor, data):
    place = data.draw(st.integers(0, len(system.devices) - 1))
    devices = list(system.devices)
    devices[place] = change(devices[place], **{name: factor})
    check_no_worse(system, dataclasses.replace(system, devices=tuple(devices)))


@given(st.sampled_from(RESOURCES), systems(), st.floats(1.0, 1000.0))
def test_more_keeps_what_is_feasible(resource, system, less):
    """From systems that may be infeasible upwards: once there is an allocation, there is one wherever there is more."""
    (part, names), found = resource, False
    for factor in np.geomspace(1 / less, 1, 6):
        other = rescale(system, **{part: dict.fromkeys(names, factor)})
        try:
            allocate(other)
            found = True
        except InfeasibleError:
            assert not found
    assert found


def test_a_device_at_its_power_limit_is_certified():
    """Bandwidth a hair short of what it asks for; the server has time to spare."""
    system = System(
        devices=(
            Device(
                name="d0",
                samples=97.0,
                gain=2.958985180054393e-11,
                power_max=0.20329780749606527,
                capacitance=5.534570926561419e-29,
                frequency_min=1313953549.225723,
                frequency_max=2806314905.271141,
                deadline=19.58365425074197,
                privacy_weight=0.0,
            ),
        ),
        tiers=(
            Tier(
                name="ring-8192",
                ring_dimension=8192,
                log2_modulus=210.0,
                encrypt_cycles=18246194.232193418,
                evaluate_cycles=202192454.5650531,
                upload_bits=595739.9649556217,
                download_bits=0.0,
                error_sigma=3.2,
                secret="ternary",
            ),
            Tier(
                name="ring-16384",
                ring_dimension=16384,
                log2_modulus=300.0,
                encrypt_cycles=64576906.57451204,
                evaluate_cycles=472529806.46336365,
                upload_bits=593528.2420770661,
                download_bits=0.0,
                error_sigma=3.2,
                secret="ternary",
            ),
            Tier(
                name="ring-32768",
                ring_dimension=32768,
                log2_modulus=520.0,
                encrypt_cycles=125966512.3473034,
                evaluate_cycles=237617691.79152483,
                upload_bits=970570.2691269732,
                download_bits=0.0,
                error_sigma=3.2,
                secret="ternary",
            ),
        ),
        server=Server(frequency=5260455889.103501, capacitance=4.089951852072745e-28),
        channel=Channel(bandwidth=1005948.1657589708, noise_density=3.981071705534986e-21, downlink_rate=None),
        privacy_price=0.020336662264141214,
        INSECURE_security_floor=None,
    )
    assert allocate(system, tolerance=TOLERANCE).certified


@given(systems(), st.randoms(use_true_random=False))
def test_order_of_the_devices(system, random):
    order = list(range(len(system.devices)))
    random.shuffle(order)
    shuffled = dataclasses.replace(system, devices=tuple(system.devices[place] for place in order))
    one, two = allocate(system, tolerance=TOLERANCE), allocate(shuffled, tolerance=TOLERANCE)
    assert abs(one.objective - two.objective) <= 2 * TOLERANCE * one.energy
    if len(system.tiers) == 1:
        # Demand and supply are balanced to 1e-12 or to what the dual resolves, whose square root is 1e-6.
        np.testing.assert_allclose(two.bandwidth, one.bandwidth[order], rtol=1e-6)


def check_same(one, two, *, energy=1.0, bandwidth=1.0):
    """The same answer in other units."""
    assert abs(two.objective / energy - one.objective) <= 2 * TOLERANCE * one.energy
    assert abs(two.bound / energy - one.bound) <= 2 * TOLERANCE * one.energy
    if len(one.system.tiers) == 1:
        np.testing.assert_allclose(two.bandwidth / bandwidth, one.bandwidth, rtol=1e-6)


@given(systems(), SCALES)
def test_unit_of_energy(system, c):
    """J: powers, noise, capacitances and the price of a bit; signal over noise stays."""
    other = rescale(
        system,
        devices={"power_max": c, "capacitance": c},
        server={"capacitance": c},
        channel={"noise_density": c},
        price=c,
    )
    check_same(allocate(system, tolerance=TOLERANCE), allocate(other, tolerance=TOLERANCE), energy=c)


@given(systems(), SCALES)
def test_unit_of_time(system, c):
    """s: a cycle at f / c takes kappa c^2 (f / c)^2, as before; W/Hz are J and stay."""
    other = rescale(
        system,
        devices={
            "deadline": c,
            "frequency_min": 1 / c,
            "frequency_max": 1 / c,
            "power_max": 1 / c,
            "capacitance": c * c,
        },
        server={"frequency": 1 / c, "capacitance": c * c},
        channel={"bandwidth": 1 / c, "downlink_rate": 1 / c},
    )
    check_same(allocate(system, tolerance=TOLERANCE), allocate(other, tolerance=TOLERANCE), bandwidth=1 / c)


@given(systems(), SCALES)
def test_unit_of_information(system, c):
    """Bits: c times as many in c times the band, whose noise N0 B stays."""
    other = rescale(
        system,
        tiers={"upload_bits": c, "download_bits": c},
        channel={"bandwidth": c, "noise_density": 1 / c, "downlink_rate": c},
    )
    check_same(allocate(system, tolerance=TOLERANCE), allocate(other, tolerance=TOLERANCE), bandwidth=c)


@given(systems(), SCALES)
def test_unit_of_computation(system, c):
    """Cycles: c times as many at c times the speed, each of which takes 1 / c^3 as much a (cycle/s)^2."""
    other = rescale(
        system,
        devices={"frequency_min": c, "frequency_max": c, "capacitance": c**-3},
        tiers={"encrypt_cycles": c, "evaluate_cycles": c},
        server={"frequency": c, "capacitance": c**-3},
    )
    check_same(allocate(system, tolerance=TOLERANCE), allocate(other, tolerance=TOLERANCE))

"""Devices, servers, channels, tiers, systems and random cells: what they hold, and what they refuse."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
from scipy import stats

from privtuner import security
from privtuner.errors import InfeasibleError, InputError, PrivtunerError
from privtuner.wireless import SECURITY_FLOOR, Cell, Channel, Device, Server, System, Tier, default_tiers
from privtuner.wireless.cells import rings
from privtuner.wireless.model import SECURITY_CEILING


def device(**changes):
    fields = {
        "name": "phone",
        "samples": 64,
        "gain": 1e-11,
        "power_max": 0.2,
        "capacitance": 1e-28,
        "frequency_min": 1e8,
        "frequency_max": 2e9,
        "deadline": 100,
    }
    return Device(**fields | changes)


def server(**changes):
    return Server(**{"frequency": 1e10, "capacitance": 1e-28} | changes)


def channel(**changes):
    return Channel(**{"bandwidth": 2e7, "noise_density": 4e-21} | changes)


def tier(**changes):
    fields = {
        "name": "ring",
        "ring_dimension": 8192,
        "log2_modulus": 200.0,
        "encrypt_cycles": 1e7,
        "evaluate_cycles": 1e8,
        "upload_bits": 1e6,
    }
    return Tier(**fields | changes)


def system(**changes):
    fields = {"devices": (device(),), "tiers": (tier(),), "server": server(), "channel": channel()}
    return System(**fields | changes)


def refusal(make, **changes):
    with pytest.raises(InputError) as caught:
        make(**changes)
    return str(caught.value)


POSITIVE = [
    (device, "samples", "samples a round"),
    (device, "gain", "1 (a linear power gain, not dB)"),
    (device, "power_max", "W"),
    (device, "capacitance", "J s^2 / cycle^3"),
    (device, "frequency_min", "cycles/s"),
    (device, "frequency_max", "cycles/s"),
    (device, "deadline", "s"),
    (server, "frequency", "cycles/s"),
    (channel, "bandwidth", "Hz"),
    (channel, "noise_density", "W/Hz"),
    (channel, "downlink_rate", "bit/s"),
    (tier, "log2_modulus", "bits"),
    (tier, "encrypt_cycles", "cycles a sample"),
    (tier, "evaluate_cycles", "cycles a sample"),
    (tier, "upload_bits", "bits a sample"),
    (tier, "error_sigma", "1"),
]
FROM_ZERO = [
    (device, "privacy_weight", "1"),
    (server, "capacitance", "J s^2 / cycle^3"),
    (tier, "download_bits", "bits a sample"),
    (system, "privacy_price", "J a bit of security"),
    (system, "INSECURE_security_floor", "bits"),
]
OPTIONAL = ("downlink_rate", "INSECURE_security_floor")
NO_NUMBERS = [-1, -5e-324, math.nan, math.inf, -math.inf, True, False, "1", "", 1j, [1.0], np.ones(1), 10**400]


def refuses(subtests, make, name, values, message):
    """Every value of the field is refused, in these words."""
    for value in values:
        with subtests.test(field=f"{make.__name__}.{name}", value=repr(value)[:40]):
            assert refusal(make, **{name: value}) == f"{name} = {value!r}: {message}"


def test_fields_that_must_be_positive(subtests):
    for make, name, unit in POSITIVE:
        refuses(subtests, make, name, [*NO_NUMBERS, 0, -0.0], f"must be a number in (0, inf), in {unit}")


def test_fields_that_may_be_zero(subtests):
    for make, name, unit in FROM_ZERO:
        refuses(subtests, make, name, NO_NUMBERS, f"must be a number in [0, inf), in {unit}")
        for zero in (0, 0.0):
            with subtests.test(field=f"{make.__name__}.{name}", value=zero):
                assert getattr(make(**{name: zero}), name) == 0


def test_none_is_a_number_only_where_it_is_the_default(subtests):
    for make, name, _ in POSITIVE + FROM_ZERO:
        with subtests.test(field=f"{make.__name__}.{name}"):
            if name in OPTIONAL:
                assert getattr(make(**{name: None}), name) is None
            else:
                assert refusal(make, **{name: None}).startswith(f"{name} = None: must be a number")


def test_every_numeric_field_is_tested(subtests):
    for make in (device, server, channel, tier, system):
        with subtests.test(record=make.__name__):
            tested = {name for other, name, _ in POSITIVE + FROM_ZERO if other is make}
            numeric = {entry.name for entry in dataclasses.fields(make()) if entry.type in ("float", "float | None")}
            assert tested == numeric


def test_smallest_and_largest_numbers_are_accepted():
    for value in (5e-324, 1.7e308, 1, 10**300, np.float64(3)):
        assert device(samples=value).samples == value


def test_frequencies_are_ordered():
    assert refusal(device, frequency_min=3e9) == (
        "frequency_min = 3e+09: must be in (0, frequency_max], in cycles/s; frequency_max = 2e+09"
    )
    assert device(frequency_min=2e9).frequency_min == 2e9


def test_names_are_printable(subtests):
    bad = ["", "n" * 101, "a\nb", "a\tb", "a\0", "\u2028", "\ud800", b"a", 3, None, True, ["a"]]
    for make in (device, tier):
        refuses(subtests, make, "name", bad, "must be a printable string of 1 to 100 characters")
        for name in ("a", "n" * 100, " ", 'the "old" one\'s C:\\', "gerät-日本-🔒"):
            with subtests.test(record=make.__name__, name=name):
                assert make(name=name).name == name


def test_rings_are_powers_of_two(subtests):
    bad = [0, 1, 255, 128, 1 << 21, 8191, 8193, 3 * 1024, -8192, 8192.0, math.nan, True, "8192", None, [8192]]
    refuses(subtests, tier, "ring_dimension", bad, "must be a power of two in [256, 1048576]")
    for ring, log2_modulus in ((256, 8), (1 << 20, 28000)):
        assert tier(ring_dimension=ring, log2_modulus=log2_modulus).ring_dimension == ring


def test_sets_that_the_estimate_does_not_cover_are_refused(subtests):
    refuses(
        subtests, tier, "secret", ["binary", "Ternary", "", None, 3, ["ternary"], {}], "the estimate covers 'ternary'"
    )
    # Errors that round to zero leave linear algebra, which no estimate of lattice attacks sees.
    refuses(subtests, tier, "error_sigma", [1e-3, 2.9, 1e10, 1e300], "the estimate covers [3, 1e+09]")
    for log2_modulus in (3.9, 8193):
        with subtests.test(log2_modulus=log2_modulus):
            message = refusal(tier, log2_modulus=log2_modulus)
            assert message.startswith(f"log2_modulus = {log2_modulus}: no estimate of its security: ")


def test_system_needs_devices_and_tiers_of_different_names(subtests):
    for what, item in (("devices", device()), ("tiers", tier())):
        with subtests.test(what=what):
            assert refusal(system, **{what: ()}) == f"{what} is empty: at least one is needed"
            other = dataclasses.replace(item, name="other")
            message = f"{what}[2].name = {item.name!r}: {what}[0] has that name already"
            assert refusal(system, **{what: (item, other, item)}) == message
            assert getattr(system(**{what: [item, other]}), what) == (item, other)


def test_security_is_the_estimate_in_whole_bits_up_to_a_ceiling():
    made = tier(ring_dimension=16384, log2_modulus=400.5, error_sigma=3.24)
    assert made.security == round(security.bits(16384, 400.5, 3.24))
    assert SECURITY_CEILING == 256
    assert security.bits(8192, 60.0, 3.2) > 500
    assert tier(log2_modulus=60.0).security == SECURITY_CEILING


def test_limits_of_the_standard_reach_their_level(subtests):
    for ring, log2_modulus, level in ((4096, 109, 128), (16384, 305, 192), (8192, 152, 192), (32768, 476, 256)):
        with subtests.test(ring=ring, level=level):
            made = tier(ring_dimension=ring, log2_modulus=log2_modulus)
            assert made.security == pytest.approx(level, abs=0.5)


def test_tier_under_the_floor(subtests):
    assert SECURITY_FLOOR == 128
    for ring, log2_modulus in ((2048, 56), (4096, 112.5), (8192, 300), (256, 20)):
        with subtests.test(ring=ring, log2_modulus=log2_modulus):
            thin = tier(name="thin", ring_dimension=ring, log2_modulus=log2_modulus)
            bits = int(thin.security)
            assert bits < 128
            assert refusal(system, tiers=(tier(), thin)) == (
                f"tier 'thin' has {bits} bits of security by its ring dimension {ring} and modulus of "
                f"{log2_modulus:g} bits, where 128 are required: take a smaller modulus or a larger ring, or, for "
                f"experiments without data to protect, set INSECURE_security_floor = {bits}"
            )
            assert system(tiers=(tier(), thin), INSECURE_security_floor=bits).tiers[1] == thin
            assert f"where {bits + 1} are required" in refusal(system, tiers=(thin,), INSECURE_security_floor=bits + 1)


def test_tier_at_the_floor_is_accepted():
    edge = tier(ring_dimension=4096, log2_modulus=109)
    assert edge.security == SECURITY_FLOOR
    assert system(tiers=(edge,)).tiers == (edge,)
    assert "where 200 are required" in refusal(system, INSECURE_security_floor=200)


def test_records_are_frozen_compare_by_value_and_travel(subtests):
    for record in (device(), server(), channel(), tier(), system(), Cell()):
        with subtests.test(record=type(record).__name__):
            for entry in dataclasses.fields(record):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(record, entry.name, getattr(record, entry.name))
                with pytest.raises(dataclasses.FrozenInstanceError):
                    delattr(record, entry.name)
            assert pickle.loads(pickle.dumps(record)) == record
            assert copy.deepcopy(record) == record
            assert hash(dataclasses.replace(record)) == hash(record)


def test_infeasible_error_travels():
    for duplicate in (lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy):
        error = duplicate(InfeasibleError("phone is 3 s late", "deadline", "phone", 0.03))
        assert type(error) is InfeasibleError
        assert str(error) == "phone is 3 s late"
        assert (error.constraint, error.device, error.shortfall) == ("deadline", "phone", 0.03)
        assert isinstance(error, InputError)
        assert isinstance(error, PrivtunerError)
        assert isinstance(error, ValueError)


# Cells

RADIUS, SHADOWING, MANY = 250.0, 8.0, 20_000


def loss_db(**changes):
    """Of each of many devices, path loss and shadowing together."""
    drawn = Cell(devices=MANY, radius=RADIUS, tiers=(tier(),), **changes).draw(7)
    return np.array([-10 * math.log10(one.gain) for one in drawn.devices])


@pytest.fixture(scope="module")
def path_loss():
    return loss_db(shadowing=0.0)


@pytest.fixture(scope="module")
def shadow(path_loss):
    return loss_db(shadowing=SHADOWING) - path_loss


def gains(cell, seed):
    return [one.gain for one in cell.draw(seed).devices]


def test_seed_decides():
    cell = Cell(devices=5)
    assert cell.draw(3) == cell.draw(3)
    assert len(set(gains(cell, 3) + gains(cell, 4))) == 10


def test_larger_cell_begins_with_the_same_devices():
    for seed in (0, 1, 2**63):
        assert Cell(devices=200).draw(seed).devices[:7] == Cell(devices=7).draw(seed).devices


def test_cell_hands_its_fields_on():
    values = {
        "bandwidth": 1e6,
        "power_max": 0.3,
        "frequency_min": 2e8,
        "frequency_max": 3e9,
        "capacitance": 2e-28,
        "server_frequency": 4e9,
        "server_capacitance": 3e-28,
        "samples": 5.0,
        "deadline": 6.0,
        "privacy_price": 0.7,
    }
    drawn = Cell(devices=2, tiers=(tier(),), **values).draw(0)
    assert [one.name for one in drawn.devices] == ["device-1", "device-2"]
    for one in drawn.devices:
        for name in ("power_max", "frequency_min", "frequency_max", "capacitance", "samples", "deadline"):
            assert getattr(one, name) == values[name]
    assert drawn.server == Server(4e9, 3e-28)
    assert drawn.channel.bandwidth == 1e6
    assert drawn.privacy_price == 0.7
    assert drawn.tiers == (tier(),)


def test_default_tiers_of_a_cell_differ_in_the_ring_alone():
    assert Cell().tiers == rings(default_tiers())
    assert [one.ring_dimension for one in Cell().tiers] == [8192, 16384, 32768]
    assert rings([tier(), tier(name="other")]) == (tier(), tier(name="other"))


def test_noise_is_thermal():
    noise = Cell().draw(0).channel.noise_density
    assert 10 * math.log10(noise / 1e-3) == pytest.approx(-174, abs=1e-9)
    assert noise == pytest.approx(3.981e-21, rel=1e-4)


def test_mean_loss_is_that_of_a_disc():
    # u = (distance / R)^2 is uniform but for the part u0 within 10 m, so ln u has mean u0 - 1 and, with its second
    # moment 2 (1 - u0 + u0 ln u0), a known variance; a decade of distance is 37.6 dB.
    u0 = (10 / RADIUS) ** 2
    decade = 37.6 / 2 / math.log(10)
    mean = 128.1 + 37.6 * math.log10(RADIUS / 1e3) + decade * (u0 - 1)
    variance = decade**2 * (2 * (1 - u0 + u0 * math.log(u0)) - (1 - u0) ** 2)
    error = math.sqrt((variance + SHADOWING**2) / MANY)
    assert abs(loss_db(shadowing=SHADOWING).mean() - mean) < 4 * error


def test_devices_are_uniform_in_the_disc(path_loss):
    distance = 10 ** ((path_loss - 128.1) / 37.6 + 3)
    assert distance.min() >= 10 * (1 - 1e-12)
    assert distance.max() <= RADIUS
    within = np.isclose(distance, 10, rtol=1e-9)
    u0 = (10 / RADIUS) ** 2
    assert stats.binomtest(int(within.sum()), MANY, u0).pvalue > 1e-3
    part = (distance[~within] / RADIUS) ** 2
    assert stats.kstest(part, stats.uniform(u0, 1 - u0).cdf).pvalue > 1e-3


def test_shadowing_is_normal_and_of_the_given_size(path_loss, shadow):
    # The standard error of a standard deviation s of n normal values is s / sqrt(2 (n - 1)).
    assert abs(shadow.std(ddof=1) - SHADOWING) < 4 * SHADOWING / math.sqrt(2 * (MANY - 1))
    assert abs(shadow.mean()) < 4 * SHADOWING / math.sqrt(MANY)
    assert stats.kstest(shadow / SHADOWING, "norm").pvalue > 1e-3
    assert stats.spearmanr(path_loss, shadow).pvalue > 1e-3


def test_smallest_cell_has_every_device_at_its_edge():
    assert gains(Cell(devices=3, radius=10, shadowing=0), 0) == pytest.approx([10 ** -(12.81 - 2 * 3.76)] * 3)


def test_cells_refuse_what_is_out_of_range(subtests):
    refuses(subtests, Cell, "devices", [0, -1, 1.0, math.nan, True, "3", None], "must be an integer of at least 1")
    radii = [0, 9.9, -250, 100001, math.nan, math.inf, True, "250", None]
    refuses(subtests, Cell, "radius", radii, "must be in [10, 100000], in m")
    refuses(subtests, Cell, "shadowing", [-1, 30.1, math.nan, math.inf, True, "8", None], "must be in [0, 30], in dB")
    for changes in ({"radius": 10, "shadowing": 0}, {"radius": 1e5, "shadowing": 30}):
        assert len(Cell(devices=1, **changes).draw(0).devices) == 1


def test_what_the_system_refuses_no_cell_draws(subtests):
    from_zero = ("server_capacitance", "privacy_price")
    positive = (
        "bandwidth",
        "power_max",
        "frequency_min",
        "frequency_max",
        "capacitance",
        "server_frequency",
        "samples",
    )
    for name in (*positive, "deadline", *from_zero):
        for value in (0, -1, math.nan, math.inf, True, "1", None):
            with subtests.test(field=name, value=value):
                cell = Cell(devices=1, **{name: value})
                if name in from_zero and value == 0:
                    assert cell.draw(0)
                else:
                    message = f"{name.removeprefix('server_')} = {value!r}: must be a number in"
                    assert message in refusal(cell.draw, seed=0)
    assert "tiers is empty" in refusal(Cell(tiers=()).draw, seed=0)
    assert "must be in (0, frequency_max]" in refusal(Cell(frequency_min=3e9).draw, seed=0)
    for seed in (-1, 1.5, "one"):
        assert f"seed = {seed!r}" in refusal(Cell().draw, seed=seed)

"""Devices, servers, channels, tiers, systems and random cells: what they hold, and what they refuse."""

import dataclasses
import math
import pickle

import numpy as np
import pytest

from privtuner.errors import InfeasibleError, InputError
from privtuner.wireless import SECURITY_FLOOR, Cell, Channel, Device, Server, System, Tier
from privtuner.wireless.cells import rings
from privtuner.wireless.model import SECURITY_CEILING

DEVICE = {
    "name": "phone",
    "samples": 64.0,
    "gain": 1e-12,
    "power_max": 0.2,
    "capacitance": 1e-28,
    "frequency_min": 1e8,
    "frequency_max": 2e9,
    "deadline": 100.0,
    "privacy_weight": 1.0,
}
SERVER = {"frequency": 1e10, "capacitance": 1e-28}
CHANNEL = {"bandwidth": 2e7, "noise_density": 4e-21, "downlink_rate": 1e8}
TIER = {
    "name": "tier",
    "ring_dimension": 8192,
    "log2_modulus": 200.0,
    "encrypt_cycles": 1e7,
    "evaluate_cycles": 1e8,
    "upload_bits": 1e6,
    "download_bits": 1e5,
    "error_sigma": 3.2,
}
KINDS = ((Device, DEVICE), (Server, SERVER), (Channel, CHANNEL), (Tier, TIER))
NUMBERS = [
    (kind, record, entry.name, entry.metadata["zero"], entry.metadata["unit"])
    for kind, record in KINDS
    for entry in dataclasses.fields(kind)
    if "unit" in entry.metadata
]


def system(**changes):
    record = {
        "devices": (Device(**DEVICE),),
        "tiers": (Tier(**TIER),),
        "server": Server(**SERVER),
        "channel": Channel(**CHANNEL),
    }
    return System(**(record | changes))


@pytest.mark.parametrize(("kind", "record"), KINDS)
def test_records_are_frozen(kind, record):
    made = kind(**record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, next(iter(record)), 1.0)


@pytest.mark.parametrize(("kind", "record", "name", "zero", "unit"), NUMBERS)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "1", 0.0])
def test_numbers_out_of_range(kind, record, name, zero, unit, value):
    if value == 0.0 and value is not True and zero:
        kind(**(record | {name: value}))
        return
    with pytest.raises(InputError) as caught:
        kind(**(record | {name: value}))
    text = str(caught.value)
    assert text.startswith(f"{name} = {value!r}: must be a number in {'[' if zero else '('}0, inf)")
    assert unit in text


def test_zero_is_the_least_where_it_is_allowed():
    zero = {(kind.__name__, name) for kind, _, name, zero, _ in NUMBERS if zero}
    assert zero == {("Device", "privacy_weight"), ("Server", "capacitance"), ("Tier", "download_bits")}


def test_a_processor_with_no_range():
    with pytest.raises(InputError, match=r"frequency_min = 3e\+09: must be in \(0, frequency_max\]"):
        Device(**(DEVICE | {"frequency_min": 3e9}))
    Device(**(DEVICE | {"frequency_min": 2e9}))


@pytest.mark.parametrize("name", ["", "a" * 101, "line\nbreak", 3, None])
@pytest.mark.parametrize(("kind", "record"), [(Device, DEVICE), (Tier, TIER)])
def test_names(kind, record, name):
    with pytest.raises(InputError, match="must be a printable string of 1 to 100 characters"):
        kind(**(record | {"name": name}))


@pytest.mark.parametrize("ring", [0, 128, 1000, 8191, 1 << 21, 8192.0, True, "8192"])
def test_rings(ring):
    with pytest.raises(InputError, match=r"ring_dimension = .*: must be a power of two in \[256, 1048576\]"):
        Tier(**(TIER | {"ring_dimension": ring}))


def test_secrets():
    with pytest.raises(InputError, match="secret = 'sparse': the estimate covers 'ternary'"):
        Tier(**TIER, secret="sparse")


def test_a_tier_that_the_estimate_does_not_cover():
    with pytest.raises(InputError, match="log2_q = 9000"):
        Tier(**(TIER | {"log2_modulus": 9000.0}))


def test_security_is_in_whole_bits_and_has_a_ceiling():
    assert Tier(**(TIER | {"log2_modulus": 214.0})).security == 131
    assert Tier(**(TIER | {"log2_modulus": 60.0})).security == SECURITY_CEILING == 256


def test_a_tier_under_the_floor_needs_the_floor_lowered_by_name():
    weak = Tier(**(TIER | {"name": "weak", "log2_modulus": 300.0}))
    assert weak.security < SECURITY_FLOOR
    with pytest.raises(
        InputError, match=r"tier 'weak' has \d+ bits .* 128 are required.*INSECURE_security_floor = \d+"
    ):
        system(tiers=(Tier(**TIER), weak))
    assert system(tiers=(weak,), INSECURE_security_floor=weak.security).tiers == (weak,)
    with pytest.raises(InputError, match="are required"):
        system(tiers=(weak,), INSECURE_security_floor=weak.security + 1)


@pytest.mark.parametrize("what", ["devices", "tiers"])
def test_a_system_has_some_of_each(what):
    with pytest.raises(InputError, match=f"{what} is empty: at least one is needed"):
        system(**{what: ()})


def test_names_are_different():
    device = Device(**DEVICE)
    with pytest.raises(InputError, match=r"devices\[1\]\.name = 'phone': devices\[0\] has that name already"):
        system(devices=[device, device])
    tier = Tier(**TIER)
    with pytest.raises(InputError, match=r"tiers\[1\]\.name = 'tier'"):
        system(tiers=[tier, tier])


@pytest.mark.parametrize("value", [-1.0, math.nan, "free"])
def test_price_of_privacy(value):
    with pytest.raises(InputError, match="privacy_price = .*J a bit of security"):
        system(privacy_price=value)


def test_lists_become_tuples():
    made = system(devices=[Device(**DEVICE)])
    assert isinstance(made.devices, tuple)
    assert hash(made) == hash(system())


def test_infeasible_errors_keep_what_they_say():
    error = pickle.loads(pickle.dumps(InfeasibleError("too late", "deadline", "phone", 0.25)))
    assert (str(error), error.constraint, error.device, error.shortfall) == ("too late", "deadline", "phone", 0.25)
    assert isinstance(error, InputError)


def test_cells_are_their_seeds():
    assert Cell().draw(3) == Cell().draw(3)
    assert Cell().draw(3) != Cell().draw(4)
    few, many = Cell(devices=4).draw(3), Cell(devices=9).draw(3)
    assert many.devices[:4] == few.devices


def test_noise_is_that_of_room_temperature():
    assert 10 * math.log10(Cell().draw(0).channel.noise_density * 1e3) == pytest.approx(-174, abs=1e-9)


def test_path_loss_and_shadowing_have_the_stated_means():
    count, radius = 20_000, 0.5
    gains = np.array([device.gain for device in Cell(devices=count, radius=radius * 1e3).draw(0).devices])
    loss = -10 * np.log10(gains)
    # Uniform in a disc, ln(distance / radius) is exponential of rate 2: mean -1/2, variance 1/4, to the nearest 10 m.
    slope = 37.6 / math.log(10)
    mean = 128.1 + 37.6 * math.log10(radius) - slope / 2
    spread = math.hypot(8.0, slope / 2)
    error = spread / math.sqrt(count)
    clipped = slope * (0.01 / radius) ** 2  # what the nearest distance adds at most
    assert abs(loss.mean() - mean) <= 4 * error + clipped
    # The fourth moments of a normal (3) and an exponential (9) variable bound the error of a variance.
    assert loss.std() == pytest.approx(spread, rel=4 * math.sqrt(9 / (4 * count)))


def test_without_shadowing_all_is_path_loss():
    gains = [device.gain for device in Cell(devices=500, shadowing=0.0).draw(1).devices]
    nearest, farthest = (128.1 + 37.6 * math.log10(distance) for distance in (0.01, 0.25))
    assert all(nearest - 1e-9 <= -10 * math.log10(gain) <= farthest + 1e-9 for gain in gains)


@pytest.mark.parametrize(
    ("field", "value"),
    [("devices", 0), ("devices", 2.0), ("devices", True), ("radius", 5.0), ("radius", math.nan), ("shadowing", -1.0)],
)
def test_cells_out_of_range(field, value):
    with pytest.raises(InputError, match=f"{field} = {value!r}"):
        Cell(**{field: value})


def test_cells_pass_the_rest_on():
    with pytest.raises(InputError, match="deadline = -1"):
        Cell(deadline=-1.0).draw(0)


def test_rings_of_a_table():
    assert [tier.name for tier in Cell().tiers] == ["ckks-8192", "ckks-16384", "ckks-32768"]
    assert rings([Tier(**TIER)]) == (Tier(**TIER),)

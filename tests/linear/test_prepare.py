"""What `prepare` makes of a weight, what it refuses, and the part of a layer that travels."""

import copy
import pickle

import numpy as np
import pytest

from linear_cases import LARGEST, PRESETS, layer
from privtuner import _core, linear
from privtuner.errors import InputError, MessageError, SecretError


def changed(shape, place, value, dtype=np.float32):
    x = np.ones(shape, dtype)
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones(3), r"weight has shape \(3,\): expected \(d_out, d_in\), neither zero"),
        (np.ones((2, 3, 4)), r"weight has shape \(2, 3, 4\)"),
        (np.ones((0, 3)), r"weight has shape \(0, 3\)"),
        (np.ones((3, 0)), r"weight has shape \(3, 0\)"),
        (3.0, r"weight has shape \(\)"),
        (np.ones((2, 3), np.int32), "weight has dtype int32: expected a floating dtype"),
        (np.ones((2, 3), bool), "weight has dtype bool"),
        (np.ones((2, 3), complex), "weight has dtype complex128"),
        ([["a", "b"]], "weight has dtype <U1"),
        (changed((2, 3), (1, 2), np.nan), r"weight\[1, 2\] is nan: every value must be finite"),
        (changed((2, 3), (0, 1), np.inf), r"weight\[0, 1\] is inf"),
        (changed((2, 3), (1, 0), -np.inf, np.float16), r"weight\[1, 0\] is -inf"),
        (
            changed((2, 3), (1, 0), -1e39, np.float64),
            r"weight\[1\]: every value must be finite in float32",
        ),
        (np.ones((65537, 1), np.float32), r"shape \(65537, 1\): both dimensions must be at most 65536"),
        (np.ones((1, 65537), np.float32), r"shape \(1, 65537\): both dimensions must be at most 65536"),
    ],
)
def test_prepare_rejects_weights(weight, message):
    with pytest.raises(InputError, match=message):
        linear.prepare(weight)


def test_prepare_rejects_presets():
    for preset in ("linear-w4", "", None):
        with pytest.raises(InputError, match=f"unknown preset {preset!r}: choose one of linear-w8, linear-w16"):
            linear.prepare(np.ones((2, 3)), preset)


def test_numbers_of_the_presets():
    keys = ("n", "q", "max_weight", "dropped_bits", "word_bytes", "weight_bytes", "reply_bytes")
    assert {name: tuple(_core.preset_info(name)[key] for key in keys) for name in linear.PRESETS} == {
        "linear-w8": (2048, 4293918721, 127, 8, 4, 1, 3),
        "linear-w16": (2048, 1125899903827969, 32639, 18, 8, 2, 4),
    }
    assert (_core.ROW_STEP, _core.MAX_TOKENS, _core.MAX_WEIGHT_16) == (32, 1 << 24, 32639)


def test_ring_of_a_preset():
    assert linear.ring("linear-w8") == (2048, 4293918721)
    assert [linear.ring(preset)[1].bit_length() for preset in linear.PRESETS] == [32, 50]
    with pytest.raises(InputError, match="unknown preset 'w8': choose one of linear-w8, linear-w16"):
        linear.ring("w8")


def test_the_largest_weight_and_dimension_are_accepted():
    largest = float(np.finfo(np.float32).max)
    assert linear.prepare([[largest, -largest]]).quantised().tolist() == [[127, -127]]
    assert linear.prepare(np.ones((1, 65536), np.float32)).spec.d_in == 65536
    assert linear.prepare(np.ones((65536, 1), np.float32)).spec.d_out == 65536


@pytest.mark.parametrize("preset", PRESETS)
def test_quantisation(preset):
    weight = np.random.default_rng(4).standard_normal((30, 50)) * np.logspace(-8, 8, 30)[:, None]
    weight[7] = 0
    prepared = linear.prepare(weight, preset)
    integers, delta = prepared.quantised(), prepared.spec.scale
    assert integers.dtype == (np.int8 if preset == "linear-w8" else np.int16)
    np.testing.assert_array_equal(delta, np.abs(weight).max(axis=1) / LARGEST[preset])
    nonzero = delta > 0
    np.testing.assert_array_equal(np.abs(integers[nonzero]).max(axis=1), LARGEST[preset])
    assert (np.abs(weight - delta[:, None] * integers) <= 0.5 * (1 + 1e-9) * delta[:, None]).all()
    assert not integers[7].any()


def test_public_part_round_trips():
    for preset in PRESETS:
        spec = layer(40, 24, preset).spec
        data = spec.to_bytes()
        assert len(data) == 96 + 8 * 40
        for again in (
            linear.LayerSpec.from_bytes(data),
            linear.LayerSpec.from_bytes(bytearray(data)),
            linear.LayerSpec.from_bytes(memoryview(data)),
            pickle.loads(pickle.dumps(spec)),
            copy.copy(spec),
            copy.deepcopy(spec),
        ):
            assert again == spec
            assert hash(again) == hash(spec)
            assert again.to_bytes() == data
            assert (again.id, again.preset, again.d_out, again.d_in) == (spec.id, preset, 40, 24)
            np.testing.assert_array_equal(again.scale, spec.scale)


def test_public_parts_are_told_apart():
    weight = np.random.default_rng(0).standard_normal((4, 6))
    spec = linear.prepare(weight).spec
    assert linear.prepare(weight).spec == spec
    changed = weight.copy()
    changed[2, 3] *= 1.5
    others = [linear.prepare(changed), linear.prepare(2 * weight), linear.prepare(weight, "linear-w16")]
    ids = {spec.id, *(other.spec.id for other in others)}
    assert len(ids) == 4
    assert all(len(identity) == 16 for identity in ids)
    assert spec not in [other.spec for other in others]
    assert spec != spec.to_bytes()


def test_the_public_part_cannot_be_changed_by_accident():
    spec = layer().spec
    with pytest.raises(ValueError, match="read-only"):
        spec.scale[0] = 1


def test_the_public_part_does_not_hold_the_weight():
    prepared = layer(30, 50)
    data = prepared.spec.to_bytes() + pickle.dumps(prepared.spec)
    integers = prepared.quantised()
    assert len(prepared.spec.to_bytes()) < integers.nbytes
    assert not any(integers[k, :8].tobytes() in data for k in range(30))


def test_damaged_public_parts_are_refused():
    data = layer().spec.to_bytes()
    for damaged, message in (
        (data[:-1], "truncated"),
        (data + b"\0", "1 bytes too many"),
        (data[:100] + bytes([data[100] ^ 4]) + data[101:], "checksum mismatch"),
        (b"", "shorter than its head"),
    ):
        with pytest.raises(MessageError, match=message):
            linear.LayerSpec.from_bytes(damaged)


def test_reprs():
    prepared = layer()
    text = f"LayerSpec(preset='linear-w8', d_out=40, d_in=24, id={prepared.spec.id.hex()})"
    assert repr(prepared.spec) == text
    assert repr(prepared) == f"QuantisedWeight({text})"


def test_error_classes_serve_plain_python_too():
    assert issubclass(MessageError, ValueError)
    assert issubclass(InputError, ValueError)
    assert issubclass(SecretError, RuntimeError)

"""Every precondition of the four functions: the class of the error, and that its message names value and fix."""

import numpy as np
import pytest

from linear_cases import batch, layer
from privtuner import _core, linear
from privtuner.errors import InputError, PrivtunerError


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


# Where a function gets a batch it refuses the same ones.
BATCHES = [
    (
        np.ones(24, np.float32),
        r"x has shape \(24,\): expected \(tokens, 24\) with at least one token \(forward direction\)",
    ),
    (np.ones((2, 3, 24), np.float32), r"x has shape \(2, 3, 24\)"),
    (np.ones((2, 23), np.float32), r"x has shape \(2, 23\): expected \(tokens, 24\)"),
    (np.ones((2, 40), np.float32), r"x has shape \(2, 40\): expected \(tokens, 24\)"),
    (np.ones((0, 24), np.float32), r"x has shape \(0, 24\): .* at least one token"),
    (np.ones((2, 24), np.int64), "x has dtype int64: expected float16, float32 or float64"),
    (np.ones((2, 24), ">f4"), "x has dtype >f4"),
    (np.ones((2, 24), np.longdouble), "x has dtype float128"),
    (changed((3, 24), (1, 5), np.nan), r"x\[1, 5\] is nan: every value must be finite"),
    (changed((3, 24), (2, 23), -np.inf), r"x\[2, 23\] is -inf: every value must be finite"),
    (changed((3, 24), (0, 0), np.inf, np.float16), r"x\[0, 0\] is inf"),
    (changed((3, 24), (1, 5), np.nan, np.float64), r"x\[1, 5\] is nan: every value must be finite"),
    (changed((3, 24), (1, 5), 1e39, np.float64), r"x \(as float32\)\[1, 5\] is inf"),
]


@pytest.mark.parametrize("function", [linear.encrypt, lambda x, spec: linear.error_bound(spec, x)])
@pytest.mark.parametrize(("x", "message"), BATCHES)
def test_batches_are_refused(function, x, message):
    with pytest.raises(InputError, match=message):
        function(x, layer().spec)


def test_batches_are_refused_backward():
    spec = layer().spec
    with pytest.raises(InputError, match=r"expected \(tokens, 40\) with at least one token \(backward direction\)"):
        linear.encrypt(batch(2, 24), spec, "backward")
    with pytest.raises(InputError, match=r"x\[1, 39\] is nan"):
        linear.encrypt(changed((3, 40), (1, 39), np.nan), spec, "backward")
    with pytest.raises(InputError, match=r"expected \(tokens, 40\)"):
        linear.error_bound(spec, batch(2, 24), "backward")
    # Not even where the scale of the row is zero.
    zeros = linear.prepare(np.zeros((2, 3))).spec
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match=r"x\[0, 1\] is"):
            linear.encrypt(changed((1, 2), (0, 1), bad), zeros, "backward")


@pytest.mark.parametrize("direction", ["", "Forward", "both", None, 0])
def test_directions_are_refused(direction):
    spec = layer().spec
    for function in (linear.encrypt, lambda x, spec, direction: linear.error_bound(spec, x, direction)):
        with pytest.raises(InputError, match=f"direction {direction!r}: choose 'forward' or 'backward'"):
            function(batch(2, 24), spec, direction)


@pytest.mark.parametrize("block_rows", [0, -1])
def test_block_rows_are_refused(block_rows):
    prepared = layer()
    request, _ = linear.encrypt(batch(1, 24), prepared.spec)
    with pytest.raises(InputError, match=f"block_rows = {block_rows}: must be positive"):
        linear.apply_blocks(prepared, request, block_rows)


def test_errors_are_of_one_family_and_show_no_other_value():
    x = changed((2, 24), (1, 5), np.nan)
    x[0] = 1234.5
    with pytest.raises(PrivtunerError) as caught:
        linear.encrypt(x, layer().spec)
    assert isinstance(caught.value, ValueError)
    assert "1234" not in str(caught.value)

"""Whatever finite weights and batches there are: results are within the guaranteed error."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from linear_cases import BLOCK_PREFIX, DIRECTIONS, LARGEST, PRESETS, check_exchange, check_result
from privtuner import linear

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SIZES = st.integers(1, 40)


def arrays(rows, columns):
    return npst.arrays(np.float32, (rows, columns), elements=FINITE)


@st.composite
def exchanges(draw):
    direction = draw(st.sampled_from(DIRECTIONS))
    d_out, d_in, tokens = draw(SIZES), draw(SIZES), draw(st.integers(1, 6))
    x = draw(arrays(tokens, d_in if direction == "forward" else d_out))
    return draw(arrays(d_out, d_in)), x, direction, draw(st.sampled_from(PRESETS))


@given(exchanges())
def test_results_are_within_the_guaranteed_error(case):
    weight, x, direction, preset = case
    check_exchange(linear.prepare(weight, preset), x, direction)


@given(exchanges(), st.integers(0, 2**32 - 1))
def test_results_of_full_range_weights_are_within_the_guaranteed_error(case, seed):
    # Drawn arrays are mostly small numbers: here every weight is far from zero.
    weight, x, direction, preset = case
    rng = np.random.default_rng(seed)
    dense = rng.choice([-1.0, 1.0], weight.shape) * rng.uniform(0.5, 1, weight.shape)
    check_exchange(linear.prepare(dense, preset), x, direction)


@given(st.sampled_from(PRESETS), arrays(5, 7))
def test_quantisation_is_within_half_a_step(preset, weight):
    prepared = linear.prepare(weight, preset)
    integers = prepared.quantised().astype(np.int64)
    delta = prepared.spec.scale[:, None]
    assert np.abs(integers).max() <= LARGEST[preset]
    assert (np.abs(weight - delta * integers) <= delta * 0.5 * (1 + 1e-9)).all()
    assert ((delta == 0) == (weight == 0).all(axis=1, keepdims=True)).all()


@given(st.integers(1, 200), st.integers(1, 70), st.sampled_from(DIRECTIONS))
def test_any_blocks_make_the_reply(block_rows, outputs, direction):
    weight = np.random.default_rng(outputs).standard_normal((outputs, 5))
    prepared = linear.prepare(weight if direction == "forward" else weight.T)
    x = np.random.default_rng(block_rows).standard_normal((3, 5)).astype(np.float32)
    request, secret = linear.encrypt(x, prepared.spec, direction)
    blocks = list(linear.apply_blocks(prepared, request, block_rows))
    assert len(blocks) == -(-outputs // (-(-block_rows // 32) * 32))
    whole = linear.apply(prepared, request)
    assert len(whole) == sum(map(len, blocks)) - BLOCK_PREFIX * (len(blocks) - 1)
    check_result(prepared, x, linear.decrypt(blocks, secret), direction)

"""Results of encrypted products against exact ones, for inputs chosen to break them. On every backend."""

import math

import numpy as np
import pytest

from linear_cases import DIRECTIONS, PRESETS, Q, batch, check_exchange, exchange, features_in, layer
from precision import assert_precision
from privtuner import linear


def signs(*shape):
    return np.where(np.random.default_rng(7).random(shape) < 0.5, -1.0, 1.0)


def rows_of_all_sizes(d_out, d_in):
    """Rows from 1e-40 to 1e30, one of zeros."""
    sizes = np.logspace(-40, 30, d_out)
    sizes[d_out // 2] = 0
    return np.random.default_rng(8).standard_normal((d_out, d_in)) * sizes[:, None]


WEIGHTS = {
    "all largest": np.ones((33, 50)),
    "all smallest": -np.ones((33, 50)),
    "largest of both signs": signs(33, 50),
    "one in a row": np.eye(33, 50),
    "one in all": np.pad([[1.0]], ((3, 29), (20, 29))),
    "zeros": np.zeros((33, 50)),
    "1e-40": signs(33, 50) * 1e-40,
    "denormal": np.full((33, 50), 1e-45),
    "1e30": signs(33, 50) * 1e30,
    "rows of all sizes": rows_of_all_sizes(33, 50),
    "float16": np.random.default_rng(9).standard_normal((33, 50)).astype(np.float16),
    "d_in = 1": signs(33, 1),
    "d_out = 1": signs(1, 50),
    "1 x 1": np.array([[-0.3]]),
}


def tokens_for(features):
    """Tokens of every kind in one batch, in an order that sets the extreme beside the small."""
    rng = np.random.default_rng(10)
    normal = rng.standard_normal((3, features))
    spike = np.zeros((2, features))
    spike[0, 0], spike[1, -1] = 1, -3e38
    rows = [
        normal * 1e-30,
        normal[:1] * 1e30,
        np.zeros((1, features)),
        np.full((1, features), 1e-45),
        normal[:1] * 1e-42,
        np.full((1, features), 1e30),
        signs(1, features),
        -np.ones((1, features)),
        spike,
        normal,
    ]
    return np.concatenate(rows).astype(np.float32)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_extreme_weights_and_tokens(backend, preset, direction, weight):
    prepared = linear.prepare(WEIGHTS[weight], preset)
    check_exchange(prepared, tokens_for(features_in(prepared, direction)), direction, on=backend)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sign", [1, -1])
def test_tokens_along_a_row_reach_the_end_of_the_range(backend, preset, sign):
    # Cauchy-Schwarz holds with equality: this is as near to a wrap as a token gets, in both directions.
    prepared = linear.prepare(signs(5, 300), preset)
    weight = prepared.quantised().astype(np.float32)
    check_exchange(prepared, sign * weight, on=backend)
    columns = weight[:1] * np.ones((1, 300), np.float32)
    check_exchange(linear.prepare(columns.T, preset), sign * np.ones((2, 300), np.float32), "backward", on=backend)


def test_huge_inputs_overflow_to_infinity_alone(backend):
    prepared = linear.prepare(np.ones((2, 4)))
    x = np.array([[3e38, 3e38, 0, 0], [3e38, -3e38, 0, 0], [-3e38] * 4, [1, 2, 3, 4]], np.float32)
    y = exchange(prepared, x, on=backend)
    assert np.isposinf(y[0]).all()
    assert np.isneginf(y[2]).all()
    check_exchange(prepared, x, on=backend)


@pytest.mark.parametrize("tokens", [1, 2, 17, 2047, 2048, 2049, 4097])
@pytest.mark.parametrize("preset", PRESETS)
def test_token_counts_around_the_groups(backend, tokens, preset):
    prepared = layer(5, 9, preset)
    for direction in DIRECTIONS:
        check_exchange(prepared, batch(tokens, features_in(prepared, direction)), direction, on=backend)


def test_both_directions_apply_the_same_quantised_weight(backend):
    prepared = layer(30, 50, "linear-w16")
    clear = prepared.spec.scale[:, None] * prepared.quantised()
    rng = np.random.default_rng(5)
    x, g = (rng.standard_normal((64, d)).astype(np.float32) for d in (50, 30))
    # The guaranteed error of a 16-bit weight, in bits of the largest output.
    for direction, batch_, want in (("forward", x, x @ clear.T), ("backward", g, g @ clear)):
        bound = linear.error_bound(prepared.spec, batch_, direction).max()
        min_bits = -math.log2(bound / np.abs(want).max())
        assert min_bits > 14
        assert_precision(want, exchange(prepared, batch_, direction, on=backend), min_bits)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_noise_has_the_size_of_theory(backend, preset, direction):
    """The noise of output k is sum_j W_kj e_j plus the rounding of the reply, in units of delta_k / Delta_t.

    Columns come in equal pairs and tokens in opposite ones: the exact product is zero and so is what rounding the
    input and the float32 result would add. Left are errors of variance 21/2 a feature, times |W_k|^2, and the dropped
    bits, uniform in a range of 2^dropped.
    """
    tokens, depth, outputs = 2048, 512, 16
    rng = np.random.default_rng(6)
    half = rng.standard_normal((outputs, depth // 2))
    weight = np.repeat(half, 2, axis=1)
    prepared = linear.prepare(weight if direction == "forward" else weight.T, preset)
    x = np.repeat(rng.standard_normal((tokens, depth // 2)), 2, axis=1)
    x[:, 1::2] *= -1
    integers, delta = prepared.quantised().astype(np.float64), prepared.spec.scale
    if direction == "backward":
        # Rows of the transpose are scaled alike, in pairs: opposite gradients stay opposite.
        assert (delta[::2] == delta[1::2]).all()
        integers, scale, scaled = integers.T, np.ones(outputs), x.astype(np.float32) * delta
    else:
        scale, scaled = delta, x.astype(np.float32).astype(np.float64)
    y = exchange(prepared, x.astype(np.float32), direction, on=backend).astype(np.float64)

    norms = np.sqrt((integers**2).sum(axis=1))
    worst = 21.5 * math.sqrt(depth) * norms.max() + 2.0 ** (7 if preset == "linear-w8" else 17)
    unit = np.sqrt((scaled**2).sum(axis=1)) * norms.max() / (Q[preset] / 2 - worst)  # 1 / Delta_t
    dropped = 2.0 ** (8 if preset == "linear-w8" else 18)
    sigma = np.sqrt(10.5 * norms**2 + dropped**2 / 12)
    z = y / (unit[:, None] * scale * sigma)
    # Outputs share the errors of the inputs; their correlations widen the spread of the mean square.
    correlations = (integers @ integers.T) / np.outer(norms, norms)
    spread = math.sqrt(2 * (correlations**2).sum()) / (outputs * math.sqrt(tokens))
    assert abs((z**2).mean() - 1) < 6 * spread
    assert abs(z.mean()) < 6 * math.sqrt(np.abs(correlations).sum()) / (outputs * math.sqrt(tokens))
    # Nothing like the tails of a normal variable is cut off: 2,048 x 16 of them reach 3.5 but not 7.
    assert 3.5 < np.abs(z).max() < 7
    assert (np.abs(y) <= linear.error_bound(prepared.spec, x, direction)).all()


def test_a_token_of_zeros_gives_zeros(backend):
    for preset in PRESETS:
        prepared = layer(6, 9, preset)
        for direction in DIRECTIONS:
            x = batch(4, features_in(prepared, direction))
            x[1:3] = 0
            y = exchange(prepared, x, direction, on=backend)
            assert not y[1:3].any()
            assert y[0].all()

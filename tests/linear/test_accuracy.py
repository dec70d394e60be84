"""Shapes, layouts and sizes that products of the processor take, and the bound of their errors."""

import math

import numpy as np
import pytest

from linear_cases import DIRECTIONS, PRESETS, Q, batch, check_exchange, features_in, layer
from privtuner import linear


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_20000_features(direction):
    shape = (3, 20000) if direction == "forward" else (20000, 3)
    weight = np.where(np.random.default_rng(7).random(shape) < 0.5, -1.0, 1.0)
    prepared = linear.prepare(weight)
    x = np.concatenate(
        [
            np.random.default_rng(10).standard_normal((3, 20000)),
            np.eye(1, 20000) * -3e38,
            np.sign(weight if direction == "forward" else weight.T)[:1],
        ]
    )
    check_exchange(prepared, x.astype(np.float32), direction)


@pytest.mark.parametrize("d_out", [1, 15, 17, 31, 33, 65])
@pytest.mark.parametrize("d_in", [1, 16, 17, 63])
def test_shapes_around_the_tiles(d_out, d_in):
    for preset in PRESETS:
        prepared = layer(d_out, d_in, preset)
        for direction in DIRECTIONS:
            check_exchange(prepared, batch(33, features_in(prepared, direction)), direction)


INPUTS = {
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64) * (1 + 1e-12),
    "Fortran order": np.asfortranarray,
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1, ::-1],
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
    "lists": lambda x: x.astype(np.float64).tolist(),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_every_layout_and_dtype(kind):
    prepared = layer(20, 12)
    x = INPUTS[kind](batch(6, 12))
    check_exchange(prepared, np.asarray(x))
    check_exchange(linear.prepare(np.asarray(x)), batch(4, 12))


def test_inputs_are_read_only_and_left_alone():
    x, weight = batch(6, 12), np.random.default_rng(3).standard_normal((20, 12))
    for array in (x, weight):
        array.setflags(write=False)
    before = x.tobytes(), weight.tobytes()
    check_exchange(linear.prepare(weight), x)
    assert before == (x.tobytes(), weight.tobytes())


def test_error_bound_by_hand():
    # |W_int| = (127, 127), delta = 1/127; one token of length 5.
    prepared = linear.prepare(np.ones((1, 2)))
    noise = 21.5 * math.sqrt(2) * 127 * math.sqrt(2) + 128
    unit = 5 * 127 * math.sqrt(2) / (Q["linear-w8"] / 2 - noise)
    want = noise * unit / 127 + 5 * math.sqrt(2) * 2**-23
    np.testing.assert_allclose(linear.error_bound(prepared.spec, [[3.0, 4.0]]), [[want]], rtol=1e-8)


def test_error_bound_scales_with_the_token():
    prepared = layer(6, 9)
    x = batch(5, 9)
    x[2] = 0
    bound = linear.error_bound(prepared.spec, x)
    assert bound.shape == (5, 6)
    assert bound.dtype == np.float64
    assert (bound > 0).all()
    assert (bound[2] < 1e-44).all()
    np.testing.assert_allclose(linear.error_bound(prepared.spec, 1024 * x), 1024 * bound, rtol=1e-12, atol=1e-40)
    assert linear.error_bound(prepared.spec, batch(5, 6), "backward").shape == (5, 9)

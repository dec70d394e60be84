"""The circuits on clear numbers: results, levels, rotations, and the bounds they declare."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from circuit_cases import PARAMETERS, SLOTS, Watched, random, spread, tensor
from privtuner import ckks
from privtuner.ckks import circuits
from privtuner.errors import CkksError, InputError

DEPTH = PARAMETERS.depth


def relative(y: ckks.ClearTensor, exact: npt.NDArray[np.float64]) -> float:
    return float(np.abs(y.values / exact - 1).max())


# Exponential


@pytest.mark.parametrize(
    ("low", "halvings", "degree"), [(-8, 0, 15), (-8, 2, 7), (-1, 0, 3), (-32, 3, 15), (-64, 5, 15)]
)
def test_exponential(low, halvings, degree):
    clear = Watched()
    x = np.concatenate([-spread(1e-3, -low, 40), [[0.0]]])
    y = circuits.exponential(clear, tensor(clear, x, domain=(low, 0)), low, halvings, degree)
    assert (
        DEPTH - y.level == circuits.exponential_depth(halvings, degree) == math.ceil(math.log2(degree + 1)) + halvings
    )
    error = circuits.exponential_error(low, halvings, degree)
    assert error < 2e-2
    assert relative(y, np.exp(x)) <= error + 1e-13
    assert y.bound < 1.04


# Reciprocal and inverse square root


@pytest.mark.parametrize("gain", [1.0, 7.0, 0.01])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(("low", "high", "degree"), [(0.1, 1.0, 7), (0.01, 1.0, 15), (30.0, 2000.0, 31), (1.0, 1.1, 1)])
def test_reciprocal(low, high, degree, steps, gain):
    clear = Watched()
    x = spread(low, high)
    y = circuits.reciprocal(clear, tensor(clear, x, domain=(low, high)), (low, high), degree, steps, gain)
    depth = math.ceil(math.log2(degree + 1)) + (1 + steps if steps else 0)
    assert DEPTH - y.level == circuits.reciprocal_depth(degree, steps) == depth
    error = circuits.reciprocal_error((low, high), degree, steps)
    assert error < 0.7
    assert relative(y, gain / x) <= error * (1 + 1e-6) + 1e-12


def test_reciprocal_error_is_the_closed_form():
    low, high, degree = 0.05, 1.0, 12
    chebyshev = np.polynomial.chebyshev.Chebyshev.basis(degree + 1)
    assert circuits.reciprocal_error((low, high), degree) == pytest.approx(1 / chebyshev((high + low) / (high - low)))
    assert circuits.reciprocal_error((1.0, 1.0 + 1e-9), 255, 16) == 0  # no overflow on the way


@pytest.mark.parametrize("gain", [1.0, 5.0])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(("low", "high", "degree"), [(0.1, 1.0, 7), (0.01, 1.0, 15), (30.0, 2000.0, 31), (1.0, 1.1, 1)])
def test_inverse_square_root(low, high, degree, steps, gain):
    clear = Watched()
    x = spread(low, high)
    y = circuits.inverse_square_root(clear, tensor(clear, x, domain=(low, high)), (low, high), degree, steps, gain)
    depth = math.ceil(math.log2(degree + 1)) + 2 * steps
    assert DEPTH - y.level == circuits.inverse_square_root_depth(degree, steps) == depth
    error = circuits.inverse_square_root_error((low, high), degree, steps)
    assert error < 0.05
    assert relative(y, gain / np.sqrt(x)) <= error * (1 + 1e-6) + 1e-12


# Matrix-vector product


@pytest.mark.parametrize("period", [None, SLOTS])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (5, 11), (16, 3)])
def test_matrix_vector(shape, period):
    clear = Watched()
    n = period or 1 << (max(shape) - 1).bit_length()
    matrix, vector = random(*shape), np.zeros(n)
    vector[: shape[1]] = random(shape[1], seed=8)
    x = np.tile(vector, SLOTS // n)[:, None]
    y = circuits.matrix_vector(clear, tensor(clear, x), matrix, period)
    assert DEPTH - y.level == circuits.MATRIX_VECTOR_DEPTH
    expected = np.zeros(n)
    expected[: shape[0]] = matrix @ vector[: shape[1]]
    np.testing.assert_allclose(y.values[:, 0], np.tile(expected, SLOTS // n), atol=1e-12)
    assert tuple(clear.rotated) == circuits.matrix_vector_steps(SLOTS, n)
    assert len(clear.rotated) <= max(3 * math.sqrt(n / 2) - 2, 2 * math.sqrt(n) - 2) + 1e-9


# Errors


def test_levels_run_out():
    clear = Watched()
    x = tensor(clear, spread(0.1, 1.0), level=circuits.inverse_square_root_depth(7, 2) - 1)
    with pytest.raises(CkksError, match="needs a level"):
        circuits.inverse_square_root(clear, x, (0.1, 1.0), 7, 2)
    enough = tensor(clear, spread(0.1, 1.0), level=circuits.inverse_square_root_depth(7, 2))
    assert circuits.inverse_square_root(clear, enough, (0.1, 1.0), 7, 2).level == 0


CLEAR = ckks.ClearEvaluator(PARAMETERS)
X = CLEAR.tensor(np.ones((SLOTS, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: circuits.exponential(CLEAR, X, 1.0), "low = 1.0"),
        (lambda: circuits.exponential(CLEAR, X, -1.0, 17), "halvings = 17"),
        (lambda: circuits.exponential_depth(0, 256), "degree 256"),
        (lambda: circuits.reciprocal(CLEAR, X, (0.0, 1.0)), "low > 0"),
        (lambda: circuits.reciprocal(CLEAR, X, (1.0, 0.5)), "low < high"),
        (lambda: circuits.reciprocal(CLEAR, X, (0.5, 1.0), 0), "degree 0"),
        (lambda: circuits.reciprocal(CLEAR, X, (0.5, 1.0), 3, -1), "newton_steps = -1"),
        (lambda: circuits.reciprocal(CLEAR, X, (0.5, 1.0), gain=0), "gain = 0"),
        (lambda: circuits.inverse_square_root(CLEAR, X, (-1.0, 1.0)), "low > 0"),
        (lambda: circuits.inverse_square_root(CLEAR, X, (1e-6, 1.0), 3, 2), "raise the degree"),
        (lambda: circuits.matrix_vector_steps(SLOTS, 12), "power of two"),
        (lambda: circuits.matrix_vector(CLEAR, X, np.ones((4, 4))), "repeated over all slots"),
        (lambda: circuits.matrix_vector(CLEAR, X, np.ones(4)), "matrix has shape"),
        (lambda: circuits.matrix_vector(CLEAR, X, np.ones((8, 8)), 4), "fit the period"),
        (lambda: circuits.matrix_vector(CLEAR, X, np.full((4, 4), np.inf)), "not finite"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()

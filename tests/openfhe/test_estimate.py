"""What is predicted of OpenFHE's slots, against slots with errors drawn at random. Needs no OpenFHE."""

import math
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest

from privtuner import ckks
from privtuner.errors import CkksError
from privtuner.openfhe.estimate import Errors, Estimate, is_uniform, join

RNG = np.random.default_rng(11)
COUNT = 20_000
"""Slots of a feature: sampled deviations are within 5 / sqrt(2 COUNT), 2.5 %, of the true ones."""

X = Estimate(2.0, np.array([1.0, 1.0, 1.0]), 2.0, 2e-3, 1e-3, independent=True)
Y = Estimate(1.5, np.array([1.0, 1.0, 1.0]), 1.5, 1e-3, 3e-3)
ONE = Estimate(1.0, np.array([1.0]), 1.0, 4e-3, 2e-3, independent=True)
HALVES = replace(X, bound=1.0, factor=np.full(3, 0.5))
SKEWED = replace(X, bound=8.0, factor=np.array([1.0, 2.0, 4.0]))
NUMBERS = np.array([0.5, -2.0, 1.0])
MATRIX = ckks.Matrix(RNG.normal(size=(4, 3)))
SHARED = ckks.Matrix(RNG.normal(size=(3, 4)), per_row=False)


def drawn(x: Estimate) -> tuple[np.ndarray, np.ndarray]:
    """What slots should hold, (COUNT, features), and what they do; errors shared by the features unless independent."""
    exact = x.slots * RNG.uniform(-1, 1, (COUNT, len(x.factor)))
    shape = exact.shape if x.independent else (COUNT, 1)
    return exact, exact + x.noise * RNG.standard_normal(shape) + x.bias


def largest_sums(slots: np.ndarray, matrix: ckks.Matrix, transpose: bool = False) -> np.ndarray:
    return slots @ (matrix.integers if transpose else matrix.integers.T).astype(np.float64)


# name: (the estimate of the result, the same on slots, inputs)
CASES = {
    "plus": (Estimate.plus, lambda x, y: x + y, (X, Y)),
    "plus one feature": (Estimate.plus, lambda x, y: x + y, (ONE, X)),
    "plus numbers": (lambda x: x.plus_numbers(NUMBERS), lambda x: x + NUMBERS, (X,)),
    "plus numbers, halves": (lambda x: x.plus_numbers(NUMBERS), lambda x: x + 2 * NUMBERS, (HALVES,)),
    "one feature plus numbers": (lambda x: x.plus_numbers(NUMBERS), lambda x: x + NUMBERS, (ONE,)),
    "times numbers": (lambda x: x.times(NUMBERS), lambda x: x * NUMBERS, (X,)),
    "times numbers, skewed": (lambda x: x.times(NUMBERS), lambda x: x * NUMBERS * SKEWED.factor, (SKEWED,)),
    "one feature times numbers": (lambda x: x.times(NUMBERS), lambda x: x * NUMBERS, (ONE,)),
    "product": (Estimate.product, lambda x, y: x * y, (X, Y)),
    "product with one feature": (Estimate.product, lambda x, y: x * y, (ONE, X)),
    "dot": (lambda x, y: x.product(y, 3).features(0, 1), lambda x, y: (x * y).sum(1, keepdims=True), (X, Y)),
    "sum of features": (Estimate.sum_of_features, lambda x: x.sum(1, keepdims=True), (X,)),
    "sum of shared errors": (Estimate.sum_of_features, lambda x: x.sum(1, keepdims=True), (Y,)),
    "select": (lambda x: x.features(1, 3), lambda x: x[:, 1:3], (X,)),
    "joined": (lambda x, y: join([x, y]), lambda x, y: np.hstack([x, y]), (X, Y)),
    "linear": (lambda x: x.linear(MATRIX, False), lambda x: largest_sums(x, MATRIX), (X,)),
    "linear of shared errors": (lambda x: x.linear(MATRIX, False), lambda x: largest_sums(x, MATRIX), (Y,)),
    "linear, transposed": (lambda x: x.linear(SHARED, True), lambda x: largest_sums(x, SHARED, True), (X,)),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_stay_below_the_estimate(name):
    estimate, run, inputs = CASES[name]
    result = estimate(*inputs)
    slots = [drawn(x) for x in inputs]
    exact, found = run(*(a for a, _ in slots)), run(*(b for _, b in slots))
    error = found - exact
    margin = 5 / math.sqrt(2 * COUNT)
    assert exact.shape[1] == len(result.factor)
    assert np.abs(exact).max() <= result.slots * (1 + 1e-12)
    assert error.std(axis=0).max() <= result.noise * (1 + margin)
    assert np.abs(error.mean(axis=0)).max() <= result.bias + 5 * result.noise / math.sqrt(COUNT)
    assert np.abs(exact * result.factor).max() <= result.bound * (1 + 1e-12)


def test_values_are_factors_times_slots():
    """The bound of values is that of slots times the factors, where nothing else was promised."""
    product = X.linear(MATRIX, False)
    np.testing.assert_allclose(product.factor, MATRIX.scale)
    assert product.bound == pytest.approx(X.bound * np.abs(MATRIX.dequantised()).sum(1).max())
    np.testing.assert_allclose(X.linear(SHARED, True).factor, SHARED.scale[0])
    assert product.times(np.ones(1)).slots == product.bound
    assert (SKEWED.assumed(3.0).bound, SKEWED.assumed(3.0).slots) == (3.0, 3.0)
    assert (HALVES.assumed(3.0).bound, HALVES.assumed(3.0).slots) == (3.0, 6.0)


def test_what_is_independent():
    assert X.plus_numbers(NUMBERS).independent
    assert not ONE.plus_numbers(NUMBERS).independent  # one error in three features
    assert not any(x.independent for x in (X.plus(X), X.product(X), X.times(NUMBERS), join([X, X])))
    assert not X.linear(MATRIX, False).independent
    assert not X.sum_of_features().independent
    assert all(x.independent for x in (X.off(noise=1.0), X.features(0, 2), X.assumed(1.0)))


def test_errors_of_operations_add_up():
    errors = Errors(unit=2.0**30, rounding=1e-4, deviation=1e-5, switch=2e-3, lift=4e-3)
    for found, noise, bias in (
        (X.rounded(errors), 1e-4, 0.0),
        (X.rescaled(errors), 1e-4, 1e-5 * X.slots),
        (X.switched(errors, 2.0), 1e-3, 2e-3),
        (X.relinearised(errors), 1e-4 + 2e-3 / 2.0**60, 1e-5 * X.slots + 4e-3 / 2.0**60),
        (X.off(noise=0.5, bias=0.25), 0.5, 0.25),
    ):
        assert found.noise == pytest.approx(X.noise + noise)
        assert found.bias == pytest.approx(X.bias + bias)
        assert (found.slots, found.bound, found.independent) == (X.slots, X.bound, X.independent)
    assert reduce(Estimate.plus, [X, Y, Y]).noise == pytest.approx(X.noise + 2 * Y.noise)


@pytest.mark.parametrize(
    "polynomial",
    [
        ckks.Polynomial((0.5, 1.0, -0.3, 0.2), "power"),
        ckks.Polynomial((0.1, 0.4, 0.0, -0.2, 0.3), "chebyshev", (-2.0, 2.0)),
    ],
)
def test_errors_of_a_polynomial(polynomial):
    x = X.assumed(1.0)
    result = x.polynomial(polynomial, Errors(unit=2.0**30, rounding=1e-6, deviation=0.0, switch=0.0, lift=0.0))
    exact, found = drawn(x)
    error = polynomial(found) - polynomial(exact)
    assert error.std(axis=0).max() <= result.noise
    assert np.abs(error.mean(axis=0)).max() <= result.bias
    assert (len(result.factor), is_uniform(result.factor)) == (3, True)


def test_factors_that_differ_are_refused():
    assert not is_uniform(SKEWED.factor)
    assert not X.shares_factors(SKEWED)
    assert X.shares_factors(replace(X, factor=X.factor * (1 + 2.0**-44)))
    with pytest.raises(CkksError, match=r"the features' factors differ; multiply by 1.0 first"):
        SKEWED.linear(MATRIX, False)
    with pytest.raises(CkksError, match="per_row=False for the transpose"):
        X.linear(ckks.Matrix(np.diag([1.0, 2.0, 3.0])), True)

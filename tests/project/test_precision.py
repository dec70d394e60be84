import math
from fractions import Fraction

import numpy as np
import pytest

from linear_cases import exact_product
from precision import assert_precision, assert_within, precision_bits


def test_bits_are_relative_to_the_largest_expected_value():
    assert precision_bits([4.0, -8.0], [4.0, -8.0]) == math.inf
    assert precision_bits([4.0, -8.0], [4.0, -7.0]) == 3
    assert precision_bits([[0.0, 1.0]], [[2.0**-10, 1.0]]) == 10


def test_precision_is_that_of_the_worst_element():
    want = np.linspace(-1, 1, 101)
    got = want + 2.0**-20
    assert_precision(want, got, 19.99)
    got[37] += 2.0**-10
    with pytest.raises(AssertionError, match=r"10\.00 bits, expected 19\.99; worst at \[37\]"):
        assert_precision(want, got, 19.99)


def test_bounds_are_held_by_every_element():
    want, bound = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.5, 0.5], [0.5, 0.001]])
    assert_within(want, want + np.array([[0.5, -0.5], [0, 0.0005]]), bound)
    with pytest.raises(AssertionError, match=r"beyond the bound by 0\.00.*worst at \[1, 1\]: expected 4\.0"):
        assert_within(want, want + 0.002, bound)
    with pytest.raises(AssertionError, match=r"expected shape \(2, 2\), got \(2,\)"):
        assert_within(want, want[0], bound)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bounds_are_not_held_by_what_is_no_number(bad):
    with pytest.raises(AssertionError, match="got"):
        assert_within([1.0], [bad], [100.0])
    with pytest.raises(AssertionError, match="bound is not finite"):
        assert_within([1.0], [1.0], [bad])


def test_results_beyond_float32_are_infinite():
    assert_within([1e39, -1e39], [math.inf, -math.inf], [1.0, 1.0])
    assert_within([3.4e38], [math.inf], [1e37])
    assert_within([1.0], [-math.inf], [1e39])
    for infinity in (math.inf, -math.inf):
        with pytest.raises(AssertionError, match="infinity beyond the bound"):
            assert_within([1e38], [infinity], [1e38])
    with pytest.raises(AssertionError, match="infinity beyond the bound"):
        assert_within([1e39], [-math.inf], [1.0])
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_within([1e39], [3.4e38], [1.0])


@pytest.mark.parametrize("largest", [127, 32639])
def test_products_are_exact_up_to_their_last_rounding(largest):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 37)) * 10.0 ** rng.integers(-30, 30, (4, 37))).astype(np.float32).astype(np.float64)
    x[2] = 0
    x[3, :2] = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    weight = rng.integers(-largest, largest + 1, (37, 5))
    weight[:, 0] = largest
    found = exact_product(x, weight)
    for (i, k), value in np.ndenumerate(found):
        terms = [Fraction(a) * int(b) for a, b in zip(x[i].tolist(), weight[:, k], strict=True)]
        mantissa, exponent = np.frexp(value)
        exact = Fraction(int(np.ldexp(mantissa, 64))) * Fraction(2) ** (int(exponent) - 64)
        assert abs(exact - sum(terms)) <= sum(map(abs, terms)) * Fraction(1, 2**50)
        if np.finfo(np.longdouble).nmant >= 63:
            assert abs(exact - sum(terms)) <= sum(map(abs, terms)) * Fraction(1, 2**60)

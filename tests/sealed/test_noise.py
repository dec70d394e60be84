"""The discrete Gaussian: exact probabilities on small deviations, moments on large ones."""

from __future__ import annotations

import random
import secrets

import numpy as np
import pytest
from scipy import stats

from loops import each
from privtuner.errors import InputError
from privtuner.sealed import noise
from privtuner.sealed.noise import LARGEST, discrete_gaussian


def seeded(seed: int):
    """A generator in place of the operating system's, so that a test cannot fail one day in a thousand."""
    return random.Random(seed).randrange


@pytest.mark.parametrize("sigma", [1, 2, 7])
def test_frequencies_are_those_of_the_discrete_gaussian(sigma):
    draws = 20_000
    found = discrete_gaussian(sigma, (draws,), seeded(sigma))
    support = np.arange(-12 * sigma, 12 * sigma + 1)
    exact = np.exp(-(support**2) / (2.0 * sigma**2))
    exact /= exact.sum()
    kept = draws * exact >= 5
    observed = np.array([(found == x).sum() for x in support[kept]] + [(~np.isin(found, support[kept])).sum()])
    expected = draws * np.append(exact[kept], 1 - exact[kept].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    # The test tells it from a rounded Gaussian of the same deviation where they differ most.
    if sigma == 1:
        rounded = np.diff(stats.norm.cdf(np.append(support, support[-1] + 1) - 0.5))
        other = draws * np.append(rounded[kept], 1 - rounded[kept].sum())
        assert stats.chisquare(observed, other).pvalue < 1e-6


def test_a_large_deviation_has_the_moments_of_a_gaussian():
    sigma, draws = 1 << 41, 4_000
    found = discrete_gaussian(sigma, (draws // 4, 4), seeded(1)) / sigma
    assert found.shape == (draws // 4, 4)
    assert stats.kstest(found.ravel(), "norm").pvalue > 1e-3
    # The lowest bits of its numbers are uniform: no grid shows.
    low = (found.ravel() * sigma).astype(np.int64) % 256
    assert stats.chisquare(np.bincount(low // 16, minlength=16)).pvalue > 1e-3


@each(("numerator", "denominator"), [(0, 3), (1, 3), (1, 1), (7, 3)])
def test_coins_have_the_probability_of_an_exponential(numerator, denominator):
    below, draws, exact = seeded(numerator), 20_000, np.exp(-numerator / denominator)
    shown = sum(noise._exponential(numerator, denominator, below) for _ in range(draws))
    assert abs(shown - draws * exact) <= 4 * np.sqrt(draws * exact * (1 - exact))


@pytest.mark.parametrize("sigma", [0, -1, LARGEST + 1])
def test_deviations_out_of_range_are_refused(sigma):
    with pytest.raises(InputError, match=f"sigma is {sigma}"):
        discrete_gaussian(sigma, (1,))


def test_the_default_generator_is_the_operating_systems():
    one, two = (discrete_gaussian(1 << 50, (8,)) for _ in range(2))
    assert (one != two).all()
    assert discrete_gaussian.__defaults__[0] is secrets.randbelow

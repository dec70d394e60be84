"""What is claimed of privacy: epsilon between an exact value and a published bound, budgets, and refusals."""

from __future__ import annotations

import math
import sys

import pytest
from scipy import optimize, stats

from loops import each
from privtuner.errors import InputError, MissingPackageError
from privtuner.sealed.adapters import ERROR, GRADIENT_BOUND
from privtuner.sealed.noise import LARGEST
from privtuner.sealed.privacy import FLOOD_BITS, SENSITIVITY, Privacy


def exact_epsilon(multiplier: float, delta: float) -> float:
    """The least epsilon of one Gaussian mechanism: Balle and Wang, ICML 2018, Theorem 8."""
    mu = 1 / multiplier

    def excess(epsilon):
        tail = stats.norm.logcdf(-mu / 2 - epsilon / mu)
        return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + tail) - delta

    return optimize.brentq(excess, 0, 1e4)


@each(multiplier=[0.3, 1.0, 8.0], openings=[1, 40], delta=[1e-5, 1e-7])
def test_epsilon_is_above_the_exact_one_and_below_the_bound_of_concentrated_privacy(multiplier, openings, delta):
    """T Gaussians of multiplier z are one of z / sqrt(T); Bun and Steinke, TCC 2016, Proposition 1.3, for the bound."""
    found = Privacy(multiplier, 1.0, delta).epsilon(openings)
    together = multiplier / SENSITIVITY / math.sqrt(openings)
    rho = 1 / (2 * together**2)
    assert exact_epsilon(together, delta) <= found <= rho + 2 * math.sqrt(rho * math.log(1 / delta))


def test_a_published_value():
    """Opacus's and TensorFlow Privacy's accountants give 4.75 or a little less for z = 1, one step, delta 1e-5."""
    # Mironov, CSF 2017, Proposition 3, with the best order; the accountant's conversion is tighter by up to 10 %.
    mironov = 0.5 + math.sqrt(2 * math.log(1e5))
    found = Privacy(SENSITIVITY, 1.0, 1e-5).epsilon(1)
    assert 0.88 * mironov < found < mironov
    assert exact_epsilon(1.0, 1e-5) == pytest.approx(4.377, abs=1e-3)


def test_no_opening_costs_nothing_and_each_one_more():
    privacy = Privacy(4.0, 1.0, 1e-5)
    spent = [privacy.epsilon(t) for t in range(6)]
    assert spent[0] == 0.0
    assert spent == sorted(set(spent))


def test_a_budget_pays_for_the_steps_that_stay_within_it():
    free = Privacy(4.0, 1.0, 1e-5)
    privacy = Privacy(4.0, 1.0, 1e-5, budget=free.epsilon(7))
    assert privacy.affordable(100) == 7
    assert privacy.affordable(5) == 5
    assert privacy.affords(7)
    assert not privacy.affords(8)
    assert free.affordable(10**6) == 10**6
    assert Privacy(4.0, 1.0, 1e-5, budget=0.01).affordable(100) == 0


@each(
    ("values", "message"),
    [
        ((0.0, 1.0, 1e-5), "without noise the server would read gradients"),
        ((-1.0, 1.0, 1e-5), "noise multiplier is -1"),
        ((float("nan"), 1.0, 1e-5), "noise multiplier is nan"),
        ((2e4, 1.0, 1e-5), "noise multiplier is 20000"),
        ((1.0, 0.0, 1e-5), "clipping norm is 0"),
        ((1.0, math.inf, 1e-5), "clipping norm is inf"),
        ((1.0, 1.0, 0.0), "delta is 0"),
        ((1.0, 1.0, 1.0), "delta is 1"),
        ((1.0, 1.0, 1e-5, 0.0), "budget of epsilon is 0"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(InputError, match=message):
        Privacy(*values)


def test_noise_that_does_not_drown_errors_or_fit_the_modulus_is_refused():
    limit = 4.0
    least = 2**FLOOD_BITS * ERROR * (GRADIENT_BOUND / limit + 1)
    assert Privacy(1.01 * least, 1.0, 1e-5).deviation(2.0**40, 2**60, limit) == math.ceil(1.01 * least * 2**40)
    with pytest.raises(InputError, match="does not drown the errors of encryption, which tell of the key"):
        Privacy(0.99 * least, 1.0, 1e-5).deviation(2.0**40, 2**60, limit)
    fits = Privacy(2.0**14 - 1, 1.0, 1e-5)
    assert fits.deviation(2.0**40, 2**59, limit) == (2**14 - 1) * 2**40
    for scale, modulus in ((2.0**40, 2**58), (2.0 * LARGEST, 2**100)):
        with pytest.raises(InputError, match="does not fit the modulus of 2.*give a smaller one"):
            fits.deviation(scale, modulus, limit)


def test_without_the_accountant_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingPackageError, match=r"the account of differential privacy needs dp_accounting.*\[dp\]"):
        Privacy(1.0, 1.0, 1e-5).epsilon(1)
    with pytest.raises(InputError, match="-1 openings"):
        Privacy(1.0, 1.0, 1e-5).epsilon(-1)

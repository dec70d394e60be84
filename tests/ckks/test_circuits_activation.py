"""Activations and their gradients on clear numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from circuit_cases import PARAMETERS, SLOTS, Watched
from privtuner.ckks.circuits import Activation
from privtuner.ckks.functions import FUNCTIONS
from privtuner.errors import CkksError, InputError

CASES = [  # name, domain, degree, unit, levels, largest error
    ("gelu", (-20.0, 28.0), 63, 24.0, 6, 6e-3),
    ("gelu", (-8.0, 8.0), 27, 8.0, 5, 2e-3),
    ("gelu", (-11.0, 9.0), 31, 1.0, 6, 4e-3),
    ("tanh", (-5.0, 4.0), 31, 5.0, 5, 2e-3),
    ("gelu", (-1.0, 1.0), 3, 1.0, 2, 5e-2),
]


@pytest.mark.parametrize(("name", "domain", "degree", "unit", "levels", "largest"), CASES)
def test_value_and_gradient(name, domain, degree, unit, levels, largest):
    act = Activation.choose(name, domain, degree, unit=unit)
    assert act.error <= largest
    clear = Watched()
    x = np.linspace(*domain, 2 * SLOTS).reshape(SLOTS, 2)
    given = clear.tensor(x / unit, bound=max(map(abs, domain)) / unit)
    y = act.forward(clear, given)
    assert PARAMETERS.depth - y.level == act.depth == levels
    exact = FUNCTIONS[name]
    assert np.abs(y.values - exact.exact(x)).max() <= act.error * (1 + 1e-9)
    assert y.bound <= 1.02 * (np.abs(exact.exact(x)).max() + act.error)
    # The slope is that of the polynomial itself.
    before = clear.work()["relinearise"]
    again, slope = act.forward_with_slope(clear, given)
    assert (again.level, again.bound) == (y.level, y.bound)
    np.testing.assert_array_equal(again.values, y.values)
    assert clear.work()["relinearise"] - before < 2 * before
    assert PARAMETERS.depth - slope.level <= act.depth
    step = 1e-5
    steps = (act.value((x + step) / unit) - act.value((x - step) / unit)) / (2 * step)
    np.testing.assert_allclose(slope.values, steps, atol=1e-8)
    off = act.derivative.max_error or 0.0
    assert off < 0.2
    assert np.abs(slope.values - exact.slope(x)).max() <= off + 1e-9
    assert slope.bound <= 1.02 * (np.abs(exact.slope(x)).max() + off)


@pytest.mark.parametrize(("name", "domain", "degree", "unit", "levels", "largest"), CASES)
def test_zero_stays_zero(name, domain, degree, unit, levels, largest):
    act, clear = Activation.choose(name, domain, degree, unit=unit), Watched()
    y = act.forward(clear, clear.tensor(np.zeros((SLOTS, 1)), bound=0.5))
    assert np.abs(y.values).max() < 1e-13


CLEAR = Watched()
ACT = Activation.choose("gelu", (-4.0, 4.0), 15)
X = CLEAR.tensor(np.zeros((SLOTS, 2)), bound=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Activation.choose("nothing", (-1.0, 1.0), 7), "no function is called"),
        (lambda: Activation.choose("gelu", (1.0, -1.0), 7), "low < high"),
        (lambda: Activation.choose("gelu", (0.0, 1.0), 7), "must hold 0"),
        (lambda: Activation.choose("sigmoid", (-1.0, 1.0), 7), "sigmoid is not 0 at 0"),
        (lambda: Activation.choose("gelu", (-1.0, 1.0), 0), "degree 0"),
        (lambda: Activation.choose("gelu", (-1.0, 1.0), 256), "degree 256"),
        (lambda: Activation.choose("gelu", (-1.0, 1.0), 7, unit=-1.0), "unit = -1.0"),
        (lambda: Activation.choose("gelu", (-1.0, 1.0), 7, unit=math.nan), "unit = nan"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_levels_run_out():
    with pytest.raises(CkksError, match="levels"):
        ACT.forward(CLEAR, CLEAR.drop_level(X, ACT.depth - 1))

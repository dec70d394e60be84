"""What the circuits share: checks of their arguments, and small things about polynomials."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner.ckks.polynomial import MAX_DEGREE, Array, Domain, Polynomial, check_domain, peak
from privtuner.errors import InputError

SLACK = 2.0**-6  # by which values may leave their exact range, for noise and the errors of the steps before


def relative_error(approximation: Polynomial, function: Any) -> float:
    """The largest |approximation / function - 1| on the domain, rounded up."""
    return peak(lambda x: np.abs(approximation(x) / function(x) - 1), approximation.domain)


def scaled(start: Polynomial, gain: float) -> Polynomial:
    """``gain`` times a polynomial."""
    if gain == 1:
        return start
    error = None if start.max_error is None else gain * start.max_error
    values = tuple(gain * c for c in start.coefficients)
    return replace(start, coefficients=values, max_error=error, derivative_error=None)


def checked_degree(degree: int) -> int:
    """The degree, or InputError."""
    if not 1 <= degree <= MAX_DEGREE:
        raise InputError(f"degree {degree}: must be between 1 and {MAX_DEGREE}")
    return degree


def checked_halvings(halvings: int) -> int:
    """The number of halvings, or InputError."""
    if not 0 <= halvings <= 16:
        raise InputError(f"halvings = {halvings}: must be between 0 and 16")
    return halvings


def checked_steps(newton_steps: int) -> int:
    """The number of Newton steps, or InputError."""
    if not 0 <= newton_steps <= 16:
        raise InputError(f"newton_steps = {newton_steps}: must be between 0 and 16")
    return newton_steps


def checked_gain(gain: float) -> float:
    """The gain, or InputError."""
    if not 0 < gain < math.inf:
        raise InputError(f"gain = {gain}: must be positive and finite")
    return gain


def checked_negative(low: float) -> float:
    """A negative number, or InputError."""
    if not -math.inf < low < 0:
        raise InputError(f"low = {low}: must be negative and finite")
    return float(low)


def checked_positive(domain: Domain) -> Domain:
    """A domain of positive numbers, or InputError."""
    low, high = check_domain(domain)
    if low <= 0:
        raise InputError(f"domain {(low, high)}: needs low > 0")
    return low, high


def feature_values(name: str, values: npt.ArrayLike, features: int) -> Array:
    """Finite values, one a feature, or InputError."""
    array = np.asarray(values, np.float64)
    if array.shape != (features,):
        raise InputError(f"{name} has shape {array.shape}: expected ({features},), one value a feature")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite: every value must be")
    return array

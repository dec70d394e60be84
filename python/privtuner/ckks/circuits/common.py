"""What the circuits share: checks of their arguments, and small things about polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner.ckks.polynomial import MAX_DEGREE, Array, Domain, Polynomial, check_domain, peak
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError

REFRESH_LEVELS = 3  # what a refresh takes, if its result shall have the chain's scale
SLACK = 2.0**-6  # by which values may leave their exact range, for noise and the errors of the steps before


def relative_error(approximation: Polynomial, function: Any) -> float:
    """The largest |approximation / function - 1| on the domain, rounded up."""
    return peak(lambda x: np.abs(approximation(x) / function(x) - 1), approximation.domain)


def scale_polynomial(start: Polynomial, gain: float) -> Polynomial:
    """Multiply a polynomial by ``gain``."""
    if gain == 1:
        return start
    error = None if start.max_error is None else gain * start.max_error
    values = tuple(gain * c for c in start.coefficients)
    return replace(start, coefficients=values, max_error=error, derivative_error=None)


def polynomial_depth(polynomial: Polynomial) -> int:
    """Levels of a polynomial of a tensor of the chain's scale: one more than its own if the domain is wider than that.

    The highest power squares what the scale has beyond the chain's with each of its levels, and may have two bits.
    """
    low, high = polynomial.domain
    too_large = (high - low) / 2 > 2 ** min(1.0, 2.0 ** (2 - polynomial.depth))
    return max(1, polynomial.depth) + int(too_large)


def check_degree(degree: int) -> int:
    """Return the degree if it is in range; else raise InputError."""
    if not 1 <= degree <= MAX_DEGREE:
        raise InputError(f"degree {degree}: must be between 1 and {MAX_DEGREE}")
    return degree


def check_halvings(halvings: int) -> int:
    """Return the number of halvings if it is in range; else raise InputError."""
    if not 0 <= halvings <= 16:
        raise InputError(f"halvings = {halvings}: must be between 0 and 16")
    return halvings


def check_steps(newton_steps: int) -> int:
    """Return the number of Newton steps if it is in range; else raise InputError."""
    if not 0 <= newton_steps <= 16:
        raise InputError(f"newton_steps = {newton_steps}: must be between 0 and 16")
    return newton_steps


def check_gain(gain: float) -> float:
    """Return the gain if it is in range; else raise InputError."""
    if not 0 < gain < math.inf:
        raise InputError(f"gain = {gain}: must be positive and finite")
    return gain


def check_negative(low: float) -> float:
    """Return a number if it is negative; else raise InputError."""
    if not -math.inf < low < 0:
        raise InputError(f"low = {low}: must be negative and finite")
    return float(low)


def check_positive(domain: Domain) -> Domain:
    """Return a domain if its numbers are positive; else raise InputError."""
    low, high = check_domain(domain)
    if low <= 0:
        raise InputError(f"domain {(low, high)}: needs low > 0")
    return low, high


def feature_values(name: str, values: npt.ArrayLike, features: int) -> Array:
    """Return finite values, one a feature; else raise InputError."""
    array = np.asarray(values, np.float64)
    if array.shape != (features,):
        raise InputError(f"{name} has shape {array.shape}: expected ({features},), one value a feature")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite: every value must be")
    return array


def baby_steps(slots: int, period: int) -> int:
    """How many of ``period`` steps are baby steps: the power of two next to sqrt(period), the larger one of two.

    Raises:
        InputError: ``period`` is no power of two, or does not divide ``slots``.
    """
    if period < 1 or period & (period - 1) or slots % period:
        raise InputError(f"period = {period}: must be a power of two that divides the {slots} slots")
    return 1 << (period.bit_length() // 2)


def rotations(evaluator: EvaluatorProtocol[Tensor], x: Tensor, steps: Sequence[int]) -> list[Tensor]:
    """Rotate by each of the steps, hoisted; a step of 0 is x itself and needs no key."""
    nonzero = [step for step in steps if step]
    rotated: Any = evaluator.rotate(x, nonzero) if nonzero else []
    return [rotated.pop(0) if step else x for step in steps]


def renewed(evaluator: EvaluatorProtocol[Tensor], x: Tensor) -> Tensor:
    """A narrow tensor refreshed, of the chain's scale: at the highest level, or from level 2 at the one below it."""
    fresh = evaluator.refresh(x)
    return fresh if x.level >= REFRESH_LEVELS else evaluator.multiply(fresh, 1.0)


def with_levels(evaluator: EvaluatorProtocol[Tensor], x: Tensor, levels: int, narrow: bool = True) -> Tensor:
    """A narrow tensor, refreshed unless so many levels and those of a refresh are left; another one as it is."""
    return renewed(evaluator, x) if narrow and x.level < levels + REFRESH_LEVELS else x


def raised(evaluator: EvaluatorProtocol[Tensor], x: Tensor, level: int) -> Tensor:
    """A narrow tensor at this level or above, so that what it meets there loses none."""
    return x if x.level >= level else renewed(evaluator, x)


def heads_of(x: Tensor, heads: int) -> list[slice]:
    """The features of every head, neighbours.

    Raises:
        InputError: ``heads`` does not divide the features.
    """
    features = x.shape[1]
    if heads < 1 or features % heads:
        raise InputError(f"heads = {heads}: must divide the {features} features")
    width = features // heads
    return [slice(begin, begin + width) for begin in range(0, features, width)]

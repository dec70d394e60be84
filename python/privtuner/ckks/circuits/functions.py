"""Exponential, reciprocal and inverse square root of every slot."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from privtuner.ckks.circuits.common import (
    SLACK,
    check_degree,
    check_gain,
    check_halvings,
    check_negative,
    check_positive,
    check_steps,
    relative_error,
    scale_polynomial,
    with_levels,
)
from privtuner.ckks.functions import approximate
from privtuner.ckks.polynomial import Array, Domain, Polynomial
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.ckks.remez import fit
from privtuner.errors import InputError


def exponential(
    evaluator: EvaluatorProtocol[Tensor], x: Tensor, low: float = -8.0, halvings: int = 0, degree: int = 15
) -> Tensor:
    """exp(x) for x in [low, 0], by halving the argument: ``p(x) ** (2 ** halvings)``.

    The polynomial p stands for ``exp(x / 2**halvings)`` with the least relative error, so the halving itself takes no
    level. Each squaring doubles the relative error.

    Args:
        evaluator: computes.
        x: any tensor with values in [low, 0].
        low: negative.
        halvings: squarings, 0 to 16.
        degree: the degree of the polynomial, 1 to 255.

    Returns:
        A tensor of the shape of ``x``, relative error at most `exponential_error`, after `exponential_depth` levels.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels.
    """
    start, _error = exponential_start(check_negative(low), 0.0, 0.0, check_halvings(halvings), check_degree(degree))
    y = evaluator.polynomial(evaluator.assume(x, -low), start)
    for _ in range(halvings):
        y = evaluator.multiply(y, y)
    return evaluator.assume(y, 1 + SLACK + exponential_error(low, halvings, degree))


def exponential_depth(halvings: int = 0, degree: int = 15) -> int:
    """Levels of `exponential`: ceil(log2(degree + 1)) + halvings."""
    return check_degree(degree).bit_length() + check_halvings(halvings)


def exponential_error(low: float = -8.0, halvings: int = 0, degree: int = 15) -> float:
    """Largest relative error of `exponential`."""
    _, error = exponential_start(check_negative(low), 0.0, 0.0, check_halvings(halvings), check_degree(degree))
    return math.expm1(2**halvings * math.log1p(error))


@lru_cache(maxsize=256)
def exponential_start(low: float, high: float, shift: float, halvings: int, degree: int) -> tuple[Polynomial, float]:
    """Return a polynomial for ``exp((x + shift) / 2**halvings)`` on [low, high] and its largest relative error."""

    def function(x: Array) -> Array:
        values: Array = np.exp((x + shift) / 2**halvings)
        return values

    start = fit(function, (low, high), degree, name="exp", relative=True)
    return start, relative_error(start, function)


# Reciprocal and inverse square root


def reciprocal(
    evaluator: EvaluatorProtocol[Tensor],
    x: Tensor,
    domain: Domain,
    degree: int = 15,
    newton_steps: int = 0,
    gain: float = 1.0,
    narrow: bool = False,
) -> Tensor:
    """``gain / x`` for x in a positive domain: a polynomial, then Goldschmidt steps.

    The start y is the polynomial of least relative error; with ``e = 1 - x y``, at most `reciprocal_error` of no
    steps, each step multiplies by ``1 + e`` and squares e (Goldschmidt's division, which is Newton's
    ``y (2 - x y)`` with the two products of a step side by side). A step takes one level and doubles the digits; the
    first one takes another for e. A polynomial of degree ``2**k (degree + 1) - 1`` would be as good as k steps for one
    level less, so steps pay where that degree is above 255, or where multiplications are dearer than a level.

    Args:
        evaluator: computes.
        x: any tensor with values in the domain.
        domain: (low, high), 0 < low.
        degree: the degree of the polynomial, 1 to 255.
        newton_steps: 0 to 16.
        gain: a positive factor, at no cost.
        narrow: x has few features, and is in the domain in every slot: whatever runs out of levels is refreshed.

    Returns:
        A tensor of the shape of ``x``, relative error at most `reciprocal_error`, after `reciprocal_depth` levels.
        An error d in x costs ``d / low`` in relative accuracy.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels.
    """
    domain = check_positive(domain)
    check_steps(newton_steps)
    start = scale_polynomial(approximate("inverse", domain, check_degree(degree), "chebyshev"), check_gain(gain))
    x = evaluator.assume(with_levels(evaluator, x, start.depth + 1, narrow), domain[1])
    inside = gain / domain[0] * (1 + reciprocal_error(domain, degree, 0))
    outside = 0.0 if narrow else abs(float(start(0.0)))
    # The ends of a narrow tensor's domain are no further apart than its noise bears.
    off = SLACK if narrow else None
    y = _assume(evaluator, evaluator.polynomial(x, start), (1 + SLACK) * max(inside, outside), off)
    if newton_steps:
        # While the polynomial is evaluated the level of x is idle: the gain is divided out of it at no cost.
        x, y = with_levels(evaluator, x, 2, narrow), with_levels(evaluator, y, 1, narrow)
        product = evaluator.multiply(x if gain == 1 else evaluator.multiply(x, 1 / gain), y)
        e = _assume(evaluator, evaluator.add(evaluator.negate(product), 1.0), 1 + SLACK, off)
        for step in range(newton_steps):
            e = with_levels(evaluator, e, 2, narrow)
            e = evaluator.multiply(e, e) if step else e
            outside *= 2  # where x is 0, e is 1
            y = evaluator.multiply(with_levels(evaluator, y, 1, narrow), evaluator.add(e, 1.0))
            y = _assume(evaluator, y, (1 + SLACK) * max(inside, outside), off)
    return y


def _assume(evaluator: EvaluatorProtocol[Tensor], x: Tensor, bound: float, off: float | None) -> Tensor:
    """Promise a bound and, unless None, an error of so much of it."""
    return evaluator.assume(x, bound, None if off is None else off * bound)


def reciprocal_depth(degree: int = 15, newton_steps: int = 0) -> int:
    """Levels of `reciprocal`: ceil(log2(degree + 1)), and with steps 1 + newton_steps more."""
    return check_degree(degree).bit_length() + (1 + newton_steps if check_steps(newton_steps) else 0)


def reciprocal_error(domain: Domain, degree: int = 15, newton_steps: int = 0) -> float:
    """Largest relative error of `reciprocal`: ``T_{degree + 1}((high + low) / (high - low)) ** -(2**newton_steps)``."""
    low, high = check_positive(domain)
    exponent = (check_degree(degree) + 1) * math.acosh((high + low) / (high - low))
    # 1 / cosh(exponent), where neither can overflow.
    start = 2 * math.exp(-exponent) / (1 + math.exp(-2 * exponent))
    return float(start ** (2 ** check_steps(newton_steps)))


def inverse_square_root(
    evaluator: EvaluatorProtocol[Tensor],
    x: Tensor,
    domain: Domain,
    degree: int = 15,
    newton_steps: int = 1,
    gain: float = 1.0,
    narrow: bool = False,
) -> Tensor:
    """``gain / sqrt(x)`` for x in a positive domain: a polynomial, then Newton steps ``y <- y (3 - x y**2) / 2``.

    The start is the polynomial of least relative error. A step is computed as ``1.5 y - (x y / 2) (y y)``, two levels
    instead of the three of the formula as it stands, and takes a relative error e to ``(3 e**2 + e**3) / 2``.

    Args:
        evaluator: computes.
        x: any tensor with values in the domain.
        domain: (low, high), 0 < low.
        degree: the degree of the polynomial, 1 to 255.
        newton_steps: 0 to 16.
        gain: a positive factor, at no cost.
        narrow: x has few features, and is in the domain in every slot: whatever runs out of levels is refreshed.

    Returns:
        A tensor of the shape of ``x``, relative error at most `inverse_square_root_error`, after
        `inverse_square_root_depth` levels.

    Raises:
        InputError: an argument out of range, or a start too rough for Newton steps: raise the degree.
        CkksError: not enough levels.
    """
    domain = check_positive(domain)
    error = inverse_square_root_error(domain, degree, newton_steps)
    start = scale_polynomial(_inverse_square_root(domain, degree)[0], check_gain(gain))
    x = evaluator.assume(with_levels(evaluator, x, start.depth + 1, narrow), domain[1])
    y = evaluator.polynomial(x, start)
    # After a step y never exceeds gain / sqrt(x), the maximum of 1.5 y - x y**3 / 2 over y.
    rough = inverse_square_root_error(domain, degree, 0)
    inside = gain / math.sqrt(domain[0]) * (1 + max(rough, error))
    outside = 0.0 if narrow else abs(float(start(0.0))) * 1.5**newton_steps
    bound = (1 + SLACK) * max(inside, outside)
    off = SLACK if narrow else None
    y = _assume(evaluator, y, bound, off)
    if newton_steps:
        half = evaluator.multiply(with_levels(evaluator, x, 3, narrow), 0.5 / gain**2)
        for _ in range(newton_steps):
            y, half = with_levels(evaluator, y, 2, narrow), with_levels(evaluator, half, 2, narrow)
            y = evaluator.subtract(
                evaluator.multiply(y, 1.5), evaluator.multiply(evaluator.multiply(half, y), evaluator.multiply(y, y))
            )
            y = _assume(evaluator, y, bound, off)
    return y


def inverse_square_root_depth(degree: int = 15, newton_steps: int = 1) -> int:
    """Levels of `inverse_square_root`: ceil(log2(degree + 1)) + 2 newton_steps."""
    return check_degree(degree).bit_length() + 2 * check_steps(newton_steps)


def inverse_square_root_error(domain: Domain, degree: int = 15, newton_steps: int = 1) -> float:
    """Largest relative error of `inverse_square_root`.

    Raises:
        InputError: an argument out of range, or a start too rough for Newton steps: raise the degree.
    """
    _, error = _inverse_square_root(check_positive(domain), check_degree(degree))
    if check_steps(newton_steps) and error > 0.7:
        raise InputError(
            f"degree {degree} starts with a relative error of {error:.2g} on {domain}: raise the degree"
            " (Newton steps need 0.7), or narrow the domain"
        )
    for _ in range(newton_steps):
        error = (3 * error**2 + error**3) / 2
    return error


@lru_cache(maxsize=256)
def _inverse_square_root(domain: Domain, degree: int) -> tuple[Polynomial, float]:
    def function(x: Array) -> Array:
        return 1 / np.sqrt(x)

    start = fit(function, domain, degree, name="inverse_sqrt", relative=True)
    return start, relative_error(start, function)

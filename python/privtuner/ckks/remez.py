"""Fits: the polynomial of least largest error on a domain, or one that interpolates.

Least-maximum fits come from the exchange algorithm of Remez (1934) in double precision, in the Chebyshev basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from numpy.polynomial import chebyshev

from privtuner.ckks.polynomial import MAX_DEGREE, Array, Domain, Polynomial, check_domain, peak
from privtuner.errors import InputError

__all__ = ["Function", "Method", "fit"]

Function = Callable[[Array], npt.ArrayLike]
Method = Literal["remez", "chebyshev"]

_EPS = float(np.finfo(np.float64).eps)


def fit(
    function: Function,
    domain: Domain,
    degree: int,
    method: Method = "remez",
    derivative: Function | None = None,
    name: str | None = None,
    relative: bool = False,
) -> Polynomial:
    """Approximate a function by a polynomial in the Chebyshev basis.

    A function that is even about the middle of the domain, up to a linear term (GELU, SiLU, ReLU), or odd, up to a
    constant (tanh, sigmoid), gets a polynomial of exactly that form: every other coefficient is zero, and the degree
    may come out one lower than asked, because the last term would not help.

    Args:
        function: function of a float64 array of any shape, elementwise, finite on the whole domain.
        domain: (low, high).
        degree: 0 to 255.
        method: ``"remez"`` for the least largest error, levelled to one part in 10,000, or, where rounding is in the
            way, to one percent; ``"chebyshev"`` to interpolate at Chebyshev nodes: never fails, an error some two times
            larger, but a closer derivative, because a level error swings fastest at the ends of the domain.
        derivative: the derivative of ``function``; with it the ``max_error`` of the derivative polynomial is known.
        name: for the result; the function's own name by default.
        relative: make the largest of |p / f - 1| least, instead of |p - f|; ``"remez"`` only. ``max_error`` is the
            absolute error all the same.

    Raises:
        InputError: a bad domain, degree or method, a function that is not finite (or zero where ``relative``), or an
            exchange that cannot be levelled, mostly because the degree asks for more than double precision: lower it,
            or use ``"chebyshev"``. An error of 64 units of rounding or less is accepted as it is.
    """
    domain = check_domain(domain)
    if not 0 <= degree <= MAX_DEGREE:
        raise InputError(f"degree {degree}: must be between 0 and {MAX_DEGREE}")
    if method not in ("remez", "chebyshev"):
        raise InputError(f"unknown method {method!r}: choose 'remez' or 'chebyshev'")
    if relative and method != "remez":
        raise InputError("relative = True: only method='remez' weighs its errors")
    label = name if name is not None else getattr(function, "__name__", "function")
    exact = _check_values(label, function)
    scaled = _on_unit_interval(exact, domain)
    if relative:
        coefficients = _remez(scaled, np.arange(degree + 1), -1.0, label, relative=True)
    else:
        coefficients = _fit_symmetric(scaled, degree, method, label)
    plain = Polynomial(tuple(coefficients), "chebyshev", domain, label)
    slope_error = None
    if derivative is not None:
        slope_error = _max_error(plain.derivative(), _check_values(f"derivative of {label}", derivative))
    return Polynomial(plain.coefficients, "chebyshev", domain, label, _max_error(plain, exact), slope_error)


def _check_values(name: str, function: Function) -> Callable[[Array], Array]:
    """Return the function with its values checked: same shape, finite."""

    def checked(x: Array) -> Array:
        with np.errstate(all="ignore"):
            values = np.asarray(function(x), np.float64)
        if values.shape != x.shape:
            raise InputError(f"{name} gives shape {values.shape} for shape {x.shape}: it must work elementwise")
        finite = np.isfinite(values)
        if not finite.all():
            raise InputError(f"{name} at {x[~finite][0]} is {values[~finite][0]}: it must be finite on the domain")
        return values

    return checked


def _on_unit_interval(function: Callable[[Array], Array], domain: Domain) -> Callable[[Array], Array]:
    low, high = domain

    def scaled(t: Array) -> Array:
        # Both ends are hit exactly, whatever the rounding: no value outside the domain is asked for.
        x = 0.5 * (high - low) * t + 0.5 * (high + low)
        return function(np.clip(np.where(t == 1, high, np.where(t == -1, low, x)), low, high))

    return scaled


def _max_error(approximation: Polynomial, exact: Callable[[Array], Array]) -> float:
    """Largest absolute error, rounded up; never below what double precision can tell."""
    largest = peak(lambda x: np.abs(approximation(x) - exact(x)), approximation.domain)
    scale = math.fsum(abs(c) for c in approximation.coefficients)
    return largest + 2 * _EPS * scale


# Fitting on [-1, 1]


def _fit_symmetric(f: Callable[[Array], Array], degree: int, method: Method, name: str) -> Array:
    """Chebyshev coefficients, with the symmetry of the function made exact."""
    t = np.cos(np.linspace(0, np.pi / 2, 513))
    right, left = f(t), f(-t)
    odd, even = (right - left) / 2, (right + left) / 2
    tolerance = 16 * _EPS * max(float(np.abs(right).max()), float(np.abs(left).max()))
    slope, constant = float(odd[0]), float(f(np.zeros(1))[0])
    coefficients = np.zeros(degree + 1)
    remainder = f
    begin = -1.0
    index = np.arange(degree + 1)
    if degree >= 1 and float(np.abs(odd - slope * t).max()) <= tolerance:
        index = index[::2]
        coefficients[1] = slope if abs(slope) > tolerance else 0.0
        begin = 0.0

        def remainder(t: Array) -> Array:
            return (f(t) + f(-t)) / 2

    elif degree >= 1 and float(np.abs(even - constant).max()) <= tolerance:
        index = index[1::2]
        coefficients[0] = constant if abs(constant) > tolerance else 0.0
        begin = 0.0

        def remainder(t: Array) -> Array:
            return (f(t) - f(-t)) / 2

    if method == "chebyshev":
        coefficients[index] = _interpolate(remainder, degree)[index]
    else:
        coefficients[index] = _remez(remainder, index, begin, name)[index]
    return coefficients


def _interpolate(f: Callable[[Array], Array], degree: int) -> Array:
    angles = (np.arange(degree + 1) + 0.5) * (np.pi / (degree + 1))
    values = f(np.cos(angles))
    coefficients: Array = np.cos(np.outer(np.arange(degree + 1), angles)) @ values * (2 / (degree + 1))
    coefficients[0] /= 2
    return coefficients


def _remez(
    f: Callable[[Array], Array], index: npt.NDArray[np.int_], begin: float, name: str, relative: bool = False
) -> Array:
    """Coefficients of the best approximation of f on [begin, 1] by the Chebyshev polynomials of the given indices.

    Multiple exchange: solve for a level error on one reference, move the reference to the extrema of the error,
    repeat until the largest error is within 1e-4 of the level one, between which the true minimum lies (de la
    Vallee Poussin).

    Args:
        f: function of float64 arrays.
        index: 0, 1, 2, ... on [-1, 1]; the even ones or the odd ones on [0, 1].
        begin: -1 or 0.
        name: for messages.
        relative: weigh errors by 1 / |f|.

    Returns:
        All coefficients up to the last index, zero where it is not in ``index``.
    """
    count = len(index) + 1
    # The extrema of the Chebyshev polynomial one beyond: in t on [-1, 1], in t**2 on [0, 1], without 0 for odd ones.
    angles = np.linspace(np.pi, 0, count)
    if begin == 0:
        angles = np.linspace(np.pi / 2, 0, count + 1)[1:] if index[0] == 1 else np.linspace(np.pi / 2, 0, count)
    reference = np.cos(angles)
    grid = np.cos(np.linspace(np.pi if begin == -1 else np.pi / 2, 0, max(2001, 40 * count + 1)))
    grid[0] = begin
    values = f(grid)
    weights = np.abs(values) if relative else np.ones_like(values)
    if relative and values.min() <= 0 <= values.max():
        raise InputError(f"{name} is 0 at a point of the domain: no relative error there, use relative=False")
    floor = 64 * _EPS * float(np.abs(values).max() / weights.min())
    if not np.any(values):
        return np.zeros(int(index[-1]) + 1)
    coefficients = np.zeros(int(index[-1]) + 1)
    signs = (-1.0) ** np.arange(count)
    best, best_ratio, best_round = coefficients, math.inf, 0

    def error(t: Array) -> Array:
        exact = f(t)
        difference: Array = exact - chebyshev.chebval(t, coefficients)
        return difference / np.abs(exact) if relative else difference

    for turn in range(60):
        exact = f(reference)
        basis = np.cos(index * np.arccos(np.clip(reference, -1, 1))[:, None])
        last = signs * np.abs(exact) if relative else signs
        solution = np.linalg.solve(np.column_stack([basis, last]), exact)
        coefficients[index] = solution[:-1]
        level = abs(float(solution[-1]))
        candidates = np.union1d(grid, reference)
        extrema, heights = _extrema(error, candidates, begin)
        highest = float(np.abs(heights).max())
        if highest <= floor:
            return coefficients
        if level > 0 and highest / level < best_ratio:
            best, best_ratio, best_round = coefficients.copy(), highest / level, turn
        if best_ratio <= 1 + 1e-4 or len(extrema) < count or turn > best_round + 8:
            break
        reference = _alternating(extrema, heights, count)
    if best_ratio > 1.01:
        raise InputError(
            f"{name}, degree {int(index[-1])}: the exchange cannot be levelled (the error reaches {best_ratio:.3g}"
            " times the level one): lower the degree, or use method='chebyshev'"
        )
    return best


def _extrema(error: Callable[[Array], Array], grid: Array, begin: float) -> tuple[Array, Array]:
    """The highest point of every run of one sign, with its error: signs alternate."""
    values = error(grid)
    change = np.flatnonzero(np.diff(np.signbit(values)))
    starts = np.concatenate([[0], change + 1])
    stops = np.concatenate([change + 1, [len(grid)]])
    places = np.array([a + int(np.abs(values[a:b]).argmax()) for a, b in zip(starts, stops, strict=True)])
    points, heights = grid[places], values[places]
    left = np.concatenate([[begin], grid])[places]
    right = np.concatenate([grid, [1.0]])[places + 1]
    sign = np.sign(heights)
    for _ in range(3):  # each pass narrows the bracket sixteenfold
        finer = left[:, None] + (right - left)[:, None] * np.linspace(0, 1, 33)
        # The best point so far stays a candidate: a corner may lie on the grid and not on the finer one.
        finer = np.sort(np.column_stack([finer, points]), axis=1)
        value = error(finer) * sign[:, None]
        best = value.argmax(axis=1)
        rows = np.arange(len(points))
        points, heights = finer[rows, best], value[rows, best] * sign
        left = finer[rows, np.maximum(best - 1, 0)]
        right = finer[rows, np.minimum(best + 1, finer.shape[1] - 1)]
    return points, heights


def _alternating(points: Array, heights: Array, count: int) -> Array:
    """``count`` of the points, signs still alternating, the highest among them."""
    chosen = list(range(len(points)))
    height = np.abs(heights)
    while len(chosen) > count:
        if len(chosen) == count + 1:
            chosen.pop(0 if height[chosen[0]] < height[chosen[-1]] else -1)
            continue
        # Drop the neighbours whose higher one is lowest, or one end where that is lower still.
        pairs = [max(height[a], height[b]) for a, b in pairwise(chosen)]
        lowest = int(np.argmin(pairs))
        ends = min((height[chosen[0]], 0), (height[chosen[-1]], len(chosen) - 1))
        if ends[0] < pairs[lowest]:
            chosen.pop(ends[1])
        else:
            del chosen[lowest : lowest + 2]
    return points[chosen]

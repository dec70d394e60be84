"""Polynomials in place of the functions that ciphertexts cannot compute.

A `Polynomial` carries what a circuit must know of it: domain, depth, and the largest error against the exact function,
measured. It is an approximation on its domain only: outside it grows like ``x ** degree``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.polynomial import chebyshev, polynomial

from privtuner.errors import InputError

__all__ = ["MAX_DEGREE", "Array", "Domain", "Polynomial", "check_domain", "peak"]

MAX_DEGREE = 255
"""Largest degree of a polynomial: eight levels."""

Array = npt.NDArray[np.float64]
Domain = tuple[float, float]

_GRID = 20_001  # points of each of the two grids on which functions are measured
_MARGIN = 2.0**-10  # by which measured maxima are rounded up


@dataclass(frozen=True, repr=False)
class Polynomial:
    """A real polynomial on an interval.

    Equal when all fields but ``derivative_error`` are; hashable; picklable.

    Attributes:
        coefficients: lowest degree first, finite, 1 to 256 of them. Zeros at the end are dropped, so that ``degree``
            is the true one.
        basis: ``"chebyshev"``: ``sum_k coefficients[k] T_k(t)`` with t in [-1, 1] the place of x in the domain;
            ``"power"``: ``sum_k coefficients[k] x**k``, whatever the domain.
        domain: (low, high), where it may be evaluated.
        name: the name of the function it stands for.
        max_error: largest absolute difference to that function on the domain: measured, rounded up by a thousandth.
            None when made from coefficients alone.
        derivative_error: the same of the derivative, where the exact one is known.

    Raises:
        InputError: no coefficients or too many, one that is not finite, an unknown basis, or low >= high.
    """

    coefficients: tuple[float, ...]
    basis: Literal["chebyshev", "power"] = "chebyshev"
    domain: Domain = (-1.0, 1.0)
    name: str = "polynomial"
    max_error: float | None = None
    derivative_error: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        values = _floats("coefficients", self.coefficients)
        while len(values) > 1 and values[-1] == 0:
            values.pop()
        if not values:
            raise InputError("coefficients is empty: give at least one")
        if len(values) > MAX_DEGREE + 1:
            raise InputError(f"degree {len(values) - 1}: must be at most {MAX_DEGREE}")
        for k, value in enumerate(values):
            if not math.isfinite(value):
                raise InputError(f"coefficients[{k}] is {value}: every coefficient must be finite")
        if self.basis not in ("chebyshev", "power"):
            raise InputError(f"unknown basis {self.basis!r}: choose 'chebyshev' or 'power'")
        for name, error in (("max_error", self.max_error), ("derivative_error", self.derivative_error)):
            if error is not None:
                if not 0 <= error < math.inf:
                    raise InputError(f"{name} = {error}: must be finite and not negative, or None")
                object.__setattr__(self, name, float(error))
        object.__setattr__(self, "coefficients", tuple(values))
        object.__setattr__(self, "domain", check_domain(self.domain))

    @property
    def degree(self) -> int:
        """Largest k whose coefficient is not zero; 0 for a constant."""
        return len(self.coefficients) - 1

    @property
    def depth(self) -> int:
        """Levels an evaluation takes, ceil(log2(degree + 1)).

        Mapping the domain to [-1, 1] takes none: a change of scale, and an added constant for domains that are not
        symmetric.
        """
        return self.degree.bit_length()

    @cached_property
    def bound(self) -> float:
        """What |p| stays below on the domain: measured on a dense grid, rounded up by a thousandth."""
        return peak(lambda x: np.abs(self(x)), self.domain)

    def __call__(self, x: npt.ArrayLike) -> Any:
        """Evaluate in double precision (Clenshaw, Horner) at real or complex x of any shape; a number gives one."""
        values = np.asarray(x)
        values = values if values.dtype.kind == "c" else values.astype(np.float64)
        if self.basis == "power":
            return polynomial.polyval(values, np.array(self.coefficients))
        low, high = self.domain
        return chebyshev.chebval((2 * values - (low + high)) / (high - low), np.array(self.coefficients))

    def derivative(self) -> Polynomial:
        """The exact derivative of this polynomial, in the same basis and on the same domain.

        Its ``max_error`` is against the derivative of the exact function, or None where that is not known.
        """
        low, high = self.domain
        if self.basis == "power":
            coefficients = polynomial.polyder(np.array(self.coefficients))
        else:
            coefficients = chebyshev.chebder(np.array(self.coefficients)) * (2 / (high - low))
        return Polynomial(tuple(coefficients), self.basis, self.domain, f"{self.name}'", self.derivative_error)

    def __repr__(self) -> str:
        error = "" if self.max_error is None else f", max error {self.max_error:.2g}"
        low, high = self.domain
        basis = f"{self.basis} on [{low:g}, {high:g}]"
        return f"Polynomial({self.name}, degree {self.degree}, {basis}, depth {self.depth}{error})"


def check_domain(domain: Domain) -> Domain:
    """Return an interval as two finite floats, low < high.

    Raises:
        InputError: it is none.
    """
    values = _floats("domain", domain)
    if len(values) != 2:
        raise InputError(f"domain = {domain!r}: expected (low, high)")
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"domain ({low}, {high}): expected finite low < high")
    return low, high


def peak(function: Callable[[Array], Array], domain: Domain) -> float:
    """Return what a function without negative values stays below on a domain: its measured maximum, rounded up.

    Measured on a uniform and a Chebyshev grid, and on finer ones about the highest places.
    """
    low, high = domain
    cosines = np.cos(np.linspace(np.pi, 0, _GRID))
    points = np.concatenate([np.linspace(low, high, _GRID), 0.5 * (high - low) * cosines + 0.5 * (high + low)])
    x = np.unique(np.clip(points, low, high))
    values = function(x)
    best = float(values.max())
    step = x[1:] - x[:-1]
    for place in np.argsort(values)[-8:]:
        left = x[place] - step[max(place - 1, 0)]
        right = x[place] + step[min(place, len(step) - 1)]
        best = max(best, float(function(np.clip(np.linspace(left, right, 401), low, high)).max()))
    return best * (1 + _MARGIN)


def _floats(name: str, values: Iterable[float]) -> list[float]:
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} = {values!r}: expected real numbers") from error

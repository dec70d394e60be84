"""Polynomials in place of the functions that ciphertexts cannot compute.

A :class:`Polynomial` carries what a circuit must know of it: domain, depth, and the largest error against the exact
function, measured. :func:`fit` makes one from any function; `gelu`, `silu`, `relu`, `tanh`, `sigmoid`, `exp`,
`inverse` and `inverse_sqrt` are ready made::

    activation = gelu()                  # Polynomial(gelu, degree 26, ...)
    slope = activation.derivative()      # what a backward pass multiplies by: the derivative of what was evaluated

Least-maximum fits come from the exchange algorithm of Remez (1934) in double precision, in the Chebyshev basis.
A polynomial is an approximation on its domain only: outside it grows like ``x ** degree``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.polynomial import chebyshev, polynomial

from privtuner.errors import InputError

__all__ = [
    "MAX_DEGREE",
    "Polynomial",
    "Row",
    "exp",
    "fit",
    "gelu",
    "inverse",
    "inverse_sqrt",
    "relu",
    "sigmoid",
    "silu",
    "table",
    "tanh",
]

MAX_DEGREE = 255
"""Largest degree of a polynomial: eight levels."""

Array = npt.NDArray[np.float64]
Function = Callable[[Array], npt.ArrayLike]
Domain = tuple[float, float]
Method = Literal["remez", "chebyshev"]

_GRID = 20_001  # points of each of the two grids on which errors are measured
_MARGIN = 2.0**-10  # by which measured maxima are rounded up
_EPS = float(np.finfo(np.float64).eps)


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
        name: of the function it stands for.
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
        object.__setattr__(self, "domain", _domain(self.domain))

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
        return _peak(lambda x: np.abs(self(x)), self.domain) * (1 + _MARGIN)

    def __call__(self, x: npt.ArrayLike) -> Any:
        """Evaluate in double precision (Clenshaw, Horner), at any shape; a number gives a number."""
        values = np.asarray(x, np.float64)
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
        function: of a float64 array of any shape, elementwise, finite on the whole domain.
        domain: (low, high).
        degree: 0 to 255.
        method: ``"remez"`` for the least largest error, levelled to one part in 10,000, or, where rounding is in the
            way, to one percent; ``"chebyshev"`` to interpolate at Chebyshev nodes: never fails, an error some two times
            larger, but a closer derivative, because a level error swings fastest at the ends of the domain.
        derivative: of ``function``; with it the ``max_error`` of the derivative polynomial is known.
        name: for the result; the function's own name by default.
        relative: make the largest of |p / f - 1| least, instead of |p - f|; ``"remez"`` only. ``max_error`` is the
            absolute error all the same.

    Raises:
        InputError: a bad domain, degree or method, a function that is not finite (or zero where ``relative``), or an
            exchange that cannot be levelled, mostly because the degree asks for more than double precision: lower it,
            or use ``"chebyshev"``. An error of 64 units of rounding or less is accepted as it is.
    """
    domain = _domain(domain)
    if not 0 <= degree <= MAX_DEGREE:
        raise InputError(f"degree {degree}: must be between 0 and {MAX_DEGREE}")
    if method not in ("remez", "chebyshev"):
        raise InputError(f"unknown method {method!r}: choose 'remez' or 'chebyshev'")
    if relative and method != "remez":
        raise InputError("relative = True: only method='remez' weighs its errors")
    label = name if name is not None else getattr(function, "__name__", "function")
    exact = _checked(label, function)
    scaled = _on_unit_interval(exact, domain)
    if relative:
        coefficients = _remez(scaled, np.arange(degree + 1), -1.0, label, relative=True)
    else:
        coefficients = _fit_symmetric(scaled, degree, method, label)
    plain = Polynomial(tuple(coefficients), "chebyshev", domain, label)
    slope_error = None
    if derivative is not None:
        slope_error = _max_error(plain.derivative(), _checked(f"derivative of {label}", derivative))
    return Polynomial(plain.coefficients, "chebyshev", domain, label, _max_error(plain, exact), slope_error)


def gelu(
    domain: Domain = (-8.0, 8.0), degree: int = 27, form: Literal["erf", "tanh"] = "erf", method: Method = "remez"
) -> Polynomial:
    """GELU (Hendrycks and Gimpel, 2016): ``x Phi(x)``, Phi the normal distribution.

    Args:
        domain: (low, high).
        degree: as for `fit`. On a symmetric domain the polynomial is ``x / 2`` and even powers.
        form: ``"erf"`` for ``x (1 + erf(x / sqrt 2)) / 2``; ``"tanh"`` for the approximation
            ``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) / 2``, which GPT-2 and others use.
        method: as for `fit`.

    Raises:
        InputError: as for `fit`, or an unknown form.
    """
    if form not in ("erf", "tanh"):
        raise InputError(f"unknown form {form!r}: choose 'erf' or 'tanh'")
    return _library("gelu" if form == "erf" else "gelu_tanh", _domain(domain), degree, method)


def silu(domain: Domain = (-8.0, 8.0), degree: int = 27, method: Method = "remez") -> Polynomial:
    """SiLU, or swish: ``x / (1 + exp(-x))``. Arguments and errors as for `gelu`."""
    return _library("silu", _domain(domain), degree, method)


def relu(domain: Domain = (-8.0, 8.0), degree: int = 63, method: Method = "remez") -> Polynomial:
    """ReLU: ``max(x, 0)``, with slope 1/2 at 0. Arguments and errors as for `gelu`.

    The corner makes it slow: the error falls as ``0.14 high / degree`` on (-high, high). That of the derivative is one
    half at the corner, whatever the degree, and with ``"remez"`` several units at the ends of the domain: where the
    derivative matters, take ``"chebyshev"``.
    """
    return _library("relu", _domain(domain), degree, method)


def tanh(domain: Domain = (-5.0, 5.0), degree: int = 31, method: Method = "remez") -> Polynomial:
    """Hyperbolic tangent. Odd on a symmetric domain. Arguments and errors as for `gelu`."""
    return _library("tanh", _domain(domain), degree, method)


def sigmoid(domain: Domain = (-8.0, 8.0), degree: int = 31, method: Method = "remez") -> Polynomial:
    """Logistic function: ``1 / (1 + exp(-x))``. One half plus odd powers. Arguments and errors as for `gelu`."""
    return _library("sigmoid", _domain(domain), degree, method)


def exp(domain: Domain = (-8.0, 0.0), degree: int = 15, method: Method = "remez") -> Polynomial:
    """Exponential function. Arguments and errors as for `gelu`.

    For longer half-lines see :func:`privtuner.ckks.circuits.exponential`.
    """
    return _library("exp", _domain(domain), degree, method)


def inverse(domain: Domain = (0.25, 4.0), degree: int = 31, method: Method = "remez") -> Polynomial:
    """Reciprocal: ``1 / x`` on a domain without 0.

    With ``method="chebyshev"`` the largest relative error is least, ``1 / T_{degree + 1}((high + low)/(high - low))``:
    the start that Newton and Goldschmidt steps want (:func:`privtuner.ckks.circuits.reciprocal`).

    Raises:
        InputError: as for `fit`, or 0 in the domain.
    """
    domain = _domain(domain)
    if domain[0] <= 0 <= domain[1]:
        raise InputError(f"domain {domain} holds 0: 1 / x needs a domain on one side of it")
    return _library("inverse", domain, degree, method)


def inverse_sqrt(domain: Domain = (0.25, 4.0), degree: int = 31, method: Method = "remez") -> Polynomial:
    """Inverse square root: ``1 / sqrt(x)`` on a positive domain.

    Raises:
        InputError: as for `fit`, or a domain that is not positive.
    """
    domain = _domain(domain)
    if domain[0] <= 0:
        raise InputError(f"domain {domain}: 1 / sqrt(x) needs low > 0")
    return _library("inverse_sqrt", domain, degree, method)


class Row(NamedTuple):
    """One line of `table`."""

    name: str
    domain: Domain
    degree: int
    depth: int
    max_error: float


def table() -> list[Row]:
    """Every polynomial of the library at its defaults, for documentation."""
    polynomials = [gelu(), gelu(form="tanh"), silu(), relu(), tanh(), sigmoid(), exp(), inverse(), inverse_sqrt()]
    return [Row(p.name, p.domain, p.degree, p.depth, p.max_error or 0.0) for p in polynomials]


# Exact functions


def _erf(x: Array) -> Array:
    return np.array([math.erf(v) for v in x.ravel()], np.float64).reshape(x.shape)


def _logistic(x: Array) -> Array:
    t: Array = np.tanh(0.5 * x)
    return 0.5 * (1 + t)


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_slope(x: Array) -> Array:
    density: Array = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + _erf(x / math.sqrt(2))) + x * density


def _gelu_tanh(x: Array) -> Array:
    t: Array = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t)


def _gelu_tanh_slope(x: Array) -> Array:
    t: Array = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def _silu(x: Array) -> Array:
    return x * _logistic(x)


def _silu_slope(x: Array) -> Array:
    s = _logistic(x)
    return s + x * s * (1 - s)


def _relu(x: Array) -> Array:
    values: Array = np.maximum(x, 0.0)
    return values


def _relu_slope(x: Array) -> Array:
    values: Array = np.heaviside(x, 0.5)
    return values


def _tanh_slope(x: Array) -> Array:
    t = np.tanh(x)
    return 1 - t * t


def _sigmoid_slope(x: Array) -> Array:
    s = _logistic(x)
    return s * (1 - s)


def _inverse(x: Array) -> Array:
    return 1 / x


def _inverse_slope(x: Array) -> Array:
    return -1 / (x * x)


def _inverse_sqrt(x: Array) -> Array:
    return 1 / np.sqrt(x)


def _inverse_sqrt_slope(x: Array) -> Array:
    return -0.5 / (x * np.sqrt(x))


_FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "gelu": (_gelu, _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "silu": (_silu, _silu_slope),
    "relu": (_relu, _relu_slope),
    "tanh": (np.tanh, _tanh_slope),
    "sigmoid": (_logistic, _sigmoid_slope),
    "exp": (np.exp, np.exp),
    "inverse": (_inverse, _inverse_slope),
    "inverse_sqrt": (_inverse_sqrt, _inverse_sqrt_slope),
}


@lru_cache(maxsize=256)
def _library(name: str, domain: Domain, degree: int, method: Method) -> Polynomial:
    function, slope = _FUNCTIONS[name]
    return fit(function, domain, degree, method, slope, name)


# Arguments


def _floats(name: str, values: Iterable[float]) -> list[float]:
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} = {values!r}: expected real numbers") from error


def _domain(domain: Domain) -> Domain:
    values = _floats("domain", domain)
    if len(values) != 2:
        raise InputError(f"domain = {domain!r}: expected (low, high)")
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"domain ({low}, {high}): expected finite low < high")
    return low, high


def _checked(name: str, function: Function) -> Callable[[Array], Array]:
    """The function with its values checked: same shape, finite."""

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


# Measuring


def _peak(function: Callable[[Array], Array], domain: Domain) -> float:
    """Largest value on the domain: a uniform and a Chebyshev grid, and finer ones about the highest places."""
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
    return best


def _max_error(approximation: Polynomial, exact: Callable[[Array], Array]) -> float:
    """Largest absolute error, rounded up; never below what double precision can tell."""
    largest = _peak(lambda x: np.abs(approximation(x) - exact(x)), approximation.domain)
    scale = math.fsum(abs(c) for c in approximation.coefficients)
    return largest * (1 + _MARGIN) + 2 * _EPS * scale


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
        f: of float64 arrays.
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

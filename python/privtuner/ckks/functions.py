"""Functions that have a polynomial ready made, one row of a table each.

::

    activation = approximate("gelu")     # Polynomial(gelu, degree 26, ...)
    slope = activation.derivative()      # what a backward pass multiplies by: the derivative of what was evaluated
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from privtuner.ckks.polynomial import Array, Domain, Polynomial, check_domain
from privtuner.ckks.remez import Function, Method, fit
from privtuner.errors import InputError

__all__ = ["FUNCTIONS", "Row", "approximate"]


def approximate(
    name: str, domain: Domain | None = None, degree: int | None = None, method: Method = "remez"
) -> Polynomial:
    """Return the polynomial in place of a function of the table `FUNCTIONS`.

    Args:
        name: the name of the function, ``"gelu"`` for instance.
        domain: (low, high); None takes the table's.
        degree: 0 to 255; None takes the table's. A function of a symmetry that `fit` keeps may come out one lower.
        method: as for `fit`. With ``"chebyshev"`` the largest *relative* error of ``"inverse"`` is least,
            ``1 / T_{degree + 1}((high + low) / (high - low))``: the start that Newton and Goldschmidt steps want.

    Raises:
        InputError: as for `fit`, an unknown name, or a domain on which the function is not defined.
    """
    if name not in FUNCTIONS:
        raise InputError(f"no function is called {name!r}; known: {', '.join(FUNCTIONS)}")
    row = FUNCTIONS[name]
    low, high = check_domain(row.domain if domain is None else domain)
    if not any(begin < low and high < end for begin, end in row.defined):
        where = " and ".join(f"({begin:g}, {end:g})" for begin, end in row.defined)
        raise InputError(f"domain {(low, high)}: {name} is defined on {where}; choose a domain within")
    return _approximate(name, (low, high), row.degree if degree is None else degree, method)


@lru_cache(maxsize=256)
def _approximate(name: str, domain: Domain, degree: int, method: Method) -> Polynomial:
    row = FUNCTIONS[name]
    return fit(row.exact, domain, degree, method, row.slope, name)


@dataclass(frozen=True)
class Row:
    """A function and how it is approximated when nothing else is asked for.

    Attributes:
        exact: the function, elementwise on float64 arrays.
        slope: its derivative, likewise.
        domain: (low, high) of the default approximation.
        degree: the degree of the default approximation.
        modules: classes of PyTorch and of ``transformers`` that compute the function.
        defined: open intervals on which it is defined; a domain lies within one of them.
    """

    exact: Function
    slope: Function
    domain: Domain
    degree: int
    modules: tuple[str, ...] = ()
    defined: tuple[Domain, ...] = ((-math.inf, math.inf),)


_STEPS = 32  # knots from one whole number to the next
_ORDER = 8
_PIECE = 1 << 14  # numbers at a time, which stay in a processor's cache


@lru_cache(maxsize=1)
def _erf_series() -> Array:
    """Taylor coefficients of erf, (order, knot), at the multiples of 1 / 32 up to 6, where it rounds to 1."""
    knots = np.arange(6 * _STEPS + 1) / _STEPS
    density = 2 / math.sqrt(math.pi) * np.exp(-knots * knots)
    rows = [np.array([math.erf(knot) for knot in knots])]
    for n in range(1, _ORDER + 1):  # derivatives of a Gaussian are Hermite polynomials times it
        hermite = np.polynomial.hermite.hermval(knots, [0.0] * (n - 1) + [1.0])
        rows.append((-1) ** (n - 1) * hermite * density / math.factorial(n))
    return np.stack(rows)


def _erf(x: Array) -> Array:
    """The series around the nearest knot: the remainder, |H_8| 2 / sqrt(pi) / 9! / 64^9 at the most, is below 2^-60."""
    series, result = _erf_series(), np.empty(x.shape)
    values, found = np.ravel(x), result.reshape(-1)
    for begin in range(0, values.size, _PIECE):
        part = values[begin : begin + _PIECE]
        size = np.minimum(np.abs(part), 6.0)
        knot = np.rint(size * _STEPS).astype(np.intp)
        off = size - knot / _STEPS
        total = series[_ORDER][knot]
        for row in series[_ORDER - 1 :: -1]:
            total = total * off + row[knot]
        found[begin : begin + _PIECE] = np.copysign(total, part)
    return result


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


FUNCTIONS: dict[str, Row] = {
    # Hendrycks and Gimpel, 2016: x Phi(x), Phi the normal distribution. On a symmetric domain x / 2 and even powers.
    "gelu": Row(_gelu, _gelu_slope, (-8.0, 8.0), 27, ("GELU", "GELUActivation")),
    # x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x**3))) / 2, which GPT-2 and others use.
    "gelu_tanh": Row(
        _gelu_tanh, _gelu_tanh_slope, (-8.0, 8.0), 27, ("FastGELUActivation", "GELUTanh", "NewGELUActivation")
    ),
    "silu": Row(_silu, _silu_slope, (-8.0, 8.0), 27, ("SiLU", "SiLUActivation")),
    # Slow: the error falls as 0.14 high / degree on (-high, high). That of the derivative is one half at the corner,
    # whatever the degree, and with "remez" several units at the ends: where it matters, take "chebyshev".
    "relu": Row(_relu, _relu_slope, (-8.0, 8.0), 63, ("ReLU",)),
    "tanh": Row(np.tanh, _tanh_slope, (-5.0, 5.0), 31, ("Tanh",)),
    "sigmoid": Row(_logistic, _sigmoid_slope, (-8.0, 8.0), 31),
    "exp": Row(np.exp, np.exp, (-8.0, 0.0), 15),  # for longer half-lines see `circuits.exponential`
    "inverse": Row(_inverse, _inverse_slope, (0.25, 4.0), 31, (), ((-math.inf, 0.0), (0.0, math.inf))),
    "inverse_sqrt": Row(_inverse_sqrt, _inverse_sqrt_slope, (0.25, 4.0), 31, (), ((0.0, math.inf),)),
}
"""The functions by name. Another one is another row."""

"""Polynomial approximations: the stated errors are true, least-maximum fits are level, derivatives are exact."""

import math
import pickle
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from numpy.polynomial import chebyshev

from loops import each
from privtuner.ckks import Polynomial, approximate, fit
from privtuner.ckks.functions import FUNCTIONS
from privtuner.errors import InputError

Array = npt.NDArray[np.float64]


def erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x)


EXACT: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.where(x > 0, x, 0.0),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "exp": np.exp,
    "inverse": lambda x: 1 / x,
    "inverse_sqrt": lambda x: x**-0.5,
}
SLOPE: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: 0.5 * (1 + erf(x / math.sqrt(2))) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    "silu": lambda x: (1 + np.exp(-x) + x * np.exp(-x)) / (1 + np.exp(-x)) ** 2,
    "tanh": lambda x: np.cosh(x) ** -2,
    "sigmoid": lambda x: 1 / (np.exp(x / 2) + np.exp(-x / 2)) ** 2,
    "exp": np.exp,
    "inverse": lambda x: -(x**-2),
    "inverse_sqrt": lambda x: -0.5 * x**-1.5,
}
# Symmetric and other domains, at which degrees the fit is still above rounding.
CASES = [
    ("gelu", None, 27),
    ("gelu", (-4.0, 4.0), 14),
    ("gelu", (-3.0, 6.0), 21),
    ("gelu_tanh", None, 27),
    ("silu", None, 27),
    ("silu", (-12.0, 12.0), 63),
    ("relu", None, 63),
    ("relu", (-1.0, 1.0), 15),
    ("relu", (-1.0, 3.0), 31),
    ("tanh", None, 31),
    ("tanh", (-2.0, 3.0), 12),
    ("tanh", (-16.0, 16.0), 63),
    ("sigmoid", None, 31),
    ("exp", None, 15),
    ("exp", (-2.0, 2.0), 7),
    ("inverse", None, 31),
    ("inverse", (0.01, 1.0), 63),
    ("inverse_sqrt", None, 31),
    ("inverse_sqrt", (0.01, 1.0), 47),
]


def test_gelu_is_exact_to_rounding_at_any_size():
    """Against the library's erf, more numbers than are worked on at a time, and far out on both sides."""
    x = np.concatenate([np.linspace(-9, 9, 40_001), [0.0, -0.0, 1e-300, -1e-9, 1e6, -1e6]]).reshape(-1, 1)
    gelu = FUNCTIONS["gelu"].exact(x)
    assert gelu.shape == x.shape
    assert np.abs(gelu - EXACT["gelu"](x)).max() <= np.spacing(9.0)
    assert np.abs(FUNCTIONS["gelu"].slope(x) - SLOPE["gelu"](x)).max() <= 2.0**-51


def dense(domain: tuple[float, float], points: int = 20001) -> Array:
    low, high = domain
    cosines = np.clip((high + low) / 2 + (high - low) / 2 * np.cos(np.linspace(np.pi, 0, points)), low, high)
    return np.unique(np.concatenate([np.linspace(low, high, points), cosines]))


@each(("name", "domain", "degree"), CASES, method=["remez", "chebyshev"])
def test_stated_error_is_the_measured_one(name, domain, degree, method):
    p = approximate(name, domain, degree, method)
    x = dense(p.domain)
    measured = np.abs(p(x) - EXACT[name](x)).max()
    assert measured <= p.max_error <= 1.01 * measured
    assert p.bound >= np.abs(p(x)).max()
    assert p.bound <= 1.01 * np.abs(p(x)).max()


@each(("name", "domain", "degree"), CASES)
def test_remez_is_level(name, domain, degree):
    p = approximate(name, domain, degree)
    assert p.max_error <= approximate(name, domain, degree, "chebyshev").max_error
    x = dense(p.domain, 60001)
    error = p(x) - EXACT[name](x)
    high = np.flatnonzero(np.abs(error) >= 0.99 * np.abs(error).max())
    alternations = 1 + np.count_nonzero(np.diff(np.sign(error[high])))
    # Chebyshev's theorem; symmetric functions have one more than they need where the true degree is one lower.
    assert alternations >= p.degree + 2


def test_remez_agrees_with_a_known_best_approximation():
    # |x| by degree 2 on [-1, 1]: x**2 + 1/8. Of x**n by degree n - 1: the error is 2**(1 - n).
    p = fit(np.abs, (-1, 1), 2)
    np.testing.assert_allclose(chebyshev.cheb2poly(p.coefficients), [0.125, 0, 1], atol=1e-6)
    assert p.max_error == pytest.approx(0.125, rel=2e-3)
    q = fit(lambda x: x**9, (-1, 1), 8)
    assert q.max_error == pytest.approx(2.0**-8, rel=2e-3)
    # 1 / x by a line on [a, b]: (1 / sqrt a - 1 / sqrt b)**2 / 2.
    r = approximate("inverse", (1.0, 4.0), 1)
    assert r.max_error == pytest.approx((1 - 0.5) ** 2 / 2, rel=2e-3)


@each(name=["gelu", "silu", "relu"])
def test_gated_functions_are_half_the_argument_and_even_powers(name):
    p = approximate(name, None, 27)
    assert p.degree == 26
    odd = np.array(p.coefficients)[1::2]
    assert odd[0] == pytest.approx(4.0, abs=1e-14)  # x / 2 on (-8, 8)
    assert not odd[1:].any()


@each(("name", "constant"), [("tanh", 0.0), ("sigmoid", 0.5)], method=["remez", "chebyshev"])
def test_odd_functions_get_odd_polynomials(name, constant, method):
    p = approximate(name, None, 28, method)
    assert p.degree == 27
    even = np.array(p.coefficients)[::2]
    assert even[0] == constant
    assert not even[1:].any()


@each(name=["gelu", "silu", "relu", "tanh", "sigmoid", "exp", "inverse", "inverse_sqrt"], degree=[1, 2, 8, 63, 255])
def test_every_degree(name, degree):
    p = approximate(name, None, degree, "chebyshev")
    assert p.degree <= degree
    assert p.max_error < {1: 6.0, 2: 2.0, 8: 0.5, 63: 0.07, 255: 0.02}[degree]


def test_large_exchanges():
    assert approximate("relu", None, 127).max_error < 0.009
    assert approximate("exp", None, 31).max_error < 1e-13  # the error of double precision is accepted


def test_polynomials_and_constants_are_reproduced():
    for degree in (3, 6):
        p = fit(lambda x: 2 * x**3 - x + 1, (-1, 3), degree)
        x = dense(p.domain)
        np.testing.assert_allclose(p(x), 2 * x**3 - x + 1, atol=1e-12)
    assert fit(lambda x: 0 * x, (-1, 1), 5).coefficients == (0.0,)
    assert fit(lambda x: 0 * x + 3, (-1, 1), 0).degree == 0


def test_relative_fit_levels_the_relative_error():
    x = dense((-6.0, 0.0))
    relative = np.abs(fit(np.exp, (-6, 0), 7, relative=True)(x) / np.exp(x) - 1).max()
    absolute = np.abs(fit(np.exp, (-6, 0), 7)(x) / np.exp(x) - 1).max()
    assert relative < 0.1 * absolute


@each(name=SLOPE, method=["remez", "chebyshev"])
def test_derivative(name, method):
    degree = 27 if name != "exp" else 12
    p = approximate(name, None, degree, method)
    d = p.derivative()
    assert (d.basis, d.domain, d.degree) == (p.basis, p.domain, p.degree - 1)
    x = dense(p.domain)
    measured = np.abs(d(x) - SLOPE[name](x)).max()
    assert measured <= d.max_error <= 1.01 * measured
    # Exact as a derivative of the polynomial itself.
    inside, h = x[(x > x[0] + 1e-3) & (x < x[-1] - 1e-3)], 1e-5
    np.testing.assert_allclose(d(inside), (p(inside + h) - p(inside - h)) / (2 * h), atol=1e-5 * max(1, d.bound))
    assert d.derivative().max_error is None


def test_power_basis():
    p = Polynomial((1.0, -2.0, 0.0, 4.0), "power", (-1, 2), "cubic")
    assert (p.degree, p.depth, p.max_error) == (3, 2, None)
    assert p(0.5) == 1 - 1 + 0.5
    assert p.derivative().coefficients == (-2.0, 0.0, 12.0)
    assert p.derivative().basis == "power"
    assert p.bound == pytest.approx(29, rel=2e-3)
    assert Polynomial((3.0,), "power").derivative().coefficients == (0.0,)


@each(
    ("degree", "depth"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (27, 5), (63, 6), (64, 7), (255, 8)]
)
def test_depth(degree, depth):
    assert Polynomial((0.0,) * degree + (1.0,)).depth == depth == math.ceil(math.log2(degree + 1))


def test_evaluation_keeps_the_shape():
    p = approximate("gelu")
    assert p(np.zeros((2, 3, 4))).shape == (2, 3, 4)
    assert float(p(1.0)) == pytest.approx(0.8413, abs=1e-3)
    # Clenshaw on the mapped domain against the definition.
    q = Polynomial((1.0, 2.0, 3.0), domain=(2, 4))
    assert q(3.5) == pytest.approx(1 + 2 * 0.5 + 3 * (2 * 0.25 - 1))


def test_values_and_identity():
    p, q = approximate("gelu"), approximate("gelu", (-8, 8))
    assert p == q
    assert hash(p) == hash(q)
    assert p != approximate("gelu_tanh")
    copy = pickle.loads(pickle.dumps(p))
    assert copy == p
    assert copy.derivative().max_error == p.derivative().max_error
    assert Polynomial(np.array([1.0, 2.0, 0.0])).coefficients == (1.0, 2.0)
    assert repr(p) == "Polynomial(gelu, degree 26, chebyshev on [-8, 8], depth 5, max error 0.00028)"
    assert "error" not in repr(Polynomial((1.0,)))
    with pytest.raises(AttributeError):
        p.name = "other"


def test_the_table_at_its_defaults():
    assert list(FUNCTIONS) == list(EXACT)
    for name, row in FUNCTIONS.items():
        p = approximate(name)
        assert (p.name, p.domain) == (name, row.domain)
        assert row.degree - 1 <= p.degree <= row.degree
        assert p.depth == math.ceil(math.log2(p.degree + 1))
        assert p.max_error < (0.02 if name == "relu" else 5e-4)


def test_no_module_has_two_functions():
    modules = [module for row in FUNCTIONS.values() for module in row.modules]
    assert len(modules) == len(set(modules))


@each(
    ("arguments", "message"),
    [
        ({"coefficients": ()}, "empty"),
        ({"coefficients": (1.0, math.nan)}, r"coefficients\[1\] is nan"),
        ({"coefficients": (math.inf,)}, "finite"),
        ({"coefficients": ("a",)}, "real numbers"),
        ({"coefficients": (1.0,) * 257}, "degree 256"),
        ({"coefficients": (1.0,), "basis": "monomial"}, "'monomial'"),
        ({"coefficients": (1.0,), "domain": (1, 1)}, "low < high"),
        ({"coefficients": (1.0,), "domain": (0, math.inf)}, "finite low < high"),
        ({"coefficients": (1.0,), "domain": (0, 1, 2)}, "expected \\(low, high\\)"),
        ({"coefficients": (1.0,), "max_error": -1.0}, "max_error"),
    ],
)
def test_bad_polynomials(arguments, message):
    with pytest.raises(InputError, match=message):
        Polynomial(**arguments)


@each(
    ("call", "message"),
    [
        (lambda: fit(np.exp, (0, 1), 256), "degree 256"),
        (lambda: fit(np.exp, (0, 1), -1), "degree -1"),
        (lambda: fit(np.exp, (1, 0), 3), "low < high"),
        (lambda: fit(np.exp, (0, 1), 3, "taylor"), "'taylor'"),
        (lambda: fit(np.exp, (0, 1), 3, "chebyshev", relative=True), "relative"),
        (lambda: fit(lambda x: x, (-1, 1), 3, relative=True), "no relative error"),
        (lambda: fit(lambda x: np.log(x), (0, 1), 3), "finite on the domain"),
        (lambda: fit(lambda x: 1.0, (0, 1), 3), "elementwise"),
        (lambda: fit(lambda x: np.sin(1e8 * x), (0, 1.1), 20), "method='chebyshev'"),
        (lambda: approximate("quick"), "no function is called 'quick'; known: gelu, gelu_tanh, "),
        (lambda: approximate("gelu", (1, -1)), "low < high"),
        (lambda: approximate("inverse", (-1, 1)), r"inverse is defined on \(-inf, 0\) and \(0, inf\)"),
        (lambda: approximate("inverse_sqrt", (0, 1)), r"domain \(0.0, 1.0\): inverse_sqrt is defined on \(0, inf\)"),
    ],
)
def test_bad_fits(call, message):
    with pytest.raises(InputError, match=message):
        call()

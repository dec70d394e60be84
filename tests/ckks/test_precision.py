"""The predicted error is a promise: no slot is further off, and the prediction is not a wild one."""

import math

import numpy as np
import pytest

from privtuner import ckks

SETS = [(1, 30), (2, 40), (3, 45), (5, 35), (8, 40), (4, 49)]
# The prediction is the worst case in a million of the worst slot, from bounds: |values| reach theirs here, so that what
# is left is the ratio of that worst case (14 standard deviations of an error with Laplace tails) to the largest of some
# thousand errors (4 to 6), and errors of two terms added as if they had one source.
LOOSE = 2.0**3


def worst(secret, tensor, want):
    difference = secret.decrypt(tensor, complex=True) - want
    return max(np.abs(difference.real).max(), np.abs(difference.imag).max())


class Case:
    def __init__(self, depth, scale_bits):
        self.parameters = ckks.Parameters.INSECURE(depth, scale_bits)
        self.secret = ckks.SecretKey(self.parameters)
        keys = self.secret.evaluation_keys(rotations=(1, -5), conjugation=True)
        self.engine = ckks.Evaluator(self.parameters, keys)
        rng = np.random.default_rng(depth)
        shape = (self.parameters.slots, 4)
        self.a = np.exp(2j * np.pi * rng.uniform(size=shape)) * (1 - 2.0**-40)
        self.b = rng.choice([-1.0, 1.0], shape)
        self.c = rng.choice([-1.0, 1.0], (shape[0], 1))
        self.matrix = ckks.Matrix(rng.standard_normal((5, 4)))

    def results(self, level):
        """Name, tensor, exact values."""
        e, a, b, c = self.engine, self.a, self.b, self.c
        x, y, z = (self.secret.encrypt(values, level=level) for values in (a, b, c))
        yield "encrypt", x, a
        yield "public key", self.secret.public_key().encrypt(a, level=level), a
        yield "add", e.add(x, y), a + b
        yield "subtract", e.subtract(z, x), c - a
        yield "negate", e.negate(x), -a
        yield "add number", e.add(x, 0.3), a + 0.3
        yield "multiply", e.multiply(x, y), a * b
        yield "multiply one feature", e.multiply(z, x), c * a
        yield "square", e.square(x), a * a
        yield "multiply number", e.multiply(x, -0.7), -0.7 * a
        yield "multiply plain", e.multiply_plain(x, b), a * b
        yield "dot", e.dot(x, y), (a * b).sum(1, keepdims=True)
        yield "sum features", e.sum_features(y), b.sum(1, keepdims=True)
        yield "linear", e.linear(x, self.matrix), a @ self.matrix.dequantised().T
        yield "rotate", e.rotate(x, 1), np.roll(a, -1, 0)
        yield "rotate hoisted", e.rotate(x, [1, -5])[1], np.roll(a, 5, 0)
        yield "conjugate", e.conjugate(x), a.conj()
        yield "linear combination", e.linear_combination([x, y], [0.5, -0.3], 0.1), 0.5 * a - 0.3 * b + 0.1
        yield "drop", e.drop_level(x, 0), a
        if level >= 2:
            yield "multiply across levels", e.multiply(x, e.multiply(y, z)), a * b * c


@pytest.mark.parametrize(("depth", "scale_bits"), SETS)
def test_every_operation_at_every_level(depth, scale_bits):
    case = Case(depth, scale_bits)
    for level in range(1, depth + 1):
        for name, tensor, want in case.results(level):
            if name in ("linear", "dot", "sum features") and scale_bits > 42 and level <= 2:
                continue  # the values at level 0 or 1 times their scale pass the modulus
            error, predicted = worst(case.secret, tensor, want), tensor.budget().error
            assert error <= predicted, f"{name} at level {level}"
            assert error >= predicted / LOOSE, f"{name} at level {level}: {predicted / error:.1f} times too careful"


@pytest.mark.parametrize(("depth", "scale_bits"), SETS[1:])
def test_sums_across_levels(depth, scale_bits):
    # A constant multiplies the higher tensor, or scales that are almost the same are taken as such.
    case = Case(depth, scale_bits)
    for level in range(2, depth + 1):
        x, y = case.secret.encrypt(case.a, level=level), case.secret.encrypt(case.b, level=level)
        total = case.engine.add(x, case.engine.square(y))
        error, predicted = worst(case.secret, total, case.a + case.b**2), total.budget().error
        assert predicted / 2**5 <= error <= predicted


@pytest.mark.parametrize(("depth", "scale_bits"), [(3, 40), (6, 35), (5, 45)])
def test_chains_of_products(depth, scale_bits):
    # Errors grow from level to level as predicted: each product has the errors of both factors.
    case = Case(depth, scale_bits)
    x, want = case.secret.encrypt(case.b), case.b
    for level in range(depth, 0, -1):
        x, want = case.engine.square(x), want**2
        assert x.level == level - 1
        assert x.scale[0] == pytest.approx(case.parameters.scale(level - 1), rel=1e-12)
        error, predicted = worst(case.secret, x, want), x.budget().error
        assert error <= predicted <= 2**4 * error


LIBRARY = {
    "gelu": (ckks.approximate("gelu"), lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))),
    "gelu_tanh": (
        ckks.approximate("gelu_tanh"),
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "silu": (ckks.approximate("silu"), lambda x: x / (1 + np.exp(-x))),
    "relu": (ckks.approximate("relu"), lambda x: np.maximum(x, 0)),
    "tanh": (ckks.approximate("tanh"), np.tanh),
    "sigmoid": (ckks.approximate("sigmoid"), lambda x: 1 / (1 + np.exp(-x))),
    "exp": (ckks.approximate("exp"), np.exp),
    "inverse": (ckks.approximate("inverse"), lambda x: 1 / x),
    "inverse_sqrt": (ckks.approximate("inverse_sqrt"), lambda x: 1 / np.sqrt(x)),
}


@pytest.fixture(scope="module")
def deep():
    parameters = ckks.Parameters.INSECURE(7, 40)
    secret = ckks.SecretKey(parameters)
    return secret, ckks.Evaluator(parameters, secret.evaluation_keys())


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("slope", [False, True])
def test_the_library_of_polynomials(deep, name, slope):
    secret, engine = deep
    polynomial, exact = LIBRARY[name]
    if slope:
        polynomial, exact = polynomial.derivative(), polynomial.derivative()
    low, high = polynomial.domain
    x = np.linspace(low, high, engine.slots)
    y = engine.polynomial(secret.encrypt(x, bound=max(-low, high)), polynomial)
    assert y.level == 7 - polynomial.depth - ((high - low) / 2 > 1.1)
    found = secret.decrypt(y)[:, 0]
    predicted = y.budget().error
    assert np.abs(found - polynomial(x)).max() <= predicted <= 1e-4
    assert np.abs(found - exact(x)).max() <= (polynomial.max_error if not slope else 0) + predicted


def test_a_polynomial_after_a_matrix_costs_its_own_depth(deep):
    secret, engine = deep
    rng = np.random.default_rng(8)
    x = rng.uniform(-1, 1, (engine.slots, 16))
    matrix = ckks.Matrix(rng.standard_normal((4, 16)) / 4)
    activation = ckks.approximate("gelu", (-8, 8), 15)
    # The matrix's integers and the width of the domain come off the scale beforehand.
    scale = engine.parameters.scale(7) * float(matrix.scale.min()) / 8.0
    hidden = engine.assume(engine.linear(secret.encrypt(x, scale=scale), matrix), 8.0)
    y = engine.polynomial(hidden, activation)
    assert y.level == 7 - 4
    want = activation(x @ matrix.dequantised().T)
    assert np.abs(secret.decrypt(y) - want).max() <= y.budget().error < 1e-2

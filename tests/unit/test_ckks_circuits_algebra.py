"""The circuits on clear numbers: results, levels, rotations, and the bounds they declare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from privtuner.ckks import circuits
from privtuner.errors import InputError, PrivtunerError

SLOTS = 64


@dataclass(frozen=True)
class Clear:
    """Values of all slots (slots, features), the number of slots in use, levels left, declared bound."""

    values: npt.NDArray[np.float64]
    tokens: int
    level: int
    bound: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.values.shape[1]


class ClearEngine:
    """The protocol on clear numbers: counts levels and rotations, checks every bound and domain."""

    name = "clear"

    def __init__(self, slots: int = SLOTS, noise: float = 0.0) -> None:
        self.slots = slots
        self.noise = noise
        self.generator = np.random.default_rng(7)
        self.rotated: list[int] = []
        self.held: list[int] = []  # results of each rotation call
        self.relinearisations = 0

    def tensor(self, values: Any, level: int = 40, bound: float | None = None) -> Clear:
        array = np.asarray(values, np.float64)
        slots = np.zeros((self.slots, array.shape[1]))
        slots[: len(array)] = array
        return Clear(slots, len(array), level, np.abs(array).max() if bound is None else bound)

    def make(self, values: npt.NDArray[np.float64], like: Clear, level: int, bound: float) -> Clear:
        if level < 0:
            raise PrivtunerError("not enough levels")
        if self.noise:
            values = values + self.generator.normal(0, self.noise, values.shape)
        assert np.abs(values).max() <= bound * (1 + 1e-9 + 1e4 * self.noise), "a declared bound is broken"
        return Clear(values, like.tokens, level, bound)

    def operand(self, x: Clear, y: Any) -> tuple[Any, int, float]:
        if isinstance(y, Clear):
            assert y.tokens == x.tokens
            assert 1 in (x.shape[1], y.shape[1]) or x.shape[1] == y.shape[1]
            return y.values, min(x.level, y.level), y.bound
        y = np.asarray(y, np.float64)
        assert y.shape in ((), (x.shape[1],))
        return y, x.level, float(np.abs(y).max())

    def add(self, x: Clear, y: Any) -> Clear:
        values, level, bound = self.operand(x, y)
        return self.make(x.values + values, x, level, x.bound + bound)

    def subtract(self, x: Clear, y: Any) -> Clear:
        values, level, bound = self.operand(x, y)
        return self.make(x.values - values, x, level, x.bound + bound)

    def negate(self, x: Clear) -> Clear:
        return self.make(-x.values, x, x.level, x.bound)

    def multiply(self, x: Clear, y: Any) -> Clear:
        values, level, bound = self.operand(x, y)
        self.relinearisations += isinstance(y, Clear) and max(x.shape[1], y.shape[1])
        return self.make(x.values * values, x, level - 1, x.bound * bound)

    def multiply_plain(self, x: Clear, values: Any) -> Clear:
        clear = np.asarray(values, np.float64)
        clear = clear[:, None] if clear.ndim == 1 else clear
        assert clear.shape in (x.shape, (x.tokens, 1))
        padded = np.zeros((self.slots, clear.shape[1]))
        padded[: x.tokens] = clear
        return self.make(x.values * padded, x, x.level - 1, x.bound * float(np.abs(clear).max()))

    def dot(self, x: Clear, y: Clear) -> Clear:
        assert x.shape == y.shape
        self.relinearisations += 1
        values = (x.values * y.values).sum(axis=1, keepdims=True)
        return self.make(values, x, min(x.level, y.level) - 1, x.shape[1] * x.bound * y.bound)

    def sum_features(self, x: Clear) -> Clear:
        return self.make(x.values.sum(axis=1, keepdims=True), x, x.level, x.shape[1] * x.bound)

    def concatenate(self, tensors: Sequence[Clear]) -> Clear:
        values = np.concatenate([t.values for t in tensors], axis=1)
        return self.make(values, tensors[0], min(t.level for t in tensors), max(t.bound for t in tensors))

    def select(self, x: Clear, features: slice) -> Clear:
        return self.make(x.values[:, features], x, x.level, x.bound)

    def polynomial(self, x: Clear, polynomial: Any) -> Clear:
        low, high = polynomial.domain
        used = x.values[: x.tokens]
        used = used[used != 0]  # an exact 0 comes of a slot that is not in use, or of a token that attends to nothing
        slack = 1e-9 * (high - low) + 20 * self.noise
        assert ((low - slack <= used) & (used <= high + slack)).all(), "outside the domain"
        assert x.bound <= max(abs(low), abs(high)), "the bound is not within the domain"
        values = self.chebyshev(2 * (x.values - low) / (high - low) - 1, polynomial.coefficients)
        return self.make(values, x, x.level - polynomial.depth, max(polynomial.bound, np.abs(values).max()))

    def chebyshev(self, t: npt.NDArray[np.float64], coefficients: Sequence[float]) -> npt.NDArray[np.float64]:
        if not self.noise:
            return np.polynomial.chebyshev.chebval(t, coefficients)
        # As an evaluator of least depth makes them, with the noise of every product.
        basis = [np.ones_like(t), t]
        for k in range(2, len(coefficients)):
            half = 1 << ((k - 1).bit_length() - 1)
            product = 2 * basis[half] * basis[k - half] - basis[2 * half - k]
            basis.append(product + self.generator.normal(0, self.noise, t.shape))
        return sum(c * b for c, b in zip(coefficients, basis, strict=False))

    def rotate(self, x: Clear, steps: Sequence[int] | int) -> Clear | list[Clear]:
        if isinstance(steps, int):
            self.rotated.append(steps)
            return self.make(np.roll(x.values, -steps, axis=0), x, x.level, x.bound)
        self.held.append(len(steps) * x.shape[1])
        self.rotated.extend(steps)
        return [self.make(np.roll(x.values, -s, axis=0), x, x.level, x.bound) for s in steps]

    def conjugate(self, x: Clear) -> Clear:
        return x

    def assume(self, x: Clear, bound: float) -> Clear:
        return self.make(x.values, x, x.level, min(x.bound, bound))


def result(y: Clear) -> npt.NDArray[np.float64]:
    return y.values[: y.tokens]


def random(*shape: int, seed: int = 3, low: float = -1.0, high: float = 1.0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).uniform(low, high, shape)


def spread(low: float, high: float, tokens: int = 50) -> npt.NDArray[np.float64]:
    """Values over the whole interval, ends included, as one feature; the slots after them are not in use."""
    return np.geomspace(low, high, tokens)[:, None]


def relative(y: Clear, exact: npt.NDArray[np.float64]) -> float:
    return float(np.abs(result(y) / exact - 1).max())


# Exponential


@pytest.mark.parametrize(
    ("low", "halvings", "degree"), [(-8, 0, 15), (-8, 2, 7), (-1, 0, 3), (-32, 3, 15), (-64, 5, 15)]
)
def test_exponential(low, halvings, degree):
    engine = ClearEngine()
    x = np.concatenate([-spread(1e-3, -low, 40), [[0.0]]])
    y = circuits.exponential(engine, engine.tensor(x), low, halvings, degree)
    assert 40 - y.level == circuits.exponential_depth(halvings, degree) == math.ceil(math.log2(degree + 1)) + halvings
    error = circuits.exponential_error(low, halvings, degree)
    assert error < 2e-2
    assert relative(y, np.exp(x)) <= error + 1e-13
    assert y.bound < 1.04


# Reciprocal and inverse square root


@pytest.mark.parametrize("gain", [1.0, 7.0, 0.01])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(("low", "high", "degree"), [(0.1, 1.0, 7), (0.01, 1.0, 15), (30.0, 2000.0, 31), (1.0, 1.1, 1)])
def test_reciprocal(low, high, degree, steps, gain):
    engine = ClearEngine()
    x = spread(low, high)
    y = circuits.reciprocal(engine, engine.tensor(x), (low, high), degree, steps, gain)
    depth = math.ceil(math.log2(degree + 1)) + (1 + steps if steps else 0)
    assert 40 - y.level == circuits.reciprocal_depth(degree, steps) == depth
    error = circuits.reciprocal_error((low, high), degree, steps)
    assert error < 0.7
    assert relative(y, gain / x) <= error * (1 + 1e-6) + 1e-12


def test_reciprocal_error_is_the_closed_form():
    low, high, degree = 0.05, 1.0, 12
    chebyshev = np.polynomial.chebyshev.Chebyshev.basis(degree + 1)
    assert circuits.reciprocal_error((low, high), degree) == pytest.approx(1 / chebyshev((high + low) / (high - low)))
    assert circuits.reciprocal_error((1.0, 1.0 + 1e-9), 255, 16) == 0  # no overflow on the way


@pytest.mark.parametrize("gain", [1.0, 5.0])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(("low", "high", "degree"), [(0.1, 1.0, 7), (0.01, 1.0, 15), (30.0, 2000.0, 31), (1.0, 1.1, 1)])
def test_inverse_square_root(low, high, degree, steps, gain):
    engine = ClearEngine()
    x = spread(low, high)
    y = circuits.inverse_square_root(engine, engine.tensor(x), (low, high), degree, steps, gain)
    depth = math.ceil(math.log2(degree + 1)) + 2 * steps
    assert 40 - y.level == circuits.inverse_square_root_depth(degree, steps) == depth
    error = circuits.inverse_square_root_error((low, high), degree, steps)
    assert error < 0.05
    assert relative(y, gain / np.sqrt(x)) <= error * (1 + 1e-6) + 1e-12


# Softmax


def softmax(scores: npt.NDArray[np.float64], mask: npt.NDArray[Any] | None = None) -> npt.NDArray[np.float64]:
    e = np.exp(scores) if mask is None else np.exp(scores) * mask
    total = e.sum(axis=1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def extreme_scores(tokens: int, keys: int, bound: float) -> npt.NDArray[np.float64]:
    """Rows at both ends of every range: equal, one high, one low, half and half, random."""
    scores = random(tokens, keys, low=-bound, high=bound)
    scores[0], scores[1], scores[2], scores[3], scores[4] = bound, -bound, -bound, bound, -bound
    scores[2, 0], scores[3, 0], scores[4, : keys // 2] = bound, -bound, bound
    return scores


@pytest.mark.parametrize("accuracy", [1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("keys", "bound"), [(1, 2.0), (2, 0.5), (8, 1.0), (16, 4.0), (16, 8.0), (33, 30.0), (8, 200.0)]
)
def test_softmax(keys, bound, masked, accuracy):
    engine = ClearEngine()
    tokens = 40
    scores = extreme_scores(tokens, keys, bound)
    mask = None
    if masked:
        mask = random(tokens, keys, seed=5) < 0.2
        mask[:6], mask[7], mask[8] = True, False, np.arange(keys) == 0
    plan = circuits.softmax_plan(keys, bound, masked, accuracy)
    assert plan.accuracy <= accuracy
    y = circuits.softmax(engine, engine.tensor(scores, 80, bound), bound, mask, accuracy)
    assert 80 - y.level == plan.depth
    exact = softmax(scores, mask)
    assert np.abs(result(y) - exact).max() <= plan.accuracy
    allowed = exact > 0
    assert np.abs(result(y)[allowed] / exact[allowed] - 1).max() <= plan.accuracy + 1e-10
    assert not result(y)[~allowed].any()
    assert y.bound < 1.02 + accuracy


@pytest.mark.parametrize(("keys", "bound"), [(16, 4.0), (16, 8.0), (64, 16.0)])
def test_softmax_bears_noise(keys, bound):
    engine = ClearEngine(noise=1e-9)
    scores = extreme_scores(SLOTS, keys, bound)
    mask = circuits.attention_mask(SLOTS, np.tri(SLOTS))[:, :keys]
    mask[:, 0] = 1
    for m in (None, mask):
        y = circuits.softmax(engine, engine.tensor(scores, 80, bound), bound, m)
        assert np.abs(result(y) - softmax(scores, m)).max() < 2e-4


@pytest.mark.parametrize(("ratio", "degree", "steps"), [(33, 63, 0), (400, 255, 0), (400, 127, 1), (3000, 255, 1)])
def test_reciprocal_amplifies_noise_by_the_ratio_of_the_domain(ratio, degree, steps):
    noise = 1e-9
    engine = ClearEngine(4096, noise)
    x = spread(1 / ratio, 1.0, 4000)
    y = circuits.reciprocal(engine, engine.tensor(x), (1 / ratio, 1.0), degree, steps)
    error = relative(y, 1 / x)
    # Largest of some 4,000 Gaussian errors of a few operations each.
    assert error <= circuits.reciprocal_error((1 / ratio, 1.0), degree, steps) + 6 * noise * ratio
    assert error >= noise * ratio


def test_softmax_levels():
    # What the documentation may quote; fewer is better.
    depths = [circuits.softmax_plan(32, bound, accuracy=1e-4).depth for bound in (1.0, 2.0, 4.0, 8.0, 16.0)]
    assert depths == [8, 11, 15, 20, 27]


# Layer norm


@pytest.mark.parametrize(("degree", "steps", "accuracy"), [(7, 1, 1e-2), (15, 1, 1e-4), (31, 0, 1e-5), (7, 3, 1e-5)])
@pytest.mark.parametrize("tokens", [SLOTS, 11])
def test_layer_norm(degree, steps, accuracy, tokens):
    engine = ClearEngine()
    features, eps = 24, 1e-3
    x = random(tokens, features) * spread(0.4, 1.6, tokens) + random(tokens, 1, seed=9)
    weight, bias = random(features, seed=1), random(features, seed=2)
    variance = x.var(axis=1, keepdims=True)
    domain = (0.9 * float(variance.min()), 1.1 * float(variance.max()))
    y = circuits.layer_norm(engine, engine.tensor(x), weight, bias, domain, eps, degree, steps)
    depth = 3 + math.ceil(math.log2(degree + 1)) + 2 * steps
    assert 40 - y.level == circuits.layer_norm_depth(degree, steps) == depth
    exact = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(variance + eps) * weight
    error = circuits.inverse_square_root_error((domain[0] + eps, domain[1] + eps), degree, steps)
    assert error < accuracy
    assert np.abs(result(y) - bias - exact).max() <= error * np.abs(exact).max() + 1e-12


# Attention


def arrange(sequences: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(sequence, token, feature) to slots: token i of sequence s in slot i * stride + s."""
    return sequences.transpose(1, 0, 2).reshape(-1, sequences.shape[2])


@pytest.mark.parametrize("period", [1, 4, 8, SLOTS])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_attention_scores(period, chunk):
    engine = ClearEngine()
    stride, features = SLOTS // period, 5
    q, k = random(stride, period, features), random(stride, period, features, seed=4)
    y = circuits.attention_scores(engine, engine.tensor(arrange(q)), engine.tensor(arrange(k)), period, chunk)
    assert y.shape == (SLOTS, period)
    assert 40 - y.level == circuits.ATTENTION_DEPTH
    table = np.einsum("sif,sjf->sij", q, k)
    for s in range(stride):
        for i in range(period):
            np.testing.assert_allclose(result(y)[i * stride + s], np.roll(table[s, i], -i), atol=1e-12)
    assert tuple(engine.rotated) == circuits.attention_steps(SLOTS, period)
    assert engine.relinearisations == period
    assert max(engine.held, default=0) <= chunk * features


@pytest.mark.parametrize("period", [1, 4, SLOTS])
def test_attention_values(period):
    engine = ClearEngine()
    stride, features = SLOTS // period, 5
    p, v = random(SLOTS, period), random(stride, period, features, seed=4)
    y = circuits.attention_values(engine, engine.tensor(p), engine.tensor(arrange(v)), period)
    assert y.shape == (SLOTS, features)
    assert 40 - y.level == circuits.ATTENTION_DEPTH
    for s in range(stride):
        for i in range(period):
            expected = sum(p[i * stride + s, d] * v[s, (i + d) % period] for d in range(period))
            np.testing.assert_allclose(result(y)[i * stride + s], expected, atol=1e-12)
    assert tuple(sorted(set(engine.rotated))) == circuits.attention_steps(SLOTS, period)
    assert engine.relinearisations == features
    assert max(engine.held, default=0) <= period


@pytest.mark.parametrize("each", [False, True])
def test_attention_from_end_to_end(each):
    engine = ClearEngine()
    period, stride, features, bound = 8, SLOTS // 8, 4, 4.0
    q, k, v = (random(stride, period, features, seed=s) for s in (1, 2, 3))
    allowed = np.tri(period, dtype=bool)
    if each:  # sequences of their own lengths, causal too
        lengths = 1 + np.arange(stride) % period
        allowed = allowed & (np.arange(period) < lengths[:, None])[:, None, :]
    scores = circuits.attention_scores(engine, engine.tensor(arrange(q)), engine.tensor(arrange(k)), period)
    mask = circuits.attention_mask(SLOTS, allowed)
    probabilities = circuits.softmax(engine, scores, bound, mask)
    y = circuits.attention_values(engine, probabilities, engine.tensor(arrange(v)), period)
    assert 40 - y.level == 2 * circuits.ATTENTION_DEPTH + circuits.softmax_plan(period, bound, True).depth
    table = np.einsum("sif,sjf->sij", q, k)
    table = np.where(allowed, table, -np.inf)
    weights = np.exp(table - table.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(result(y), arrange(np.einsum("sij,sjf->sif", weights, v)), atol=1e-4)


# Matrix-vector product


@pytest.mark.parametrize("period", [None, SLOTS])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (5, 11), (16, 3)])
def test_matrix_vector(shape, period):
    engine = ClearEngine()
    n = period or 1 << (max(shape) - 1).bit_length()
    matrix, vector = random(*shape), np.zeros(n)
    vector[: shape[1]] = random(shape[1], seed=8)
    x = np.tile(vector, SLOTS // n)[:, None]
    y = circuits.matrix_vector(engine, engine.tensor(x), matrix, period)
    assert 40 - y.level == circuits.MATRIX_VECTOR_DEPTH
    expected = np.zeros(n)
    expected[: shape[0]] = matrix @ vector[: shape[1]]
    np.testing.assert_allclose(result(y)[:, 0], np.tile(expected, SLOTS // n), atol=1e-12)
    assert tuple(engine.rotated) == circuits.matrix_vector_steps(SLOTS, n)
    assert len(engine.rotated) <= max(3 * math.sqrt(n / 2) - 2, 2 * math.sqrt(n) - 2) + 1e-9


# Errors


def test_levels_run_out():
    engine = ClearEngine()
    x = engine.tensor(spread(0.1, 1.0), level=circuits.inverse_square_root_depth(7, 2) - 1)
    with pytest.raises(PrivtunerError, match="levels"):
        circuits.inverse_square_root(engine, x, (0.1, 1.0), 7, 2)
    enough = engine.tensor(spread(0.1, 1.0), level=circuits.inverse_square_root_depth(7, 2))
    assert circuits.inverse_square_root(engine, enough, (0.1, 1.0), 7, 2).level == 0


ENGINE = ClearEngine()
X = ENGINE.tensor(np.ones((SLOTS, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: circuits.exponential(ENGINE, X, 1.0), "low = 1.0"),
        (lambda: circuits.exponential(ENGINE, X, -1.0, 17), "halvings = 17"),
        (lambda: circuits.exponential_depth(0, 256), "degree 256"),
        (lambda: circuits.reciprocal(ENGINE, X, (0.0, 1.0)), "low > 0"),
        (lambda: circuits.reciprocal(ENGINE, X, (1.0, 0.5)), "low < high"),
        (lambda: circuits.reciprocal(ENGINE, X, (0.5, 1.0), 0), "degree 0"),
        (lambda: circuits.reciprocal(ENGINE, X, (0.5, 1.0), 3, -1), "newton_steps = -1"),
        (lambda: circuits.reciprocal(ENGINE, X, (0.5, 1.0), gain=0), "gain = 0"),
        (lambda: circuits.inverse_square_root(ENGINE, X, (-1.0, 1.0)), "low > 0"),
        (lambda: circuits.inverse_square_root(ENGINE, X, (1e-6, 1.0), 3, 2), "raise the degree"),
        (lambda: circuits.softmax(ENGINE, X, -1.0), "bound = -1.0"),
        (lambda: circuits.softmax(ENGINE, X, 1e4), "scale the scores down"),
        (lambda: circuits.softmax(ENGINE, X, 1.0, accuracy=1.0), "accuracy = 1.0"),
        (lambda: circuits.softmax(ENGINE, X, 1.0, np.ones((4, 4))), "mask has shape"),
        (lambda: circuits.softmax(ENGINE, X, 1.0, np.full((SLOTS, 4), 0.5)), "other than 0 and 1"),
        (lambda: circuits.softmax_plan(0, 1.0), "keys = 0"),
        (lambda: circuits.layer_norm(ENGINE, X, np.ones(3), np.ones(4), (0.1, 1)), "weight has shape"),
        (lambda: circuits.layer_norm(ENGINE, X, np.ones(4), np.full(4, np.nan), (0.1, 1)), "bias holds"),
        (lambda: circuits.layer_norm(ENGINE, X, np.ones(4), np.ones(4), (0.0, 1.0), 0.0), "variance_domain"),
        (lambda: circuits.layer_norm(ENGINE, X, np.ones(4), np.ones(4), (0.1, 1.0), -1.0), "eps = -1.0"),
        (lambda: circuits.attention_steps(SLOTS, 3), "period = 3"),
        (lambda: circuits.attention_steps(SLOTS, 0), "period = 0"),
        (lambda: circuits.attention_scores(ENGINE, X, ENGINE.tensor(np.ones((SLOTS, 3))), 4), "must agree"),
        (lambda: circuits.attention_scores(ENGINE, X, X, 4, 0), "chunk = 0"),
        (lambda: circuits.attention_values(ENGINE, X, X, 8), "probabilities has shape"),
        (lambda: circuits.attention_mask(SLOTS, np.ones((4, 5))), "allowed has shape"),
        (lambda: circuits.attention_mask(SLOTS, np.ones((3, 4, 4))), "hold 16"),
        (lambda: circuits.matrix_vector_steps(SLOTS, 12), "power of two"),
        (lambda: circuits.matrix_vector(ENGINE, X, np.ones((4, 4))), "repeated over all slots"),
        (lambda: circuits.matrix_vector(ENGINE, X, np.ones(4)), "matrix has shape"),
        (lambda: circuits.matrix_vector(ENGINE, X, np.ones((8, 8)), 4), "fit the period"),
        (lambda: circuits.matrix_vector(ENGINE, X, np.full((4, 4), np.inf)), "not finite"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()

"""Circuits on encrypted tensors: exponential, reciprocal, softmax, layer norm, attention, matrix-vector product.

Written against :class:`privtuner.engines.base.CkksEngine` alone, so that they run on every engine. Each states the
levels it takes, which are known beforehand (the ``..._depth`` functions), and, where it rotates, the steps that the
rotation keys must cover (the ``..._steps`` functions).

A domain or a bound that a circuit is given is the caller's promise about values nobody can see: outside it results are
wrong, and may be huge. Slots that are not in use hold 0; that is outside the domain of a reciprocal or an inverse
square root, but the polynomials stay moderate there, and the bounds that the circuits declare hold there too.

Accuracies are those of the formulas in exact arithmetic; the noise of the ciphertexts comes on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from privtuner.errors import InputError

from .approximations import MAX_DEGREE, Array, Domain, Polynomial, _domain, _peak, fit, inverse

if TYPE_CHECKING:
    from privtuner.engines.base import CkksEngine

__all__ = [
    "ATTENTION_DEPTH",
    "MATRIX_VECTOR_DEPTH",
    "CkksTensor",
    "SoftmaxPlan",
    "attention_mask",
    "attention_scores",
    "attention_steps",
    "attention_values",
    "exponential",
    "exponential_depth",
    "exponential_error",
    "inverse_square_root",
    "inverse_square_root_depth",
    "inverse_square_root_error",
    "layer_norm",
    "layer_norm_depth",
    "matrix_vector",
    "matrix_vector_steps",
    "reciprocal",
    "reciprocal_depth",
    "reciprocal_error",
    "softmax",
    "softmax_plan",
]

ATTENTION_DEPTH = 1
"""Levels of `attention_scores`, and of `attention_values`."""

MATRIX_VECTOR_DEPTH = 1
"""Levels of `matrix_vector`."""


class CkksTensor(Protocol):
    """What circuits read of an encrypted tensor."""

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, features)."""
        ...

    @property
    def level(self) -> int:
        """Multiplications left."""
        ...

    @property
    def bound(self) -> float:
        """What |value| stays below."""
        ...


T = TypeVar("T", bound=CkksTensor)

_SLACK = 2.0**-6  # by which values may leave their exact range, for noise and the errors of the steps before


# Exponential


def exponential(engine: CkksEngine[T], x: T, low: float = -8.0, halvings: int = 0, degree: int = 15) -> T:
    """exp(x) for x in [low, 0], by halving the argument: ``p(x) ** (2 ** halvings)``.

    The polynomial p stands for ``exp(x / 2**halvings)`` with the least relative error, so the halving itself takes no
    level. Each squaring doubles the relative error.

    Args:
        engine: computes.
        x: any tensor with values in [low, 0].
        low: negative.
        halvings: squarings, 0 to 16.
        degree: of the polynomial, 1 to 255.

    Returns:
        A tensor of the shape of ``x``, relative error at most `exponential_error`, after `exponential_depth` levels.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels.
    """
    start, _error = _exponential(_negative(low), 0.0, 0.0, _halvings(halvings), _degree(degree))
    y = engine.polynomial(engine.assume(x, -low), start)
    for _ in range(halvings):
        y = engine.multiply(y, y)
    return engine.assume(y, 1 + _SLACK + exponential_error(low, halvings, degree))


def exponential_depth(halvings: int = 0, degree: int = 15) -> int:
    """Levels of `exponential`: ceil(log2(degree + 1)) + halvings."""
    return _degree(degree).bit_length() + _halvings(halvings)


def exponential_error(low: float = -8.0, halvings: int = 0, degree: int = 15) -> float:
    """Largest relative error of `exponential`."""
    _, error = _exponential(_negative(low), 0.0, 0.0, _halvings(halvings), _degree(degree))
    return math.expm1(2**halvings * math.log1p(error))


@lru_cache(maxsize=256)
def _exponential(low: float, high: float, shift: float, halvings: int, degree: int) -> tuple[Polynomial, float]:
    """A polynomial for ``exp((x + shift) / 2**halvings)`` on [low, high] and its largest relative error."""

    def function(x: Array) -> Array:
        values: Array = np.exp((x + shift) / 2**halvings)
        return values

    start = fit(function, (low, high), degree, name="exp", relative=True)
    return start, _relative_error(start, function)


# Reciprocal and inverse square root


def reciprocal(
    engine: CkksEngine[T], x: T, domain: Domain, degree: int = 15, newton_steps: int = 0, gain: float = 1.0
) -> T:
    """``gain / x`` for x in a positive domain: a polynomial, then Goldschmidt steps.

    The start y is the polynomial of least relative error; with ``e = 1 - x y``, at most `reciprocal_error` of no
    steps, each step multiplies by ``1 + e`` and squares e (Goldschmidt's division, which is Newton's
    ``y (2 - x y)`` with the two products of a step side by side). A step takes one level and doubles the digits; the
    first one takes another for e. A polynomial of degree ``2**k (degree + 1) - 1`` would be as good as k steps for one
    level less, so steps pay where that degree is above 255, or where multiplications are dearer than a level.

    Args:
        engine: computes.
        x: any tensor with values in the domain.
        domain: (low, high), 0 < low.
        degree: of the polynomial, 1 to 255.
        newton_steps: 0 to 16.
        gain: a positive factor, at no cost.

    Returns:
        A tensor of the shape of ``x``, relative error at most `reciprocal_error`, after `reciprocal_depth` levels.
        An error d in x costs ``d / low`` in relative accuracy.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels.
    """
    domain = _positive(domain)
    _steps(newton_steps)
    start = _scaled(inverse(domain, _degree(degree), "chebyshev"), _gain(gain))
    x = engine.assume(x, domain[1])
    y = engine.polynomial(x, start)
    inside = gain / domain[0] * (1 + reciprocal_error(domain, degree, 0))
    bound = (1 + _SLACK) * max(inside, abs(float(start(0.0))) * 2**newton_steps)
    if newton_steps:
        # While the polynomial is evaluated the level of x is idle: the gain is divided out of it at no cost.
        product = engine.multiply(x if gain == 1 else engine.multiply(x, 1 / gain), y)
        e = engine.assume(engine.add(engine.negate(product), 1.0), 1 + _SLACK)
        for step in range(newton_steps):
            e = engine.multiply(e, e) if step else e
            y = engine.assume(engine.multiply(y, engine.add(e, 1.0)), bound)
    return engine.assume(y, bound)


def reciprocal_depth(degree: int = 15, newton_steps: int = 0) -> int:
    """Levels of `reciprocal`: ceil(log2(degree + 1)), and with steps 1 + newton_steps more."""
    return _degree(degree).bit_length() + (1 + newton_steps if _steps(newton_steps) else 0)


def reciprocal_error(domain: Domain, degree: int = 15, newton_steps: int = 0) -> float:
    """Largest relative error of `reciprocal`: ``T_{degree + 1}((high + low) / (high - low)) ** -(2**newton_steps)``."""
    low, high = _positive(domain)
    exponent = (_degree(degree) + 1) * math.acosh((high + low) / (high - low))
    # 1 / cosh(exponent), where neither can overflow.
    start = 2 * math.exp(-exponent) / (1 + math.exp(-2 * exponent))
    return float(start ** (2 ** _steps(newton_steps)))


def inverse_square_root(
    engine: CkksEngine[T], x: T, domain: Domain, degree: int = 15, newton_steps: int = 1, gain: float = 1.0
) -> T:
    """``gain / sqrt(x)`` for x in a positive domain: a polynomial, then Newton steps ``y <- y (3 - x y**2) / 2``.

    The start is the polynomial of least relative error. A step is computed as ``1.5 y - (x y / 2) (y y)``, two levels
    instead of the three of the formula as it stands, and takes a relative error e to ``(3 e**2 + e**3) / 2``.

    Args:
        engine: computes.
        x: any tensor with values in the domain.
        domain: (low, high), 0 < low.
        degree: of the polynomial, 1 to 255.
        newton_steps: 0 to 16.
        gain: a positive factor, at no cost.

    Returns:
        A tensor of the shape of ``x``, relative error at most `inverse_square_root_error`, after
        `inverse_square_root_depth` levels.

    Raises:
        InputError: an argument out of range, or a start too rough for Newton steps: raise the degree.
        CkksError: not enough levels.
    """
    domain = _positive(domain)
    error = inverse_square_root_error(domain, degree, newton_steps)
    start = _scaled(_inverse_square_root(domain, degree)[0], _gain(gain))
    x = engine.assume(x, domain[1])
    y = engine.polynomial(x, start)
    # After a step y never exceeds gain / sqrt(x), the maximum of 1.5 y - x y**3 / 2 over y.
    rough = inverse_square_root_error(domain, degree, 0)
    inside = gain / math.sqrt(domain[0]) * (1 + max(rough, error))
    bound = (1 + _SLACK) * max(inside, abs(float(start(0.0))) * 1.5**newton_steps)
    y = engine.assume(y, bound)
    if newton_steps:
        half = engine.multiply(x, 0.5 / gain**2)
        for _ in range(newton_steps):
            y = engine.subtract(
                engine.multiply(y, 1.5), engine.multiply(engine.multiply(half, y), engine.multiply(y, y))
            )
            y = engine.assume(y, bound)
    return y


def inverse_square_root_depth(degree: int = 15, newton_steps: int = 1) -> int:
    """Levels of `inverse_square_root`: ceil(log2(degree + 1)) + 2 newton_steps."""
    return _degree(degree).bit_length() + 2 * _steps(newton_steps)


def inverse_square_root_error(domain: Domain, degree: int = 15, newton_steps: int = 1) -> float:
    """Largest relative error of `inverse_square_root`.

    Raises:
        InputError: an argument out of range, or a start too rough for Newton steps: raise the degree.
    """
    _, error = _inverse_square_root(_positive(domain), _degree(degree))
    if _steps(newton_steps) and error > 0.7:
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
    return start, _relative_error(start, function)


# Softmax

_CONDITION = 4096.0  # largest ratio of the ends of a sum that is inverted: what the noise in it is multiplied by
_ROUGH = 2.0**-8  # accuracy of normalisations that are followed by another


@dataclass(frozen=True)
class SoftmaxPlan:
    """How `softmax` proceeds: which polynomials, how many squarings, how many levels.

    Attributes:
        keys: features of the scores.
        bound: of the scores.
        masked: whether a mask is applied.
        exponential: polynomial for ``exp((x - bound) / 2**squarings)``.
        domains: of the sums that are inverted: the first one, and one after each squaring.
        degrees: of the reciprocals, one a domain.
        steps: Goldschmidt steps of the reciprocals.
        accuracy: largest relative error of a probability, and so of its absolute error.
    """

    keys: int
    bound: float
    masked: bool
    exponential: Polynomial
    domains: tuple[Domain, ...]
    degrees: tuple[int, ...]
    steps: tuple[int, ...]
    accuracy: float

    @property
    def squarings(self) -> int:
        """Times the distribution is squared and normalised again."""
        return len(self.domains) - 1

    @property
    def depth(self) -> int:
        """Levels of the whole softmax."""
        inversions = sum(reciprocal_depth(d, k) + 1 for d, k in zip(self.degrees, self.steps, strict=True))
        return self.exponential.depth + int(self.masked) + inversions + self.squarings


def softmax(
    engine: CkksEngine[T], scores: T, bound: float, mask: npt.ArrayLike | None = None, accuracy: float = 1e-4
) -> T:
    """Softmax over the features, for scores in [-bound, bound].

    No maximum can be taken on ciphertexts, so the public bound takes its place: exponents are in [-2 bound, 0].
    Inverting the sum of such exponentials directly would be ill conditioned: it ranges over a factor of
    exp(2 bound). Instead the scores are divided by ``2**squarings`` (inside the polynomial, at no cost), the softmax
    of these is computed, and it is squared and normalised again, ``squarings`` times: the normalise-and-square
    algorithm of Cho, Hanrot, Kim, Park and Stehle, "Fast and Accurate Homomorphic Softmax Evaluation", CCS 2024.
    Here the range of the sum of squares of a distribution over n keys that is the softmax of scores in [-b, b] is
    taken as ``[1 / n, min(1, cosh(b)**2 / n)]``, by the inequality of Polya and Szego. `softmax_plan` picks the number
    of squarings for the fewest levels.

    Args:
        engine: computes.
        scores: (tokens, keys), |score| <= bound in every slot in use, masked ones as well.
        bound: positive; the fewer levels the smaller. About 500 is the largest.
        mask: clear, (tokens, keys), 1 (or True) where a token may attend, else 0; takes one level. A token that may
            attend to nothing gets zeros.
        accuracy: largest relative error of a probability, 1e-9 to 0.1.

    Returns:
        Probabilities of the shape of ``scores``, after ``softmax_plan(...).depth`` levels. A relative error d in the
        first sum comes from an absolute error of ``d keys exp(-2 bound / 2**squarings)``: at worst 4,096 times the
        noise of a ciphertext, and less in later sums.

    Raises:
        InputError: an argument out of range, or a mask that is not 0 and 1 in the shape of the scores.
        CkksError: not enough levels.
    """
    tokens, keys = scores.shape
    counts: Array | None = None
    allowed: Array | None = None
    if mask is not None:
        allowed = np.asarray(mask).astype(np.float64)
        if allowed.shape != (tokens, keys):
            raise InputError(f"mask has shape {allowed.shape}: expected {(tokens, keys)}, that of the scores")
        if not np.isin(allowed, (0.0, 1.0)).all():
            raise InputError("mask holds values other than 0 and 1: give 1 where a token may attend, else 0")
        counts = np.maximum(allowed.sum(axis=1, keepdims=True), 1.0)
    plan = softmax_plan(keys, bound, mask is not None, accuracy)
    y = engine.polynomial(engine.assume(scores, plan.bound), plan.exponential)
    # Before a squaring, y is the distribution times sqrt(count), so that the sum of squares is at least 1.
    last = plan.squarings == 0
    if allowed is None or counts is None:
        total = engine.sum_features(y)
        gain = 1.0 if last else math.sqrt(keys)
    else:
        mean = engine.multiply_plain(y, allowed / counts)
        total = engine.sum_features(mean)
        y = mean if last else engine.multiply_plain(y, allowed / np.sqrt(counts))
        gain = 1.0
    for turn, (domain, degree, steps) in enumerate(zip(plan.domains, plan.degrees, plan.steps, strict=True)):
        if turn:
            last = turn == plan.squarings
            y = engine.multiply(y, y)
            total = engine.sum_features(y)
            gain = 1.0
            if not last and counts is None:
                gain = math.sqrt(keys)
            elif not last and counts is not None:
                # The level this takes is idle: the reciprocal takes at least one.
                y = engine.multiply_plain(y, np.sqrt(counts) * np.ones(keys))
        y = engine.multiply(y, reciprocal(engine, total, domain, degree, steps, gain))
        y = engine.assume(y, (1.0 if last else math.sqrt(keys)) * (1 + max(_SLACK, accuracy)))
    return y


def softmax_plan(keys: int, bound: float, masked: bool = False, accuracy: float = 1e-4) -> SoftmaxPlan:
    """The plan of `softmax` with the fewest levels; among equals, with the fewest squarings.

    Raises:
        InputError: an argument out of range.
    """
    if keys < 1:
        raise InputError(f"keys = {keys}: must be positive")
    if not 0 < bound < math.inf:
        raise InputError(f"bound = {bound}: must be positive and finite")
    if not 1e-9 <= accuracy <= 0.1:
        raise InputError(f"accuracy = {accuracy}: must be between 1e-9 and 0.1")
    return _softmax_plan(int(keys), float(bound), bool(masked), float(accuracy))


@lru_cache(maxsize=256)
def _softmax_plan(keys: int, bound: float, masked: bool, accuracy: float) -> SoftmaxPlan:
    plans = []
    for squarings in range(8):
        if math.exp(min(2 * bound / 2**squarings, 700.0)) > _CONDITION:
            continue
        found = _softmax_exponential(bound, squarings, accuracy / 4)
        if found is None:
            continue
        start, error = found
        narrow = bound / 2**squarings
        # With a mask the first sum is a mean; without one its range is that of a sum of all keys.
        count = 1 if masked else keys
        ends = [(count * math.exp(-2 * narrow), float(count))]
        for turn in range(squarings):
            spread = math.cosh(min(narrow * 2**turn, 300.0)) ** 2
            ends.append((1.0, min(float(keys), spread)))
        domains = tuple((low * (1 - _SLACK), high * (1 + _SLACK)) for low, high in ends)
        wanted = [_ROUGH] * squarings + [accuracy / 2]
        inversions = [_least_depth(d, a) for d, a in zip(domains, wanted, strict=True)]
        degrees, steps = tuple(d for d, _ in inversions), tuple(k for _, k in inversions)
        achieved = 2 * error + reciprocal_error(domains[-1], degrees[-1], steps[-1])
        plans.append(SoftmaxPlan(keys, bound, masked, start, domains, degrees, steps, achieved))
    if not plans:
        raise InputError(f"bound = {bound} with accuracy = {accuracy}: too large; scale the scores down")
    return min(plans, key=lambda plan: (plan.depth, plan.squarings))


def _softmax_exponential(bound: float, squarings: int, accuracy: float) -> tuple[Polynomial, float] | None:
    """The exponential of fewest levels whose relative error is ``accuracy`` after the squarings, and that error."""
    for degree in (3, 7, 15, 31):
        start, error = _exponential(-bound, bound, -bound, squarings, degree)
        error = math.expm1(2**squarings * math.log1p(error))
        if error <= accuracy:
            return start, error
    return None


def _least_depth(domain: Domain, accuracy: float) -> tuple[int, int]:
    """Degree and steps of the reciprocal of fewest levels, and then of fewest multiplications."""
    choices = []
    for steps in range(8):
        for bits in range(1, 9):
            degree = 2**bits - 1
            if reciprocal_error(domain, degree, steps) <= accuracy:
                choices.append((reciprocal_depth(degree, steps), 2 * math.sqrt(degree) + 2 * steps, degree, steps))
                break
    _, _, degree, steps = min(choices)
    return degree, steps


# Layer norm


def layer_norm(
    engine: CkksEngine[T],
    x: T,
    weight: npt.ArrayLike,
    bias: npt.ArrayLike,
    variance_domain: Domain,
    eps: float = 1e-5,
    degree: int = 15,
    newton_steps: int = 1,
) -> T:
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, mean and variance over the features.

    Mean and variance are additions across ciphertexts: no rotation (Ba, Kiros and Hinton, "Layer Normalization",
    2016, in the feature-major layout). The divisions by the number of features are folded into other factors.

    Args:
        engine: computes.
        x: (tokens, features).
        weight: (features,), finite.
        bias: (features,), finite.
        variance_domain: (low, high) that holds the variance of every token, without eps; 0 <= low, and 0 < low + eps.
        eps: not negative.
        degree: of the start of the inverse square root.
        newton_steps: of the inverse square root.

    Returns:
        A tensor of the shape of ``x``, after `layer_norm_depth` levels. Its relative error, before the bias is added,
        is at most ``inverse_square_root_error((low + eps, high + eps), degree, newton_steps)``.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels.
    """
    features = x.shape[1]
    low, high = _domain(variance_domain)
    if not 0 <= eps < math.inf:
        raise InputError(f"eps = {eps}: must be finite and not negative")
    if low < 0 or low + eps <= 0:
        raise InputError(f"variance_domain {(low, high)}: needs low >= 0, and low + eps > 0")
    scale, offset = _feature_values("weight", weight, features), _feature_values("bias", bias, features)
    mean = engine.multiply(engine.sum_features(x), 1 / features)
    centred = engine.subtract(x, mean)
    squares = engine.add(engine.dot(centred, centred), features * eps)
    domain = (features * (low + eps), features * (high + eps))
    factor = inverse_square_root(engine, squares, domain, degree, newton_steps, math.sqrt(features))
    return engine.add(engine.multiply(engine.multiply(centred, scale), factor), offset)


def layer_norm_depth(degree: int = 15, newton_steps: int = 1) -> int:
    """Levels of `layer_norm`: three more than `inverse_square_root_depth`."""
    return 3 + inverse_square_root_depth(degree, newton_steps)


# Attention


def attention_steps(slots: int, period: int) -> tuple[int, ...]:
    """Rotations of `attention_scores` and `attention_values`: the multiples of slots / period.

    Raises:
        InputError: ``period`` does not divide ``slots``.
    """
    stride = _stride(slots, period)
    return tuple(stride * d for d in range(1, period))


def attention_mask(slots: int, allowed: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Which keys a query may see, in the layout of `attention_scores`: the mask for `softmax`.

    Args:
        slots: of the engine.
        allowed: (period, period), ``allowed[i, j]`` true where token i may see token j: for causal attention
            ``numpy.tri(period)``. Or one for each sequence, (slots / period, period, period).

    Returns:
        float64 (slots, period) of 0 and 1.

    Raises:
        InputError: another shape, or a period that does not divide ``slots``.
    """
    table = np.asarray(allowed).astype(bool)
    if table.ndim not in (2, 3) or table.shape[-1] != table.shape[-2]:
        raise InputError(f"allowed has shape {table.shape}: expected (period, period), with sequences before or not")
    period = table.shape[-1]
    stride = _stride(slots, period)
    if table.ndim == 3 and table.shape[0] != stride:
        raise InputError(f"allowed holds {table.shape[0]} sequences: {slots} slots of period {period} hold {stride}")
    table = np.broadcast_to(table, (stride, period, period))
    token = np.arange(slots) // stride
    key = (token[:, None] + np.arange(period)) % period
    mask: Array = table[(np.arange(slots) % stride)[:, None], token[:, None], key].astype(np.float64)
    return mask


def attention_scores(engine: CkksEngine[T], q: T, k: T, period: int, chunk: int = 8) -> T:
    """Scores of every query with every key of its sequence: ``sum_f q[i, f] k[(i + d) mod period, f]`` as feature d.

    Token i of sequence s sits in slot ``i * stride + s``, ``stride = slots / period``, so that one rotation by
    ``d * stride`` is a cyclic one over the tokens of every sequence at once. One relinearisation a score. Scaling by
    1 / sqrt(features) is left to the weights that made q.

    Args:
        engine: computes.
        q: queries (tokens, features).
        k: keys, the same shape.
        period: tokens of a sequence, padding included; divides the slots.
        chunk: rotations of k that are hoisted together, and held at a time: ``chunk * features`` ciphertexts.

    Returns:
        (tokens, period), after `ATTENTION_DEPTH` levels. Rotations: `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    stride = _stride(engine.slots, period)
    if q.shape != k.shape:
        raise InputError(f"q has shape {q.shape}, k {k.shape}: they must agree")
    if chunk < 1:
        raise InputError(f"chunk = {chunk}: must be positive")
    scores: list[T] = []
    for begin in range(0, period, chunk):
        steps = [d * stride for d in range(begin, min(begin + chunk, period))]
        scores.extend(engine.dot(q, rotated) for rotated in _rotations(engine, k, steps))
    return engine.concatenate(scores)


def attention_values(engine: CkksEngine[T], probabilities: T, v: T, period: int) -> T:
    """Values weighed by probabilities: ``out[i, f] = sum_d probabilities[i, d] v[(i + d) mod period, f]``.

    Feature by feature: the rotations of one feature of v, hoisted (its decomposition is computed once), and their
    dot product with the probabilities, one relinearisation an output. ``period`` ciphertexts are held at a time.

    Args:
        engine: computes.
        probabilities: (tokens, period), laid out as the result of `attention_scores`.
        v: values (tokens, features).
        period: as for `attention_scores`.

    Returns:
        (tokens, features), after `ATTENTION_DEPTH` levels. Rotations: `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    stride = _stride(engine.slots, period)
    tokens, features = v.shape
    if probabilities.shape != (tokens, period):
        raise InputError(f"probabilities has shape {probabilities.shape}: expected {(tokens, period)}")
    steps = [d * stride for d in range(period)]
    return engine.concatenate(
        [
            engine.dot(
                probabilities,
                engine.concatenate(list(_rotations(engine, engine.select(v, slice(f, f + 1)), steps))),
            )
            for f in range(features)
        ]
    )


# Matrix-vector product


def matrix_vector_steps(slots: int, period: int) -> tuple[int, ...]:
    """Rotations of `matrix_vector`: about 2 sqrt(period) of them.

    Raises:
        InputError: ``period`` is no power of two, or does not divide ``slots``.
    """
    babies = _babies(slots, period)
    return tuple(range(1, babies)) + tuple(range(babies, period, babies))


def matrix_vector(engine: CkksEngine[T], x: T, matrix: npt.ArrayLike, period: int | None = None) -> T:
    """A clear matrix times one encrypted vector that fills the slots, repeated with a period n.

    The diagonal method of Halevi and Shoup ("Algorithms in HElib", CRYPTO 2014) with baby steps and giant steps, as in
    their "Bootstrapping for HElib" (EUROCRYPT 2015): with b about sqrt(n), the b - 1 rotations of x are hoisted, and
    n / b - 1 sums of products with rotated diagonals are rotated in turn.

    Args:
        engine: computes.
        x: (slots, 1), slot i holding ``vector[i % n]``.
        matrix: (rows, columns), finite, both at most n; zeros are added up to (n, n).
        period: n, a power of two that divides the slots; by default the least that holds the matrix.

    Returns:
        (slots, 1), slot i holding ``(matrix @ vector)[i % n]``, after `MATRIX_VECTOR_DEPTH` levels. Rotations:
        `matrix_vector_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    entries = np.asarray(matrix, np.float64)
    if entries.ndim != 2 or 0 in entries.shape:
        raise InputError(f"matrix has shape {entries.shape}: expected (rows, columns), neither zero")
    if not np.isfinite(entries).all():
        raise InputError("matrix holds values that are not finite: every value must be")
    n = 1 << (max(entries.shape) - 1).bit_length() if period is None else period
    babies = _babies(engine.slots, n)
    if max(entries.shape) > n:
        raise InputError(f"matrix has shape {entries.shape}: at most {n} rows and columns fit the period")
    if x.shape != (engine.slots, 1):
        raise InputError(f"x has shape {x.shape}: expected {(engine.slots, 1)}, the vector repeated over all slots")
    square = np.zeros((n, n))
    square[: entries.shape[0], : entries.shape[1]] = entries
    row = np.arange(n)
    turned = engine.concatenate(list(_rotations(engine, x, list(range(babies)))))
    total: T | None = None
    for giant in range(0, n, babies):
        # Rotated back by `giant`: the sum is rotated forward afterwards.
        back = (row - giant) % n
        diagonals = np.stack([square[back, (back + giant + baby) % n] for baby in range(babies)], axis=1)
        products = engine.multiply_plain(turned, np.tile(diagonals, (engine.slots // n, 1)))
        part = next(_rotations(engine, engine.sum_features(products), [giant]))
        total = part if total is None else engine.add(total, part)
    assert total is not None  # noqa: S101 - n is at least 1
    return total


def _babies(slots: int, period: int) -> int:
    if period < 1 or period & (period - 1) or slots % period:
        raise InputError(f"period = {period}: must be a power of two that divides the {slots} slots")
    return 1 << ((period.bit_length()) // 2)


# Shared


def _rotations(engine: CkksEngine[T], x: T, steps: Sequence[int]) -> Iterator[T]:
    """Rotate by each of the steps, hoisted; a step of 0 is x itself and needs no key."""
    nonzero = [step for step in steps if step]
    rotated: Any = engine.rotate(x, nonzero) if nonzero else []
    for step in steps:
        yield rotated.pop(0) if step else x


def _relative_error(approximation: Polynomial, function: Any) -> float:
    return _peak(lambda x: np.abs(approximation(x) / function(x) - 1), approximation.domain) * (1 + 2.0**-10)


def _scaled(start: Polynomial, gain: float) -> Polynomial:
    if gain == 1:
        return start
    error = None if start.max_error is None else gain * start.max_error
    values = tuple(gain * c for c in start.coefficients)
    return replace(start, coefficients=values, max_error=error, derivative_error=None)


def _degree(degree: int) -> int:
    if not 1 <= degree <= MAX_DEGREE:
        raise InputError(f"degree {degree}: must be between 1 and {MAX_DEGREE}")
    return degree


def _halvings(halvings: int) -> int:
    if not 0 <= halvings <= 16:
        raise InputError(f"halvings = {halvings}: must be between 0 and 16")
    return halvings


def _steps(newton_steps: int) -> int:
    if not 0 <= newton_steps <= 16:
        raise InputError(f"newton_steps = {newton_steps}: must be between 0 and 16")
    return newton_steps


def _gain(gain: float) -> float:
    if not 0 < gain < math.inf:
        raise InputError(f"gain = {gain}: must be positive and finite")
    return gain


def _negative(low: float) -> float:
    if not -math.inf < low < 0:
        raise InputError(f"low = {low}: must be negative and finite")
    return float(low)


def _positive(domain: Domain) -> Domain:
    low, high = _domain(domain)
    if low <= 0:
        raise InputError(f"domain {(low, high)}: needs low > 0")
    return low, high


def _stride(slots: int, period: int) -> int:
    if period < 1 or slots % period:
        raise InputError(f"period = {period}: must divide the {slots} slots")
    return slots // period


def _feature_values(name: str, values: npt.ArrayLike, features: int) -> Array:
    array = np.asarray(values, np.float64)
    if array.shape != (features,):
        raise InputError(f"{name} has shape {array.shape}: expected ({features},), one value a feature")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds values that are not finite: every value must be")
    return array

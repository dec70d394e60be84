"""Softmax and layer norm over features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from privtuner.ckks.circuits.common import SLACK, feature_values
from privtuner.ckks.circuits.functions import (
    exponential_start,
    inverse_square_root,
    inverse_square_root_depth,
    reciprocal,
    reciprocal_depth,
    reciprocal_error,
)
from privtuner.ckks.polynomial import Array, Domain, Polynomial, check_domain
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError

_CONDITION = 4096.0  # largest ratio of the ends of a sum that is inverted: what the noise in it is multiplied by
_ROUGH = 2.0**-8  # accuracy of normalisations that are followed by another


@dataclass(frozen=True)
class SoftmaxPlan:
    """How `softmax` proceeds: which polynomials, how many squarings, how many levels.

    Attributes:
        keys: features of the scores.
        bound: the bound of the scores.
        masked: whether a mask is applied.
        exponential: polynomial for ``exp((x - bound) / 2**squarings)``.
        domains: the domains of the sums that are inverted: the first one, and one after each squaring.
        degrees: the degrees of the reciprocals, one a domain.
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
    evaluator: EvaluatorProtocol[Tensor],
    scores: Tensor,
    bound: float,
    mask: npt.ArrayLike | None = None,
    accuracy: float = 1e-4,
) -> Tensor:
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
        evaluator: computes.
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
    y = evaluator.polynomial(evaluator.assume(scores, plan.bound), plan.exponential)
    # Before a squaring, y is the distribution times sqrt(count), so that the sum of squares is at least 1.
    last = plan.squarings == 0
    if allowed is None or counts is None:
        total = evaluator.sum_features(y)
        gain = 1.0 if last else math.sqrt(keys)
    else:
        mean = evaluator.multiply_plain(y, allowed / counts)
        total = evaluator.sum_features(mean)
        y = mean if last else evaluator.multiply_plain(y, allowed / np.sqrt(counts))
        gain = 1.0
    for turn, (domain, degree, steps) in enumerate(zip(plan.domains, plan.degrees, plan.steps, strict=True)):
        if turn:
            last = turn == plan.squarings
            y = evaluator.multiply(y, y)
            total = evaluator.sum_features(y)
            gain = 1.0
            if not last and counts is None:
                gain = math.sqrt(keys)
            elif not last and counts is not None:
                # The level this takes is idle: the reciprocal takes at least one.
                y = evaluator.multiply_plain(y, np.sqrt(counts) * np.ones(keys))
        y = evaluator.multiply(y, reciprocal(evaluator, total, domain, degree, steps, gain))
        y = evaluator.assume(y, (1.0 if last else math.sqrt(keys)) * (1 + max(SLACK, accuracy)))
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
        domains = tuple((low * (1 - SLACK), high * (1 + SLACK)) for low, high in ends)
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
        start, error = exponential_start(-bound, bound, -bound, squarings, degree)
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
    evaluator: EvaluatorProtocol[Tensor],
    x: Tensor,
    weight: npt.ArrayLike,
    bias: npt.ArrayLike,
    variance_domain: Domain,
    eps: float = 1e-5,
    degree: int = 15,
    newton_steps: int = 1,
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, mean and variance over the features.

    Mean and variance are additions across ciphertexts: no rotation (Ba, Kiros and Hinton, "Layer Normalization",
    2016, in the feature-major layout). The divisions by the number of features are folded into other factors.

    Args:
        evaluator: computes.
        x: (tokens, features).
        weight: (features,), finite.
        bias: (features,), finite.
        variance_domain: (low, high) that holds the variance of every token, without eps; 0 <= low, and 0 < low + eps.
        eps: not negative.
        degree: the degree of the start of the inverse square root.
        newton_steps: the Newton steps of the inverse square root.

    Returns:
        A tensor of the shape of ``x``, after `layer_norm_depth` levels. Its relative error, before the bias is added,
        is at most ``inverse_square_root_error((low + eps, high + eps), degree, newton_steps)``.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels.
    """
    features = x.shape[1]
    low, high = check_domain(variance_domain)
    if not 0 <= eps < math.inf:
        raise InputError(f"eps = {eps}: must be finite and not negative")
    if low < 0 or low + eps <= 0:
        raise InputError(f"variance_domain {(low, high)}: needs low >= 0, and low + eps > 0")
    scale, offset = feature_values("weight", weight, features), feature_values("bias", bias, features)
    mean = evaluator.multiply(evaluator.sum_features(x), 1 / features)
    centred = evaluator.subtract(x, mean)
    squares = evaluator.add(evaluator.dot(centred, centred), features * eps)
    domain = (features * (low + eps), features * (high + eps))
    factor = inverse_square_root(evaluator, squares, domain, degree, newton_steps, math.sqrt(features))
    normed = evaluator.multiply(evaluator.multiply(centred, scale), factor)
    # No entry of a vector is more than sqrt(features) times the root of its mean square. The product's own bound is far
    # above that, and would not fit the modulus at the last level.
    largest = math.sqrt(features) * float(np.abs(scale).max(initial=0)) * (1 + SLACK)
    return evaluator.add(evaluator.assume(normed, min(normed.bound, largest) or normed.bound), offset)


def layer_norm_depth(degree: int = 15, newton_steps: int = 1) -> int:
    """Levels of `layer_norm`: three more than `inverse_square_root_depth`."""
    return 3 + inverse_square_root_depth(degree, newton_steps)

"""Layer norm over features under an encrypted mask, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic

import numpy as np
import numpy.typing as npt

from privtuner.ckks.circuits.common import REFRESH_LEVELS, SLACK, feature_values, raised, renewed, with_levels
from privtuner.ckks.circuits.functions import (
    inverse_square_root,
    inverse_square_root_depth,
    inverse_square_root_error,
)
from privtuner.ckks.polynomial import Array, Domain, check_domain
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError

_CHUNK = 32  # features of whose weights there is a ciphertext at a time


@dataclass(frozen=True)
class Normed(Generic[Tensor]):
    """What the backward pass needs of a layer norm.

    Attributes:
        centred: the input less its mean, (slots, features).
        root: one over the root of variance plus eps, (slots, 1), 0 where no token is.
    """

    centred: Tensor
    root: Tensor


@dataclass(frozen=True)
class LayerNorm:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the features of every token; 0 where there is none.

    Ba, Kiros and Hinton, "Layer Normalization", 2016, in the feature-major layout: mean and variance are sums across
    ciphertexts, so no rotation. Mean, variance and inverse root are one ciphertext each, and are refreshed whenever
    they run out of levels: what is wide takes one level, forward and backward, though the root is deep. The weight
    multiplies the root, not the result.

    Attributes:
        features: what is averaged over.
        domain: the variances of all tokens, without eps.
        eps: not negative.
        degree: of the polynomial that the inverse root starts with.
        newton_steps: that follow it.
        error: largest relative error of the inverse root, and so of the result before the bias, in exact arithmetic.
        noise: what an operation or a refresh adds to the error of a value at the most.
    """

    features: int
    domain: Domain
    eps: float
    degree: int
    newton_steps: int
    error: float
    noise: float

    @classmethod
    def choose(
        cls, features: int, domain: Domain, eps: float = 1e-5, accuracy: float = 1e-4, noise: float = 2.0**-17
    ) -> LayerNorm:
        """Choose the inverse root of fewest products.

        Args:
            features: positive.
            domain: (low, high) that holds the variance of every token, without eps; 0 <= low, and 0 < low + eps.
            eps: not negative.
            accuracy: of the inverse root, relative; 1e-9 to 0.1.
            noise: positive, of one operation; the default holds for scales of 2^40 and N = 2^15, refreshes included.

        Raises:
            InputError: an argument out of range, or a domain too wide for that accuracy.
        """
        low, high = check_domain(domain)
        if features < 1:
            raise InputError(f"features = {features}: must be positive")
        if not 0 <= eps < math.inf:
            raise InputError(f"eps = {eps}: must be finite and not negative")
        if low < 0 or low + eps <= 0:
            raise InputError(f"domain {(low, high)}: needs low >= 0, and low + eps > 0")
        if not 1e-9 <= accuracy <= 0.1:
            raise InputError(f"accuracy = {accuracy}: must be between 1e-9 and 0.1")
        if not 0 < noise < math.inf:
            raise InputError(f"noise = {noise}: must be positive and finite")
        return _choose(int(features), (low, high), float(eps), float(accuracy), float(noise))

    @property
    def _largest(self) -> float:
        """What variance plus eps is measured in, so that the root's polynomial is on (low, 1)."""
        return (self.domain[1] + self.eps) * (1 + SLACK)

    @property
    def _relative(self) -> Domain:
        return (self.domain[0] + self.eps) * (1 - SLACK) / self._largest, 1.0

    @property
    def _steepest(self) -> float:
        """The largest inverse root."""
        return (1 + SLACK + self.error) / math.sqrt(self.domain[0] + self.eps)

    def forward(
        self,
        evaluator: EvaluatorProtocol[Tensor],
        x: Tensor,
        mask: Tensor,
        weight: npt.ArrayLike,
        bias: npt.ArrayLike,
    ) -> tuple[Tensor, Normed[Tensor]]:
        """The normalised tensor, and what `backward` needs.

        One product a feature; a sum of squares, and the products of the root.

        Args:
            evaluator: computes, with refreshes.
            x: (slots, features) of the chain's scale, at level 4 or above; 0 where no token is.
            mask: (slots, 1), 1 where a token is, else 0; level 3 or above.
            weight: (features,), finite.
            bias: (features,), finite.

        Returns:
            (y, saved): y of the shape of x, one level below it if x is below the highest.

        Raises:
            InputError: shapes that do not fit, values that are not finite.
            CkksError: not enough levels, or no refreshes.
        """
        n = self.features
        scale, offset = feature_values("weight", weight, n), feature_values("bias", bias, n)
        for name, tensor, features in (("x", x, n), ("mask", mask, 1)):
            if tensor.shape != (evaluator.slots, features):
                raise InputError(f"{name} has shape {tensor.shape}: expected {(evaluator.slots, features)}")
        mean = renewed(evaluator, evaluator.multiply(evaluator.sum_features(x), 1 / n))
        # The square of an entry is at most the sum of squares.
        centred = evaluator.subtract(x, mean)
        centred = evaluator.assume(centred, min(centred.bound, math.sqrt(n * self.domain[1]) * (1 + SLACK)))
        # Half the relative error of the variance, which comes from the entries and, at the low end, from its own noise.
        off = 2 * (x.budget().error + self.noise)  # the mean is off as well
        relative = 0.5 * self.noise / self._relative[0] + off * self._steepest
        root = evaluator.assume(
            self._root(evaluator, evaluator.dot(centred, centred), mask),
            self._steepest,
            relative * self._steepest + self.noise,
        )
        root, mask = raised(evaluator, root, x.level + 1), raised(evaluator, mask, x.level + 1)
        heaviest = float(np.abs(scale).max()) or 1.0
        largest = math.sqrt(n) * heaviest * (1 + SLACK + self.error)
        # Entries times the root are within sqrt(n), so a relative error of the root is one of that.
        error = heaviest * (math.sqrt(n) * relative + self._steepest * off) + self.noise
        parts = []
        for some in _chunks(n):
            factor = _times(evaluator, root, scale[some], x.level)
            normed = evaluator.multiply(evaluator.select(centred, some), factor)
            normed = evaluator.assume(normed, largest, error)
            parts.append(evaluator.add(normed, _times(evaluator, mask, offset[some], x.level)))
        return evaluator.concatenate(parts), Normed(centred, root)

    def _root(self, evaluator: EvaluatorProtocol[Tensor], squares: Tensor, mask: Tensor) -> Tensor:
        """The inverse root from the sum of squares, 0 where no token is."""
        top, domain = self._largest, self._relative
        inside = math.sqrt(domain[0]) - self.eps / top  # where no token is, the root is of sqrt(low)
        mask = with_levels(evaluator, mask, 1)
        weights = [1 / (self.features * top), -inside]
        filled = evaluator.linear_combination([squares, mask], weights, inside + self.eps / top)
        root = inverse_square_root(
            evaluator, filled, domain, self.degree, self.newton_steps, 1 / math.sqrt(top), narrow=True
        )
        return evaluator.multiply(with_levels(evaluator, root, 1), mask)

    def backward(
        self, evaluator: EvaluatorProtocol[Tensor], saved: Normed[Tensor], dy: Tensor, weight: npt.ArrayLike
    ) -> Tensor:
        """The gradient of the input: ``root (g - mean(g) - xhat mean(g xhat))``, g = weight dy, xhat = root centred.

        Computed as ``(root weight) dy - root mean(g) - (root**3 mean(g centred)) centred``: the factors of dy and of
        what was saved are of few ciphertexts, refreshed, and two products a feature are left.

        Args:
            evaluator: computes, with refreshes.
            saved: of `forward`; ``centred``, which may have been refreshed since, at level 4 or above, best above dy.
            dy: (slots, features) of the chain's scale, at level 3 or above, 0 where no token is.
            weight: as for `forward`.

        Returns:
            Of the shape of dy, one level below the lower of dy and ``centred``.

        Raises:
            InputError: shapes that do not fit, values that are not finite.
            CkksError: not enough levels, or no refreshes.
        """
        n, centred = self.features, saved.centred
        scale = feature_values("weight", weight, n)
        if dy.shape != centred.shape:
            raise InputError(f"dy has shape {dy.shape}, what was saved {centred.shape}: they must agree")
        largest = math.sqrt(float(np.square(scale).mean())) * dy.bound or 1.0  # the root mean square of g over a row
        columns = [evaluator.select(dy, slice(f, f + 1)) for f in range(n)]
        mean = evaluator.linear_combination(columns, scale / n)
        cross = evaluator.dot(evaluator.multiply(centred, scale / n), dy)
        mean = evaluator.assume(mean, (1 + SLACK) * largest)
        cross = evaluator.assume(cross, (1 + SLACK) * largest * math.sqrt(self.domain[1]))  # Cauchy and Schwarz
        both = renewed(evaluator, evaluator.concatenate([mean, cross]))
        mean, cross = evaluator.select(both, slice(0, 1)), evaluator.select(both, slice(1, 2))

        level = min(dy.level, centred.level)
        root = raised(evaluator, saved.root, max(level + 1, REFRESH_LEVELS + 2))
        shift = evaluator.multiply(root, mean)
        slope = evaluator.multiply(evaluator.multiply(root, cross), evaluator.square(root))
        # root times the standard deviation is at most 1.
        slope = evaluator.assume(slope, (1 + SLACK) * largest * self._steepest**2)
        slope, shift = raised(evaluator, slope, level), raised(evaluator, shift, level)
        bound = self._steepest * (float(np.abs(scale).max()) * dy.bound + largest * (1 + math.sqrt(n)))
        parts = []
        for some in _chunks(n):
            ours = evaluator.multiply(evaluator.select(dy, some), _times(evaluator, root, scale[some], level))
            theirs = evaluator.multiply(evaluator.select(centred, some), slope)
            parts.append(evaluator.subtract(evaluator.subtract(ours, theirs), shift))
        return evaluator.assume(evaluator.concatenate(parts), bound)


@lru_cache(maxsize=256)
def _choose(features: int, domain: Domain, eps: float, accuracy: float, noise: float) -> LayerNorm:
    empty = LayerNorm(features, domain, eps, 1, 0, 0.0, noise)
    choices = []
    for bits in range(1, 7):
        degree = 2**bits - 1
        for steps in range(5):
            try:
                error = inverse_square_root_error(empty._relative, degree, steps)
            except InputError:  # too rough for steps
                break
            if error <= accuracy:
                products = 2 * math.sqrt(degree + 1) + 3 * steps
                choices.append((products, inverse_square_root_depth(degree, steps), degree, steps, error))
                break
    if not choices:
        raise InputError(f"domain {domain} with accuracy = {accuracy}: too wide")
    _, _, degree, steps, error = min(choices)
    return LayerNorm(features, domain, eps, degree, steps, error, noise)


def _chunks(features: int) -> Iterator[slice]:
    for begin in range(0, features, _CHUNK):
        yield slice(begin, min(begin + _CHUNK, features))


def _times(evaluator: EvaluatorProtocol[Tensor], x: Tensor, values: Array, level: int) -> Tensor:
    """One ciphertext times each of some values, at a level below its own, of the chain's scale there."""
    low = evaluator.drop_level(x, min(x.level, level + 1))
    return evaluator.multiply(evaluator.concatenate([low] * len(values)), values)

"""Dense layers on ciphertexts, with biases that leave hidden positions at zero."""

from __future__ import annotations

import math
from typing import Generic

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.ckks.evaluator import Matrix
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.sealed.weights import Dense

__all__ = ["Affine", "Masks", "add_residual", "canonical"]

Integers = npt.NDArray[np.int16]

_MOST_COPIES = 32  # of the mask: a bias up to so many times the largest weight costs no precision


def canonical(ev: EvaluatorProtocol[Tensor], x: Tensor, level: int | None = None, factor: float = 1.0) -> Tensor:
    """The values times a factor at the chain's scale of a level below, by default one below."""
    below = x.level - 1 if level is None else level
    return ev.multiply(ev.drop_level(x, below + 1), factor)


def add_residual(ev: EvaluatorProtocol[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The sum x + y of what a matrix made, at any scale, and a tensor of the chain's: no level if y has one more."""
    return ev.add(x if y.level > x.level else canonical(ev, x), y)


class Masks(Generic[Tensor]):
    """The mask of real positions at every level and at its chain's scale, made when first asked for.

    Args:
        ev: computes.
        mask: (slots, 1), at its level's scale.
    """

    def __init__(self, ev: EvaluatorProtocol[Tensor], mask: Tensor) -> None:
        self._ev, self.mask = ev, mask
        self._at = {mask.level: mask}

    def at(self, level: int) -> Tensor:
        """The mask at a level up to its own."""
        if level not in self._at:
            self._at[level] = canonical(self._ev, self.mask, level)
        return self._at[level]


class Affine:
    """x W^T + b x mask, weights in 16 bits with one scale: the bias is a matrix of its own, which takes the mask.

    Args:
        weight: int16 (d_out, d_in).
        bias: int16 (d_out, copies), which takes so many copies of the mask; None without a bias.
        scale: of one.
    """

    def __init__(self, weight: Integers, bias: Integers | None, scale: float) -> None:
        self._weight, self._bias, self._scale = weight, bias, scale
        self.matrix = Matrix.of_integers(weight, scale)
        self.bias = None if bias is None else Matrix.of_integers(bias, scale)

    @classmethod
    def of(cls, layer: Dense) -> Affine:
        """A dense layer, rounded."""
        largest = float(np.abs(layer.weight).max()) or 1.0
        copies = min(max(1, math.ceil(float(np.abs(layer.bias).max()) / largest)), _MOST_COPIES)
        bias = np.column_stack([layer.bias / copies] * copies)
        scale = (max(float(np.abs(part).max()) for part in (layer.weight, bias)) or 1.0) / _core.MAX_WEIGHT_16
        return cls(_rounded(layer.weight, scale), _rounded(bias, scale), scale)

    def rows(self, size: int) -> list[Affine]:
        """The layer as several, of at most ``size`` outputs each."""
        spans = [slice(i, i + size) for i in range(0, len(self._weight), size)]
        return [Affine(self._weight[s], None if self._bias is None else self._bias[s], self._scale) for s in spans]

    def columns(self, size: int) -> list[Affine]:
        """The layer as a sum of several, of at most ``size`` features of x each; the first one has the bias."""
        return [
            Affine(self._weight[:, i : i + size], None if i else self._bias, self._scale)
            for i in range(0, self._weight.shape[1], size)
        ]

    def apply(self, ev: EvaluatorProtocol[Tensor], x: Tensor, masks: Masks[Tensor]) -> Tensor:
        """The outputs (slots, d_out) of x of the chain's scale, at a scale of the matrix's. No level."""
        y = ev.linear(x, self.matrix)
        if self.bias is None:
            return y
        return ev.add(y, ev.linear(ev.concatenate([masks.at(x.level)] * self.bias.shape[1]), self.bias))

    def backward(self, ev: EvaluatorProtocol[Tensor], dy: Tensor) -> Tensor:
        """The gradient by x (slots, d_in), at a scale of the matrix's. No level."""
        return ev.linear(dy, self.matrix, transpose=True)


def _rounded(values: npt.NDArray[np.float64], scale: float) -> Integers:
    whole: Integers = np.rint(values / scale).astype(np.int16)
    return whole

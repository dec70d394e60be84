"""Dense layers on ciphertexts, with biases that leave hidden positions at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.ckks.evaluator import Matrix
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.sealed.weights import Dense

__all__ = ["Affine", "Masks", "add_residual", "canonical"]

Array = npt.NDArray[np.float64]

_MOST_COPIES = 32  # of the mask: a bias up to so many times the largest weight costs no precision


def canonical(ev: EvaluatorProtocol[Tensor], x: Tensor, level: int | None = None) -> Tensor:
    """The same values at the chain's scale of a level below, by default one below."""
    below = x.level - 1 if level is None else level
    return ev.multiply(ev.drop_level(x, below + 1), 1.0)


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
    """x W^T + b x mask, weights in 16 bits with one scale: the mask is further features of x, the bias their weights.

    Args:
        integers: int16 (d_out, d_in + copies).
        scale: of one.
        copies: of the mask behind the features of x, each with its part of the bias.
    """

    def __init__(self, integers: npt.NDArray[np.int16], scale: float, copies: int) -> None:
        self.copies, self.width = copies, integers.shape[1] - copies
        self._integers, self._scale = integers, scale
        self.matrix = Matrix.of_integers(integers, scale)

    @classmethod
    def of(cls, layers: Sequence[Dense]) -> Affine:
        """Dense layers of the same input, their outputs one after the other, rounded with one scale."""
        weight = np.concatenate([layer.weight for layer in layers])
        bias = np.concatenate([layer.bias for layer in layers])
        largest = float(np.abs(weight).max()) or 1.0
        copies = min(max(1, math.ceil(float(np.abs(bias).max()) / largest)), _MOST_COPIES)
        whole = np.column_stack([weight, *[bias / copies] * copies])
        scale = (float(np.abs(whole).max()) or 1.0) / _core.MAX_WEIGHT_16
        return cls(np.rint(whole / scale).astype(np.int16), scale, copies)

    def rows(self, size: int) -> list[Affine]:
        """The layer as several, of at most ``size`` outputs each."""
        return [
            Affine(self._integers[i : i + size], self._scale, self.copies) for i in range(0, len(self._integers), size)
        ]

    def columns(self, size: int) -> list[Affine]:
        """The layer as a sum of several, of at most ``size`` features of x each; the first one has the bias."""
        x, bias = np.split(self._integers, [self.width], axis=1)
        parts = [x[:, i : i + size] for i in range(0, self.width, size)]
        return [
            Affine(np.column_stack([part, bias]) if first else part, self._scale, self.copies if first else 0)
            for first, part in ((i == 0, part) for i, part in enumerate(parts))
        ]

    def extend(self, ev: EvaluatorProtocol[Tensor], x: Tensor, masks: Masks[Tensor]) -> Tensor:
        """The features of x and the copies of the mask, what `apply` takes. The scale of x is the chain's."""
        return ev.concatenate([x, *[masks.at(x.level)] * self.copies]) if self.copies else x

    def apply(self, ev: EvaluatorProtocol[Tensor], extended: Tensor) -> Tensor:
        """The outputs (slots, d_out), at a scale of the matrix's. No level."""
        return ev.linear(extended, self.matrix)

    def backward(self, ev: EvaluatorProtocol[Tensor], dy: Tensor) -> Tensor:
        """The gradient by x (slots, d_in), at a scale of the matrix's. No level."""
        dx = ev.linear(dy, self.matrix, transpose=True)
        return ev.select(dx, slice(0, self.width)) if self.copies else dx

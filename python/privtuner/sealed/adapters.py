"""Encrypted LoRA: the matrices, their products with features, their gradients and their steps, all on ciphertexts.

The numbers of a matrix sit in the coefficients of a few ciphertexts (`privtuner.sealed.shape.Chunks`) and are expanded
to constants, one in every slot, when they are needed (Angel et al., "PIR with compressed queries and amortized query
processing", IEEE S&P 2018). Gradients arrive packed in the same way, so that a step is a linear combination of a few
ciphertexts. Both matrices have ``width`` rows of ``rank`` numbers: A^T and B, the latter times `Shape.strength`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic

import numpy as np
import numpy.typing as npt

from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError
from privtuner.sealed.shape import Chunks, Shape, Target

__all__ = [
    "Adapter",
    "EncryptedAdapters",
    "check_rates",
    "initial_numbers",
    "matrices_of",
    "numbers_of",
    "outer",
    "squares",
    "take_step",
]

Array = npt.NDArray[np.float64]
Matrices = dict[tuple[int, Target], tuple[Array, Array]]

BOUND = 16.0
"""What the numbers of all adapters stay below, and their velocities by `GRADIENT_BOUND`."""
GRADIENT_BOUND = 2.0**8
"""What the gradients stay below, summed over a batch of sequences: the owner divides by a power of two if need be."""
ERROR = 2.0**-14
"""What errors of values stay below, as a part of their bound: what is known of them by running the circuits on clear
numbers with noise, where predictions add up the worst of every operation."""
STEP_LEVEL = 4
"""The level at which gradients enter a step: one for its combination, three for the refresh that follows."""


@dataclass(frozen=True)
class EncryptedAdapters(Generic[Tensor]):
    """All adapters of an encoder, and the velocities of their numbers.

    Attributes:
        values, velocity: packed, (slots, `Shape.adapter_ciphertexts`).
    """

    values: Tensor
    velocity: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both tensors."""
        return self.values, self.velocity


class Adapter:
    """One adapter of one matrix: W x + strength B A x.

    Args:
        shape: of the encoder.
        layer: whose it is.
        target: the matrix it adapts.
    """

    def __init__(self, shape: Shape, layer: int, target: Target) -> None:
        self.chunks = shape.chunks
        self._a = shape.adapter(layer, target)
        self._b = self._a + len(self.chunks.groups)

    def forward(
        self, ev: EvaluatorProtocol[Tensor], values: Tensor, x: Tensor, inner: float, factor: float
    ) -> tuple[Tensor, Tensor]:
        """Return A x (slots, rank), one level below x, and ``factor`` times what is added to W x, two levels below.

        Args:
            ev: computes.
            values: of `EncryptedAdapters`, a level above ``x``, which is brought down otherwise.
            x: (slots, width), of the chain's scale.
            inner: what |A x| stays below.
            factor: by which B is multiplied.
        """
        u = ev.assume(self._down(ev, values, self._a, x), inner, inner * ERROR)
        return u, self._up(ev, values, self._b, u, factor)

    def backward(
        self,
        ev: EvaluatorProtocol[Tensor],
        values: Tensor,
        x: Tensor,
        u: Tensor,
        dy: Tensor,
        inner: float,
        through: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the gradients by the numbers, a packed ciphertext each, and the one by x if it is wanted.

        Args:
            ev: computes.
            values: as for `forward`.
            x: its input.
            u: A x, as it returned it.
            dy: the gradient by its output (slots, width).
            inner: what the gradient by A x stays below.
            through: whether to return the gradient by x, two levels below dy.
        """
        w = ev.assume(self._down(ev, values, self._b, dy), inner, inner * ERROR)
        gradients = [*outer(ev, self.chunks, x, w), *outer(ev, self.chunks, dy, u)]
        return gradients, self._up(ev, values, self._a, w) if through else None

    def _expanded(
        self, ev: EvaluatorProtocol[Tensor], values: Tensor, first: int, level: int, factor: float = 1.0
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of a matrix by groups, each with the tensor of its numbers, row after row, times ``factor``.

        At ``level``, or one below that of ``values``, where these are no higher; of the chain's scale.
        """
        level = min(level, values.level - 1)
        for group, rows in enumerate(self.chunks.groups):
            packed = ev.select(values, slice(first + group, first + group + 1))
            numbers = ev.expand(ev.drop_level(packed, level + 1), self.chunks.numbers)
            yield rows, ev.multiply(numbers, factor)

    def _down(self, ev: EvaluatorProtocol[Tensor], values: Tensor, first: int, x: Tensor) -> Tensor:
        """The products of the transpose of a matrix (width, rank) with x: (slots, rank)."""
        rank = self.chunks.rank
        total: Tensor | None = None
        for rows, numbers in self._expanded(ev, values, first, x.level):
            part = ev.select(x, rows)
            entries = [ev.select(numbers, slice(i, i + 1)) for i in range(numbers.shape[1])]
            sums = ev.concatenate([ev.dot(part, ev.concatenate(entries[i::rank])) for i in range(rank)])
            total = sums if total is None else ev.add(total, sums)
        assert total is not None  # noqa: S101 - a width is positive
        return total

    def _up(self, ev: EvaluatorProtocol[Tensor], values: Tensor, first: int, u: Tensor, factor: float = 1.0) -> Tensor:
        """The product of a matrix (width, rank), times ``factor``, with u: (slots, width)."""
        rank = self.chunks.rank
        return ev.concatenate(
            [
                ev.dot(u, ev.select(numbers, slice(i, i + rank)))
                for _, numbers in self._expanded(ev, values, first, u.level, factor)
                for i in range(0, numbers.shape[1], rank)
            ]
        )


OUTER_LEVEL = 3
"""The level at which a gradient's products are taken: what a refresh needs, and one."""


def outer(ev: EvaluatorProtocol[Tensor], chunks: Chunks, x: Tensor, u: Tensor) -> Iterator[Tensor]:
    """Yield the sums over slots of every product of a feature of x with one of u, packed like a matrix."""
    level = min(x.level, u.level, OUTER_LEVEL)
    x, u = (ev.drop_level(y, level) for y in (x, u))
    for rows in chunks.groups:
        products = [ev.multiply(u, ev.select(x, slice(f, f + 1))) for f in range(rows.start, rows.stop)]
        sums = ev.pack_slot_sums(ev.concatenate(products))
        yield ev.assume(sums, GRADIENT_BOUND, GRADIENT_BOUND * ERROR)


def take_step(
    ev: EvaluatorProtocol[Tensor],
    shape: Shape,
    adapters: EncryptedAdapters[Tensor],
    gradients: Tensor,
    rate: float,
    momentum: float,
    level: int,
) -> EncryptedAdapters[Tensor]:
    """One step of gradient descent with momentum: v' = momentum v + g, then values - rate v'.

    Args:
        ev: computes.
        shape: of the encoder.
        adapters: all of them.
        gradients: of all numbers, packed as they are.
        rate: of learning, divided by what the gradient was multiplied by; from 0 on.
        momentum: from 0 to below 1.
        level: of the result.

    Raises:
        InputError: a rate or momentum out of range, or gradients of another shape.
    """
    check_rates(rate, momentum)
    if gradients.shape != adapters.values.shape:
        raise InputError(f"gradients of shape {gradients.shape} for adapters of shape {adapters.values.shape}")
    rates = rate * squares(shape)
    g = ev.refresh(gradients, STEP_LEVEL, packed=True)
    ones = np.ones_like(rates)
    velocity = ev.linear_combination([adapters.velocity, g], [momentum * ones, ones])
    values = ev.linear_combination([adapters.values, adapters.velocity, g], [ones, -momentum * rates, -rates])
    return EncryptedAdapters(
        ev.refresh(ev.assume(values, BOUND, BOUND * ERROR), level, packed=True),
        ev.refresh(ev.assume(velocity, GRADIENT_BOUND, GRADIENT_BOUND * ERROR), level, packed=True),
    )


def check_rates(rate: float, momentum: float) -> None:
    """Refuse a rate or a momentum out of range."""
    if not 0 <= rate < np.inf or not 0 <= momentum < 1:
        raise InputError(f"rate = {rate}, momentum = {momentum}: expected a rate from 0 on, and momentum in [0, 1)")


def squares(shape: Shape) -> Array:
    """What the rate of each packed ciphertext is multiplied by, float64 (`Shape.adapter_ciphertexts`,).

    A step of B is one of strength B by strength squared: once for the gradient, once for what is stored.
    """
    groups = len(shape.chunks.groups)
    return np.concatenate([np.repeat([1.0, shape.strength(target) ** 2], groups) for _, target in shape.adapted])


def initial_numbers(shape: Shape, generator: np.random.Generator) -> Array:
    """Fresh adapters: A uniform in +- 1 / sqrt(width), as PEFT initialises it (Kaiming, a = sqrt 5), and B zero.

    Returns:
        float64 (`Chunks.numbers`, `Shape.adapter_ciphertexts`): a column is what one ciphertext packs.
    """
    limit = shape.width**-0.5
    fresh: Matrices = {
        place: (generator.uniform(-limit, limit, (shape.rank, shape.width)), np.zeros((shape.width, shape.rank)))
        for place in shape.adapted
    }
    return numbers_of(shape, fresh)


def numbers_of(shape: Shape, matrices: Mapping[tuple[int, Target], tuple[npt.ArrayLike, npt.ArrayLike]]) -> Array:
    """The numbers of given matrices A (rank, width) and B (width, rank), as `initial_numbers` returns them.

    Raises:
        InputError: a matrix that is missing, of another shape, or not finite.
    """
    columns = []
    for place in shape.adapted:
        if place not in matrices:
            raise InputError(f"no matrices for layer {place[0]}, {place[1]}")
        a, b = (np.asarray(matrix, np.float64) for matrix in matrices[place])
        if a.shape != (shape.rank, shape.width) or b.shape != (shape.width, shape.rank):
            raise InputError(
                f"A of shape {a.shape} and B of shape {b.shape}: expected {(shape.rank, shape.width)} and its reverse"
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise InputError("an adapter holds NaN or infinity")
        columns += [
            a.T.reshape(-1, shape.chunks.numbers),
            (b * shape.strength(place[1])).reshape(-1, shape.chunks.numbers),
        ]
    numbers: Array = np.concatenate(columns).T.copy()
    return numbers


def matrices_of(shape: Shape, numbers: npt.ArrayLike) -> Matrices:
    """The matrices A (rank, width) and B (width, rank) of every adapter, from what `numbers_of` returns.

    Raises:
        InputError: numbers of another shape.
    """
    table, expected = np.asarray(numbers, np.float64), (shape.chunks.numbers, shape.adapter_ciphertexts)
    if table.shape != expected:
        raise InputError(f"numbers of shape {table.shape}: expected {expected}")
    parts = table.T.reshape(len(shape.adapted), 2, shape.width, shape.rank)
    return {
        place: (a.T.copy(), b / shape.strength(place[1])) for place, (a, b) in zip(shape.adapted, parts, strict=True)
    }

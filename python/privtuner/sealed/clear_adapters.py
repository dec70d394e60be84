"""LoRA in the clear at the server: folded into the weights on the way, gradients as for encrypted adapters.

Both matrices lie as `privtuner.sealed.adapters` packs them: a column of `Numbers.values` is what a ciphertext of the
gradient packs.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privtuner.ckks.evaluator import Matrix
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError, MessageError
from privtuner.sealed.adapters import ERROR, OUTER_LEVEL, check_rates, initial_numbers, matrices_of, outer, squares
from privtuner.sealed.affine import canonical
from privtuner.sealed.locker import Locker
from privtuner.sealed.shape import Shape, Target

__all__ = ["ClearAdapter", "ClearAdapters", "lock_numbers", "numbers_limit", "unlock_numbers"]

Array = npt.NDArray[np.float64]

_STEP = struct.Struct("<Q")
_PIECE = 1 << 19  # numbers


@dataclass(frozen=True)
class ClearAdapters:
    """All adapters of an encoder, and the velocities of their numbers.

    Attributes:
        values, velocity: float64 (`Chunks.numbers`, `Shape.adapter_ciphertexts`), of B times `Shape.strength`.
    """

    values: Array
    velocity: Array

    @classmethod
    def fresh(cls, shape: Shape) -> ClearAdapters:
        """A drawn from the operating system's generator, B zero, and velocities of zero."""
        values = initial_numbers(shape, np.random.Generator(np.random.PCG64(secrets.randbits(256))))
        return cls(values, np.zeros_like(values))

    def step(self, shape: Shape, gradients: Array, rate: float, momentum: float) -> ClearAdapters:
        """Take a step as `privtuner.sealed.adapters.take_step` does.

        Args:
            shape: of the encoder.
            gradients: by all numbers, of their shape.
            rate: of learning, divided by what the gradient was multiplied by; from 0 on.
            momentum: from 0 to below 1.

        Raises:
            InputError: a rate or momentum out of range, or gradients of another shape.
        """
        check_rates(rate, momentum)
        if gradients.shape != self.values.shape:
            raise InputError(f"gradients of shape {gradients.shape} for adapters of shape {self.values.shape}")
        velocity = momentum * self.velocity + gradients
        return ClearAdapters(self.values - rate * squares(shape) * velocity, velocity)

    def folded(self, shape: Shape) -> dict[tuple[int, Target], ClearAdapter]:
        """The adapter of every adapted matrix."""
        return {
            place: ClearAdapter(shape, a, b * shape.strength(place[1]))
            for place, (a, b) in matrices_of(shape, self.values).items()
        }


class ClearAdapter:
    """One adapter of one matrix, whose weight becomes W + strength B A.

    Args:
        shape: of the encoder.
        a: (rank, width).
        b: (width, rank), times `Shape.strength`.

    Attributes:
        product: strength B A, float64 (width, width).
    """

    def __init__(self, shape: Shape, a: Array, b: Array) -> None:
        self.product: Array = b @ a
        self._chunks = shape.chunks
        self._a, self._b = (Matrix(matrix, bits=16, per_row=False) for matrix in (a, b))

    def inner(self, ev: EvaluatorProtocol[Tensor], x: Tensor, bound: float) -> Tensor:
        """A x (slots, rank), as `gradients` takes it.

        Args:
            ev: computes.
            x: (slots, width), of the chain's scale.
            bound: what |A x| stays below.
        """
        u = ev.linear(ev.drop_level(x, min(x.level, OUTER_LEVEL + 1)), self._a)
        return canonical(ev, ev.assume(u, bound, bound * ERROR))

    def gradients(self, ev: EvaluatorProtocol[Tensor], x: Tensor, u: Tensor, dy: Tensor, bound: float) -> list[Tensor]:
        """The gradients by the numbers, a packed ciphertext each.

        Args:
            ev: computes.
            x: the input (slots, width).
            u: of `inner`.
            dy: the gradient by the output (slots, width).
            bound: what the gradient by A x stays below.
        """
        low = ev.drop_level(dy, min(dy.level, OUTER_LEVEL + 1))
        w = canonical(ev, ev.assume(ev.linear(low, self._b, transpose=True), bound, bound * ERROR))
        return [*outer(ev, self._chunks, x, w), *outer(ev, self._chunks, dy, u)]


# The training state


def lock_numbers(locker: Locker, step: int, adapters: ClearAdapters) -> Iterator[bytes]:
    """Yield the locked pieces of the state after ``step`` steps, for the data owner to keep and not to read."""
    flat = np.concatenate([adapters.values.reshape(-1), adapters.velocity.reshape(-1)]).astype("<f8")
    for number, begin in enumerate(range(0, len(flat), _PIECE)):
        yield locker.close(number, _STEP.pack(step) + flat[begin : begin + _PIECE].tobytes())


def unlock_numbers(locker: Locker, pieces: Iterable[bytes | memoryview], shape: Shape) -> tuple[int, ClearAdapters]:
    """Return the step and the adapters whose pieces `lock_numbers` yielded.

    Raises:
        MessageError: pieces of another run or of several steps, too few or too many.
    """
    count, parts, steps = 2 * shape.chunks.numbers * shape.adapter_ciphertexts, list[Array](), set[int]()
    arriving = enumerate(pieces)
    for begin in range(0, count, _PIECE):
        number, locked = next(arriving, (0, b""))
        piece = locker.open(number, locked)
        if len(piece) != _STEP.size + 8 * min(_PIECE, count - begin):
            raise MessageError(f"training state: a piece of {len(piece)} bytes is none of this model's")
        steps.update(_STEP.unpack_from(piece))
        parts.append(np.frombuffer(piece, "<f8", offset=_STEP.size).astype(np.float64))
    if next(arriving, None) is not None:
        raise MessageError("training state: it has more pieces than are due")
    if len(steps) != 1:
        raise MessageError("training state: its pieces are of several steps; go on with an older one")
    values, velocity = np.concatenate(parts).reshape(2, shape.chunks.numbers, -1)
    return steps.pop(), ClearAdapters(values, velocity)


def numbers_limit(shape: Shape) -> int:
    """Bytes that the locked pieces of a state have together, at most."""
    numbers = 2 * shape.chunks.numbers * shape.adapter_ciphertexts
    return 8 * numbers + (numbers // _PIECE + 1) * (_STEP.size + Locker.OVERHEAD + 64)  # and a length in a file

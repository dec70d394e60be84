"""Arithmetic on encrypted tensors by the compiled engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from .. import _core
from ..copies import Immutable
from ..errors import CkksError, InputError
from .keys import EvaluationKeys, as_scales, as_values
from .parameters import Parameters
from .polynomial import Polynomial
from .tensor import EncryptedTensor

__all__ = ["Evaluator", "Matrix"]


class Matrix(Immutable):
    """A clear matrix in small integers, ready for :meth:`Evaluator.linear`: ``weight[k] ~ delta[k] * W_int[k]``.

    Args:
        weight: float array (d_out, d_in).
        bits: 8 or 16 (integers up to 127 or 32639).
        per_row: a scale for each row, which uses the integers' range best, or one scale for the matrix, so that all
            outputs share one scale and the transpose applies to any tensor.

    Attributes:
        shape: (d_out, d_in). delta: float64 (d_out,). integers: the integer matrix.

    Raises:
        InputError: not a finite two-dimensional array, or bits other than 8 or 16.
    """

    def __init__(self, weight: npt.ArrayLike, *, bits: int = 8, per_row: bool = True) -> None:
        array = np.asarray(weight)
        if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiub":
            raise InputError(f"weight of shape {array.shape} and dtype {array.dtype}; pass real numbers, (d_out, d_in)")
        array = array.astype(np.float64)
        if not np.isfinite(array).all():
            raise InputError("weight holds NaN or infinity")
        if bits not in (8, 16):
            raise InputError(f"bits {bits}; choose 8 or 16")
        largest, kind = (127, np.int8) if bits == 8 else (32639, np.int16)
        peak = np.abs(array).max(axis=1) if per_row else np.full(len(array), np.abs(array).max())
        peak[peak == 0] = 1.0
        delta = peak / largest
        self._hold(np.ascontiguousarray(np.rint(array / delta[:, None]), kind), delta)

    @classmethod
    def of_integers(cls, integers: npt.NDArray[Any], delta: float) -> Matrix:
        """The matrix ``delta * integers``: int8 or int16 up to 32639, (d_out, d_in), rounded already.

        Raises:
            InputError: integers of another type, shape or size, or a delta that is not positive.
        """
        return cls._of(np.ascontiguousarray(integers), np.full(len(integers), delta))

    def _hold(self, integers: npt.NDArray[Any], delta: npt.NDArray[np.float64]) -> None:
        self.delta, self.integers = delta, integers
        self._core = _core.CkksMatrix(integers, delta)
        self.shape: tuple[int, int] = (self._core.rows, self._core.cols)

    def dequantised(self) -> npt.NDArray[np.float64]:
        """The weight in force, delta[:, None] * integers."""
        weight: npt.NDArray[np.float64] = self.delta[:, None] * self.integers
        return weight

    def __reduce__(self) -> tuple[Any, ...]:
        return (Matrix._of, (self.integers, self.delta))

    @classmethod
    def _of(cls, integers: npt.NDArray[Any], delta: npt.NDArray[np.float64]) -> Matrix:
        matrix = cls.__new__(cls)
        matrix._hold(integers, delta)
        return matrix

    def __repr__(self) -> str:
        return f"Matrix(shape={self.shape}, bits={8 * self._core.bytes_per_weight})"


def _core_of(x: EncryptedTensor) -> _core.CkksTensor:
    """Its ciphertexts. The core's own refusal of another type would show all arguments, and so clear values."""
    if not isinstance(x, EncryptedTensor):
        raise InputError(f"expected an encrypted tensor of this engine, got {type(x).__module__}.{type(x).__name__}")
    return x._core


class Evaluator:
    """The native :class:`privtuner.ckks.protocol.EvaluatorProtocol`.

    Every operation returns a new tensor and carries level, scale, bound and predicted error. A product of two tensors
    is relinearised and rescaled at once. Operations on planned tensors (`planned`) compute nothing else: `plan` uses
    them to know a circuit before any key exists.

    Args:
        parameters: the set in force.
        keys: what products and rotations need; None for operations without keys and for dry runs.
    """

    name = "native"

    def __init__(self, parameters: Parameters, keys: EvaluationKeys | None = None) -> None:
        self.parameters = parameters
        self.keys = keys
        self.slots = parameters.slots
        self._core = _core.CkksEvaluator(parameters._core, None if keys is None else keys._core)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Evaluator, (self.parameters, self.keys))

    def _wrap(self, core: _core.CkksTensor) -> EncryptedTensor:
        return EncryptedTensor(core, self.parameters)

    def planned(
        self,
        tokens: int,
        features: int,
        *,
        bound: float = 1.0,
        level: int | None = None,
        scale: npt.ArrayLike | None = None,
        public_key: bool = False,
        noise: float | None = None,
    ) -> EncryptedTensor:
        """A tensor without ciphertexts, for dry runs, or to say what to expect (`EncryptedTensor.from_bytes`).

        Args:
            tokens: rows of the tensor, at most ``slots``.
            features: its columns.
            bound: as that of `SecretKey.encrypt`.
            level: as there.
            scale: as there.
            public_key: as encrypted with the public key.
            noise: standard deviation of the slots' errors, of something computed; None for a fresh encryption's.
        """
        if not 1 <= tokens <= self.slots:
            raise CkksError(f"{tokens} tokens do not fit the {self.slots} slots of {self.parameters.name}")
        at = self.parameters.depth if level is None else level
        return self._wrap(self._core.planned(tokens, features, at, bound, as_scales(scale), public_key, noise))

    def upload(self, x: EncryptedTensor) -> EncryptedTensor:
        """What this evaluator computes on: the tensor itself. Evaluators of other devices copy it there."""
        return x

    def download(self, x: EncryptedTensor) -> EncryptedTensor:
        """The tensor that can be serialised and decrypted: the tensor itself."""
        return x

    def add(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """X + y; y a tensor, a number, or numbers of shape (features,). No level, unless the scales need one."""
        if isinstance(y, EncryptedTensor):
            return self._wrap(self._core.add(_core_of(x), _core_of(y)))
        return self._wrap(self._core.add_constant(_core_of(x), as_numbers(y)))

    def subtract(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """X - y, as `add`."""
        if isinstance(y, EncryptedTensor):
            return self._wrap(self._core.subtract(_core_of(x), _core_of(y)))
        return self._wrap(self._core.add_constant(_core_of(x), -as_numbers(y)))

    def negate(self, x: EncryptedTensor) -> EncryptedTensor:
        """-x. No level."""
        return self._wrap(self._core.negate(_core_of(x)))

    def multiply(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """X y slot by slot; y a tensor, a number, or numbers of shape (features,). One level."""
        if isinstance(y, EncryptedTensor):
            return self._wrap(self._core.multiply(_core_of(x), _core_of(y)))
        return self._wrap(self._core.multiply_constant(_core_of(x), as_numbers(y)))

    def square(self, x: EncryptedTensor) -> EncryptedTensor:
        """X x. One level."""
        return self.multiply(x, x)

    def multiply_plain(self, x: EncryptedTensor, values: npt.ArrayLike) -> EncryptedTensor:
        """X times clear values of shape (tokens,) or (tokens, features), slot by slot. One level."""
        re, im = as_values(values)
        return self._wrap(self._core.multiply_plain(_core_of(x), re, im))

    def dot(self, x: EncryptedTensor, y: EncryptedTensor) -> EncryptedTensor:
        """The sum over features of x y, one feature: one relinearisation for all of them. One level."""
        return self._wrap(self._core.dot(_core_of(x), _core_of(y)))

    def sum_features(self, x: EncryptedTensor) -> EncryptedTensor:
        """The sum over features, one feature. No level."""
        return self._wrap(self._core.sum_features(_core_of(x)))

    def concatenate(self, tensors: Sequence[EncryptedTensor]) -> EncryptedTensor:
        """The features of all tensors, one after the other, at the lowest level among them. No level."""
        return self._wrap(self._core.concatenate([_core_of(x) for x in tensors]))

    def select(self, x: EncryptedTensor, features: slice) -> EncryptedTensor:
        """Some neighbouring features, without a copy. No level."""
        begin, end, step = features.indices(x.shape[1])
        if step != 1:
            raise InputError(f"features {features}: choose neighbouring ones, step 1")
        return self._wrap(self._core.select(_core_of(x), begin, end))

    def linear(
        self, x: EncryptedTensor, weights: Matrix | npt.ArrayLike, *, transpose: bool = False
    ) -> EncryptedTensor:
        """X W^T (x W if ``transpose``) for a clear matrix, as a `Matrix` or an array (quantised to 8 bits here).

        An exact integer product modulo every prime: no level, no rotation. The outputs' scales carry 1 / delta.
        """
        matrix = weights if isinstance(weights, Matrix) else Matrix(weights)
        return self._wrap(self._core.linear(_core_of(x), matrix._core, transpose))

    def linear_combination(
        self, tensors: Sequence[EncryptedTensor], weights: npt.ArrayLike, constant: npt.ArrayLike = 0.0
    ) -> EncryptedTensor:
        """Constant + sum_t weights[t] tensors[t]; weights of shape (t,) or (t, features). One level."""
        rows = np.asarray(weights, np.float64)
        if rows.ndim == 1:
            rows = rows[:, None]
        if rows.ndim != 2 or len(rows) != len(tensors):
            raise InputError(f"weights of shape {rows.shape} for {len(tensors)} tensors; pass (t,) or (t, features)")
        core = self._core.linear_combination(
            [_core_of(x) for x in tensors], rows.tolist(), np.atleast_1d(as_numbers(constant)).tolist()
        )
        return self._wrap(core)

    def polynomial(self, x: EncryptedTensor, polynomial: Polynomial) -> EncryptedTensor:
        """p(x) in every slot. The polynomial's depth in levels, one more if x's scale is large for the domain."""
        low, high = polynomial.domain
        coefficients = np.asarray(polynomial.coefficients, np.float64)
        return self._wrap(self._core.polynomial(_core_of(x), polynomial.basis, coefficients, low, high))

    def rescale(self, x: EncryptedTensor) -> EncryptedTensor:
        """Divide scale and error by the level's prime. One level."""
        return self._wrap(self._core.rescale(_core_of(x)))

    def drop_to(self, x: EncryptedTensor, level: int) -> EncryptedTensor:
        """X at a lower level and the same scale: smaller and faster, no more exact."""
        return self._wrap(self._core.drop(_core_of(x), level))

    @overload
    def rotate(self, x: EncryptedTensor, steps: int) -> EncryptedTensor: ...
    @overload
    def rotate(self, x: EncryptedTensor, steps: Sequence[int]) -> list[EncryptedTensor]: ...
    def rotate(self, x: EncryptedTensor, steps: Sequence[int] | int) -> EncryptedTensor | list[EncryptedTensor]:
        """Slot i takes slot i + steps (cyclic over all slots), as ``numpy.roll(x, -steps)``. No level.

        Several steps are hoisted: the decomposition of x is computed once, and a list comes back.
        """
        if isinstance(steps, (int, np.integer)):
            return self._wrap(self._core.rotate(_core_of(x), [int(steps)])[0])
        return [self._wrap(core) for core in self._core.rotate(_core_of(x), [int(step) for step in steps])]

    def conjugate(self, x: EncryptedTensor) -> EncryptedTensor:
        """The complex conjugate of every slot. No level."""
        return self._wrap(self._core.conjugate(_core_of(x)))

    def sum_slots(self, x: EncryptedTensor) -> EncryptedTensor:
        """The sum over all slots, in every slot: rotations by 1, 2, 4, ... slots / 2. No level."""
        return self._wrap(self._core.sum_slots(_core_of(x)))

    def pack_slot_sums(self, x: EncryptedTensor) -> EncryptedTensor:
        """The sums over all slots of every feature, packed as the coefficients of ceil(features / N) ciphertexts.

        One automorphism a feature and no level (Chen, Dai, Kim, Song, "Efficient Homomorphic Conversion Between (Ring)
        LWE Ciphertexts", 2021). Only for :meth:`SecretKey.decrypt_sums`: slots of the result mean nothing. Slots
        beyond the tokens count too: they hold zero unless a constant was added. Needs keys made with ``packing``.
        """
        return self._wrap(self._core.pack_slot_sums(_core_of(x)))

    def assume(self, x: EncryptedTensor, bound: float) -> EncryptedTensor:
        """X with the caller's promise that |value| <= bound. No copy, no level.

        Raises:
            CkksError: the bound is not a positive number.
        """
        return self._wrap(self._core.assume(_core_of(x), bound))

    def __repr__(self) -> str:
        return f"<CKKS evaluator of {self.parameters.name}, keys: {self.keys!r}>"


def as_numbers(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A number, or numbers of shape (features,), as finite float64 of one dimension."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.ndim > 1:
        raise InputError(f"expected a number or numbers of shape (features,), got {array.dtype} of shape {array.shape}")
    if not np.isfinite(array.astype(np.float64)).all():
        raise CkksError("a constant is NaN or infinity")
    return np.atleast_1d(array.astype(np.float64))

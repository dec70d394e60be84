"""Arithmetic on encrypted tensors by the compiled core: the operations, and the evaluator on the processor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.ckks.arguments import as_choice, as_numbers, as_span, as_steps, as_weights, whole
from privtuner.ckks.keys import EvaluationKeys, as_scales, as_values
from privtuner.ckks.parameters import Parameters
from privtuner.ckks.polynomial import Polynomial
from privtuner.ckks.refresher import Refresher
from privtuner.ckks.tensor import EncryptedTensor, Tensor
from privtuner.copies import Immutable
from privtuner.errors import CkksError, InputError

__all__ = ["Evaluator", "Matrix", "Operations", "call_core", "refresh_with", "reveal_with"]

T = TypeVar("T", bound=Tensor)


class Matrix(Immutable):
    """A clear matrix in small integers, ready for `Evaluator.linear`: ``weight[k] ~ scale[k] * W_int[k]``.

    Args:
        weight: float array (d_out, d_in).
        bits: 8 or 16 (integers up to 127 or 32639).
        per_row: a scale for each row, which uses the integers' range best, or one scale for the matrix, so that all
            outputs share one scale and the transpose applies to any tensor.

    Attributes:
        shape: (d_out, d_in). scale: float64 (d_out,). integers: the integer matrix.

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
        largest, kind = (127, np.int8) if bits == 8 else (_core.MAX_WEIGHT_16, np.int16)
        peak = np.abs(array).max(axis=1) if per_row else np.full(len(array), np.abs(array).max())
        peak[peak == 0] = 1.0
        scale = peak / largest
        self._hold(np.ascontiguousarray(np.rint(array / scale[:, None]), kind), scale)

    @classmethod
    def of(cls, weights: Matrix | npt.ArrayLike) -> Matrix:
        """Return a matrix as it is, or an array quantised to 8 bits with a scale for each row."""
        return weights if isinstance(weights, Matrix) else cls(weights)

    @classmethod
    def of_integers(cls, integers: npt.NDArray[Any], scale: float) -> Matrix:
        """The matrix ``scale * integers``: int8 or int16 up to 32639, (d_out, d_in), rounded already.

        Raises:
            InputError: integers of another type, shape or size, or a scale that is not positive.
        """
        return cls._of(np.ascontiguousarray(integers), np.full(len(integers), scale))

    def _hold(self, integers: npt.NDArray[Any], scale: npt.NDArray[np.float64]) -> None:
        self.scale, self.integers = scale, integers
        self._core = _core.CkksMatrix(integers, scale)
        self.shape: tuple[int, int] = (self._core.rows, self._core.cols)

    def dequantised(self) -> npt.NDArray[np.float64]:
        """The weight in force, scale[:, None] * integers."""
        weight: npt.NDArray[np.float64] = self.scale[:, None] * self.integers
        return weight

    def __reduce__(self) -> tuple[Any, ...]:
        return (Matrix._of, (self.integers, self.scale))

    @classmethod
    def _of(cls, integers: npt.NDArray[Any], scale: npt.NDArray[np.float64]) -> Matrix:
        matrix = cls.__new__(cls)
        matrix._hold(integers, scale)
        return matrix

    def __repr__(self) -> str:
        return f"Matrix(shape={self.shape}, bits={8 * self._core.bytes_per_weight})"


class Operations(ABC, Generic[T]):
    """The operations of the compiled evaluator, on tensors whose words are wherever a subclass has them.

    Every operation returns a new tensor and carries level, scale, bound and predicted error. A product of two tensors
    is relinearised and rescaled at once. All operations go through `_run`.
    """

    name: str

    def __init__(
        self, parameters: Parameters, keys: EvaluationKeys | None, *, record: bool = False, batch: int = 1
    ) -> None:
        self.parameters = parameters
        self.keys = keys
        self.slots = parameters.slots
        keys_core = None if keys is None else keys._core
        self._core = _core.CkksEvaluator(parameters._core, keys_core, record=record, batch=batch)

    @abstractmethod
    def _core_of(self, x: object) -> _core.CkksTensor:
        """Check that ``x`` is a tensor of this evaluator's and return what the compiled evaluator takes for it.

        That one's own refusal of another type would show all arguments, and so clear values.
        """

    @abstractmethod
    def _run(self, inputs: Sequence[T], operation: Callable[..., Any], *arguments: Any) -> list[T]:
        """Return what an operation of the compiled evaluator makes of ``inputs`` and the clear arguments after them.

        ``inputs`` is a list where the operation takes a list, and a tuple where it takes its tensors one by one.
        """

    def _one(self, inputs: Sequence[T], operation: Callable[..., _core.CkksTensor], *arguments: Any) -> T:
        return self._run(inputs, operation, *arguments)[0]

    def _cores(self, inputs: Sequence[T]) -> Sequence[_core.CkksTensor]:
        """Return `_core_of` all inputs, in a list for a list and in a tuple for a tuple."""
        cores = [self._core_of(x) for x in inputs]
        return cores if isinstance(inputs, list) else tuple(cores)

    def add(self, x: T, y: T | npt.ArrayLike) -> T:
        """The sum x + y; y a tensor, a number, or numbers of shape (features,). No level, unless scales need one."""
        if isinstance(y, Tensor):
            return self._one((x, y), self._core.add)
        return self._one((x,), self._core.add_constant, as_numbers(y))

    def subtract(self, x: T, y: T | npt.ArrayLike) -> T:
        """The difference x - y, as `add`."""
        if isinstance(y, Tensor):
            return self._one((x, y), self._core.subtract)
        return self._one((x,), self._core.add_constant, -as_numbers(y))

    def negate(self, x: T) -> T:
        """The negative, -x. No level."""
        return self._one((x,), self._core.negate)

    def multiply(self, x: T, y: T | npt.ArrayLike) -> T:
        """The product x y, slot by slot; y a tensor, a number, or numbers of shape (features,). One level."""
        if isinstance(y, Tensor):
            return self._one((x, y), self._core.multiply)
        return self._one((x,), self._core.multiply_constant, as_numbers(y))

    def square(self, x: T) -> T:
        """The square x x. One level."""
        return self.multiply(x, x)

    def multiply_plain(self, x: T, values: npt.ArrayLike) -> T:
        """The product of x and clear values of shape (tokens,) or (tokens, features), slot by slot. One level."""
        return self._one((x,), self._core.multiply_plain, *as_values(values))

    def dot(self, x: T, y: T) -> T:
        """The sum over features of x y, one feature: one relinearisation for all of them. One level."""
        return self._one((x, y), self._core.dot)

    def sum_features(self, x: T) -> T:
        """The sum over features, one feature. No level."""
        return self._one((x,), self._core.sum_features)

    def concatenate(self, tensors: Sequence[T]) -> T:
        """The features of all tensors, one after the other, at the lowest level among them. No level."""
        return self._one(list(tensors), self._core.concatenate)

    def select(self, x: T, features: slice) -> T:
        """Some neighbouring features, without a copy. No level."""
        return self._one((x,), self._core.select, *as_span(features, x.shape[1]))

    def linear(self, x: T, weights: Matrix | npt.ArrayLike, *, transpose: bool = False) -> T:
        """The product x W^T (x W if ``transpose``) for a clear matrix, or an array, which is quantised to 8 bits here.

        An exact integer product modulo every prime: no level, no rotation. The outputs' scales are those of x divided
        by the matrix's.
        """
        return self._one((x,), self._core.linear, Matrix.of(weights), transpose)

    def linear_combination(self, tensors: Sequence[T], weights: npt.ArrayLike, constant: npt.ArrayLike = 0.0) -> T:
        """The sum constant + sum_t weights[t] tensors[t]; weights of shape (t,) or (t, features). One level."""
        rows = as_weights(weights, len(tensors)).tolist()
        return self._one(list(tensors), self._core.linear_combination, rows, as_numbers(constant).tolist())

    def polynomial(self, x: T, polynomial: Polynomial) -> T:
        """The value p(x) in every slot. The polynomial's depth, one level more if x's scale is large for the domain."""
        coefficients = np.asarray(polynomial.coefficients, np.float64)
        return self._one((x,), self._core.polynomial, polynomial.basis, coefficients, *polynomial.domain)

    def polynomials(self, x: T, polynomials: Sequence[Polynomial]) -> list[T]:
        """The values of several polynomials of one basis and domain, at powers of x that are computed once.

        Each takes the levels that `polynomial` says; if one of them takes a level for the domain, all do.
        """
        if not polynomials:
            raise InputError("no polynomials: give at least one")
        basis, domain = polynomials[0].basis, polynomials[0].domain
        if any((p.basis, p.domain) != (basis, domain) for p in polynomials):
            raise InputError("polynomials of different bases or domains share no powers: evaluate them one by one")
        coefficients = [np.asarray(p.coefficients, np.float64) for p in polynomials]
        return self._run((x,), self._core.polynomials, basis, coefficients, *domain)

    def rescale(self, x: T) -> T:
        """The same values with scale and error divided by the level's prime. One level."""
        return self._one((x,), self._core.rescale)

    def drop_level(self, x: T, level: int) -> T:
        """The same values at a lower level and the same scale: smaller and faster, no more exact."""
        return self._one((x,), self._core.drop, whole("level", level))

    @overload
    def rotate(self, x: T, steps: int) -> T: ...
    @overload
    def rotate(self, x: T, steps: Sequence[int]) -> list[T]: ...
    def rotate(self, x: T, steps: Sequence[int] | int) -> T | list[T]:
        """Slot i takes slot i + steps (cyclic over all slots), as ``numpy.roll(x, -steps)``. No level.

        Several steps are hoisted: the decomposition of x is computed once, and a list comes back.
        """
        wanted, several = as_steps(steps)
        results = self._run((x,), self._core.rotate, wanted)
        return results if several else results[0]

    def conjugate(self, x: T) -> T:
        """The complex conjugate of every slot. No level."""
        return self._one((x,), self._core.conjugate)

    def sum_slots(self, x: T) -> T:
        """The sum over all slots, in every slot: rotations by 1, 2, 4, ... slots / 2. No level."""
        return self._one((x,), self._core.sum_slots)

    def pack_slot_sums(self, x: T) -> T:
        """The sums over all slots of every feature, packed as the coefficients of ceil(features / N) ciphertexts.

        One automorphism a feature and no level (Chen, Dai, Kim, Song, "Efficient Homomorphic Conversion Between (Ring)
        LWE Ciphertexts", 2021). Only for `SecretKey.decrypt_sums`: slots of the result mean nothing. Slots beyond the
        tokens count too: they hold zero unless a constant was added. Needs keys made with ``packing``.
        """
        return self._one((x,), self._core.pack_slot_sums)

    def expand(self, x: T, count: int, features: slice | None = None) -> T:
        """The numbers that are packed in the coefficients of one ciphertext, each in all slots of a feature of its own.

        By the automorphisms that packing needs (Angel, Chen, Laine, Setty, "PIR with Compressed Queries and Amortized
        Query Processing", 2018): a key switch a number, and no level. The scale becomes that of ``x`` times ``count``
        rounded up to a power of two; ``multiply(result, 1.0)`` brings the numbers to the chain's, for a level.

        Args:
            x: packed numbers, of one feature: as `pack_slot_sums` or `SecretKey.encrypt_packed` leave them.
            count: how many are packed.
            features: some of them, all by default. Every 2^k-th one, ``slice(i, None, 2**k)``, costs a key switch a
                number and k more; neighbours cost up to log2(count) each.

        Raises:
            CkksError: no such numbers; keys without ``packing``.
        """
        return self._one((x,), self._core.expand, whole("count", count), as_choice(features, count))

    def refresh(self, x: T, level: int | None = None, *, packed: bool = False) -> T:
        """The same values in fresh ciphertexts, which the owner of the key makes without reading them.

        What is sent is re-randomised and masked by uniform numbers modulo the three primes of level 2, so it tells the
        owner nothing of ``x`` and of where it came from. From level 3 on the result has the chain's scale of ``level``
        and two features travel as one, real and imaginary part, whose error then counts twice, for one conjugation a
        pair. At level 2 every feature travels alone and keeps its scale.

        Args:
            x: a tensor at level 2 or above, of real values.
            level: that of the result, from 2 on; default the parameters' depth.
            packed: the numbers are coefficients, as `pack_slot_sums` leaves them: then none travel in pairs.

        Raises:
            CkksError: levels out of range; values whose bound and scale leave the masks too little room (1 in 2^40 for
                a single wrong coefficient in all refreshes of a key); no conjugation key; no refresher.
        """
        at = self.parameters.depth if level is None else whole("level", level)
        low = self._one((x,), self._core.lower_for_refresh, at, packed)
        return self._one((self._refreshed(low, at, packed),), self._core.split_pairs, x.shape[1], x.bound)

    def _refreshed(self, x: T, level: int, packed: bool) -> T:
        """Return what the owner of the key makes of a tensor at level 2; here: what is known of it."""
        return self._one((x,), self._core.refreshed, level, packed)

    def reveal(self, x: T, flood_bits: int = 12, *, error: float, packed: bool = False) -> T:
        """The same values for the owner of the key to decrypt: re-randomised, and their errors drowned.

        An encryption of zero is added, which cuts what the ciphertext has to do with the inputs and with clear weights,
        and uniform noise of up to ``2^flood_bits`` times the predicted worst error in every coefficient: a value then
        says at most 2^-flood_bits (in statistical distance) about the error under it, which depends on the weights.

        Args:
            x: a tensor whose slots may all be seen: zero those that may not first.
            flood_bits: 1 to 40.
            error: what is left of the values' precision: no value is off by more, but for one case in a million.
            packed: the numbers are coefficients, as `pack_slot_sums` leaves them.

        Raises:
            CkksError: the flood leaves less precision, or does not fit the modulus; no refresher, whose public key is
                taken.
        """
        return self._revealed(x, whole("flood_bits", flood_bits), float(error), packed)

    def _revealed(self, x: T, flood_bits: int, error: float, packed: bool) -> T:
        """Return what `reveal` makes of x; here: what is known of it."""
        return self._one((x,), self._core.revealed, flood_bits, error, packed)

    def assume(self, x: T, bound: float, error: float | None = None) -> T:
        """The same tensor with the caller's promise that |value| <= bound. No copy, no level.

        Args:
            x: any tensor.
            bound: positive.
            error: positive, what no slot is off by, where less is known to be than the prediction, which takes every
                value for as large as the bound and every error for as bad as it may be; None to leave the prediction.

        Raises:
            CkksError: the bound or the error is not a positive number.
        """
        return self._one((x,), self._core.assume, bound, math.inf if error is None else float(error))


class Evaluator(Operations[EncryptedTensor]):
    """The native `privtuner.ckks.protocol.EvaluatorProtocol`: it computes on the processor, on tensors in memory.

    Operations on planned tensors (`planned`) compute nothing else than what is known of the result: `plan` uses them to
    know a circuit before any key exists.

    Args:
        parameters: the set in force.
        keys: what products and rotations need; None for operations without keys and for dry runs.
        refresher: the way to the owner of the key, for `refresh` and `reveal`.
    """

    name = "native"

    def __init__(
        self, parameters: Parameters, keys: EvaluationKeys | None = None, refresher: Refresher | None = None
    ) -> None:
        super().__init__(parameters, keys)
        self.refresher = refresher

    def __reduce__(self) -> tuple[Any, ...]:
        return (Evaluator, (self.parameters, self.keys, self.refresher))

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
        core = self._core.planned(tokens, features, at, bound, as_scales(scale), public_key, noise)
        return EncryptedTensor(core, self.parameters)

    def _refreshed(self, x: EncryptedTensor, level: int, packed: bool) -> EncryptedTensor:
        if x.planned:
            return super()._refreshed(x, level, packed)
        return refresh_with(self.refresher, self._core, x, level, packed)

    def _revealed(self, x: EncryptedTensor, flood_bits: int, error: float, packed: bool) -> EncryptedTensor:
        if x.planned:
            return super()._revealed(x, flood_bits, error, packed)
        return reveal_with(self.refresher, self._core, x, flood_bits, error, packed)

    def upload(self, x: EncryptedTensor) -> EncryptedTensor:
        """The tensor itself, which is where this evaluator computes."""
        return x

    def download(self, x: EncryptedTensor) -> EncryptedTensor:
        """The tensor itself."""
        return x

    def _core_of(self, x: object) -> _core.CkksTensor:
        if not isinstance(x, EncryptedTensor):
            hint = "; download it first" if isinstance(x, Tensor) else ""
            raise InputError(f"expected an encrypted tensor, got {type(x).__module__}.{type(x).__name__}{hint}")
        return x._core

    def _run(
        self, inputs: Sequence[EncryptedTensor], operation: Callable[..., Any], *arguments: Any
    ) -> list[EncryptedTensor]:
        return [EncryptedTensor(core, self.parameters) for core in call_core(operation, self._cores(inputs), arguments)]

    def __repr__(self) -> str:
        return f"<CKKS evaluator of {self.parameters.name}, keys: {self.keys!r}>"


def refresh_with(
    refresher: Refresher | None, core: _core.CkksEvaluator, x: EncryptedTensor, level: int, packed: bool
) -> EncryptedTensor:
    """Have the owner of the key refresh a tensor at level 2 that is in this process."""
    if refresher is None:
        raise CkksError("a refresh needs the owner of the key: make the evaluator with a refresher")
    (fresh,) = call_core(core.refreshed, (x._core,), (level, packed))
    return EncryptedTensor(refresher._refresh(x._core, fresh), x.parameters)


def reveal_with(
    refresher: Refresher | None,
    core: _core.CkksEvaluator,
    x: EncryptedTensor,
    flood_bits: int,
    error: float,
    packed: bool,
) -> EncryptedTensor:
    """Return `Operations.reveal` of a tensor in this process."""
    if refresher is None:
        raise CkksError("to reveal takes the public key: make the evaluator with a refresher")
    (room,) = call_core(core.revealed, (x._core,), (flood_bits, error, packed))
    key = refresher.public_key._core
    return EncryptedTensor(_core.ckks_reveal(key, x._core, flood_bits, packed, room), x.parameters)


def call_core(
    operation: Callable[..., Any], cores: Sequence[_core.CkksTensor], arguments: Sequence[Any]
) -> list[_core.CkksTensor]:
    """Call an operation of the compiled evaluator, with a list of tensors as one argument and a tuple as several."""
    clear = [argument._core if isinstance(argument, Matrix) else argument for argument in arguments]
    made = operation(cores, *clear) if isinstance(cores, list) else operation(*cores, *clear)
    return made if isinstance(made, list) else [made]

"""The evaluator on clear numbers: to debug circuits with, and to study their accuracy.

The native evaluator goes through every operation on planned tensors: it decides levels, scales, bounds and predicted
errors, and refuses what cannot be done. The values beside them are NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.ckks.arguments import whole
from privtuner.ckks.evaluator import Matrix, Operations, call_core
from privtuner.ckks.keys import as_fresh
from privtuner.ckks.parameters import Parameters
from privtuner.ckks.polynomial import Polynomial
from privtuner.ckks.tensor import Tensor
from privtuner.copies import Stays
from privtuner.errors import CkksError, InputError

__all__ = ["ClearEvaluator", "ClearTensor"]

Array = npt.NDArray[Any]

_SLACK = 2.0**-30  # by which NumPy's rounding may leave a bound or a domain, relatively


class ClearTensor(Tensor, Stays):
    """The clear values of a tensor of shape (tokens, features), and what its ciphertexts would carry beside them.

    Made by `ClearEvaluator.tensor` and by the operations; immutable. Level, scale, bound, budget and bytes are those of
    the encrypted tensor.
    """

    stays = "a clear tensor cannot be pickled: pickle its values, and make a tensor of them in the other process"

    def __init__(self, core: _core.CkksTensor, parameters: Parameters, slots: Array, packed: bool) -> None:
        super().__init__(core, parameters)
        slots.flags.writeable = False
        self._slots = slots  # (slots, features), those beyond the tokens too
        self._packed = packed  # what matters are the coefficients of the polynomials with these slots

    @property
    def values(self) -> Array:
        """What decryption gives: float64, or complex128 once complex values met them, (tokens, features), read-only.

        Raises:
            CkksError: values as large as the bound would not fit the modulus.
        """
        self._core.check_room()
        return self._slots[: self.shape[0]]

    def sums(self, count: int) -> npt.NDArray[np.float64]:
        """Return the sums that `pack_slot_sums` packed, float64 (count,), as `SecretKey.decrypt_sums` does.

        Args:
            count: features of the tensor that was packed.

        Raises:
            InputError: ``count`` does not fit the tensor. CkksError: as `values`.
        """
        n = 2 * len(self._slots)
        if not self._packed or count < 1 or -(-count // n) != self.shape[1]:
            raise InputError(f"{count} packed sums do not make {self.shape[1]} features")
        self._core.check_room()
        coefficients = _coefficients(self._slots)
        return np.concatenate([coefficients[:: n // places, f][:sums] for f, sums, places in _spread(n, count)])

    def _place(self) -> str:
        return "clear"


class ClearEvaluator(Operations[ClearTensor]):
    """The `privtuner.ckks.protocol.EvaluatorProtocol` on clear numbers, at the speed of NumPy and without keys.

    ::

        clear = ckks.ClearEvaluator(parameters)
        y = circuit(clear, clear.tensor(x, bound=8.0))
        print(y.values, y.budget())

    A result has the level, scale, bound and predicted error of the native one, and what the native evaluator refuses is
    refused in the same words, but for a missing key: `plan` lists the keys that a circuit takes. What the native
    evaluator has to believe is checked: values beyond the bound of their tensor, or outside the domain of a polynomial,
    raise CkksError in the operation that meets them.

    Args:
        parameters: the set in force.
        noise: None for exact values; a seed to give every fresh tensor and every result the error of its operation,
            Gaussian, of the standard deviation that is predicted for it (for a polynomial, a worst case).
    """

    name = "clear"

    def __init__(self, parameters: Parameters, noise: int | None = None) -> None:
        super().__init__(parameters, None)
        self.noise = noise
        self._generator = None if noise is None else np.random.default_rng(noise)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ClearEvaluator, (self.parameters, self.noise))

    def tensor(
        self,
        values: npt.ArrayLike,
        *,
        bound: float = 1.0,
        level: int | None = None,
        scale: npt.ArrayLike | None = None,
    ) -> ClearTensor:
        """Make a tensor of clear values, in place of `SecretKey.encrypt`.

        Args:
            values: real or complex, (tokens, features), or (tokens,) for one feature; at most ``slots`` tokens.
            bound: |value| <= bound.
            level: default the parameters' depth.
            scale: one number or (features,); default the chain's.

        Raises:
            CkksError, InputError: as `SecretKey.encrypt`.
        """
        re, im, at, number, scales = as_fresh(self.parameters, values, bound, level, scale)
        self.parameters._core.check_values(re, im, number)
        core = self._core.planned(len(re), re.shape[1], at, number, scales, False, None)
        self.parameters._core.check_encoding(re, im, core.scale)
        return self._make("tensor", core, _pad(self.slots, re, im), core)

    def packed(
        self,
        numbers: npt.ArrayLike,
        *,
        bound: float = 1.0,
        level: int | None = None,
        scale: npt.ArrayLike | None = None,
    ) -> ClearTensor:
        """Make a tensor of packed numbers, in place of `SecretKey.encrypt_packed`.

        Raises:
            CkksError, InputError: as there.
        """
        values, im, at, number, scales = as_fresh(self.parameters, numbers, bound, level, scale)
        if im is not None:
            raise InputError("packed numbers are real; pack real and imaginary parts as two")
        core = self._core.planned_packed(values, at, number, scales)
        return self._make("packed", core, _embed(_place_numbers(2 * self.slots, values)), core, packed=True)

    def refresh(self, x: ClearTensor, level: int | None = None, *, packed: bool = False) -> ClearTensor:
        """The same values, as `Operations.refresh` has them refreshed; checked to be real, or packed."""
        core = self._core_of(x)
        _check_packed("refresh", x, packed)
        if not packed and (np.abs(x._slots.imag) > core.bound * _SLACK + self._error_of(core)).any():
            raise CkksError("refresh: the values are not real; refresh real and imaginary part as two features")

        def refresh(core: _core.CkksTensor, level: int, packed: bool) -> _core.CkksTensor:
            low = self._core.lower_for_refresh(core, level, packed)
            fresh = self._core.refreshed(low, level, packed)
            return self._core.split_pairs(fresh, core.features, core.bound)

        at = self.parameters.depth if level is None else whole("level", level)
        return self._one((x,), refresh, at, packed)

    def _revealed(self, x: ClearTensor, flood_bits: int, error: float, packed: bool) -> ClearTensor:
        self._core_of(x)
        _check_packed("reveal", x, packed)
        return super()._revealed(x, flood_bits, error, packed)

    def _core_of(self, x: object) -> _core.CkksTensor:
        if not isinstance(x, ClearTensor):
            raise InputError(f"expected a clear tensor, got {type(x).__module__}.{type(x).__name__}; see `tensor`")
        return x._core

    def _run(self, inputs: Sequence[ClearTensor], operation: Callable[..., Any], *arguments: Any) -> list[ClearTensor]:
        """Carry out an operation of the core on the planned tensors, and the same on the values."""
        name, cores = operation.__name__, self._cores(inputs)
        results = errors = call_core(operation, cores, arguments)
        if self._generator is not None:
            exact = [core.without_noise() for core in cores]
            errors = call_core(operation, exact if isinstance(cores, list) else tuple(exact), arguments)
        if name == "multiply_plain":
            self._check_encoding(inputs[0], *arguments)
        promised = self._check_domain(inputs[0], *arguments[-2:]) if name.startswith("polynomial") else np.True_
        made = _VALUES[name](*(x._slots for x in inputs), *arguments)
        if name == "expand":
            _check_packed("expand", inputs[0], True)
        packed = name == "pack_slot_sums" or (name != "expand" and any(x._packed for x in inputs))
        return [
            self._make(name, result, values, error, packed, promised)
            for result, values, error in zip(results, made if isinstance(made, list) else [made], errors, strict=True)
        ]

    def _make(
        self,
        name: str,
        core: _core.CkksTensor,
        slots: Array,
        error: _core.CkksTensor,
        packed: bool = False,
        promised: Array | np.bool_ = np.True_,
    ) -> ClearTensor:
        """Return a result with the noise of ``error`` added, after a check of the values that are ``promised``."""
        if name in _UNCHANGED:  # they were checked, and no error is added
            return ClearTensor(core, self.parameters, slots, packed)
        if self._generator is not None and error.noise.any():
            slots = slots + self._draw(error.noise / error.scale, packed, slots.dtype)
        numbers = _coefficients(slots) if packed else slots[: core.tokens]
        limit = core.bound * (1 + _SLACK) + self._error_of(core)
        if not _largest(numbers) <= limit:
            beyond = ~(np.abs(numbers) <= limit) & promised
            if beyond.any():
                raise CkksError(
                    f"{name}: {_describe(beyond)} beyond the bound of {core.bound:g}: an input left the domain "
                    "declared for it, or a bound that was assumed does not hold"
                )
        return ClearTensor(core, self.parameters, slots, packed)

    def _check_domain(self, x: ClearTensor, low: float, high: float) -> Array:
        """Return which values are in the domain; others must be zero, as of tokens that a mask left nothing of."""
        values, error = x._slots[: x.shape[0]], self._error_of(x._core)
        slack = (high - low) * _SLACK + error
        inside: Array = (low - slack <= values.real) & (values.real <= high + slack) & (np.abs(values.imag) <= slack)
        outside = ~inside & (np.abs(values) > error)
        if outside.any():
            raise CkksError(
                f"polynomial: {_describe(outside)} outside the domain [{low:g}, {high:g}]: fit on a wider domain, or "
                "see that the input stays inside"
            )
        return inside

    def _check_encoding(self, x: ClearTensor, re: Array, im: Array | None) -> None:
        """Refuse clear values that are too large for the scale at which a product encodes them."""
        factor = self.parameters.scale(x.level - 1) * self.parameters.primes[x.level] / x.scale
        self.parameters._core.check_encoding(
            re, im, factor if re.shape[1] == len(factor) else factor.max(keepdims=True)
        )

    def _error_of(self, core: _core.CkksTensor) -> float:
        """Return what the errors of the values stay below."""
        return 0.0 if self._generator is None else core.worst_error

    def _draw(self, deviation: npt.NDArray[np.float64], packed: bool, dtype: npt.DTypeLike) -> Array:
        """Draw the errors of all slots, or of all coefficients where sums are packed."""
        assert self._generator is not None  # noqa: S101 - called with noise only

        def draw(shape: tuple[int, int]) -> Array:
            assert self._generator is not None  # noqa: S101 - as above
            return self._generator.standard_normal(shape, np.float32)  # twice as fast as in double precision

        if packed:
            return _embed(deviation * draw((2 * self.slots, len(deviation))))
        shape = (self.slots, len(deviation))
        return deviation * (draw(shape) + 1j * draw(shape) if np.dtype(dtype).kind == "c" else draw(shape))

    def __repr__(self) -> str:
        return f"<clear CKKS evaluator of {self.parameters.name}>"


def _check_packed(name: str, x: ClearTensor, packed: bool) -> None:
    """Refuse slots where coefficients are meant, or the other way round: bounds and errors would be those of others."""
    if packed != x._packed:
        raise CkksError(f"{name}: the tensor holds {'packed numbers' if x._packed else 'slots, no packed numbers'}")


def _largest(numbers: Array) -> float:
    """Return the largest absolute value, or NaN if there is one."""
    if numbers.dtype.kind == "c":
        return float(np.abs(numbers).max())
    return max(float(numbers.max()), -float(numbers.min()))


def _describe(bad: Array) -> str:
    row, feature = np.argwhere(bad)[0]
    return f"{bad.sum()} of {bad.size} values, the first of them at [{row}, {feature}], are"


# Values


def _pad(slots: int, re: Array, im: Array | None) -> Array:
    """Return the values of all slots: those beyond the tokens hold zero."""
    values = re if im is None else re + 1j * im
    padded = np.zeros((slots, values.shape[1]), values.dtype)
    padded[: len(values)] = values
    return padded


def _apply_matrix(x: Array, matrix: Matrix, transpose: bool) -> Array:
    weight = matrix.dequantised()
    product: Array = x @ (weight if transpose else weight.T)
    return product


def _combine(*arguments: Any) -> Array:
    *tensors, weights, constant = arguments
    total: Array = np.asarray(constant) + sum(np.asarray(row) * x for row, x in zip(weights, tensors, strict=True))
    return total


def _evaluate(x: Array, basis: Literal["chebyshev", "power"], coefficients: Array, low: float, high: float) -> Array:
    values: Array = Polynomial(tuple(coefficients), basis, (low, high))(x)
    return values


# Packed sums


def _spread(n: int, count: int) -> list[tuple[int, int, int]]:
    """Return for each ciphertext of packed sums its number, its sums, and over how many places it spreads them."""
    groups = [(group, min(n, count - group * n)) for group in range(-(-count // n))]
    return [(group, sums, 1 << (sums - 1).bit_length()) for group, sums in groups]


def _place_numbers(n: int, numbers: Array) -> Array:
    """Return coefficients (N, features) that hold the numbers (count, features) of every feature as packed sums."""
    ((_, _, places),) = _spread(n, len(numbers))
    coefficients = np.zeros((n, numbers.shape[1]))
    coefficients[:: n // places][: len(numbers)] = numbers
    return coefficients


def _expand(slots: Array, count: int, wanted: list[int]) -> Array:
    """Return the packed numbers, each in all slots."""
    n = 2 * len(slots)
    ((_, _, places),) = _spread(n, count)
    numbers: Array = _coefficients(slots)[:: n // places, 0][wanted]
    return np.tile(numbers, (len(slots), 1))


def _pack(slots: Array) -> Array:
    """Return the slots of the polynomials whose coefficients are the sums over all slots of every feature."""
    n, sums = 2 * len(slots), slots.real.sum(axis=0)
    coefficients = np.zeros((n, -(-len(sums) // n)))
    for group, count, places in _spread(n, len(sums)):
        coefficients[:: n // places, group][:count] = sums[group * n : group * n + count]
    return _embed(coefficients)


@lru_cache(maxsize=4)
def _exponents(n: int) -> npt.NDArray[np.int64]:
    """Return 5^j modulo 2N: slot j is the polynomial's value at that power of the 2N-th root of unity."""
    exponents = np.ones(n // 2, np.int64)
    for j in range(1, n // 2):
        exponents[j] = exponents[j - 1] * 5 % (2 * n)
    return exponents


def _embed(coefficients: Array) -> Array:
    """Return the slots (N / 2, features) of real coefficients (N, features)."""
    n = len(coefficients)
    return np.asarray(np.fft.fft(coefficients, 2 * n, axis=0).conj()[_exponents(n)])


def _coefficients(slots: Array) -> Array:
    """Return the real coefficients (N, features) of slots (N / 2, features)."""
    n, exponents = 2 * len(slots), _exponents(2 * len(slots))
    points = np.zeros((2 * n, slots.shape[1]), np.complex128)
    points[exponents], points[2 * n - exponents] = slots, slots.conj()
    return np.asarray(np.fft.fft(points, axis=0)[:n].real / n)


_UNCHANGED = {"concatenate", "drop", "select"}
"""Operations of the core that move values which were checked."""

_VALUES: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_constant": np.add,
    "assume": lambda x, _bound, _error: x,
    "concatenate": lambda *xs: np.concatenate(xs, axis=1),
    "conjugate": np.conj,
    "dot": lambda x, y: (x * y).sum(axis=1, keepdims=True),
    "drop": lambda x, _level: x,
    "expand": _expand,
    "linear": _apply_matrix,
    "linear_combination": _combine,
    "multiply": np.multiply,
    "multiply_constant": np.multiply,
    "multiply_plain": lambda x, re, im: x * _pad(len(x), re, im),
    "negate": np.negative,
    "pack_slot_sums": _pack,
    "polynomial": _evaluate,
    "polynomials": lambda x, basis, rows, low, high: [_evaluate(x, basis, row, low, high) for row in rows],
    "refresh": lambda x, _level, packed: x if packed else x.real,
    "rescale": lambda x: x,
    "revealed": lambda x, _flood_bits, _error, _packed: x,
    "rotate": lambda x, steps: [np.roll(x, -step, axis=0) for step in steps],
    "select": lambda x, begin, end: x[:, begin:end],
    "subtract": np.subtract,
    "sum_features": lambda x: x.sum(axis=1, keepdims=True),
    "sum_slots": lambda x: np.broadcast_to(x.sum(axis=0), x.shape).copy(),
}
"""What each operation of the core is on values: all slots of its tensors, then its other arguments."""

"""Arithmetic on encrypted tensors by OpenFHE, and matrix products on its residues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from .. import _core
from ..ckks import Matrix, Polynomial
from ..ckks.evaluator import as_numbers
from ..ckks.keys import as_values
from ..errors import CkksError, EngineError, InputError
from .context import Context, same_context
from .keys import SIGMA, EvaluationKeys, rounding_noise, slot_noise
from .library import library, whole
from .tensor import EncryptedTensor

__all__ = ["Evaluator"]

Array = npt.NDArray[np.float64]

_COLUMN_WORDS = 1 << 21  # of the residues that `linear` works on at a time
_SAME = 2.0**-40  # factors that differ by less are one


class Evaluator:
    """The :class:`privtuner.ckks.protocol.EvaluatorProtocol` of OpenFHE.

    Every operation returns a new tensor and carries level, bound and predicted error. Products of ciphertexts are
    relinearised, and rescaled as the context's scaling technique does it. Operations with keys run one at a time in a
    process: OpenFHE finds keys in tables that have no lock.

    Args:
        context: of the tensors.
        keys: what products and rotations need; None for operations without keys.

    Raises:
        CkksError: keys of another context.
    """

    name = "openfhe"

    def __init__(self, context: Context, keys: EvaluationKeys | None = None) -> None:
        if keys is not None and not same_context(keys.context, context):
            raise CkksError("the evaluation keys are of another context; make or load those of this one")
        self.context, self.keys, self.slots = context, keys, context.slots
        self._lib = library()
        self._keys = None if keys is None else keys._core
        self._unit = 2.0**context.scale_bits  # the scale after a rescaling, nearly
        self._rounded = slot_noise(context, rounding_noise(context), self._unit)  # a slot's error from it
        self._deviation = context.scale_deviation()
        self._switched, self._lifted = self._switch_error()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Evaluator, (self.context, self.keys))

    def add(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """X + y; y a tensor, a number, or numbers of shape (features,). No level, unless the factors differ."""
        if isinstance(y, EncryptedTensor):
            return self._sum(x, y, self._lib.add)
        return self._add_constant(x, as_numbers(y))

    def subtract(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """X - y, as `add`."""
        if isinstance(y, EncryptedTensor):
            return self._sum(x, y, self._lib.subtract)
        return self._add_constant(x, -as_numbers(y))

    def negate(self, x: EncryptedTensor) -> EncryptedTensor:
        """-x. No level."""
        self._check(x)
        return self._like(x, self._lib.negate(x._core))

    def multiply(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """X y slot by slot; y a tensor, a number, or numbers of shape (features,). One level."""
        if not isinstance(y, EncryptedTensor):
            return self._multiply_constant(x, as_numbers(y))
        self._check(x, y)
        self._need_level("a product", x, y)
        x, y = self._met(x, y)
        core = self._lib.multiply(x._core, y._core, self._keys)
        return self._product(core, x, y, 1)

    def square(self, x: EncryptedTensor) -> EncryptedTensor:
        """X x. One level."""
        return self.multiply(x, x)

    def multiply_plain(self, x: EncryptedTensor, values: npt.ArrayLike) -> EncryptedTensor:
        """X times clear values of shape (tokens,) or (tokens, features), slot by slot. One level."""
        self._check(x)
        self._need_level("a product with clear values", x)
        re, im = as_values(values)
        if im is not None and not self.context.complex:
            raise InputError("complex values, and this context has none; make one with ckks_data_type='COMPLEX'")
        if len(re) != x.shape[0] or re.shape[1] not in (1, x.shape[1]):
            raise CkksError(f"clear values of shape {re.shape} do not fit a tensor of shape {x.shape}")
        size = np.abs(re) if im is None else np.hypot(re, im)
        if not np.isfinite(size).all():
            raise CkksError("clear values hold NaN or infinity")
        scaled = [
            None if part is None else np.ascontiguousarray((np.broadcast_to(part, x.shape) * x.factor).T)
            for part in (re, im)
        ]
        core = self._lib.multiply_plain(x._core, *scaled)
        column = (size * x.factor).max(axis=0)
        largest = float(column.max())
        encoding = slot_noise(self.context, math.sqrt(1 / 12), self._scale(x))
        # Columns so small that OpenFHE would refuse them count as zero.
        lost = float(column[column * self._scale(x) < self.context.ring_dimension].max(initial=0.0))
        bound = x.bound * float(size.max())
        return self._tensor(
            core,
            x.shape[0],
            bound,
            slot_bound=bound,
            noise=largest * self._ready(x) + x._slot_bound * encoding + self._rounded,
            bias=largest * x._bias + bound * self._deviation + lost * x._slot_bound,
        )

    def dot(self, x: EncryptedTensor, y: EncryptedTensor) -> EncryptedTensor:
        """The sum over features of x y, one feature: one relinearisation for all of them. One level."""
        self._check(x, y)
        self._need_level("a dot product", x, y)
        if x.shape != y.shape:
            raise CkksError(f"a dot product of shapes {x.shape} and {y.shape}; both must be the same")
        if not _uniform(x.factor * y.factor):
            raise CkksError(
                "the features of a dot product have different scales; multiply by 1.0 first (takes a level)"
            )
        x, y = self._met(x, y)
        core = self._lib.dot(x._core, y._core, self._keys)
        return self._product(core, x, y, x.shape[1])

    def sum_features(self, x: EncryptedTensor) -> EncryptedTensor:
        """The sum over features, one feature. No level."""
        self._check(x)
        if not _uniform(x.factor):
            raise CkksError("features of different scales cannot be added; multiply by 1.0 first (takes a level)")
        count = x.shape[1]
        return self._tensor(
            self._lib.sum_features(x._core),
            x.shape[0],
            count * x.bound,
            slot_bound=count * x._slot_bound,
            noise=(math.sqrt(count) if x._independent else count) * x._noise,
            bias=count * x._bias,
            factor=x.factor[:1],
        )

    def concatenate(self, tensors: Sequence[EncryptedTensor]) -> EncryptedTensor:
        """The features of all tensors, one after the other, at the lowest level among them. No level."""
        if not tensors:
            raise CkksError("no tensors to concatenate; give at least one")
        self._check(*tensors)
        level = min(x.level for x in tensors)
        parts = [self._settled(self.drop_to(x, level)) for x in tensors]
        return self._tensor(
            self._lib.Ciphertexts.concatenate([x._core for x in parts]),
            parts[0].shape[0],
            max(x.bound for x in parts),
            slot_bound=max(x._slot_bound for x in parts),
            noise=max(x._noise for x in parts),
            bias=max(x._bias for x in parts),
            factor=np.concatenate([x.factor for x in parts]),
        )

    def select(self, x: EncryptedTensor, features: slice) -> EncryptedTensor:
        """Some neighbouring features, without a copy. No level."""
        self._check(x)
        begin, end, step = features.indices(x.shape[1])
        if step != 1:
            raise InputError(f"features {features}: choose neighbouring ones, step 1")
        if begin >= end:
            raise CkksError(f"features {features} of {x.shape[1]}: there are none")
        core = x._core.select(begin, end)
        return self._like(x, core, factor=x.factor[begin:end])

    def linear(
        self, x: EncryptedTensor, weights: Matrix | npt.ArrayLike, *, transpose: bool = False
    ) -> EncryptedTensor:
        """X W^T (x W if ``transpose``) for a clear matrix, as a `Matrix` or an array (quantised to 8 bits here).

        An exact integer product of the residues modulo every prime, by this package's kernels: no level, no rotation,
        no key. The outputs' factors carry the scales of the rows.
        """
        matrix = weights if isinstance(weights, Matrix) else Matrix(weights)
        rows = matrix.shape[1 if transpose else 0]

        def run() -> Any:
            builder = self._lib.Builder(x._core, rows, [])
            n, components = self.context.ring_dimension, x._core.components
            width = column_width(n, x.shape[1], rows)
            for tower, modulus in enumerate(x.moduli):
                for component in range(components):
                    for begin in range(0, n, width):
                        words = x._core.residues(tower, component, begin, min(width, n - begin))
                        product = _core.ResidueProduct(matrix._core, transpose, words, modulus)
                        builder.set(tower, component, begin, product.multiply(0, rows))
            return builder.finish()

        return self._matrix_product(x, matrix, transpose, run)

    def textbook_linear(
        self, x: EncryptedTensor, weights: Matrix | npt.ArrayLike, *, transpose: bool = False
    ) -> EncryptedTensor:
        """`linear` by OpenFHE alone, one scalar product and one addition a weight: its oracle, and its yardstick.

        Equal to `linear` bit for bit.
        """
        matrix = weights if isinstance(weights, Matrix) else Matrix(weights)
        integers = matrix.integers.T if transpose else matrix.integers

        def run() -> Any:
            return self._lib.textbook_integers(x._core, np.ascontiguousarray(integers, np.int64))

        return self._matrix_product(x, matrix, transpose, run)

    def linear_combination(
        self, tensors: Sequence[EncryptedTensor], weights: npt.ArrayLike, constant: npt.ArrayLike = 0.0
    ) -> EncryptedTensor:
        """Constant + sum_t weights[t] tensors[t]; weights of shape (t,) or (t, features). One level."""
        rows = np.asarray(weights, np.float64)
        if rows.ndim == 1:
            rows = rows[:, None]
        if rows.ndim != 2 or len(rows) != len(tensors) or not len(tensors):
            raise InputError(f"weights of shape {rows.shape} for {len(tensors)} tensors; pass (t,) or (t, features)")
        if not np.isfinite(rows).all():
            raise CkksError("weights hold NaN or infinity")
        self._check(*tensors)
        self._need_level("a linear combination", *tensors)
        features = max(rows.shape[1], *(x.shape[1] for x in tensors))
        if any(x.shape[1] not in (1, features) for x in tensors) or rows.shape[1] not in (1, features):
            raise CkksError(f"tensors of {[x.shape[1] for x in tensors]} features do not combine with {rows.shape}")
        tensors = self._met(*tensors)
        scaled = [np.broadcast_to(row * x.factor, (features,)) for row, x in zip(rows, tensors, strict=True)]
        core = self._lib.linear_combination([x._core for x in tensors], [row.tolist() for row in scaled])
        sizes = [float(np.abs(row).max()) for row in scaled]
        bound = sum(float(np.abs(row).max()) * x.bound for row, x in zip(rows, tensors, strict=True))
        scale = self._scale(tensors[0])
        result = self._tensor(
            core,
            tensors[0].shape[0],
            bound,
            slot_bound=bound,
            noise=sum(s * self._ready(x) for s, x in zip(sizes, tensors, strict=True)) + self._rounded,
            bias=sum(s * x._bias + x._slot_bound / scale for s, x in zip(sizes, tensors, strict=True))
            + bound * self._deviation,
        )
        numbers = as_numbers(constant)
        return self._add_constant(result, numbers) if numbers.any() else result

    def polynomial(self, x: EncryptedTensor, polynomial: Polynomial) -> EncryptedTensor:
        """p(x) in every slot, by ``EvalChebyshevSeries`` or ``EvalPoly``.

        OpenFHE takes one level more than the polynomial's depth for most degrees, one to map the domain to [-1, 1]
        unless it is that already, and one where the features of x have factors.
        """
        self._check(x)
        if polynomial.degree == 0:
            constant = self._multiply_constant(x, np.zeros(1))
            return self._add_constant(constant, np.array(polynomial.coefficients[:1]))
        low, high = polynomial.domain
        chebyshev = polynomial.basis == "chebyshev"
        if chebyshev and x.bound > max(abs(low), abs(high)) * (1 + 1e-9):
            raise CkksError(
                f"values up to {x.bound:g} may leave the domain [{low:g}, {high:g}]; fit a wider one, or promise "
                "smaller values with assume"
            )
        coefficients = [float(c) for c in polynomial.coefficients]
        if not _uniform(x.factor) or (not chebyshev and abs(x.factor[0] - 1) > _SAME):
            x = self._multiply_constant(x, np.ones(1))
        factor = float(x.factor[0])
        self._need_level("a polynomial", x)
        if chebyshev:
            core = self._lib.chebyshev_series(x._core, coefficients, low / factor, high / factor, self._keys)
            inner = 2 * factor / (high - low)  # how the map to [-1, 1] scales errors
        else:
            core = self._lib.power_series(x._core, coefficients, self._keys)
            inner = 1.0
        k = np.arange(len(coefficients))
        sizes = np.abs(coefficients)
        reach = 1.0 if chebyshev else max(1.0, x._slot_bound)
        # |T_k'| <= k^2, |(x^k)'| <= k reach^(k-1); every step adds its rounding and its key switch.
        slope = float((sizes * (k * k if chebyshev else k * reach ** np.maximum(k - 1, 0))).sum())
        value = float((sizes * reach**k).sum())
        each = self._rounded + (self._switched + self._lifted) / self._unit**2
        bound = max(polynomial.bound, 2.0**-20)
        return self._tensor(
            core,
            x.shape[0],
            bound,
            slot_bound=bound,
            # Dividing by T_k, as baby steps and giant steps do, at most doubles coefficients, twice for most degrees.
            noise=4 * (slope * (inner * self._ready(x) + 2 * each) + (1 + float(sizes.sum())) * each),
            bias=slope * (inner * x._bias + 2.0**-44) + (slope + value) * self._deviation * polynomial.depth,
        )

    def rescale(self, x: EncryptedTensor) -> EncryptedTensor:
        """Ciphertexts of another program under FIXEDMANUAL that it did not rescale; all else is rescaled already."""
        self._check(x)
        if not self.context._core.manual or x._core.noise_scale_degree == 1:
            return x
        core = self._lib.rescale(x._core)
        return self._like(x, core, noise=x._noise + self._rounded, bias=x._bias + x._slot_bound * self._deviation)

    def drop_to(self, x: EncryptedTensor, level: int) -> EncryptedTensor:
        """X at a lower level: smaller and faster, no more exact.

        Raises:
            CkksError: x is below that level already, or it does not exist.
        """
        self._check(x)
        level = whole("level", level)
        if not 0 <= level <= x.level:
            raise CkksError(f"a tensor of level {x.level} cannot be brought to level {level}")
        if level == x.level:
            return x
        x = self._settled(x)
        core = self._lib.drop(x._core, self.context._top - level)
        return self._like(x, core, noise=x._noise + self._rounded)

    @overload
    def rotate(self, x: EncryptedTensor, steps: int) -> EncryptedTensor: ...
    @overload
    def rotate(self, x: EncryptedTensor, steps: Sequence[int]) -> list[EncryptedTensor]: ...
    def rotate(self, x: EncryptedTensor, steps: Sequence[int] | int) -> EncryptedTensor | list[EncryptedTensor]:
        """Slot i takes slot i + steps (cyclic over all slots), as ``numpy.roll(x, -steps)``. No level.

        Several steps are hoisted: the decomposition of x is computed once, and a list comes back.
        """
        self._check(x)
        several = isinstance(steps, Sequence) and not isinstance(steps, str)
        wanted = [whole("a rotation", step) for step in (steps if several else [steps])]  # type: ignore[union-attr]
        cores = self._lib.rotate(x._core, wanted, self._keys)
        results = [self._switched_key(x, core) for core in cores]
        return results if several else results[0]

    def conjugate(self, x: EncryptedTensor) -> EncryptedTensor:
        """The complex conjugate of every slot. No level."""
        self._check(x)
        return self._switched_key(x, self._lib.conjugate(x._core, self._keys))

    def sum_slots(self, x: EncryptedTensor) -> EncryptedTensor:
        """The sum over all slots, in every slot: rotations by 1, 2, 4, ... slots / 2. No level."""
        self._check(x)
        core = self._lib.sum_slots(x._core, self._keys)
        return self._like(
            x,
            core,
            bound=self.slots * x.bound,
            slot_bound=self.slots * x._slot_bound,
            noise=math.sqrt(self.slots) * (x._noise + 2 * self._switched / float(core.scaling_factor)),
            bias=self.slots * x._bias + 2 * self._lifted / float(core.scaling_factor),
        )

    def pack_slot_sums(self, x: EncryptedTensor) -> EncryptedTensor:  # noqa: ARG002 - the protocol's
        """Not done by this engine: `sum_slots`, or the native one."""
        raise EngineError("the OpenFHE engine does not pack sums of slots; use sum_slots, or the native engine")

    def bootstrap(self, x: EncryptedTensor, *, precision_bits: float) -> EncryptedTensor:
        """X with levels to compute on, by OpenFHE's ``EvalBootstrap``. |x| must be at most about 1.

        Args:
            x: of any level; factors must be 1.
            precision_bits: what the caller knows of the precision with these parameters, for the predicted error;
                OpenFHE states none.

        Raises:
            CkksError: keys without bootstrapping, a tensor with factors, or OpenFHE cannot.
        """
        self._check(x)
        if not self.context.bootstrapping:
            raise CkksError("bootstrapping needs context.enable_bootstrapping() and keys with bootstrapping=True")
        if not _uniform(np.append(x.factor, 1.0)):
            raise CkksError("bootstrapping needs factors of 1; multiply by 1.0 first (takes a level)")
        needed = self.context.bootstrapping_elements
        if needed is not None and self.keys is not None and not needed <= self.keys.elements:
            raise CkksError("the evaluation keys lack some that bootstrapping needs; make them with bootstrapping=True")
        core = self._lib.bootstrap(x._core, self._keys)
        return self._like(x, core, bias=x._bias + x.bound * 2.0**-precision_bits)

    def assume(self, x: EncryptedTensor, bound: float) -> EncryptedTensor:
        """X with the caller's promise that |value| <= bound. No copy, no level.

        Raises:
            CkksError: the bound is not a positive number.
        """
        self._check(x)
        if not (math.isfinite(bound) and bound > 0):
            raise CkksError(f"bound {bound}: give a positive number")
        slot_bound = bound / float(x.factor.min())
        return self._like(x, x._core, bound=bound, slot_bound=slot_bound)

    def _tensor(self, core: Any, tokens: int, bound: float, **values: Any) -> EncryptedTensor:
        return EncryptedTensor(core, self.context, tokens, bound, **values)

    def _like(self, x: EncryptedTensor, core: Any, **changes: Any) -> EncryptedTensor:
        """X with another core, and what changes with it."""
        values = {
            "slot_bound": x._slot_bound,
            "noise": x._noise,
            "bias": x._bias,
            "factor": x.factor,
            "independent": x._independent,
        } | changes
        return self._tensor(core, x.shape[0], values.pop("bound", x.bound), **values)

    def _check(self, *tensors: EncryptedTensor) -> None:
        first = tensors[0]
        for x in tensors:
            if not isinstance(x, EncryptedTensor):
                raise InputError(f"a {type(x).__name__}; expected an encrypted tensor of the OpenFHE engine")
            if not same_context(x.context, self.context):
                raise CkksError("the tensor is of another context than the engine")
            if x.shape[0] != first.shape[0]:
                raise CkksError(f"tensors of {first.shape[0]} and {x.shape[0]} tokens do not fit")
            if x.tag != first.tag:
                raise CkksError("the tensors were encrypted under different secret keys")
        if self.keys is not None and self.keys.tag != first.tag:
            raise CkksError("the tensor was encrypted under another secret key than the evaluation keys are of")

    def _need_level(self, what: str, *tensors: EncryptedTensor) -> None:
        if min(x.level for x in tensors) < 1:
            raise CkksError(f"{what} needs a level and there is none left; choose parameters of larger depth")

    def _scale(self, x: EncryptedTensor) -> float:
        """The scale that clear numbers are encoded at for a product with x."""
        return float(self.context._core.scaling_factor(min(self.context._top - x.level, len(self.context.moduli) - 1)))

    def _ready(self, x: EncryptedTensor) -> float:
        """The random error of a factor: automatic scaling rescales it first if that was put off."""
        return x._noise + (self._rounded if x._core.noise_scale_degree > 1 else 0.0)

    def _switch_error(self) -> tuple[float, float]:
        """Of a slot at scale 1 after a key switch: random and systematic error."""
        n = self.context.ring_dimension
        if self.context.key_switch_technique == "HYBRID":
            # OpenFHE's conversion from the k special primes is off by 0 to k, times (1, s). The mean of that, k / 2 in
            # every coefficient, is large where 1 + X + ... + X^(N-1) is: up to 2 N / pi.
            special = len(self.context.special_moduli)
            secret = 5 * math.sqrt(n / 3)
            coefficient = (1 + 0.5 * special) * math.sqrt(1 + 2 * n / 3)
            return slot_noise(self.context, coefficient, 1.0), 0.5 * special * (2 * n / math.pi) * secret
        largest = max(self.context.moduli).bit_length()
        bits = self.context._core.digit_bits or largest
        digits = len(self.context.moduli) * -(-largest // bits)
        # The digits are not negative: their mean times an error has its peak where that of HYBRID has.
        mean = 2.0 ** (bits - 1) * (2 * n / math.pi) * 5 * SIGMA * math.sqrt(n / 2) * math.sqrt(digits)
        return slot_noise(self.context, SIGMA * 2.0**bits * math.sqrt(digits * n / 3), 1.0), mean

    def _switched_key(self, x: EncryptedTensor, core: Any) -> EncryptedTensor:
        """X after an automorphism."""
        scale = float(core.scaling_factor)
        return self._like(x, core, noise=x._noise + self._switched / scale, bias=x._bias + self._lifted / scale)

    def _settled(self, x: EncryptedTensor) -> EncryptedTensor:
        if x._core.noise_scale_degree == 1:
            return x
        core = self._lib.settle(x._core)
        return self._like(x, core, noise=x._noise + self._rounded)

    def _sum(self, x: EncryptedTensor, y: EncryptedTensor, run: Any) -> EncryptedTensor:
        self._check(x, y)
        if x.shape[1] != y.shape[1] and 1 not in (x.shape[1], y.shape[1]):
            raise CkksError(f"tensors of {x.shape[1]} and {y.shape[1]} features do not fit")
        if not np.allclose(x.factor, y.factor, rtol=_SAME, atol=0):
            x, y = (self._multiply_constant(tensor, np.ones(1)) for tensor in (x, y))
        x, y = self._met(x, y)
        core = run(x._core, y._core)
        return self._tensor(
            core,
            x.shape[0],
            x.bound + y.bound,
            slot_bound=x._slot_bound + y._slot_bound,
            noise=self._ready(x) + self._ready(y) + self._rounded,
            bias=x._bias + y._bias,
            factor=np.broadcast_to(x.factor if len(x.factor) > 1 else y.factor, (core.features,)).copy(),
        )

    def _met(self, *tensors: EncryptedTensor) -> list[EncryptedTensor]:
        """The tensors at the lowest level among them: OpenFHE 1.5.1 does not bring them there under FIXEDAUTO."""
        level = min(x.level for x in tensors)
        return [self.drop_to(x, level) for x in tensors]

    def _add_constant(self, x: EncryptedTensor, constants: Array) -> EncryptedTensor:
        self._check(x)
        features = _broadcast(x, constants)
        factor = np.broadcast_to(x.factor, (features,)).copy()
        core = self._lib.add_constant(x._core, (constants / x.factor).tolist())
        size = float(np.abs(constants).max())
        slots = float(np.abs(constants / x.factor).max())
        return self._like(
            x,
            core,
            bound=x.bound + size,
            slot_bound=x._slot_bound + slots,
            bias=x._bias + slots * 2.0**-50 + 1 / self._scale(x),
            factor=factor,
            independent=x._independent and features == x.shape[1],
        )

    def _multiply_constant(self, x: EncryptedTensor, constants: Array) -> EncryptedTensor:
        self._check(x)
        self._need_level("a product with a number", x)
        features = _broadcast(x, constants)
        scaled = np.broadcast_to(constants * x.factor, (features,))
        core = self._lib.multiply_constant(x._core, scaled.tolist())
        size = float(np.abs(scaled).max())
        bound = float(np.abs(constants).max()) * x.bound
        return self._like(
            x,
            core,
            bound=bound,
            slot_bound=bound,
            noise=size * self._ready(x) + self._rounded,
            bias=size * x._bias + x._slot_bound / self._scale(x) + bound * self._deviation,
            factor=np.ones(features),
            independent=x._independent and features == x.shape[1],
        )

    def _product(self, core: Any, x: EncryptedTensor, y: EncryptedTensor, terms: int) -> EncryptedTensor:
        slot_bound = terms * x._slot_bound * y._slot_bound
        of_x, of_y = self._ready(x), self._ready(y)
        noise = x._slot_bound * of_y + y._slot_bound * of_x + of_x * of_y
        square = self._unit**2  # of the scale at which the key is switched
        factor = x.factor * y.factor
        return self._tensor(
            core,
            x.shape[0],
            terms * x.bound * y.bound,
            slot_bound=slot_bound,
            noise=terms * noise + self._switched / square + self._rounded,
            bias=terms * (x._slot_bound * y._bias + y._slot_bound * x._bias)
            + slot_bound * self._deviation
            + self._lifted / square,
            factor=factor if terms == 1 else factor[:1],
        )

    def _matrix_product(self, x: EncryptedTensor, matrix: Matrix, transpose: bool, run: Any) -> EncryptedTensor:
        self._check(x)
        depth = matrix.shape[0 if transpose else 1]
        if x.shape[1] != depth:
            raise CkksError(f"a tensor of {x.shape[1]} features does not fit a matrix that takes {depth}")
        given = x.factor * matrix.delta if transpose else x.factor
        if not _uniform(given):
            raise CkksError(
                "the features' factors differ; multiply by 1.0 first (takes a level), or use a Matrix with "
                "per_row=False for the transpose"
            )
        integers = np.abs(matrix.integers.T if transpose else matrix.integers).astype(np.float64)
        factor = given[0] * (np.ones(matrix.shape[1]) if transpose else matrix.delta)
        longest = float(integers.sum(axis=1).max())
        spread = float(np.sqrt((integers**2).sum(axis=1)).max()) if x._independent else longest
        values = float(np.abs(matrix.dequantised()).sum(axis=0 if transpose else 1).max())
        return self._tensor(
            run(),
            x.shape[0],
            values * x.bound,
            slot_bound=longest * x._slot_bound,
            noise=spread * x._noise,
            bias=longest * x._bias,
            factor=factor,
        )

    def __repr__(self) -> str:
        return f"<OpenFHE evaluator of {self.context!r}, keys: {self.keys!r}>"


def column_width(n: int, features: int, rows: int) -> int:
    """Coefficients that `Evaluator.linear` works on at a time: new memory for all would cost as much as the copies."""
    return max(256, min(n, _COLUMN_WORDS // max(features, rows) // 256 * 256))


def _broadcast(x: EncryptedTensor, constants: Array) -> int:
    """Features of x with constants, one a feature or one for all."""
    features = max(x.shape[1], len(constants))
    if len(constants) not in (1, features) or x.shape[1] not in (1, features):
        raise CkksError(f"{len(constants)} constants do not fit {x.shape[1]} features")
    return features


def _uniform(factor: Array) -> bool:
    return bool(np.abs(factor / factor[0] - 1).max() <= _SAME)

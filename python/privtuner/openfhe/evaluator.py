"""Arithmetic on encrypted tensors by OpenFHE, and matrix products on its residues."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.ckks import Matrix, Polynomial
from privtuner.ckks.arguments import as_numbers, as_span, as_steps, as_weights, whole
from privtuner.ckks.keys import as_values
from privtuner.errors import CkksError, EngineError, InputError
from privtuner.openfhe.context import Context, same_context
from privtuner.openfhe.estimate import Errors, Estimate, is_uniform, join, slot_noise
from privtuner.openfhe.keys import EvaluationKeys
from privtuner.openfhe.library import library
from privtuner.openfhe.tensor import EncryptedTensor

__all__ = ["Evaluator"]

Array = npt.NDArray[np.float64]

_COLUMN_WORDS = 1 << 21  # of the residues that `linear` works on at a time


class Evaluator:
    """The `privtuner.ckks.protocol.EvaluatorProtocol` of OpenFHE.

    Every operation returns a new tensor and carries level, bound and predicted error. Products of ciphertexts are
    relinearised, and rescaled as the context's scaling technique does it. Operations with keys run one at a time in a
    process: OpenFHE finds keys in tables that have no lock.

    Args:
        context: the context of the tensors.
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
        self._errors = Errors.of(context)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Evaluator, (self.context, self.keys))

    def add(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """The sum x + y; y a tensor, a number, or numbers of shape (features,). No level, unless the factors differ."""
        if isinstance(y, EncryptedTensor):
            return self._sum(x, y, self._lib.add)
        return self._add_constant(x, as_numbers(y))

    def subtract(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """The difference x - y, as `add`."""
        if isinstance(y, EncryptedTensor):
            return self._sum(x, y, self._lib.subtract)
        return self._add_constant(x, -as_numbers(y))

    def negate(self, x: EncryptedTensor) -> EncryptedTensor:
        """The negative, -x. No level."""
        self._check(x)
        return self._tensor(x, self._lib.negate(x._core), x.estimate)

    def multiply(self, x: EncryptedTensor, y: EncryptedTensor | npt.ArrayLike) -> EncryptedTensor:
        """The product x y, slot by slot; y a tensor, a number, or numbers of shape (features,). One level."""
        if not isinstance(y, EncryptedTensor):
            return self._multiply_constant(x, as_numbers(y))
        self._check(x, y)
        self._need_level("a product", x, y)
        x, y = self._bring_down(x, y)
        core = self._lib.multiply(x._core, y._core, self._keys)
        return self._tensor(x, core, self._estimate(x).product(self._estimate(y)).relinearised(self._errors))

    def square(self, x: EncryptedTensor) -> EncryptedTensor:
        """The square x x. One level."""
        return self.multiply(x, x)

    def multiply_plain(self, x: EncryptedTensor, values: npt.ArrayLike) -> EncryptedTensor:
        """The product of x and clear values of shape (tokens,) or (tokens, features), slot by slot. One level."""
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
        encoding = slot_noise(self.context, math.sqrt(1 / 12), self._scale(x))
        # Columns so small that OpenFHE would refuse them count as zero.
        lost = float(column[column * self._scale(x) < self.context.ring_dimension].max(initial=0.0))
        slots = x.estimate.slots
        product = self._estimate(x).times(size).off(noise=slots * encoding).rescaled(self._errors)
        return self._tensor(x, core, product.off(bias=lost * slots))

    def dot(self, x: EncryptedTensor, y: EncryptedTensor) -> EncryptedTensor:
        """The sum over features of x y, one feature: one relinearisation for all of them. One level."""
        self._check(x, y)
        self._need_level("a dot product", x, y)
        if x.shape != y.shape:
            raise CkksError(f"a dot product of shapes {x.shape} and {y.shape}; both must be the same")
        if not is_uniform(x.factor * y.factor):
            raise CkksError(
                "the features of a dot product have different scales; multiply by 1.0 first (takes a level)"
            )
        x, y = self._bring_down(x, y)
        core = self._lib.dot(x._core, y._core, self._keys)
        products = self._estimate(x).product(self._estimate(y), x.shape[1]).relinearised(self._errors)
        return self._tensor(x, core, products.features(0, 1))

    def sum_features(self, x: EncryptedTensor) -> EncryptedTensor:
        """The sum over features, one feature. No level."""
        self._check(x)
        if not is_uniform(x.factor):
            raise CkksError("features of different scales cannot be added; multiply by 1.0 first (takes a level)")
        return self._tensor(x, self._lib.sum_features(x._core), x.estimate.sum_of_features())

    def concatenate(self, tensors: Sequence[EncryptedTensor]) -> EncryptedTensor:
        """The features of all tensors, one after the other, at the lowest level among them. No level."""
        if not tensors:
            raise CkksError("no tensors to concatenate; give at least one")
        self._check(*tensors)
        level = min(x.level for x in tensors)
        parts = [self._settle(self.drop_level(x, level)) for x in tensors]
        core = self._lib.Ciphertexts.concatenate([x._core for x in parts])
        return self._tensor(parts[0], core, join([x.estimate for x in parts]))

    def select(self, x: EncryptedTensor, features: slice) -> EncryptedTensor:
        """Some neighbouring features, without a copy. No level."""
        self._check(x)
        begin, end = as_span(features, x.shape[1])
        return self._tensor(x, x._core.select(begin, end), x.estimate.features(begin, end))

    def linear(
        self, x: EncryptedTensor, weights: Matrix | npt.ArrayLike, *, transpose: bool = False
    ) -> EncryptedTensor:
        """The product x W^T (x W if ``transpose``) for a clear matrix, or an array, which is quantised to 8 bits here.

        An exact integer product of the residues modulo every prime, by this package's kernels: no level, no rotation,
        no key. The outputs' factors carry the scales of the rows.
        """
        matrix = Matrix.of(weights)
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
        matrix = Matrix.of(weights)
        integers = matrix.integers.T if transpose else matrix.integers

        def run() -> Any:
            return self._lib.textbook_integers(x._core, np.ascontiguousarray(integers, np.int64))

        return self._matrix_product(x, matrix, transpose, run)

    def linear_combination(
        self, tensors: Sequence[EncryptedTensor], weights: npt.ArrayLike, constant: npt.ArrayLike = 0.0
    ) -> EncryptedTensor:
        """The sum constant + sum_t weights[t] tensors[t]; weights of shape (t,) or (t, features). One level."""
        rows = as_weights(weights, len(tensors))
        self._check(*tensors)
        self._need_level("a linear combination", *tensors)
        features = max(rows.shape[1], *(x.shape[1] for x in tensors))
        if any(x.shape[1] not in (1, features) for x in tensors) or rows.shape[1] not in (1, features):
            raise CkksError(f"tensors of {[x.shape[1] for x in tensors]} features do not combine with {rows.shape}")
        tensors = self._bring_down(*tensors)
        scaled = [np.broadcast_to(row * x.factor, (features,)) for row, x in zip(rows, tensors, strict=True)]
        core = self._lib.linear_combination([x._core for x in tensors], [row.tolist() for row in scaled])
        scale = self._scale(tensors[0])
        terms = [
            self._estimate(x).times(np.abs(row)).off(bias=x.estimate.slots / scale)
            for row, x in zip(rows, tensors, strict=True)
        ]
        total = replace(reduce(Estimate.plus, terms), independent=False).rescaled(self._errors)
        result = self._tensor(tensors[0], core, total)
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
        if not is_uniform(x.factor) or (not chebyshev and not is_uniform(np.append(1.0, x.factor[0]))):
            x = self._multiply_constant(x, np.ones(1))
        factor = float(x.factor[0])
        self._need_level("a polynomial", x)
        if chebyshev:
            core = self._lib.chebyshev_series(x._core, coefficients, low / factor, high / factor, self._keys)
        else:
            core = self._lib.power_series(x._core, coefficients, self._keys)
        return self._tensor(x, core, self._estimate(x).polynomial(polynomial, self._errors))

    def polynomials(self, x: EncryptedTensor, polynomials: Sequence[Polynomial]) -> list[EncryptedTensor]:
        """The values of several polynomials, one by one: OpenFHE keeps no powers."""
        return [self.polynomial(x, polynomial) for polynomial in polynomials]

    def rescale(self, x: EncryptedTensor) -> EncryptedTensor:
        """Rescale ciphertexts that another program left unscaled under FIXEDMANUAL; all else is rescaled already."""
        self._check(x)
        if not self.context._core.manual or x._core.noise_scale_degree == 1:
            return x
        return self._tensor(x, self._lib.rescale(x._core), x.estimate.rescaled(self._errors))

    def drop_level(self, x: EncryptedTensor, level: int) -> EncryptedTensor:
        """The same values at a lower level: smaller and faster, no more exact.

        Raises:
            CkksError: x is below that level already, or it does not exist.
        """
        self._check(x)
        level = whole("level", level)
        if not 0 <= level <= x.level:
            raise CkksError(f"a tensor of level {x.level} cannot be brought to level {level}")
        if level == x.level:
            return x
        x = self._settle(x)
        core = self._lib.drop(x._core, self.context._top - level)
        return self._tensor(x, core, x.estimate.rounded(self._errors))

    @overload
    def rotate(self, x: EncryptedTensor, steps: int) -> EncryptedTensor: ...
    @overload
    def rotate(self, x: EncryptedTensor, steps: Sequence[int]) -> list[EncryptedTensor]: ...
    def rotate(self, x: EncryptedTensor, steps: Sequence[int] | int) -> EncryptedTensor | list[EncryptedTensor]:
        """Slot i takes slot i + steps (cyclic over all slots), as ``numpy.roll(x, -steps)``. No level.

        Several steps are hoisted: the decomposition of x is computed once, and a list comes back.
        """
        self._check(x)
        wanted, several = as_steps(steps)
        results = [self._after_switch(x, core) for core in self._lib.rotate(x._core, wanted, self._keys)]
        return results if several else results[0]

    def conjugate(self, x: EncryptedTensor) -> EncryptedTensor:
        """The complex conjugate of every slot. No level."""
        self._check(x)
        return self._after_switch(x, self._lib.conjugate(x._core, self._keys))

    def sum_slots(self, x: EncryptedTensor) -> EncryptedTensor:
        """The sum over all slots, in every slot: rotations by 1, 2, 4, ... slots / 2. No level."""
        self._check(x)
        core = self._lib.sum_slots(x._core, self._keys)
        scale = float(core.scaling_factor)
        once = x.estimate.off(noise=2 * self._errors.switch / scale)
        total = once.summed(self.slots, spread=math.sqrt(self.slots)).off(bias=2 * self._errors.lift / scale)
        return self._tensor(x, core, total)

    def pack_slot_sums(self, x: EncryptedTensor) -> EncryptedTensor:  # noqa: ARG002 - the protocol's
        """Refused, as OpenFHE does not pack sums: use `sum_slots`, or the native evaluator."""
        raise EngineError("OpenFHE does not pack sums of slots; use sum_slots, or the native evaluator")

    def expand(self, x: EncryptedTensor, count: int, features: slice | None = None) -> EncryptedTensor:  # noqa: ARG002
        """Refused, as OpenFHE does not pack numbers in coefficients."""
        raise EngineError("OpenFHE does not pack numbers in coefficients; use the native evaluator")

    def refresh(self, x: EncryptedTensor, level: int | None = None, *, packed: bool = False) -> EncryptedTensor:  # noqa: ARG002
        """Refused, as masked refreshes are of the native scheme; see `bootstrap`."""
        raise EngineError("OpenFHE has no masked refresh; use bootstrap, or the native evaluator")

    def reveal(self, x: EncryptedTensor, *options: object, **named: object) -> EncryptedTensor:  # noqa: ARG002
        """Refused, as OpenFHE adds its own noise where it decrypts."""
        raise EngineError("OpenFHE has no flooded results; use the native evaluator")

    def bootstrap(self, x: EncryptedTensor, *, precision_bits: float) -> EncryptedTensor:
        """The same values with levels to compute on, by OpenFHE's ``EvalBootstrap``. |x| must be at most about 1.

        Args:
            x: tensor of any level; factors must be 1.
            precision_bits: what the caller knows of the precision with these parameters, for the predicted error;
                OpenFHE states none.

        Raises:
            CkksError: keys without bootstrapping, a tensor with factors, or OpenFHE cannot.
        """
        self._check(x)
        if not self.context.bootstrapping:
            raise CkksError("bootstrapping needs context.enable_bootstrapping() and keys with bootstrapping=True")
        if not is_uniform(np.append(x.factor, 1.0)):
            raise CkksError("bootstrapping needs factors of 1; multiply by 1.0 first (takes a level)")
        needed = self.context.bootstrapping_elements
        if needed is not None and self.keys is not None and not needed <= self.keys.elements:
            raise CkksError("the evaluation keys lack some that bootstrapping needs; make them with bootstrapping=True")
        core = self._lib.bootstrap(x._core, self._keys)
        return self._tensor(x, core, x.estimate.off(bias=x.bound * 2.0**-precision_bits))

    def assume(self, x: EncryptedTensor, bound: float, error: float | None = None) -> EncryptedTensor:
        """The same tensor with the promise that |value| <= bound, and off by ``error`` at most. No copy, no level.

        Raises:
            CkksError: the bound or the error is not a positive number.
        """
        self._check(x)
        for name, value in (("bound", bound), ("error", 1.0 if error is None else error)):
            if not (math.isfinite(value) and value > 0):
                raise CkksError(f"{name} {value}: give a positive number")
        estimate = x.estimate.assumed(bound)
        if error is not None and error < x.budget().error:
            estimate = replace(estimate, noise=0.0, bias=error / float(np.abs(estimate.factor).max()))
        return self._tensor(x, x._core, estimate)

    def _tensor(self, like: EncryptedTensor, core: Any, estimate: Estimate) -> EncryptedTensor:
        return EncryptedTensor(core, self.context, like.shape[0], estimate)

    def _check(self, *tensors: EncryptedTensor) -> None:
        first = tensors[0]
        for x in tensors:
            if not isinstance(x, EncryptedTensor):
                raise InputError(f"a {type(x).__name__}; expected an encrypted tensor of OpenFHE")
            if not same_context(x.context, self.context):
                raise CkksError("the tensor is of another context than the evaluator")
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

    def _estimate(self, x: EncryptedTensor) -> Estimate:
        """Return the estimate of a factor, after the rescaling that automatic scaling does first if it was put off."""
        return x.estimate if x._core.noise_scale_degree == 1 else x.estimate.rounded(self._errors)

    def _settle(self, x: EncryptedTensor) -> EncryptedTensor:
        """The tensor with the rescaling done that was put off."""
        if x._core.noise_scale_degree == 1:
            return x
        return self._tensor(x, self._lib.settle(x._core), self._estimate(x))

    def _after_switch(self, x: EncryptedTensor, core: Any) -> EncryptedTensor:
        """The tensor after an automorphism."""
        return self._tensor(x, core, x.estimate.switched(self._errors, float(core.scaling_factor)))

    def _bring_down(self, *tensors: EncryptedTensor) -> list[EncryptedTensor]:
        """The tensors at the lowest level among them: OpenFHE 1.5.1 does not bring them there under FIXEDAUTO."""
        level = min(x.level for x in tensors)
        return [self.drop_level(x, level) for x in tensors]

    def _sum(self, x: EncryptedTensor, y: EncryptedTensor, run: Callable[[Any, Any], Any]) -> EncryptedTensor:
        self._check(x, y)
        if x.shape[1] != y.shape[1] and 1 not in (x.shape[1], y.shape[1]):
            raise CkksError(f"tensors of {x.shape[1]} and {y.shape[1]} features do not fit")
        if not x.estimate.shares_factors(y.estimate):
            x, y = (self._multiply_constant(tensor, np.ones(1)) for tensor in (x, y))
        x, y = self._bring_down(x, y)
        total = self._estimate(x).plus(self._estimate(y)).rounded(self._errors)
        return self._tensor(x, run(x._core, y._core), total)

    def _add_constant(self, x: EncryptedTensor, constants: Array) -> EncryptedTensor:
        self._check(x)
        _require_fit(x, constants)
        core = self._lib.add_constant(x._core, (constants / x.factor).tolist())
        return self._tensor(x, core, x.estimate.plus_numbers(constants).off(bias=1 / self._scale(x)))

    def _multiply_constant(self, x: EncryptedTensor, constants: Array) -> EncryptedTensor:
        self._check(x)
        self._need_level("a product with a number", x)
        features = _require_fit(x, constants)
        core = self._lib.multiply_constant(x._core, np.broadcast_to(constants * x.factor, (features,)).tolist())
        product = self._estimate(x).times(constants).off(bias=x.estimate.slots / self._scale(x)).rescaled(self._errors)
        independent = x.estimate.independent and features == x.shape[1]
        return self._tensor(x, core, replace(product, independent=independent))

    def _matrix_product(
        self, x: EncryptedTensor, matrix: Matrix, transpose: bool, run: Callable[[], Any]
    ) -> EncryptedTensor:
        self._check(x)
        depth = matrix.shape[0 if transpose else 1]
        if x.shape[1] != depth:
            raise CkksError(f"a tensor of {x.shape[1]} features does not fit a matrix that takes {depth}")
        estimate = x.estimate.linear(matrix, transpose)
        return self._tensor(x, run(), estimate)

    def __repr__(self) -> str:
        return f"<OpenFHE evaluator of {self.context!r}, keys: {self.keys!r}>"


def column_width(n: int, features: int, rows: int) -> int:
    """Coefficients that `Evaluator.linear` works on at a time: new memory for all would cost as much as the copies."""
    return max(256, min(n, _COLUMN_WORDS // max(features, rows) // 256 * 256))


def _require_fit(x: EncryptedTensor, constants: Array) -> int:
    """The features of x with constants, one a feature or one for all, or CkksError."""
    features = max(x.shape[1], len(constants))
    if len(constants) not in (1, features) or x.shape[1] not in (1, features):
        raise CkksError(f"{len(constants)} constants do not fit {x.shape[1]} features")
    return features

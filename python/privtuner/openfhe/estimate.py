"""What OpenFHE does not keep with its ciphertexts: bounds on their values and on their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from privtuner.ckks import Matrix, Polynomial
from privtuner.errors import CkksError
from privtuner.openfhe.context import Context

__all__ = ["SIGMA", "Errors", "Estimate", "is_uniform", "join", "rounding_noise", "slot_noise"]

Array = npt.NDArray[np.float64]

SIGMA = 3.19
"""Standard deviation of OpenFHE's errors."""

_SAME = 2.0**-40  # factors that differ by less are one


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is known of a tensor's values beside its ciphertexts. Immutable.

    Operations give the estimate of their result.

    Attributes:
        bound: |value| <= bound.
        factor: float64 (features,). A value is ``factor`` times what a slot holds.
        slots: |what a slot holds| <= slots.
        noise: standard deviation of the random error of what a slot holds.
        bias: what its systematic error stays below.
        independent: whether the errors of the features are.
    """

    bound: float
    factor: Array
    slots: float
    noise: float
    bias: float = 0.0
    independent: bool = False

    @classmethod
    def of_slots(
        cls, bound: float, features: int, noise: float, bias: float = 0.0, *, independent: bool = False
    ) -> Estimate:
        """The estimate of values that are what the slots hold."""
        return cls(float(bound), np.ones(features), float(bound), noise, bias, independent)

    def shares_factors(self, other: Estimate) -> bool:
        """Whether each feature has one factor here and there."""
        return np.allclose(self.factor, other.factor, rtol=_SAME, atol=0)

    def off(self, *, noise: float = 0.0, bias: float = 0.0) -> Estimate:
        """The estimate with errors added."""
        return replace(self, noise=self.noise + noise, bias=self.bias + bias)

    def rounded(self, errors: Errors) -> Estimate:
        """The estimate after a division by a prime that the scale follows exactly."""
        return self.off(noise=errors.rounding)

    def rescaled(self, errors: Errors) -> Estimate:
        """The estimate after a division by a prime, with the scale said to be divided by the unit."""
        return self.off(noise=errors.rounding, bias=self.slots * errors.deviation)

    def switched(self, errors: Errors, scale: float) -> Estimate:
        """The estimate after a key switch at ``scale``."""
        return self.off(noise=errors.switch / scale, bias=errors.lift / scale)

    def relinearised(self, errors: Errors) -> Estimate:
        """The estimate after the key switch of a product, at the square of the scale, and its rescaling."""
        square = errors.unit**2
        return self.off(noise=errors.switch / square).rescaled(errors).off(bias=errors.lift / square)

    def plus(self, other: Estimate) -> Estimate:
        """The sum with a tensor of the same factors, or its difference. One feature serves all of the other's."""
        factor = np.broadcast_arrays(self.factor, other.factor)[0 if len(self.factor) > 1 else 1].copy()
        return Estimate(
            self.bound + other.bound,
            factor,
            self.slots + other.slots,
            self.noise + other.noise,
            self.bias + other.bias,
        )

    def plus_numbers(self, numbers: Array) -> Estimate:
        """The sum with clear numbers, one a feature or one for all."""
        slots = float(np.abs(numbers / self.factor).max())
        features = max(len(self.factor), len(numbers))
        return replace(
            self,
            bound=self.bound + float(np.abs(numbers).max()),
            factor=np.broadcast_to(self.factor, (features,)).copy(),
            slots=self.slots + slots,
            bias=self.bias + slots * 2.0**-50,
            independent=self.independent and features == len(self.factor),
        )

    def times(self, numbers: Array) -> Estimate:
        """The product with clear numbers, whose last axis is the features or one for all; factors end in the slots."""
        largest = float(np.abs(numbers * self.factor).max())
        bound = float(np.abs(numbers).max()) * self.bound
        features = max(len(self.factor), numbers.shape[-1])
        return Estimate.of_slots(bound, features, largest * self.noise, largest * self.bias)

    def product(self, other: Estimate, terms: int = 1) -> Estimate:
        """Products slot by slot, where one feature serves all of the other's, or sums of ``terms`` such products."""
        return Estimate(
            terms * self.bound * other.bound,
            self.factor * other.factor,
            terms * self.slots * other.slots,
            terms * (self.slots * other.noise + other.slots * self.noise + self.noise * other.noise),
            terms * (self.slots * other.bias + other.slots * self.bias),
        )

    def summed(self, terms: float, *, spread: float | None = None, bound: float | None = None) -> Estimate:
        """Sums of ``terms`` slots, or of multiples whose absolute values sum up to that.

        Args:
            terms: by which bounds and systematic errors grow.
            spread: by which the random error grows; None: as the bounds, the worst.
            bound: by which the bound of the values grows; None: as that of the slots.
        """
        return replace(
            self,
            bound=(terms if bound is None else bound) * self.bound,
            slots=terms * self.slots,
            noise=(terms if spread is None else spread) * self.noise,
            bias=terms * self.bias,
        )

    def features(self, begin: int, end: int) -> Estimate:
        """The estimate of some neighbouring features."""
        return replace(self, factor=self.factor[begin:end])

    def sum_of_features(self) -> Estimate:
        """The sum over features of one factor."""
        count = len(self.factor)
        total = self.summed(count, spread=math.sqrt(count) if self.independent else count)
        return replace(total, factor=self.factor[:1], independent=False)

    def linear(self, matrix: Matrix, transpose: bool) -> Estimate:
        """The product with a clear matrix: of the slots with its integers, of the factors with its scales.

        Raises:
            CkksError: the features that are summed have different factors.
        """
        given = self.factor * matrix.scale if transpose else self.factor
        if not is_uniform(given):
            raise CkksError(
                "the features' factors differ; multiply by 1.0 first (takes a level), or use a Matrix with "
                "per_row=False for the transpose"
            )
        integers = np.abs(matrix.integers.T if transpose else matrix.integers).astype(np.float64)
        longest = float(integers.sum(axis=1).max())
        spread = float(np.sqrt((integers**2).sum(axis=1)).max()) if self.independent else longest
        values = float(np.abs(matrix.dequantised()).sum(axis=0 if transpose else 1).max())
        factor = given[0] * (np.ones(matrix.shape[1]) if transpose else matrix.scale)
        return replace(self.summed(longest, spread=spread, bound=values), factor=factor, independent=False)

    def polynomial(self, polynomial: Polynomial, errors: Errors) -> Estimate:
        """A polynomial of slots of one factor (factor 1 in the power basis), evaluated on the domain [-1, 1]."""
        low, high = polynomial.domain
        chebyshev = polynomial.basis == "chebyshev"
        # How the map to [-1, 1] scales errors.
        inner = 2 * float(self.factor[0]) / (high - low) if chebyshev else 1.0
        sizes = np.abs([float(c) for c in polynomial.coefficients])
        k = np.arange(len(sizes))
        reach = 1.0 if chebyshev else max(1.0, self.slots)
        # |T_k'| <= k^2, |(x^k)'| <= k reach^(k-1); every step adds its rounding and its key switch.
        slope = float((sizes * (k * k if chebyshev else k * reach ** np.maximum(k - 1, 0))).sum())
        value = float((sizes * reach**k).sum())
        each = errors.rounding + (errors.switch + errors.lift) / errors.unit**2
        return Estimate.of_slots(
            max(polynomial.bound, 2.0**-20),
            len(self.factor),
            # Dividing by T_k, as baby steps and giant steps do, at most doubles coefficients, twice for most degrees.
            noise=4 * (slope * (inner * self.noise + 2 * each) + (1 + float(sizes.sum())) * each),
            bias=slope * (inner * self.bias + 2.0**-44) + (slope + value) * errors.deviation * polynomial.depth,
        )

    def assumed(self, bound: float) -> Estimate:
        """The estimate with |value| <= bound promised."""
        return replace(self, bound=float(bound), slots=bound / float(self.factor.min()))


def join(estimates: Sequence[Estimate]) -> Estimate:
    """The estimate of several tensors' features, one after the other: the worst of each."""
    return Estimate(
        max(x.bound for x in estimates),
        np.concatenate([x.factor for x in estimates]),
        max(x.slots for x in estimates),
        max(x.noise for x in estimates),
        max(x.bias for x in estimates),
    )


def is_uniform(factor: Array) -> bool:
    """Whether all features have one factor."""
    return bool(np.abs(factor / factor[0] - 1).max() <= _SAME)


@dataclass(frozen=True)
class Errors:
    """What the operations of a context add to a slot.

    Attributes:
        unit: the scale after a rescaling, nearly.
        rounding: standard deviation a rescaling adds at that scale.
        deviation: largest |prime / scale - 1|: the part of a slot by which a rescaling is off.
        switch: standard deviation a key switch adds at scale 1.
        lift: bias a key switch adds at scale 1.
    """

    unit: float
    rounding: float
    deviation: float
    switch: float
    lift: float

    @classmethod
    def of(cls, context: Context) -> Errors:
        """The errors of a context's operations."""
        unit = 2.0**context.scale_bits
        rounding = slot_noise(context, rounding_noise(context), unit)
        return cls(unit, rounding, context.scale_deviation(), *_switch_error(context))


def slot_noise(context: Context, coefficient: float, scale: float) -> float:
    """Standard deviation of the real part of a slot, from that of each coefficient."""
    return coefficient * math.sqrt(context.ring_dimension / 2) / scale


def rounding_noise(context: Context) -> float:
    """Standard deviation of a coefficient after a division: uniform rounding times (1, s), s uniform ternary."""
    return math.sqrt((1 + context.ring_dimension * 2 / 3) / 12)


def _switch_error(context: Context) -> tuple[float, float]:
    """Standard deviation and bias a key switch adds to a slot at scale 1."""
    n = context.ring_dimension
    if context.key_switch_technique == "HYBRID":
        # OpenFHE's conversion from the k special primes is off by 0 to k, times (1, s). The mean of that, k / 2 in
        # every coefficient, is large where 1 + X + ... + X^(N-1) is: up to 2 N / pi.
        special = len(context.special_moduli)
        secret = 5 * math.sqrt(n / 3)
        coefficient = (1 + 0.5 * special) * math.sqrt(1 + 2 * n / 3)
        return slot_noise(context, coefficient, 1.0), 0.5 * special * (2 * n / math.pi) * secret
    largest = max(context.moduli).bit_length()
    bits = context._core.digit_bits or largest
    digits = len(context.moduli) * -(-largest // bits)
    # The digits are not negative: their mean times an error has its peak where that of HYBRID has.
    mean = 2.0 ** (bits - 1) * (2 * n / math.pi) * 5 * SIGMA * math.sqrt(n / 2) * math.sqrt(digits)
    return slot_noise(context, SIGMA * 2.0**bits * math.sqrt(digits * n / 3), 1.0), mean

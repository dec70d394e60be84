"""Activations of every slot, and their gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from privtuner.ckks.circuits.common import SLACK, check_degree, polynomial_depth
from privtuner.ckks.functions import FUNCTIONS, approximate
from privtuner.ckks.polynomial import Domain, Polynomial
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError


@dataclass(frozen=True)
class Activation:
    """A polynomial in place of an activation, and its exact derivative. Public constants.

    Attributes:
        unit: values are given as multiples of it. With a unit of half the domain's width the polynomial takes its
            depth; values that are more than a unit or two from the domain's centre take a level more.
        value: the polynomial of x / unit.
        derivative: its derivative by x, of x / unit.
        error: largest absolute error of the value on the domain.
    """

    unit: float
    value: Polynomial
    derivative: Polynomial
    error: float

    @classmethod
    def choose(cls, name: str, domain: Domain, degree: int, *, unit: float = 1.0) -> Activation:
        """Approximate a function, keeping its 0 at 0 so that rows of zeros stay so.

        Chebyshev's interpolation: its derivative is an approximation of the derivative too.

        Args:
            name: of `privtuner.ckks.functions.FUNCTIONS`, one that is 0 at 0: ``"gelu"`` or ``"tanh"`` for instance.
            domain: (low, high) around 0, what x is in.
            degree: 1 to 255.
            unit: positive; x comes divided by it.

        Raises:
            InputError: an argument out of range, or a function that is not 0 at 0.
        """
        if not 0 < unit < math.inf:
            raise InputError(f"unit = {unit}: must be positive and finite")
        found = approximate(name, domain, check_degree(degree), "chebyshev")
        low, high = found.domain
        if not low < 0 < high:
            raise InputError(f"domain {(low, high)}: must hold 0 inside, where no token is")
        if np.any(FUNCTIONS[name].exact(np.zeros(1))):
            raise InputError(f"{name} is not 0 at 0, as it must be where no token is")
        at_zero = float(found(0.0))
        error = (found.max_error or 0.0) + abs(at_zero)
        value = replace(found, coefficients=(found.coefficients[0] - at_zero, *found.coefficients[1:]), max_error=error)
        scaled = (low / unit, high / unit)
        return cls(float(unit), replace(value, domain=scaled), replace(value.derivative(), domain=scaled), error)

    @property
    def depth(self) -> int:
        """Levels of all methods."""
        return polynomial_depth(self.value)

    def forward(self, evaluator: EvaluatorProtocol[Tensor], x: Tensor) -> Tensor:
        """The activation of x, which is given over `unit`, of the chain's scale, in the domain in every slot.

        Raises:
            CkksError: not enough levels.
        """
        y = evaluator.polynomial(_inside(evaluator, x, self.value), self.value)
        return _bounded(evaluator, y, self.value)

    def forward_with_slope(self, evaluator: EvaluatorProtocol[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """The activation, and what a gradient is multiplied by on its way back: its derivative by x, not by x / unit.

        Both at shared powers of x, about three quarters of the products of two evaluations; x is not needed again.

        Raises:
            CkksError: not enough levels.
        """
        value, slope = evaluator.polynomials(_inside(evaluator, x, self.value), [self.value, self.derivative])
        return _bounded(evaluator, value, self.value), _bounded(evaluator, slope, self.derivative)


def _inside(evaluator: EvaluatorProtocol[Tensor], x: Tensor, polynomial: Polynomial) -> Tensor:
    return evaluator.assume(x, max(map(abs, polynomial.domain)))


def _bounded(evaluator: EvaluatorProtocol[Tensor], y: Tensor, polynomial: Polynomial) -> Tensor:
    return evaluator.assume(y, (1 + SLACK) * polynomial.bound)

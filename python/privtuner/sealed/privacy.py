"""What the server learns of the training data from noisy gradients, in terms of differential privacy.

**The relation.** What is opened at a step has norm at most 1 before noise, whatever the batch, and noise of standard
deviation `Privacy.noise_multiplier` is added to each of its numbers. Any two training sets, of whatever texts and
labels, differ at a step by a vector of norm at most 2. So every step is a Gaussian mechanism of sensitivity 2, steps
compose adaptively, and the guarantee is for **the training set as a whole**, and for each text in it. Nothing less can
be claimed for a text that is in one batch only: the head is trained on it in the clear, and later gradients pass
through the head. Sampling gains nothing for the same reason. To clip text by text takes gradients text by text, and
packed sums over slots have none.

The account is in Renyi differential privacy, which holds for the discrete Gaussian as for the continuous one (Canonne,
Kamath, Steinke, NeurIPS 2020), by Google's ``dp-accounting``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from privtuner.errors import InputError
from privtuner.packages import missing
from privtuner.sealed.adapters import ERROR, GRADIENT_BOUND
from privtuner.sealed.noise import LARGEST

__all__ = ["FLOOD_BITS", "RELATION", "Privacy"]

SENSITIVITY = 2.0
"""By how much, in norm, what is opened at a step differs between any two training sets."""
FLOOD_BITS = 6
"""By how many bits the noise exceeds what the errors of opened numbers stay below."""
RELATION = "any two training sets: the guarantee is for all texts and labels together, and so for each of them"
_MOST_NOISE = 2.0**14
_ORDERS = [1 + 2 ** (k / 8) for k in range(-80, 81)]  # the best one is 1 + sqrt(log(1 / delta) / rho)
_TAIL = 16
"""In so many deviations noise stays, but for one number in 2^190."""


@dataclass(frozen=True)
class Privacy:
    """How gradients are clipped and noised before the server sees them, and how much that may tell.

    Attributes:
        noise_multiplier: standard deviation of the noise on every number, over the norm that gradients are clipped to.
        clip: that norm, of the gradient of a batch by all numbers of the adapters, in units of the loss.
        delta: of (epsilon, delta)-differential privacy; below one over the number of texts.
        budget: the most epsilon; None for no limit.

    Raises:
        InputError: a value out of range. There is no noise of zero.
    """

    noise_multiplier: float
    clip: float
    delta: float
    budget: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier <= _MOST_NOISE:
            raise InputError(
                f"the noise multiplier is {self.noise_multiplier:g}; give a number above 0 and up to {_MOST_NOISE:g}: "
                "without noise the server would read gradients, and an opened value endangers the key"
            )
        if not 0 < self.clip < math.inf:
            raise InputError(f"the clipping norm is {self.clip:g}; give a positive number")
        if not 0 < self.delta < 1:
            raise InputError(f"delta is {self.delta:g}; give a number between 0 and 1, below one over the texts")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise InputError(f"the budget of epsilon is {self.budget:g}; give a positive number")

    def epsilon(self, openings: int) -> float:
        """The epsilon of so many opened gradients, at `delta`, for `RELATION`; infinite where it is not known.

        Raises:
            MissingPackageError: ``dp-accounting`` is not installed.
        """
        if openings < 0:
            raise InputError(f"{openings} openings: give a number from 0 on")
        if not openings:
            return 0.0
        try:
            from dp_accounting import GaussianDpEvent
            from dp_accounting.rdp import RdpAccountant
        except ModuleNotFoundError as error:
            raise missing(error, "the account of differential privacy") or error from None
        accountant = RdpAccountant(orders=_ORDERS)
        accountant.compose(GaussianDpEvent(self.noise_multiplier / SENSITIVITY), openings)
        return float(accountant.get_epsilon(self.delta))

    def affords(self, openings: int) -> bool:
        """Whether the budget holds after so many openings in all."""
        return self.budget is None or self.epsilon(openings) <= self.budget

    def affordable(self, most: int) -> int:
        """How many openings the budget pays for in all, up to ``most``."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.affords(middle) else (low, middle - 1)
        return low

    def deviation(self, scale: float, modulus: int, limit: float) -> int:
        """The standard deviation of the noise in units of one over a scale.

        Args:
            scale: of what is opened.
            modulus: of what is opened: numbers and noise stay below half of it.
            limit: the clipping norm in the units of the packed gradient.

        Raises:
            InputError: noise that does not drown the errors of the numbers under it, of which they tell who holds the
                ciphertexts, and so of the key; or that the modulus has no room for.
        """
        error = ERROR * (GRADIENT_BOUND / limit + 1.0)
        least = 2.0**FLOOD_BITS * error
        if self.noise_multiplier < least:
            raise InputError(
                f"a noise multiplier of {self.noise_multiplier:g} with a clipping norm of {self.clip:g} does not drown "
                f"the errors of encryption, which tell of the key: give at least {least:.3g}, or a larger norm"
            )
        sigma = math.ceil(self.noise_multiplier * scale)
        if sigma > LARGEST or _TAIL * sigma + scale > modulus / 2:
            raise InputError(
                f"a noise multiplier of {self.noise_multiplier:g} does not fit the modulus of "
                f"2^{math.log2(modulus):.0f}: give a smaller one"
            )
        return sigma

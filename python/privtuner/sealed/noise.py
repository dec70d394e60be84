"""Gaussian noise on whole numbers, drawn exactly.

Differential privacy is proven for noise of an exact distribution. Floating-point samplers have another one, whose gaps
give the value under the noise away (Mironov, "On significance of the least significant bits for differential privacy",
CCS 2012), so all arithmetic here is on whole numbers. Algorithms 1 to 3 of Canonne, Kamath, Steinke, "The Discrete
Gaussian for Differential Privacy", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from secrets import randbelow

import numpy as np
import numpy.typing as npt

from privtuner.errors import InputError

__all__ = ["LARGEST", "discrete_gaussian"]

LARGEST = 1 << 55
"""The largest standard deviation: a draw passes 2^62 with a probability below e^-8000."""

Below = Callable[[int], int]


def discrete_gaussian(sigma: int, shape: tuple[int, ...], below: Below = randbelow) -> npt.NDArray[np.int64]:
    """Draw whole numbers x with probabilities in proportion to ``exp(-x^2 / (2 sigma^2))``.

    Vectors of them have the concentrated differential privacy of the continuous distribution (Theorem 14 there).

    Args:
        sigma: 1 to `LARGEST`.
        shape: of the result, int64.
        below: draws a uniform whole number from 0 to below its argument; by default of the operating system's
            generator. How often it is called depends on the result, and so does the time that is taken.

    Raises:
        InputError: a deviation out of range.
    """
    if not 1 <= sigma <= LARGEST:
        raise InputError(f"sigma is {sigma}: give a whole number from 1 to {LARGEST}")
    out = np.empty(shape, np.int64)
    flat = out.reshape(-1)
    for i in range(flat.size):
        flat[i] = _gaussian(sigma, below)
    return out


def _gaussian(sigma: int, below: Below) -> int:
    """Accept discrete Laplace noise y of scale sigma with probability exp(-(|y| - sigma)^2 / (2 sigma^2))."""
    while True:
        y = _laplace(sigma, below)
        if _exponential((abs(y) - sigma) ** 2, 2 * sigma**2, below):
            return y


def _laplace(scale: int, below: Below) -> int:
    """Probabilities in proportion to exp(-|x| / scale)."""
    while True:
        remainder = below(scale)
        if not _exponential(remainder, scale, below):
            continue
        quotient = 0
        while _exponential(1, 1, below):
            quotient += 1
        size = remainder + scale * quotient
        negative = below(2)
        if size or not negative:  # zero once, not with both signs
            return -size if negative else size


def _exponential(numerator: int, denominator: int, below: Below) -> bool:
    """True with probability exp(-numerator / denominator)."""
    while numerator > denominator:
        if not _exponential(1, 1, below):
            return False
        numerator -= denominator
    # 1 - x + x^2 / 2! - ...: the first k at which a coin of probability x / k shows zero is odd with probability
    # exp(-x).
    k = 1
    while below(denominator * k) < numerator:
        k += 1
    return k % 2 == 1

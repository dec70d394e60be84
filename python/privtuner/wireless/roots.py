"""Roots of many falling functions at once: Newton's method inside brackets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from privtuner.wireless.arrays import FloatArray

__all__ = ["falling_root"]

_STEPS = 200
_LEAP = 4.0  # down, where there is no bracket yet and Newton's step leads out


def falling_root(
    function: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
    start: FloatArray,
    high: FloatArray,
    accuracy: float,
) -> FloatArray:
    """Solve function(y) = 0 for y <= ``high``, elementwise; ``high`` itself where the function is positive up to there.

    Args:
        function: values and slopes at y; the values fall.
        start: to begin with, at most ``high``.
        high: upper ends; the function must grow beyond every bound towards -inf.
        accuracy: the accuracy of the values.
    """
    top, low = high, np.full(start.shape, -np.inf)
    y = start
    for _ in range(_STEPS):
        value, slope = function(y)
        above = value > 0
        done = (np.abs(value) <= accuracy) | (above & (y >= top)) | (high - low <= 4e-16 * np.abs(high))
        if done.all():
            break
        low, high = np.where(above, np.maximum(low, y), low), np.where(above, high, np.minimum(high, y))
        step = np.minimum(y - value / slope, high)
        middle = np.where(low > -np.inf, 0.5 * (low + high), high - _LEAP)
        inside = (step > low) & ((step < high) | (high == top))
        y = np.where(done, y, np.where(inside, step, middle))
    return y

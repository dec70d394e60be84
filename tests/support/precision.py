"""Comparison of encrypted results with exact ones: by guaranteed bounds, by bits, by the worst element."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def _worst(excess: npt.NDArray[Any], want: npt.NDArray[Any], got: npt.NDArray[Any]) -> str:
    place = np.unravel_index(int(np.argmax(excess)), excess.shape)
    return f"worst at {[int(i) for i in place]}: expected {want[place]}, got {got[place]}"


def precision_bits(want: npt.ArrayLike, got: npt.ArrayLike) -> float:
    """-log2 of the largest error, relative to the largest expected value; infinite if nothing differs."""
    exact, found = np.asarray(want, np.longdouble), np.asarray(got, np.longdouble)
    assert exact.shape == found.shape, f"expected shape {exact.shape}, got {found.shape}"
    error = float(np.abs(exact - found).max())
    return math.inf if error == 0 else -math.log2(error / float(np.abs(exact).max()))


def assert_precision(want: npt.ArrayLike, got: npt.ArrayLike, min_bits: float) -> None:
    """Every element of ``got`` is within ``2**-min_bits * max|want|`` of ``want``."""
    bits = precision_bits(want, got)
    exact, found = np.asarray(want, np.longdouble), np.asarray(got, np.longdouble)
    assert bits >= min_bits, f"{bits:.2f} bits, expected {min_bits:.2f}; {_worst(np.abs(exact - found), exact, found)}"


def assert_within(want: npt.ArrayLike, got: npt.ArrayLike, bound: npt.ArrayLike) -> None:
    """Every element of the float32 array ``got`` is within its own ``bound`` of ``want``.

    An expected value beyond float32 by more than its bound must be infinite with its sign; where the bound reaches from
    the expected value beyond float32, the result may be infinite.
    """
    exact, found = np.asarray(want, np.longdouble), np.asarray(got, np.longdouble)
    limit = np.broadcast_to(np.asarray(bound, np.longdouble), exact.shape)
    assert exact.shape == found.shape, f"expected shape {exact.shape}, got {found.shape}"
    assert np.isfinite(limit).all(), "a bound is not finite"
    assert not np.isnan(found).any(), "got NaN"
    infinite = np.isinf(found)
    furthest = np.sign(found) * exact + limit  # that the bound allows on the side of the result
    assert (furthest[infinite] > _FLOAT32_MAX).all(), "got an infinity beyond the bound"
    excess = np.where(infinite, -np.inf, np.abs(exact - np.where(infinite, 0, found)) - limit)
    assert (excess <= 0).all(), f"beyond the bound by {excess.max()}; {_worst(excess, exact, found)}"

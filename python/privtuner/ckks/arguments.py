"""The checks of clear arguments that all evaluators share."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from privtuner.errors import CkksError, InputError

__all__ = ["as_choice", "as_numbers", "as_span", "as_steps", "as_weights", "whole"]


def as_numbers(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A number, or numbers of shape (features,), as finite float64 of one dimension."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" or array.ndim > 1:
        raise InputError(f"expected a number or numbers of shape (features,), got {array.dtype} of shape {array.shape}")
    if not np.isfinite(array.astype(np.float64)).all():
        raise CkksError("a constant is NaN or infinity")
    return np.atleast_1d(array.astype(np.float64))


def as_weights(weights: npt.ArrayLike, tensors: int) -> npt.NDArray[np.float64]:
    """The weights of a linear combination, a number or numbers of shape (features,) for each tensor: finite float64.

    Two-dimensional: (tensors, 1) or (tensors, features).
    """
    rows = np.asarray(weights)
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.dtype.kind not in "fiub" or rows.ndim != 2 or len(rows) != tensors or not tensors:
        raise InputError(f"weights of shape {rows.shape} for {tensors} tensors; pass (t,) or (t, features)")
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise CkksError("weights hold NaN or infinity")
    return rows


def as_span(features: slice, count: int) -> tuple[int, int]:
    """The first of some neighbouring features out of ``count``, and the one behind the last."""
    begin, end, step = features.indices(count)
    if step != 1:
        raise InputError(f"features {features}: choose neighbouring ones, step 1")
    if begin >= end:
        raise CkksError(f"features {features} of {count}: there are none; choose a range inside")
    return begin, end


def as_choice(features: slice | None, count: int) -> list[int]:
    """Some out of ``count`` features, rising; None: all."""
    chosen = range(count) if features is None else range(count)[features]
    if chosen.step < 0:
        raise InputError(f"features {features}: choose rising ones, step 1 or more")
    return list(chosen)


def as_steps(steps: Sequence[int] | SupportsIndex) -> tuple[list[int], bool]:
    """The steps of a rotation, and whether several were given rather than one."""
    if isinstance(steps, Sequence):
        return [whole("a rotation", step) for step in steps], True
    return [whole("a rotation", steps)], False


def whole(name: str, value: object) -> int:
    """Return a whole number of 31 bits; else raise InputError."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{name} is {value!r}; give a whole number") from None
    if abs(number) >= 1 << 31:
        raise InputError(f"{name} is {number}; give a number below 2^31 in size")
    return number

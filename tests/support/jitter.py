"""A pytest plugin (``-p jitter``): NumPy's functions, off by a unit in the last place.

Which way depends on the place in the array, its size and its layout, as where a vector kernel leaves some elements to a
scalar one. So it shows, on any processor, what another one's kernels may do. Exact results, such as exp(0) = 1, stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

FUNCTIONS = (
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "cbrt"),
    *("sin", "cos", "tan", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "arcsinh", "arccosh", "arctanh"),
)


def shaken(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` whose results are one unit too large, right and one too small, in turn."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        values = np.asarray(result)
        if values.dtype.kind != "f":
            return result
        layout = values.size + (not np.asarray(arguments[0]).flags.c_contiguous)
        ways = (np.arange(values.size).reshape(values.shape) + layout) % 3
        kept = (ways == 0) | (values == np.rint(values)) | ~np.isfinite(values)
        with np.errstate(all="ignore"):
            beyond = np.nextafter(values, np.where(ways == 1, np.inf, -np.inf).astype(values.dtype))
        moved = np.where(kept, values, beyond)
        if options.get("out") is not None:
            result[...] = moved
            return result
        return moved if values.ndim else moved[()]

    return call


for name in FUNCTIONS:
    setattr(np, name, shaken(getattr(np, name)))

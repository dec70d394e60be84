"""Exchanges with one encrypted layer, and what they must give, for the tests of ``privtuner.linear``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from precision import assert_within
from privtuner import linear

PRESETS = linear.PRESETS
DIRECTIONS: tuple[linear.Direction, ...] = ("forward", "backward")
HEADER, REQUEST_PREFIX, BLOCK_PREFIX = 64, 112, 88  # bytes
N = 2048
WORD = {"linear-w8": 4, "linear-w16": 8}  # bytes of a residue
OUTPUT = {"linear-w8": 3, "linear-w16": 4}  # bytes of an output in a reply
Q = {"linear-w8": 4293918721, "linear-w16": 1125899903827969}
LARGEST = {"linear-w8": 127, "linear-w16": 32639}


def layer(d_out: int = 40, d_in: int = 24, preset: str = "linear-w8", seed: int = 0) -> linear.Prepared:
    return linear.prepare(np.random.default_rng(seed).standard_normal((d_out, d_in)), preset)


def batch(tokens: int, features: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((tokens, features)).astype(np.float32)


def features_in(prepared: linear.Prepared, direction: str) -> int:
    return prepared.public.d_in if direction == "forward" else prepared.public.d_out


def features_out(prepared: linear.Prepared, direction: str) -> int:
    return prepared.public.d_out if direction == "forward" else prepared.public.d_in


def product(prepared: linear.Prepared, x: npt.ArrayLike, direction: str = "forward") -> npt.NDArray[np.longdouble]:
    """The product with the quantised weight: 64 bits of mantissa and an exponent no case leaves."""
    wide = np.asarray(x).astype(np.float32).astype(np.longdouble)
    weight = prepared.quantised().astype(np.longdouble)
    delta = prepared.public.delta.astype(np.longdouble)
    return (wide @ weight.T) * delta if direction == "forward" else (wide * delta) @ weight


def exchange(
    prepared: linear.Prepared,
    x: npt.ArrayLike,
    direction: linear.Direction = "forward",
    masks: linear.MaskCache | None = None,
) -> npt.NDArray[np.float32]:
    request, secret = linear.encrypt(x, prepared.public, direction, masks)
    return linear.decrypt(linear.apply(prepared, request), secret)


def check_result(prepared: linear.Prepared, x: Any, y: npt.NDArray[np.float32], direction: linear.Direction) -> None:
    """Every output is within the guaranteed error."""
    assert y.dtype == np.float32
    assert_within(product(prepared, x, direction), y, linear.error_bound(prepared.public, x, direction))


def check_exchange(
    prepared: linear.Prepared,
    x: Any,
    direction: linear.Direction = "forward",
    masks: linear.MaskCache | None = None,
) -> None:
    check_result(prepared, x, exchange(prepared, x, direction, masks), direction)

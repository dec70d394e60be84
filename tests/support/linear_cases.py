"""Exchanges with one encrypted layer, and what they must give, for the tests of ``privtuner.linear``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from precision import assert_within
from privtuner import _core, linear, wire
from privtuner.parties import LinearServer

PRESETS = linear.PRESETS
DIRECTIONS: tuple[linear.Direction, ...] = ("forward", "backward")
REQUEST_PREFIX, BLOCK_PREFIX = 112, 88  # bytes
MASK_SEED = slice(72, 104)  # of a request
N = 2048
_INFO = {preset: _core.preset_info(preset) for preset in PRESETS}  # test_linear_arguments has their numbers
WORD = {preset: info["word_bytes"] for preset, info in _INFO.items()}  # bytes of a residue
OUTPUT = {preset: info["reply_bytes"] for preset, info in _INFO.items()}  # bytes of an output in a reply
DROPPED = {preset: info["dropped_bits"] for preset, info in _INFO.items()}
Q = {preset: info["q"] for preset, info in _INFO.items()}
LARGEST = {preset: info["max_weight"] for preset, info in _INFO.items()}


def layer(d_out: int = 40, d_in: int = 24, preset: str = "linear-w8", seed: int = 0) -> linear.QuantisedWeight:
    return linear.prepare(np.random.default_rng(seed).standard_normal((d_out, d_in)), preset)


def batch(tokens: int, features: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((tokens, features)).astype(np.float32)


def features_in(prepared: linear.QuantisedWeight, direction: str) -> int:
    return prepared.spec.d_in if direction == "forward" else prepared.spec.d_out


def features_out(prepared: linear.QuantisedWeight, direction: str) -> int:
    return prepared.spec.d_out if direction == "forward" else prepared.spec.d_in


def product(
    prepared: linear.QuantisedWeight, x: npt.ArrayLike, direction: str = "forward"
) -> npt.NDArray[np.longdouble]:
    """The product with the quantised weight: exact integers, times scales with 64 bits of mantissa."""
    wide, weight = np.asarray(x).astype(np.float32).astype(np.float64), prepared.quantised()
    delta = prepared.spec.scale.astype(np.longdouble)
    if direction == "forward":
        return exact_product(wide, weight.T) * delta
    scaled = wide * delta
    high = scaled.astype(np.float64)
    return exact_product(high, weight) + exact_product((scaled - high).astype(np.float64), weight)


def exact_product(x: npt.NDArray[np.float64], weight: npt.NDArray[Any]) -> npt.NDArray[np.longdouble]:
    """x @ weight, (tokens, depth) times (depth, columns) of integers, rounded to 64 bits of mantissa.

    Each value of x is cut into digits of its row's own power of two, so short that float64 adds their products exactly,
    in whatever order a library takes them.
    """
    bits = 53 - (int(np.abs(weight.astype(np.int64)).max()) * weight.shape[0]).bit_length()
    assert bits >= 8, "the sums leave no room for digits"
    operand = weight.astype(np.float64)
    rest, result = x, np.zeros((x.shape[0], weight.shape[1]), np.longdouble)
    unit = np.ldexp(1.0, np.frexp(np.abs(x).max(axis=1, keepdims=True))[1] - bits)
    while rest.any():
        digits = np.trunc(rest / unit)
        rest = rest - digits * unit
        result += (digits @ operand) * unit
        unit = np.ldexp(unit, -bits)
    return result


def blocks_of(server: LinearServer, prepared: linear.QuantisedWeight, request: Any, block_rows: int) -> Iterator[Any]:
    """The blocks of a server's reply, so many outputs each."""
    return server.answer(prepared, request, block_rows * 4 * wire.peek(request).tokens)


def check_blocks(
    engine: Any, owner: Any, prepared: linear.QuantisedWeight, tokens: int, block_rows: int, host: Any
) -> None:
    """An engine and an owner, three times in both directions: its replies are the core's in blocks of that size, block
    by block, and its results right; ``host`` brings these to NumPy."""
    for direction in DIRECTIONS:
        x = batch(tokens, features_in(prepared, direction))
        for _ in range(3):  # from the second one on with the product of the mask
            request, secret = owner.encrypt(x, prepared.spec, direction)
            reply = list(blocks_of(engine, prepared, request, block_rows))
            assert reply == list(linear.apply_blocks(prepared, request, block_rows))
            check_result(prepared, x, host(owner.decrypt(reply, secret)), direction)


def exchange(
    prepared: linear.QuantisedWeight,
    x: npt.ArrayLike,
    direction: linear.Direction = "forward",
    masks: linear.MaskCache | None = None,
    on: Any = linear,
) -> npt.NDArray[np.float32]:
    """What comes back decrypted; ``on``: the module of the four functions, or a `backends.Backend`."""
    request, secret = on.encrypt(x, prepared.spec, direction, masks)
    return on.decrypt(on.apply(prepared, request), secret)


def check_result(
    prepared: linear.QuantisedWeight, x: Any, y: npt.NDArray[np.float32], direction: linear.Direction
) -> None:
    """Every output is within the guaranteed error."""
    assert y.dtype == np.float32
    assert_within(product(prepared, x, direction), y, linear.error_bound(prepared.spec, x, direction))


def check_exchange(
    prepared: linear.QuantisedWeight,
    x: Any,
    direction: linear.Direction = "forward",
    masks: linear.MaskCache | None = None,
    on: Any = linear,
) -> None:
    check_result(prepared, x, exchange(prepared, x, direction, masks, on), direction)

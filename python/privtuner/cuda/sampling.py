"""Random polynomials on the device: the samplers of the C++ core, the same values from the same seeds.

A seed of 32 bytes makes independent keystreams, one for each (domain, index, sub-index), by ChaCha20 (RFC 8439). A row
of samples takes one of them from its beginning. Secret seeds stay on the device as eight words; whoever made them
wipes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from privtuner.cuda.device import Device, constant
from privtuner.errors import InputError

__all__ = ["ERROR", "MASK", "MAX_SAMPLES", "SECRET", "binomial", "seed_words", "ternary", "uniform", "wipe"]

MASK, SECRET, ERROR = 0, 1, 2
"""Domains: what a keystream is for."""

MAX_SAMPLES = 1 << 17
"""The most samples of one row, as in the C++ core."""

_THREADS = 128
_SHARED_BYTES = 35 * 4 * _THREADS  # draw_bytes of sampling.cuh
_BINOMIAL_THREADS = 256  # at most
_GROUP, _GROUP_BLOCKS = 48, 4  # samples that take four keystream blocks
_SHARED_BLOCK = 17 * 4  # bytes of a keystream block in shared memory


def seed_words(device: Device, seed: bytes | bytearray | memoryview) -> Any:
    """Upload a seed.

    Args:
        device: where to.
        seed: 32 bytes.

    Returns:
        Device array of 8 uint32. Wipe it after use if the seed is secret.

    Raises:
        InputError: not 32 bytes.
    """
    if len(seed) != 32:
        raise InputError(f"a seed of {len(seed)} bytes; pass 32")
    return device.upload(np.frombuffer(seed, "<u4"), "a seed")


def wipe(device: Device, array: Any) -> None:
    """Write zeros over a device array, after what the current stream holds by now.

    Args:
        device: where it lies.
        array: any array of the device, contiguous or not.
    """
    with device.active():
        array.fill(0)


def uniform(
    device: Device,
    seed: bytes | Any,
    domain: int,
    first: int,
    rows: int,
    n: int,
    moduli: int | Sequence[int],
    word_bytes: int,
    out: Any = None,
    *,
    sub_indices: Sequence[int] | None = None,
) -> Any:
    """Residues uniform modulo q, by rejection.

    Sample i is keystream word i, masked to q's bit length. Words that are >= q are replaced, in order of i, by the next
    words < q from the first whole 64-byte block behind those n on (cpp/include/privtuner/ring/sampling.hpp).

    Args:
        device: where to draw them.
        seed: 32 bytes if it is public, or a device array of 8 uint32 as from `seed_words`.
        domain: the domain of the keystreams.
        first: stream index of the first row; the following ones count up.
        rows: how many stream indices.
        n: samples in a row, 1 to 2^17.
        moduli: one for all rows, or one for each row; with ``sub_indices`` one for each of these. 2 or more each.
        word_bytes: 4 or 8, of a keystream word and of a sample.
        out: where to write, a contiguous device array as described under Returns; a new one when None.
        sub_indices: draw these of every stream index. Without them, sub-index 0.

    Returns:
        Device array of uint32 or uint64, shape (rows, n), or (rows, len(sub_indices), n): values in [0, q).

    Raises:
        InputError: an argument is not as described.
        EngineError: the device's memory does not suffice.
    """
    if word_bytes not in (4, 8):
        raise InputError(f"word_bytes is {word_bytes}; choose 4 or 8")
    _check(domain, first, rows, n)
    dtype = np.dtype(np.uint32 if word_bytes == 4 else np.uint64)
    subs = [0] if sub_indices is None else _sub_indices(sub_indices)
    if isinstance(moduli, (int, np.integer)):
        listed = [int(moduli)]
    else:
        listed = [int(q) for q in moduli]
        expected, what = (rows, "rows") if sub_indices is None else (len(subs), "sub-indices")
        if len(listed) != expected:
            raise InputError(f"{len(listed)} moduli for {expected} {what}; pass one for each, or one number for all")
    for q in listed:
        if not 2 <= q < 1 << 8 * word_bytes:
            raise InputError(f"q = {q} is not in [2, 2^{8 * word_bytes}), the range of {word_bytes}-byte words")
    shape = (rows, n) if sub_indices is None else (rows, len(subs), n)
    out = _target(device, out, shape, dtype)
    if rows * len(subs) > 0:
        words = _seed(device, seed)
        device.launch(
            f"uniform{8 * word_bytes}",
            (_blocks(rows * len(subs)),),
            _THREADS,
            out,
            words,
            constant(device, np.array(subs, np.uint32)),
            constant(device, np.array(listed, dtype)),
            len(listed),
            len(subs),
            domain,
            first,
            n,
            shared=_SHARED_BYTES,
        )
    return out


def ternary(device: Device, seed: Any, first: int, rows: int, n: int, out: Any = None) -> Any:
    """Secret polynomials with coefficients uniform in {-1, 0, 1}, by rejection of single bytes.

    Args:
        device: where to draw them.
        seed: device array of 8 uint32.
        first: stream index of the first row in the domain `SECRET` (sub-index 0); the following ones count up.
        rows: how many.
        n: samples in a row, 1 to 2^17.
        out: contiguous device array of int8, shape (rows, n), to write to; a new one when None.

    Returns:
        Device array of int8, shape (rows, n). Secret: `wipe` it after use.

    Raises:
        InputError: an argument is not as described.
        EngineError: the device's memory does not suffice.
    """
    _check(SECRET, first, rows, n)
    out = _target(device, out, (rows, n), np.dtype(np.int8))
    if rows > 0:
        words = _seed(device, seed)
        device.launch("ternary", (_blocks(rows),), _THREADS, out, words, first, n, shared=_SHARED_BYTES)
    return out


def binomial(
    device: Device, seed: Any, first: int, rows: int, sub_indices: Sequence[int], n: int, out: Any = None
) -> Any:
    """Errors of the centred binomial distribution with eta = 21: a population count of 42 bits, minus 21.

    Where the C++ core draws fewer than n samples of a stream, they are the first ones of these.

    Args:
        device: where to draw them.
        seed: device array of 8 uint32.
        first: stream index of the first row in the domain `ERROR` (a feature); the following ones count up.
        rows: how many stream indices.
        sub_indices: draw these of every stream index (groups of tokens).
        n: samples in a row, 1 to 2^17.
        out: contiguous device array of int8, shape (rows, len(sub_indices), n), to write to; a new one when None.

    Returns:
        Device array of int8, shape (rows, len(sub_indices), n), values in [-21, 21]. Secret: `wipe` it after use.

    Raises:
        InputError: an argument is not as described.
        EngineError: the device's memory does not suffice.
    """
    _check(ERROR, first, rows, n)
    subs = _sub_indices(sub_indices)
    out = _target(device, out, (rows, len(subs), n), np.dtype(np.int8))
    blocks = -(-n // _GROUP) * _GROUP_BLOCKS
    threads = min(_BINOMIAL_THREADS, -(-blocks // 32) * 32)
    tiles = -(-blocks // threads)
    if rows * len(subs) > 0:
        device.launch(
            "binomial",
            (_blocks(rows * len(subs) * tiles),),
            threads,
            out,
            _seed(device, seed),
            constant(device, np.array(subs, np.uint32)),
            len(subs),
            tiles,
            first,
            n,
            shared=_SHARED_BLOCK * threads,
        )
    return out


def _check(domain: int, first: int, rows: int, n: int) -> None:
    if domain not in (MASK, SECRET, ERROR):
        raise InputError(f"domain {domain} is none of 0 (mask), 1 (secret) and 2 (error)")
    if not 1 <= n <= MAX_SAMPLES:
        raise InputError(f"{n} samples in one row; draw 1 to {MAX_SAMPLES}")
    if first < 0 or rows < 0 or first + rows > 1 << 32:
        raise InputError(f"{rows} rows from stream index {first} on: indices are those from 0 to 2^32 - 1")


def _sub_indices(given: Sequence[int]) -> list[int]:
    for sub in given:
        if not 0 <= sub < 1 << 32:
            raise InputError(f"sub-index {sub} is not in [0, 2^32)")
    return list(given)


def _seed(device: Device, seed: Any) -> Any:
    words = seed_words(device, seed) if isinstance(seed, (bytes, bytearray, memoryview)) else seed
    if words.shape != (8,):  # the launch checks the rest
        raise InputError(f"a seed of shape {words.shape}; pass 8 words of uint32")
    return words


def _target(device: Device, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    if out is None:
        return device.empty(shape, dtype, "random polynomials")
    if out.shape != shape or out.dtype != dtype:
        raise InputError(f"out is {out.dtype} {out.shape}; it must be {dtype} {shape}")
    return out


def _blocks(count: int) -> int:
    if count >= 1 << 31:
        raise InputError(f"{count} blocks of threads in one launch; draw fewer rows at once")
    return count

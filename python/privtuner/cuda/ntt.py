"""Negacyclic number-theoretic transforms on a device, word for word those of the native library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.cuda.device import Device
from privtuner.errors import InputError

__all__ = ["Transforms"]

_MIN_LOG, _MAX_LOG = 10, 16
_TILE_LOG = 12  # most words that a block transforms in shared memory
_ROUND_LOG = 4  # 16 words a thread: kRoundLog of the kernels
_COLUMN_THREADS_LOG = 7
_WORD_THREADS_LOG, _PER_THREAD_LOG = 8, 2  # of products: kPerThread of the kernels


class Transforms:
    """Transforms of rows of ``n`` words modulo any of ``primes``, with their tables on the device.

    ``order`` says which primes: row r of an array (all its axes but the last taken together) is modulo
    ``primes[order[r % len(order)]]``. It is a device array of uint32, its values are the caller's responsibility.
    Rows of one prime share its tables best when they are len(order) apart.

    Launches on the current stream and does not wait. Values are in natural order, transforms in bit-reversed order:
    value i is a(psi^(2 brv(i) + 1)), psi the root the native library takes. All words are in [0, q). No branch and no
    address depends on the words, so they may be secret.

    Args:
        device: where the arrays are.
        n: words of a row, a power of two from 1,024 to 65,536.
        primes: q = 1 modulo 2 n, below 2^32 for words of 4 bytes and below 2^61 for words of 8.
        word_bytes: 4 (arrays of uint32) or 8 (uint64).

    Raises:
        InputError: no such n, prime or word.
        EngineError: no memory is left for the tables, 4 n words a prime.
    """

    def __init__(self, device: Device, n: int, primes: Sequence[int], word_bytes: int) -> None:
        if word_bytes not in (4, 8):
            raise InputError(f"words of {word_bytes} bytes: choose 4 or 8")
        if n.bit_count() != 1 or not 1 << _MIN_LOG <= n <= 1 << _MAX_LOG:
            raise InputError(f"n is {n}; give a power of two from {1 << _MIN_LOG} to {1 << _MAX_LOG}")
        if len(primes) == 0:
            raise InputError("no primes: give at least one")
        self._device = device
        self.n, self.word_bytes = n, word_bytes
        self.primes = tuple(int(prime) for prime in primes)
        self.dtype: Any = np.dtype(np.uint32 if word_bytes == 4 else np.uint64)
        self._bits = 8 * word_bytes
        self._log_n = n.bit_length() - 1

        tables = np.empty((4, len(primes), n), self.dtype)
        last = np.empty((len(primes), 4), self.dtype)
        for index, prime in enumerate(self.primes):
            try:
                *rows, last[index] = _core.ntt_tables(n, prime, word_bytes)
            except (ValueError, TypeError) as error:
                raise InputError(f"prime {prime}: {error}") from error
            tables[:, index] = rows
        what = f"the transform's tables of {len(primes)} primes"
        self.roots, self.root_companions = device.upload(tables[0], what), device.upload(tables[1], what)
        self.inverse_roots, self.inverse_root_companions = (
            device.upload(tables[2], what),
            device.upload(tables[3], what),
        )
        self._last = last
        self._scales = device.upload(last)
        self._constants = device.upload(np.array([self._constant(prime) for prime in self.primes], self.dtype))

    def forward(self, words: Any, order: Any) -> None:
        """Transform every row, in place.

        Args:
            words: contiguous device array (..., n) of the transforms' dtype, values in [0, q).
            order: which primes; see the class.

        Raises:
            InputError: another dtype or shape, not contiguous, or rows that are no multiple of len(order).
        """
        period, repeats = self._rows(words, order)
        if repeats == 0:
            return
        tables = (self._constants, order, self.roots, self.root_companions, self._log_n)
        if self._log_n > _TILE_LOG:
            self._columns("forward", period * repeats, words, *tables, self._log_n - _TILE_LOG, period, repeats)
        self._tiles("forward", period * repeats, words, *tables, min(self._log_n, _TILE_LOG), period, repeats)

    def inverse(self, words: Any, order: Any, scales: Any = None) -> None:
        """Undo `forward` on every row, in place.

        Args:
            words: contiguous device array (..., n) of the transforms' dtype, values in [0, q).
            order: which primes; see the class.
            scales: what `scales` gave for this order: rows come out times its factors, at no further cost.

        Raises:
            InputError: another dtype or shape, not contiguous, or rows that are no multiple of len(order).
        """
        period, repeats = self._rows(words, order)
        if scales is not None and scales.shape != (period, 4):
            raise InputError(f"scales of shape {scales.shape} for an order of {period}: make them by Transforms.scales")
        if repeats == 0:
            return
        scaled = (self._scales, 0) if scales is None else (scales, 1)
        tables = (self._constants, order, self.inverse_roots, self.inverse_root_companions, *scaled, self._log_n)
        self._tiles("inverse", period * repeats, words, *tables, min(self._log_n, _TILE_LOG), period, repeats)
        if self._log_n > _TILE_LOG:
            self._columns("inverse", period * repeats, words, *tables, self._log_n - _TILE_LOG, period, repeats)

    def scales(self, order: Sequence[int], factors: Sequence[int]) -> Any:
        """Make the scales of an inverse whose row r comes out times factors[r % len(order)]; public factors only.

        Args:
            order: indices of primes, on the host.
            factors: one integer for each.

        Returns:
            A device array for `inverse`.

        Raises:
            InputError: another number of factors, or an index that is none of a prime.
        """
        if len(factors) != len(order):
            raise InputError(f"{len(factors)} factors for an order of {len(order)}: give one each")
        rows: npt.NDArray[Any] = np.empty((len(order), 4), self.dtype)
        for row, (index, factor) in enumerate(zip(order, factors, strict=True)):
            if not 0 <= index < len(self.primes):
                raise InputError(f"order holds {index}; there are {len(self.primes)} primes")
            for k in (0, 2):
                value = int(self._last[index, k]) * int(factor) % self.primes[index]
                rows[row, k], rows[row, k + 1] = value, self._companion(value, self.primes[index])
        return self._device.upload(rows)

    def prepare(self, words: Any, order: Any) -> tuple[Any, Any]:
        """What `multiply` needs of factors, without a division or a branch: they may be secret.

        Args:
            words: contiguous device array (..., n) of the transforms' dtype, values in [0, q).
            order: which primes; see the class.

        Returns:
            Two arrays (rows, n), values and companions; opaque, to be wiped by the caller if the words are secret.

        Raises:
            InputError: another dtype or shape, not contiguous, or rows that are no multiple of len(order).
            EngineError: no memory is left for them.
        """
        period, repeats = self._rows(words, order)
        values, companions = (
            self._device.empty((period * repeats, self.n), self.dtype, "prepared factors") for _ in range(2)
        )
        if repeats != 0:
            arguments = (words, values, companions, self._constants, order, self._log_n, period, repeats)
            self._products("prepare", period * repeats, *arguments)
        return values, companions

    def multiply(self, words: Any, values: Any, companions: Any, order: Any, out: Any) -> None:
        """Word by word, out = words times factors modulo q, in [0, q).

        Args:
            words: contiguous device array (..., n) of the transforms' dtype; any words.
            values: values from `prepare`, contiguous (..., n): row r of the words is multiplied by row r % (rows of
                values), which must be modulo the same prime.
            companions: companions from `prepare`, likewise.
            order: which primes; see the class.
            out: array of the shape of words; may be words.

        Raises:
            InputError: other dtypes or shapes, not contiguous, or rows that are no multiple of len(order) or of the
                factors' rows.
        """
        period, repeats = self._rows(words, order)
        rows, factors = period * repeats, self._count(values, "values")
        if self._count(companions, "companions") != factors or self._count(out, "out") != rows:
            raise InputError(f"{rows} rows times {factors}: companions as many as values, out as many as words")
        if rows == 0:
            return
        if factors == 0 or rows % factors != 0:
            raise InputError(f"{rows} rows times {factors}: the factors' rows must divide the words' rows")
        arguments = (words, values, companions, out, self._constants, order, self._log_n, period)
        self._products("multiply", rows, *arguments, factors, rows // factors)

    def _rows(self, words: Any, order: Any) -> tuple[int, int]:
        """Length of the order, and how often it is repeated."""
        rows = self._count(words, "words")
        if order.dtype != np.uint32 or order.ndim != 1 or order.shape[0] == 0:
            raise InputError(f"order: expected one axis of uint32, got shape {order.shape} of {order.dtype}")
        period = int(order.shape[0])
        if rows % period != 0:
            raise InputError(f"{rows} rows for an order of {period}: give a multiple of it")
        return period, rows // period

    def _count(self, words: Any, what: str) -> int:
        if words.dtype != self.dtype or words.ndim == 0 or words.shape[-1] != self.n:
            raise InputError(f"{what}: expected rows of {self.n} {self.dtype}, got {words.shape} of {words.dtype}")
        if not words.flags.c_contiguous:
            raise InputError(f"{what}: the array is not contiguous; copy it")
        return int(words.size) // self.n

    def _columns(self, kernel: str, rows: int, *arguments: Any) -> None:
        log_parts = self._log_n - _ROUND_LOG - _COLUMN_THREADS_LOG
        name = f"ntt{self._bits}_{kernel}_columns"
        self._device.launch(name, (rows << log_parts,), 1 << _COLUMN_THREADS_LOG, *arguments, log_parts)

    def _tiles(self, kernel: str, rows: int, *arguments: Any) -> None:
        tile = min(self.n, 1 << _TILE_LOG)
        shared = (tile + (tile >> _ROUND_LOG)) * self.word_bytes
        name = f"ntt{self._bits}_{kernel}_tiles"
        self._device.launch(name, (rows * (self.n // tile),), tile >> _ROUND_LOG, *arguments, shared=shared)

    def _products(self, kernel: str, rows: int, *arguments: Any) -> None:
        log_parts = self._log_n - _WORD_THREADS_LOG - _PER_THREAD_LOG
        name = f"ntt{self._bits}_{kernel}"
        self._device.launch(name, (rows << log_parts,), 1 << _WORD_THREADS_LOG, *arguments, log_parts)

    def _constant(self, q: int) -> tuple[int, int, int, int]:
        """What kernels take of a prime: q, 2^64 mod q as a factor, 1/q modulo a word."""
        two64 = (1 << 64) % q
        return q, two64, self._companion(two64, q), pow(q, -1, 1 << self._bits)

    def _companion(self, value: int, q: int) -> int:
        """The companion of a factor that is in Montgomery form (4 bytes) or a plain number (8 bytes)."""
        if self.word_bytes == 8:
            return (value << 64) // q
        return value * pow(q, -1, 1 << 32) % (1 << 32)

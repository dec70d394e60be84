"""The word operations of CKKS on device arrays: what the native evaluator does to a tensor's residues.

A tensor's words are a contiguous uint64 array (features, 2, limbs, N): NTT domain, row ``limb`` modulo prime ``limb``
of the chain, below it. An operand of one feature serves every feature of the result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.cuda import gemm
from privtuner.cuda.device import Device
from privtuner.cuda.ntt import Transforms

__all__ = ["Words"]

Array = Any
"""An array of the device."""

_THREADS = 256
_WORDS, _SUM_WORDS = 4, 2  # of a thread: kWords and kSumWords of the kernels
_TARGETS = 8  # kTargets of the kernels
_TERMS = 4  # kTerms of the kernels
_WORK_BYTES = 256 << 20  # enough for a GPU to be busy for longer than launches take
_ALIVE = 8  # tensors of a circuit that shall fit beside each other in as much memory as work takes
_STAGING_BYTES = 4 << 20


class Words:
    """Word operations for one parameter set on one device.

    Every operation fills ``out`` and returns nothing; it is launched on the current stream, one stream at a time, and
    not waited for. Features are processed in chunks that bound the work memory. Threads hold ``lock`` meanwhile.

    Args:
        device: where the arrays are.
        parameters: the parameters of the tensors.
        work_bytes: bytes of work memory for one operation; a single feature takes what it needs. None: 256 MiB, or a
            quarter of what is free if that is less.
    """

    def __init__(self, device: Device, parameters: _core.CkksParameters, work_bytes: int | None = None) -> None:
        self._device = device
        self._core = parameters
        self.lock = threading.RLock()
        self.n = parameters.ring_dimension
        self._primes = [int(prime) for prime in parameters.primes]
        self._specials, self._max_limbs = parameters.special_count, parameters.max_limbs
        self._work_bytes = min(_WORK_BYTES, device.free_bytes() // 4) if work_bytes is None else work_bytes
        words = 2 * self._max_limbs * self.n  # of a feature
        self.batch = max(1, self._work_bytes // (8 * _ALIVE * words))
        """Features that a circuit takes at once where it could take one after the other."""
        self._transforms = Transforms(device, self.n, self._primes, 8)
        self._moduli = device.upload(np.array([_constants(prime) for prime in self._primes], np.uint64))
        self._staging = _Staging(device)
        self._digits = lru_cache(None)(self._make_digits)
        self._division = lru_cache(None)(self._make_division)
        self._chain = lru_cache(None)(lambda limbs: device.upload(np.arange(limbs, dtype=np.uint32)))
        self._permutation = lru_cache(None)(lambda element: device.upload(parameters.galois_permutation(element)))

    def empty(self, features: int, limbs: int) -> Array:
        """Room for a tensor.

        Raises:
            EngineError: the device has not that much memory left.
        """
        return self._device.empty((features, 2, limbs, self.n), np.uint64, f"a tensor of {features} features")

    # Sums

    def add(self, out: Array, x: Array, y: Array, minus: bool) -> None:
        """x + y, or x - y."""
        features, _, limbs, _ = out.shape
        self._launch(
            "residues_add",
            (features, limbs, 2),
            _WORDS,
            *(out, x, y, self._moduli, self.n, features, limbs, _step(x), _step(y), int(minus)),
        )

    def sum(self, out: Array, x: Array) -> None:
        """The sum over the features of x."""
        features, _, limbs, _ = x.shape
        self._launch("residues_sum", (1, limbs, 2), 1, out, x, self._moduli, self.n, features, limbs)

    def copy(self, out: Array, parts: Sequence[Array]) -> None:
        """Copy the features of all parts one after the other, their first limbs."""
        begin = 0
        for part in parts:
            out[begin : begin + len(part)] = part[:, :, : out.shape[2]]
            begin += len(part)

    def combine(
        self,
        out: Array,
        terms: Sequence[Array],
        weights: npt.NDArray[np.uint64],
        constants: npt.NDArray[np.uint64] | None,
        rescaled: bool,
    ) -> None:
        """The sum of weights[:, t, f] terms[t][f], plus constants[:, f]; divided by the last prime if rescaled.

        Args:
            out: one limb less than the sum if rescaled.
            terms: tensors of at least the sum's limbs.
            weights: (limbs, terms, features), residues.
            constants: (limbs, features), residues.
            rescaled: whether to divide.
        """
        features, _, kept, _ = out.shape
        if not rescaled:
            self._add_up(out, out, terms, weights, constants, kept, 2 * kept, accumulate=False)
            return
        division = self._division("last", kept + 1)
        for begin, end in self._chunks(features, 2 + 2 * kept):
            divided, rest = self._work("a rescaled sum", (end - begin, 2, 1), (end - begin, 2, kept))
            self._add_up(
                out[begin:end],
                divided,
                [_chunk(term, begin, end) for term in terms],
                weights[:, :, begin:end],
                None if constants is None else constants[:, begin:end],
                kept,
                2 * kept,
                accumulate=False,
            )
            self._divide(out[begin:end], out[begin:end], divided, rest, division)

    def _add_up(
        self,
        kept: Array,
        divided: Array,
        terms: Sequence[Array],
        weights: npt.NDArray[np.uint64],
        constants: npt.NDArray[np.uint64] | None,
        kept_limbs: int,
        kept_stride: int,
        *,
        accumulate: bool,
    ) -> None:
        limbs, features = len(weights), len(kept)
        shift = self._moduli if constants is None else self._staging.put(constants)
        for first in range(0, max(1, len(terms)), _TERMS):
            some = list(terms[first : first + _TERMS])
            given = [*some, *[self._moduli] * (_TERMS - len(some))]  # what is not there is not read
            factors = self._moduli if not some else self._staging.put(weights[:, first : first + _TERMS])
            self._launch(
                "residues_combine",
                (features, limbs, 2),
                _SUM_WORDS,
                *(kept, divided, *given, factors, shift, self._moduli, self.n, features, kept_limbs, kept_stride),
                *(limbs - kept_limbs, len(some)),
                *(_step(term) if term is not self._moduli else 0 for term in given),
                *(term.shape[2] if term is not self._moduli else 0 for term in given),
                int(constants is not None and first == 0),
                int(accumulate or first > 0),
            )

    # Products

    def plain(self, out: Array, x: Array, coefficients: npt.NDArray[np.int64]) -> None:
        """x times ring elements with these coefficients (features, N), divided by the last prime."""
        features, _, kept, n = out.shape
        limbs = kept + 1
        division = self._division("last", limbs)
        for begin, end in self._chunks(features, 1 + limbs + 2 + 2 * kept):
            count = end - begin
            rows, divided, rest = self._work("a product", (count, limbs), (count, 2, 1), (count, 2, kept))
            clear = self._device.upload(np.ascontiguousarray(coefficients[begin:end]))
            self._launch("residues_reduce", (count, limbs), _WORDS, rows, clear, self._moduli, n, count, limbs)
            self._transforms.forward(rows, self._chain(limbs))
            self._multiply_rows(out[begin:end], divided, x[begin:end], rows, kept, limbs)
            self._divide(out[begin:end], out[begin:end], divided, rest, division)

    def monomial(self, out: Array, x: Array, power: int) -> None:
        """x times X^power."""
        limbs = out.shape[2]
        rows = self._device.empty((limbs, self.n), np.uint64)
        rows[...] = 0
        rows[:, power] = 1
        self._transforms.forward(rows, self._chain(limbs))
        self._multiply_rows(out, out, x, rows, limbs, 0)

    def _multiply_rows(self, kept: Array, divided: Array, x: Array, rows: Array, kept_limbs: int, step: int) -> None:
        features, _, limbs, n = x.shape
        self._launch(
            "residues_multiply",
            (features, limbs, 2),
            _WORDS,
            *(kept, divided, x, rows, self._moduli, n, features, limbs, kept_limbs, step),
        )

    def matrix(self, out: Array, x: Array, weights: gemm.Weights, transpose: bool) -> None:
        """The matrix, or its transpose, applied to the features of x; some limbs at a time where memory is short."""
        depth, _, limbs, n = x.shape
        moduli = self._primes[:limbs] * 2
        bits = max(prime.bit_length() for prime in moduli)
        flat, target = x.reshape(depth, 2 * limbs, n), out.reshape(len(out), 2 * limbs, n)
        row = gemm.packed_bytes(depth, 1, n, 8, bits)
        if 2 * limbs * row <= self._work_bytes:
            gemm.multiply(weights, transpose, gemm.pack(self._device, flat, bits), moduli, out=target)
            return
        batch = max(1, self._work_bytes // (row + (depth + len(out)) * n * 8))
        for begin in range(0, 2 * limbs, batch):
            some = slice(begin, begin + batch)
            packed = gemm.pack(self._device, self._device.xp.ascontiguousarray(flat[:, some]), bits)
            target[:, some] = gemm.multiply(weights, transpose, packed, moduli[some])

    def product(
        self,
        out: Array,
        x: Array,
        y: Array,
        key: Array,
        *,
        summed: bool,
        multipliers: npt.NDArray[np.uint64] | None,
        terms: Sequence[Array],
        weights: npt.NDArray[np.uint64],
        constants: npt.NDArray[np.uint64] | None,
    ) -> None:
        """Products times multipliers, plus a sum as that of `combine`; relinearised and divided by the last prime.

        Args:
            out: one limb less than the product.
            x: tensor of at least the product's limbs.
            y: likewise.
            key: (digits, 2, primes, N), the relinearisation key.
            summed: the sum over the features of x and y is the one feature of out.
            multipliers: (limbs, features), residues; None: 1.
            terms: added before the division, see `combine`.
            weights: (limbs, terms, features), residues.
            constants: (limbs, features), residues; None: no constants.
        """
        features, _, kept, n = out.shape
        limbs = kept + 1
        digits, division = self._digits(limbs), self._division("special_last", limbs)
        for begin, end in self._chunks(features, 4 * limbs + digits.rows_out + 2 * division.rows_in + 2 * kept):
            count = end - begin
            degree, scaled, extended, divided, rest = self._work(
                "a product",
                *((count, 3, limbs), (count, limbs), (count, digits.rows_out)),
                *((count, 2, division.rows_in), (count, 2, kept)),
            )
            a, b = (x, y) if summed else (_chunk(x, begin, end), _chunk(y, begin, end))
            factors = self._moduli if multipliers is None else self._staging.put(multipliers[:, begin:end])
            self._launch(
                "residues_tensor",
                (count, limbs),
                _SUM_WORDS,
                *(degree, scaled, a, b, factors, self._moduli, n, count, max(len(x), len(y)) if summed else 1, limbs),
                *(_step(a), _step(b), a.shape[2], b.shape[2], int(multipliers is not None)),
            )
            if terms or constants is not None:
                self._add_up(
                    degree,
                    degree,
                    [_chunk(term, begin, end) for term in terms],
                    weights[:, :, begin:end],
                    None if constants is None else constants[:, begin:end],
                    limbs,
                    3 * limbs,
                    accumulate=True,
                )
            self._extend(scaled, extended, digits)
            self._switch(out[begin:end], divided, degree, extended, key, limbs)
            self._divide(out[begin:end], out[begin:end], divided, rest, division)

    # Automorphisms

    def galois(self, outs: Sequence[Array], x: Array, elements: Sequence[int], keys: Mapping[int, Array]) -> None:
        """x under the automorphisms X -> X^element; x is taken apart once for all of them.

        Args:
            outs: one an element.
            x: the tensor.
            elements: odd, 1: a copy.
            keys: (digits, 2, primes, N), of every element but 1.
        """
        features, _, limbs, _ = x.shape
        for out, element in zip(outs, elements, strict=True):
            if element == 1:
                out[...] = x
        switched = [(out, element) for out, element in zip(outs, elements, strict=True) if element != 1]
        if not switched:
            return
        digits, division = self._digits(limbs), self._division("special", limbs)
        for begin, end in self._chunks(features, limbs + digits.rows_out + 2 * division.rows_in + 4 * limbs):
            count = end - begin
            scaled, extended, kept, divided, rest = self._work(
                "a rotation",
                *((count, limbs), (count, digits.rows_out)),
                *((count, 2, limbs), (count, 2, division.rows_in), (count, 2, limbs)),
            )
            scaled[...] = x[begin:end, 1]
            self._extend(scaled, extended, digits)
            for out, element in switched:
                self._switch(kept, divided, x[begin:end], extended, keys[element], limbs)
                self._divide(out[begin:end], kept, divided, rest, division, self._permutation(element))

    # Key switching (Han, Ki, "Better Bootstrapping for Approximate Homomorphic Encryption", 2020, section 3)

    def _extend(self, scaled: Array, extended: Array, digits: _Conversion) -> None:
        """The digits of scaled (features, limbs, N) modulo all other primes; scaled is used up."""
        self._transforms.inverse(scaled, digits.order, digits.scales)
        self._convert(extended, scaled, digits, len(scaled))
        self._transforms.forward(extended, digits.targets)

    def _switch(self, kept: Array, divided: Array, x: Array, extended: Array, key: Array, limbs: int) -> None:
        """The last component of x under another secret, plus the others, times the special primes' product."""
        features, components = x.shape[:2]
        digit_limbs = self._core.digit_limbs
        self._launch(
            "residues_switch",
            (features, limbs + self._specials),
            _SUM_WORDS,
            *(kept, divided, x, extended, key, self._raise, self._moduli, self.n, features, components, limbs),
            *(self._specials, self._max_limbs, -(-limbs // digit_limbs), digit_limbs, kept.shape[2]),
        )

    def _divide(
        self, out: Array, kept: Array, divided: Array, rest: Array, division: _Division, index: Array | None = None
    ) -> None:
        """Divide the primes of divided (used up) out of kept into out, permuted by index."""
        features, _, limbs, _ = kept.shape
        self._transforms.inverse(divided, division.order, division.scales)
        self._convert(rest, divided, division, 2 * features)
        self._transforms.forward(rest, division.targets)
        name = "residues_divide" if index is None else "residues_divide_permuted"
        permuted = () if index is None else (index,)
        self._launch(
            name,
            (features, limbs, 2),
            _WORDS,
            *(out, kept, rest, division.factors, *permuted, self._moduli, self.n, features, limbs),
        )

    def _convert(self, out: Array, x: Array, conversion: _Conversion, vectors: int) -> None:
        c = conversion
        self._launch(
            "residues_convert",
            (vectors, len(c.groups)),
            1,
            *(out, x, c.groups, c.sources, c.inverses, c.targets, c.weights, self._moduli),
            *(self.n, vectors, c.rows_in, c.rows_out, c.width),
            shared=8 * _TARGETS * (c.width + 1),
        )

    # Tables

    @cached_property
    def _raise(self) -> Array:
        return self._device.upload(np.array(self._core.special_products, np.uint64))

    def _make_digits(self, limbs: int) -> _Conversion:
        """Make the conversion from the digits of `limbs` limbs to all primes that are not theirs."""
        primes = [*range(limbs), *range(self._max_limbs, len(self._primes))]
        parts = []
        for digit in range(-(-limbs // self._core.digit_limbs)):
            constants = self._core.digit_conversion(digit, limbs)
            parts.append((constants, [prime for prime in primes if prime not in constants.sources]))
        return _Conversion.of(self._device, self._transforms, parts)

    def _make_division(self, kind: str, limbs: int) -> _Division:
        """Make tables to divide out limb `limbs` - 1 ("last"), special primes ("special"), or both ("special_last")."""
        if kind == "last":
            constants = self._core.last_conversion(limbs)
        else:
            constants = self._core.special_conversion(limbs, kind == "special_last")
        kept = limbs if kind == "special" else limbs - 1
        conversion = _Conversion.of(self._device, self._transforms, [(constants, list(range(kept)))])
        inverse = [int(word) for word in constants.inverse_product[:kept]]
        pairs = [(word, (word << 64) // prime) for word, prime in zip(inverse, self._primes[:kept], strict=True)]
        return _Division(**vars(conversion), factors=self._device.upload(np.array(pairs, np.uint64)))

    # Launching

    def _launch(self, kernel: str, grid: tuple[int, ...], words: int, *arguments: Any, shared: int = 0) -> None:
        """Launch on a grid of features, then rows and components; a thread takes `words` of a row."""
        blocks = self.n // (_THREADS * words)
        self._device.launch(kernel, (grid[0] * blocks, *grid[1:]), _THREADS, *arguments, shared=shared)

    def _chunks(self, features: int, rows: int) -> Iterator[tuple[int, int]]:
        """Ranges of features whose work, `rows` rows each, fits the memory for it."""
        size = max(1, self._work_bytes // (rows * self.n * 8))
        count = -(-features // size)
        for i in range(count):  # of even sizes
            yield features * i // count, features * (i + 1) // count

    def _work(self, what: str, *shapes: tuple[int, ...]) -> list[Array]:
        """Uninitialised rows of these shapes, one piece of memory."""
        sizes = [math.prod(shape) for shape in shapes]
        memory = self._device.empty((sum(sizes), self.n), np.uint64, f"the work space of {what}")
        ends = np.cumsum(sizes).tolist()
        return [
            memory[end - size : end].reshape(*shape, self.n)
            for shape, size, end in zip(shapes, sizes, ends, strict=True)
        ]


@dataclass(frozen=True)
class _Conversion:
    """Tables of a base conversion, on the device: of the inverse transform before it, and of `residues_convert`."""

    order: Array
    """Primes of the rows that go in, ascending."""
    scales: Array
    """Factors of the inverse transform of these rows: the inverse cofactors."""
    groups: Array
    sources: Array
    inverses: Array
    targets: Array
    """Primes of the rows that come out: the order of their transforms, too."""
    weights: Array
    width: int
    rows_in: int
    rows_out: int

    @classmethod
    def of(
        cls, device: Device, transforms: Transforms, parts: Sequence[tuple[_core.BaseConversion, list[int]]]
    ) -> _Conversion:
        """Several conversions beside each other: the constants of each and the primes it leads to."""
        sources = [int(prime) for constants, _ in parts for prime in constants.sources]
        cofactors = [int(word) for constants, _ in parts for word in constants.inverse_cofactor]
        order = sorted(sources)
        width = 1 + max(len(constants.sources) for constants, _ in parts)
        groups: list[tuple[int, int, int, int]] = []
        targets: list[int] = []
        weights: list[npt.NDArray[np.uint64]] = []
        first = 0
        for constants, primes in parts:
            count = len(constants.sources)
            for begin in range(0, len(primes), _TARGETS):
                groups.append((first, count, len(targets) + begin, min(_TARGETS, len(primes) - begin)))
            first += count
            targets += primes
            weights += [np.pad(row, (0, width - 1 - count)) for row in constants.weights[primes]]
        inverses = np.concatenate([constants.inverse_prime for constants, _ in parts])
        return cls(
            order=device.upload(np.array(order, np.uint32)),
            scales=transforms.scales(order, [cofactors[sources.index(prime)] for prime in order]),
            groups=device.upload(np.array(groups, np.uint32).reshape(-1, 4)),
            sources=device.upload(np.array([order.index(prime) for prime in sources], np.uint32)),
            inverses=device.upload(inverses),
            targets=device.upload(np.array(targets, np.uint32)),
            weights=device.upload(np.array(weights, np.uint64).reshape(-1, width)),
            width=width,
            rows_in=len(order),
            rows_out=len(targets),
        )


@dataclass(frozen=True)
class _Division(_Conversion):
    """The conversion of what is divided out, and the division itself."""

    factors: Array
    """Inverses of the product of its primes modulo the limbs that stay, with companions."""


class _Staging:
    """Small arrays on their way to the device, through page-locked memory: no copy waits for the kernels before it.

    The memory is used again only when the device has done everything before; all on one stream.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory = device.page_locked(_STAGING_BYTES)
        self._used = 0
        self._last: Array = None

    def put(self, array: npt.NDArray[Any]) -> Array:
        """Copy to the device, ahead of whatever is launched next."""
        nbytes = array.nbytes
        if nbytes > len(self._memory):
            return self._device.upload(np.ascontiguousarray(array))
        if self._used + nbytes > len(self._memory):
            self._device.download(self._last)  # waits for all copies
            self._used = 0
        host = self._memory[self._used : self._used + nbytes]
        host[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._used += nbytes
        self._last = self._device.empty(array.shape, array.dtype)
        self._device.copy_in(host, self._last)
        return self._last


def _step(x: Array) -> int:
    """Rows from one feature to the next; 0 where one feature serves all."""
    return 0 if len(x) == 1 else 2 * int(x.shape[2])


def _chunk(x: Array, begin: int, end: int) -> Array:
    return x if len(x) == 1 else x[begin:end]


def _constants(prime: int) -> tuple[int, int, int, int]:
    """Constants of a modulus, as the kernels' load_modulus takes them."""
    two64 = (1 << 64) % prime
    return prime, two64, (two64 << 64) // prime, (1 << 64) // prime

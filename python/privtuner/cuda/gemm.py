"""Exact products modulo q of small signed weights with residues, on the tensor cores.

Bytes of residues times bytes of weights, with exact 32-bit sums that are put together modulo q in registers: see
kernels/gemm.cu. The words are those of `_core.ResidueProduct`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.cuda.device import Device, constant
from privtuner.errors import InputError

__all__ = ["Packed", "Weights", "multiply", "pack", "packed_bytes", "workspace_bytes"]

# Constants of kernels/gemm.cu.
_TILE_ROWS = 128
_TILE_COLUMNS = {4: 64, 8: 32}  # by bytes of a word
_STEP = 64
_STAGES = 4
_THREADS = 256
_MAX_BITS = {4: 32, 8: 60}
_PLANES = {4: (4, 4), 8: (5, 8)}  # fewest and most
_MAX_BATCH = 65535


class Weights:
    """A matrix of integers on a device, stored once; it serves W and its transpose.

    Attributes:
        device: that it is on. rows, cols: of W. bytes_per_weight: 1 or 2.
        planes: device array int8 (bytes_per_weight, rows, cols); weight = sum of 256^i planes[i].
    """

    def __init__(self, device: Device, integers: npt.NDArray[np.int8] | npt.NDArray[np.int16]) -> None:
        """Copy ``integers`` to the device, in the current stream: other streams have to wait for it.

        Args:
            device: where to.
            integers: int8, or int16 in [-32639, 32639]; (rows, cols), each 1 to 65536.

        Raises:
            InputError: another type, shape or a weight out of range.
            EngineError: the device has not enough memory.
        """
        if integers.dtype not in (np.int8, np.int16):
            raise InputError(f"weights are {integers.dtype}; give int8 or int16")
        if integers.ndim != 2 or not all(1 <= length <= _core.MAX_DEPTH for length in integers.shape):
            raise InputError(
                f"weights have shape {integers.shape}; give a matrix of 1 to {_core.MAX_DEPTH} rows and columns"
            )
        self.device = device
        self.rows, self.cols = integers.shape
        self.bytes_per_weight = integers.dtype.itemsize
        planes = [integers]
        if self.bytes_per_weight == 2:
            if integers.min() < -_core.MAX_WEIGHT_16 or integers.max() > _core.MAX_WEIGHT_16:
                raise InputError(
                    f"a weight is outside [-{_core.MAX_WEIGHT_16}, {_core.MAX_WEIGHT_16}], where 16-bit ones are"
                )
            planes = [integers.astype(np.int8), ((integers + np.int16(128)) >> 8).astype(np.int8)]  # low: modulo 256
        self.planes = device.upload(np.stack(planes).astype(np.int8), "a weight matrix")

    @property
    def nbytes(self) -> int:
        """Device memory it takes."""
        return int(self.planes.nbytes)


@dataclass(frozen=True)
class Packed:
    """Residues as byte planes, in the order in which a product reads them; from `pack`."""

    device: Device
    depth: int
    batch: int
    columns: int
    word_bytes: int
    bits: int
    """Most bits a modulus may have."""
    data: Any
    """Device array uint8 of `packed_bytes`."""

    @property
    def nbytes(self) -> int:
        """Device memory it takes."""
        return packed_bytes(self.depth, self.batch, self.columns, self.word_bytes, self.bits)


def pack(device: Device, residues: Any, bits: int) -> Packed:
    """Lay residues out for products, in little more time than a copy takes.

    Args:
        device: that has them.
        residues: contiguous device array (depth, batch, columns) of uint32 or uint64, every word below 2^bits. It may
            be changed once the current stream is through.
        bits: length of the longest modulus in bits: up to 32 for uint32, up to 60 for uint64. Memory and time of
            products of uint64 are in proportion to ceil(bits / 8), from 5 on; those of uint32 are the same for all.

    Raises:
        InputError: another type or shape, more than 65536 in depth or 65535 in the batch, or bits out of range.
        EngineError: the device has not enough memory.
    """
    if residues.dtype not in (np.uint32, np.uint64):
        raise InputError(f"residues are {residues.dtype}; give uint32 or uint64")
    if residues.ndim != 3:
        raise InputError(f"residues have shape {residues.shape}; give (depth, batch, columns)")
    depth, batch, columns = residues.shape
    word_bytes = residues.dtype.itemsize
    data = device.empty((packed_bytes(depth, batch, columns, word_bytes, bits),), np.uint8, "residues laid out")
    tile = _TILE_COLUMNS[word_bytes]
    grid = (_ceil(columns, tile), _ceil(depth, _STEP), batch)
    kernel = f"gemm_pack_{_kind(word_bytes, bits)}"
    device.launch(kernel, grid, 4 * tile, data, residues, depth, batch, columns)
    return Packed(device, depth, batch, columns, word_bytes, bits, data)


def multiply(
    weights: Weights,
    transpose: bool,
    packed: Packed,
    moduli: Sequence[int],
    row_begin: int = 0,
    row_count: int | None = None,
    out: Any = None,
) -> Any:
    """sum_k op(W)[row_begin + r, k] residues[k, b, c] mod moduli[b], exactly; op(W) is W or its transpose.

    Puts its work into the current stream and waits for nothing. While it runs it takes `workspace_bytes`.

    Args:
        weights: on the device that has ``packed``.
        transpose: whether op(W) is the transpose.
        packed: residues below their moduli.
        moduli: one for each of the batch; odd, from 3 on, of at most ``packed.bits`` bits.
        row_begin: first row of op(W).
        row_count: how many; all that follow when None.
        out: contiguous device array (row_count, batch, columns) of the residues' type, a new one when None.

    Returns:
        ``out``, every word in [0, modulus).

    Raises:
        InputError: depths or devices differ, rows out of range, other moduli, or ``out`` of another shape or type.
        EngineError: the device has not enough memory.
    """
    device = weights.device
    rows, depth = (weights.cols, weights.rows) if transpose else (weights.rows, weights.cols)
    count = rows - row_begin if row_count is None else row_count
    if packed.device is not device:
        raise InputError(f"the weights are on {device.name} and the residues on {packed.device.name}")
    if packed.depth != depth:
        raise InputError(f"the sum is over {depth} weights a row and {packed.depth} residues a column")
    if row_begin < 0 or count < 1 or row_begin + count > rows:
        raise InputError(f"rows {row_begin} to {row_begin + count} of a matrix of {rows}")
    constants = _constants(moduli, packed)
    shape, dtype = (count, packed.batch, packed.columns), np.dtype(f"u{packed.word_bytes}")
    if out is None:
        out = device.empty(shape, dtype, "a product")
    if out.shape != shape or out.dtype != dtype:
        raise InputError(f"out is {out.dtype} {out.shape}; this product needs {dtype} {shape}")

    left = device.empty((workspace_bytes(weights, transpose, count),), np.uint8, "weights laid out")
    row_tiles, steps = _ceil(count, _TILE_ROWS), _ceil(depth, _STEP)
    device.launch(
        "gemm_left",
        (steps, row_tiles, weights.bytes_per_weight),
        _THREADS,
        left,
        weights.planes,
        weights.rows,
        weights.cols,
        int(transpose),
        row_begin,
        row_begin + count,
        shared=_TILE_ROWS * (_STEP + 4),
    )
    tile = _TILE_COLUMNS[packed.word_bytes]
    grid = (row_tiles * _ceil(packed.columns, tile), 1, packed.batch)
    shared = _STAGES * _STEP * (_TILE_ROWS + tile * _planes(packed.word_bytes, packed.bits))
    sizes = (count, packed.columns, packed.batch, steps)
    table = constant(device, constants)
    for byte in reversed(range(weights.bytes_per_weight)):  # 256 times the high bytes' product, and the low bytes'
        add = int(byte + 1 < weights.bytes_per_weight)
        kernel = f"gemm_{_kind(packed.word_bytes, packed.bits)}"
        device.launch(kernel, grid, _THREADS, out, left, packed.data, table, *sizes, byte, add, shared=shared)
    return out


def packed_bytes(depth: int, batch: int, columns: int, word_bytes: int, bits: int) -> int:
    """Device memory of packed residues: about depth batch columns, times 4 or ceil(bits / 8).

    Raises:
        InputError: as `pack`.
    """
    if not (1 <= depth <= _core.MAX_DEPTH and 1 <= batch <= _MAX_BATCH and columns >= 1):
        raise InputError(
            f"residues of shape ({depth}, {batch}, {columns}); give (depth, batch, columns) of at least 1 each, depth "
            f"up to {_core.MAX_DEPTH}, batch up to {_MAX_BATCH}"
        )
    tile = _TILE_COLUMNS[word_bytes]
    return batch * _ceil(columns, tile) * tile * _ceil(depth, _STEP) * _STEP * _planes(word_bytes, bits)


def workspace_bytes(weights: Weights, transpose: bool, row_count: int | None = None) -> int:
    """Device memory that a product takes beside its operands and its result: that of the weights of its rows."""
    rows, depth = (weights.cols, weights.rows) if transpose else (weights.rows, weights.cols)
    tiles = _ceil(rows if row_count is None else row_count, _TILE_ROWS)
    return weights.bytes_per_weight * tiles * _TILE_ROWS * _ceil(depth, _STEP) * _STEP


def _ceil(length: int, step: int) -> int:
    return -(-length // step)


def _planes(word_bytes: int, bits: int) -> int:
    if not 2 <= bits <= _MAX_BITS[word_bytes]:
        raise InputError(f"bits is {bits}; moduli of uint{8 * word_bytes} words have 2 to {_MAX_BITS[word_bytes]}")
    fewest, most = _PLANES[word_bytes]
    return min(max(_ceil(bits, 8), fewest), most)


def _kind(word_bytes: int, bits: int) -> str:
    """The part of a kernel's name that says its word and planes."""
    return f"u{8 * word_bytes}_{_planes(word_bytes, bits)}"


def _constants(moduli: Sequence[int], packed: Packed) -> npt.NDArray[np.uint64]:
    """What the kernels know of each modulus: PlaneModulus of kernels/gemm.cuh."""
    if len(moduli) != packed.batch:
        raise InputError(f"{len(moduli)} moduli for a batch of {packed.batch}")
    offset = 1 << 63 if packed.word_bytes == 4 else (1 << 63) + (1 << 95)
    words = []
    for q in map(int, moduli):
        if q < 3 or q % 2 == 0 or q.bit_length() > packed.bits:
            raise InputError(f"modulus {q}: these residues were packed for odd ones from 3 on, of {packed.bits} bits")
        two32 = (1 << 32) % q
        words.append((q, (1 << 64) // q, offset % q, two32, (two32 << 64) // q))
    return np.array(words, np.uint64)

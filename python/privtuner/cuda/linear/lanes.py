"""What both halves of the linear scheme share on a device: streams, presets, memory that pieces pass through."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.cuda import sampling
from privtuner.cuda.device import Device, PageLocked
from privtuner.cuda.ntt import Transforms
from privtuner.linear import BytesLike, LayerSpec

__all__ = [
    "PIECE_BYTES",
    "THREADS",
    "TILE_BYTES",
    "WORK_BYTES",
    "Context",
    "Ring",
    "Slot",
    "context_of",
    "lane_rows",
    "message_of",
    "page_locked_view",
    "pieces",
    "tiles",
    "upload_weights",
    "wipe",
]

PIECE_BYTES = 8 << 20
"""Largest piece of a message copied in one go, bytes."""
WORK_BYTES = 256 << 20
"""Device memory a lane takes, bytes, unless one feature needs more."""
THREADS = 256
_TILE_ROWS, _TILE_TOKENS = 32, 128  # of linear.cu
TILE_BYTES = 4 * (_TILE_ROWS + 1) * _TILE_TOKENS
"""Shared memory of a tile that is transposed."""


class Ring:
    """A preset on a device: its numbers, its tables, and kernels for its words."""

    def __init__(self, device: Device, preset: str) -> None:
        info = _core.preset_info(preset)
        self.preset = preset
        self.n, self.q = int(info["n"]), int(info["q"])
        self.bits = self.q.bit_length()
        self.word_bytes, self.reply_bytes = int(info["word_bytes"]), int(info["reply_bytes"])
        self.dropped_bits = int(info["dropped_bits"])
        self.dtype: Any = np.dtype(np.uint32 if self.word_bytes == 4 else np.uint64)
        self._device = device
        self._order = device.upload(np.zeros(1, np.uint32))
        self._transforms = Transforms(device, self.n, [self.q], self.word_bytes)

    def launch(self, kernel: str, grid: tuple[int, ...], *arguments: Any, shared: int = 0) -> None:
        """Run a kernel of linear.cu for words of this preset."""
        name = f"linear_{kernel}{8 * self.word_bytes}"
        self._device.launch(name, grid, THREADS, *arguments, shared=shared)

    def groups(self, tokens: int) -> int:
        """How many groups of N tokens, each with a secret of its own, the last one perhaps not full."""
        return -(-tokens // self.n)

    def masks(self, seed: Any, first: int, rows: int, out: Any = None) -> Any:
        """Mask polynomials ``first`` to ``first + rows``, (rows, n), in the transform's domain."""
        n, q = self.n, self.q
        return sampling.uniform(self._device, seed, sampling.MASK, first, rows, n, q, self.word_bytes, out=out)

    def secrets(self, seed: Any, groups: int) -> tuple[Any, Any]:
        """A ternary secret for each group: prepared factors, two arrays (groups, n)."""
        words = self._device.empty((groups, self.n), self.dtype, "secrets")
        ternary = sampling.ternary(self._device, seed, 0, groups, self.n)
        try:
            self.launch("residues", (-(-ternary.size // THREADS),), words, ternary, self.q, ternary.size)
            self._transforms.forward(words, self._order)
            values, companions = self._transforms.prepare(words, self._order)
        finally:
            wipe(ternary, words)
        return values, companions

    def multiply_masks(self, masks: Any, factors: tuple[Any, Any], out: Any) -> None:
        """Into out (groups, rows, n): masks (rows, n) times the secret of each group, as coefficients."""
        values, companions = factors
        for group in range(out.shape[0]):
            one = slice(group, group + 1)
            self._transforms.multiply(masks, values[one], companions[one], self._order, out[group])
        self._transforms.inverse(out, self._order)


class Context:
    """What this module keeps for a device: two lanes and the tables of the presets."""

    def __init__(self, device: Device) -> None:
        self.device = device
        with device.active():
            self.lanes = (device.stream(), device.stream())
        self._rings: dict[str, Ring] = {}
        self._weights: dict[int, tuple[Any, Any]] = {}  # by the address of a Public, while it lives
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lane(self, index: int) -> Iterator[None]:
        """Work goes to one of the lanes, the even or the odd one."""
        with self.device.active(), self.lanes[index % 2]:
            yield

    def ring(self, preset: str) -> Ring:
        """The tables of a preset, made when they are first asked for."""
        with self._lock:
            if preset not in self._rings:
                with self.lane(0):
                    self._rings[preset] = Ring(self.device, preset)
                self.lanes[0].synchronize()
            return self._rings[preset]

    def weights(self, spec: LayerSpec) -> tuple[Any, Any]:
        """Upload a layer's scales (d_out,) and d_in ones, once, for both lanes. For work that is waited for."""
        with self._lock:
            kept = self._weights.get(id(spec))
            if kept is None:
                with self.lane(0):
                    kept = upload_weights(self.device, spec)
                self.lanes[0].synchronize()
                weakref.finalize(spec, self._weights.pop, id(spec), None)
                self._weights[id(spec)] = kept
            return kept

    def fork(self) -> None:
        """Make lane 1 wait for lane 0."""
        self.lanes[1].wait(self.lanes[0])

    def join(self) -> None:
        """Make lane 0 wait for lane 1; frees happen on lane 0."""
        self.lanes[0].wait(self.lanes[1])

    def finish(self) -> None:
        """Wait, after `join`, for both lanes, so that page-locked memory can be used for something else."""
        self.lanes[0].synchronize()


_CONTEXTS_LOCK = threading.Lock()


def context_of(device: Device) -> Context:
    """The one context of a device, which lives as long as the device does."""
    with _CONTEXTS_LOCK:
        if "linear" not in device.kept:
            device.kept["linear"] = Context(device)
        context: Context = device.kept["linear"]
        return context


def wipe(*arrays: Any) -> None:
    """Zeros over device arrays, in the current stream."""
    for array in arrays:
        array.fill(0)


def pieces(count: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, length) of the pieces of a range."""
    for number, begin in enumerate(range(0, count, step)):
        yield number, begin, min(step, count - begin)


def upload_weights(device: Device, spec: LayerSpec) -> tuple[Any, Any]:
    """Upload what `Context.weights` keeps, in the current stream."""
    return device.upload(spec.scale), device.upload(np.ones(spec.d_in))


def lane_rows(device: Device, row_bytes: int, rows: int) -> int:
    """How many of ``rows`` a lane takes at once, at least one: all if they are small, else what its memory holds."""
    if rows * row_bytes <= PIECE_BYTES:  # not worth a question to the driver
        return rows
    return max(1, min(rows, min(WORK_BYTES, device.free_bytes() // 4) // row_bytes))


def page_locked_view(message: BytesLike) -> npt.NDArray[np.uint8] | None:
    """View a message's bytes where they are page-locked, to be copied from without a detour; else None."""
    view = memoryview(message)
    return np.frombuffer(view, np.uint8).view(PageLocked) if isinstance(view.obj, PageLocked) else None


def message_of(memory: npt.NDArray[np.uint8]) -> memoryview:
    """A read-only view of a finished message. It, and every view of a part, keeps the memory alive."""
    return memory.data.toreadonly()


class Slot:
    """Device memory of one lane that one piece after the other passes through."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._device: dict[str, Any] = {}

    def copy_in(self, name: str, source: npt.NDArray[np.uint8], dtype: Any) -> Any:
        """Start the copy of bytes of the host; the device array is good until the next piece."""
        target = self.array(name, source.nbytes // dtype.itemsize, dtype)
        self._context.device.copy_in(source, target)
        return target

    def array(self, name: str, size: int, dtype: Any, what: str = "a work array") -> Any:
        """A device array that lives on, its content with it, while it is long enough."""
        kept = self._device.get(name)
        if kept is None or kept.size < size:
            if kept is not None:
                wipe(kept)
            kept = self._device[name] = self._context.device.empty((size,), dtype, what)
        return kept[:size]

    def wipe(self) -> None:
        """Zeros over everything on the device, in the current stream."""
        wipe(*self._device.values())


def tiles(tokens: int, rows: int) -> tuple[int, int]:
    """The grid of a kernel that transposes (tokens, rows), or the other way."""
    return -(-tokens // _TILE_TOKENS), -(-rows // _TILE_ROWS)

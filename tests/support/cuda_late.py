"""A stand-in whose streams run as late as they may: what lacks a wait, or lets memory go too early, gives wrong words.

Work is queued, and done only when somebody waits for its stream, and then no more of other streams than that stream
waits for. Memory that was let go of is handed out again at once, to the stream it came from, as by CuPy's pool; page-
locked memory to whoever asks next.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_arrays import DeviceArray, Xp, host
from cuda_host import HostDevice, page_locked_bytes, whole_bytes


class LateStream:
    """Work in order, done when somebody waits for it; of a hasty stream at once."""

    def __init__(self, device: LateDevice, hasty: bool = False) -> None:
        self._device, self._hasty = device, hasty
        self._work: deque[Callable[[], None]] = deque()
        self._done = 0
        self.free: dict[int, list[np.ndarray]] = {}  # memory to hand out again, by size

    def __enter__(self) -> None:
        self._device.entered().append(self)

    def __exit__(self, *_: object) -> None:
        self._device.entered().pop()

    def put(self, work: Callable[[], None]) -> None:
        with self._device.lock:
            self._work.append(work)
        if self._hasty:
            self.synchronize()

    def wait(self, other: LateStream | None = None) -> None:
        other = other or self._device.current()
        with self._device.lock:
            until = other._done + len(other._work)
        self.put(lambda: other.run(until))

    def synchronize(self) -> None:
        with self._device.lock:
            self.run(self._done + len(self._work))

    def run(self, until: int) -> None:
        with self._device.lock:
            while self._done < until:
                self._done += 1
                self._work.popleft()()


class LateArray(DeviceArray):
    """Memory of a stream, until the last view of it is gone."""

    def __init__(self, memory: np.ndarray, device: LateDevice, root: Any) -> None:
        super().__init__(memory)
        self._device, self._root = device, root

    def _alike(self, memory: np.ndarray) -> LateArray:
        return LateArray(memory, self._device, self._root)

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, DeviceArray):
            self[index].fill(value)
            return
        target, source = host(self[index]), host(value)
        self._device.current().put(lambda: np.copyto(target, source))

    def fill(self, value: Any) -> None:
        target = DeviceArray(self._memory)
        self._device.current().put(lambda: target.fill(value))


class _Root:
    """What all views of an array hold on to."""


class PageLockedOwner:
    """Of memory that goes back when the last array of it is gone."""

    def __init__(self, memory: np.ndarray) -> None:
        self.__array_interface__ = memory.__array_interface__


class LateDevice(HostDevice):
    """See the module. The ``hasty`` one of its streams, in the order in which they are made, is never late."""

    def __init__(self, hasty: int | None = None) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self._hasty, self._streams = hasty, 0
        self._default = LateStream(self)
        self._entered = threading.local()
        self._page_locked: list[np.ndarray] = []
        self.xp = type("LateXp", (Xp,), {"ascontiguousarray": self._ascontiguousarray, "isfinite": self._isfinite})

    def entered(self) -> list[LateStream]:
        if not hasattr(self._entered, "streams"):
            self._entered.streams = [self._default]
        return self._entered.streams

    def current(self) -> LateStream:
        return self.entered()[-1]

    def stream(self) -> LateStream:
        self._streams += 1
        return LateStream(self, self._streams - 1 == self._hasty)

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        given = [DeviceArray(host(value)) if isinstance(value, DeviceArray) else value for value in arguments]
        run = super().launch
        self.current().put(lambda: run(kernel, grid, threads, *given, shared=shared))

    def empty(self, shape: tuple[int, ...], dtype: Any, what: str = "a work array") -> LateArray:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        free = self.current().free.setdefault(nbytes, [])
        with self.lock:
            memory = free.pop() if free else host(super().empty((nbytes,), np.uint8, what))
        root = _Root()
        weakref.finalize(root, free.append, memory)
        return LateArray(memory.view(dtype).reshape(shape), self, root)

    def upload(self, array: Any, what: str = "an array") -> LateArray:
        assert isinstance(array, np.ndarray)
        out = self.empty(array.shape, array.dtype, what)
        target, taken = host(out), array.copy()
        self.current().put(lambda: np.copyto(target, taken))
        return out

    def download(self, array: Any) -> np.ndarray:
        self.current().synchronize()
        return Xp.asnumpy(array)

    def page_locked(self, nbytes: int) -> Any:
        fitting = [i for i, memory in enumerate(self._page_locked) if memory.nbytes >= nbytes]
        memory = self._page_locked.pop(fitting[-1]) if fitting else host(super().page_locked(nbytes))
        owner = PageLockedOwner(memory)
        weakref.finalize(owner, self._page_locked.append, memory)
        return np.asarray(owner)[:nbytes].view(type(memory))

    def copy_in(self, source: Any, array: Any) -> None:
        target, given = whole_bytes(array), host(page_locked_bytes(source, array)).__array_interface__
        self.current().put(lambda: np.copyto(target, _memory_at(given)))

    def copy_out(self, array: Any, target: Any) -> None:
        source, given = whole_bytes(array), host(page_locked_bytes(target, array)).__array_interface__
        self.current().put(lambda: np.copyto(_memory_at(given), source))

    def active(self) -> Any:
        return contextlib.nullcontext()

    def _ascontiguousarray(self, a: LateArray, dtype: Any = None) -> LateArray:
        if a.flags.c_contiguous and dtype in (None, a.dtype):
            return a
        out = self.empty(a.shape, a.dtype if dtype is None else dtype)
        out[...] = a
        return out

    def _isfinite(self, x: LateArray) -> LateArray:
        out = self.empty(x.shape, np.bool_)
        target, source = host(out), host(x)
        self.current().put(lambda: np.isfinite(source, out=target))
        return out


def _memory_at(interface: dict[str, Any]) -> np.ndarray:
    """The bytes there, without holding on to whoever owns them."""
    owner = PageLockedOwner.__new__(PageLockedOwner)
    owner.__array_interface__ = interface
    return np.asarray(owner)

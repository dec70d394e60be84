"""What an exchange costs, counted: bytes that are copied, read and allocated on the host, and calls to the driver."""

from __future__ import annotations

import contextlib
import mmap
import threading
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cuda_arrays import DeviceArray
from cuda_host import ON_GPU, HostDevice
from cuda_late import PageLockedOwner
from privtuner import _core
from privtuner.cuda.device import PageLocked
from privtuner.errors import EngineError


class _CountedStream:
    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def wait(self, other: Any = None) -> None:
        self._counts["events"] += 1

    def synchronize(self) -> None:
        self._counts["waits"] += 1


class CountingDevice(HostDevice):
    """Counts what goes over the bus and what is asked of the driver; page-locked memory is pooled as by CuPy.

    Attributes:
        counts: "launches"; "uploads", of pageable memory; "downloads"; "waits" of the host for the device, downloads
            included; "events" between streams; "questions" for free memory; "in" and "out", bytes over the bus from and
            to page-locked memory; "fresh", bytes of page-locked memory that the pool had not.
        lent: pieces of page-locked memory that somebody holds.
        page_locked_limit: the most bytes that there are of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.lent = 0
        self.page_locked_limit = 1 << 40
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.RLock()

    def launch(self, *arguments: Any, **options: Any) -> None:
        self.counts["launches"] += 1
        super().launch(*arguments, **options)

    def empty(self, shape: tuple[int, ...], dtype: Any, what: str = "a work array") -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8)[:size]  # tracemalloc does not see it
        memory.fill(0xA5)
        return DeviceArray(memory.view(dtype).reshape(shape))

    def upload(self, array: Any, what: str = "an array") -> Any:
        self.counts["uploads"] += 1
        return super().upload(array, what)

    def download(self, array: Any) -> Any:
        self.counts["downloads"] += 1
        self.counts["waits"] += 1
        return super().download(array)

    def page_locked(self, nbytes: int) -> Any:
        size = 1 << max(9, (nbytes - 1).bit_length())
        with self._lock:
            free = self._free.setdefault(size, [])
            if not free:
                if self.counts["fresh"] + size > self.page_locked_limit:
                    raise EngineError(f"the host has not {nbytes} bytes of page-locked memory left")
                self.counts["fresh"] += size
                free.append(np.frombuffer(mmap.mmap(-1, size), np.uint8))
            memory = free.pop()
            self.lent += 1
        owner = PageLockedOwner(memory)
        weakref.finalize(owner, self._back, memory)
        return np.asarray(owner)[:nbytes].view(PageLocked)

    def _back(self, memory: np.ndarray) -> None:
        with self._lock:
            self._free[memory.nbytes].append(memory)
            self.lent -= 1

    def copy_in(self, source: Any, array: Any) -> None:
        self.counts["in"] += array.nbytes
        super().copy_in(source, array)

    def copy_out(self, array: Any, target: Any) -> None:
        self.counts["out"] += array.nbytes
        super().copy_out(array, target)

    def stream(self) -> Any:
        return _CountedStream(self.counts)

    def free_bytes(self) -> int:
        self.counts["questions"] += 1
        return super().free_bytes()


@contextlib.contextmanager
def counted(device: CountingDevice, patch: Any) -> Iterator[Counter[str]]:
    """Counts of what is done inside, on the device and of the core on the host.

    With those of the device: "read", bytes that the core reads for checksums; "copied", bytes it copies meanwhile;
    "memory", the most bytes of the host that Python and NumPy had at once, in addition to those at the beginning.
    """
    counts: Counter[str] = Counter()

    def reading(owner: Any, name: str, sizes: Callable[[tuple[Any, ...], Any], tuple[int, int]]) -> None:
        genuine = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            result = genuine(*arguments)
            read, copied = sizes(arguments, result)
            counts["read"] += read
            counts["copied"] += copied
            return result

        patched.setattr(owner, name, call)

    def opened(arguments: tuple[Any, ...], size: int) -> tuple[int, int]:
        return size, size if len(arguments) > 2 and arguments[2] is not None else 0

    with patch.context() as patched:
        reading(_core, "linear_open_request", lambda arguments, _: opened(arguments, len(arguments[1])))
        reading(_core.Reply, "next", lambda arguments, rows: opened(arguments, rows.size))
        reading(_core, "linear_seal_request", lambda arguments, _: (len(arguments[1]), 0))
        reading(_core, "linear_seal_blocks", lambda arguments, _: (sum(len(block[0]) for block in arguments[4]), 0))
        before = Counter(device.counts)
        tracemalloc.start()
        try:
            start = tracemalloc.get_traced_memory()[0]
            yield counts
            if not ON_GPU:  # where every launch brings its arrays there and back
                counts["memory"] = tracemalloc.get_traced_memory()[1] - start
        finally:
            tracemalloc.stop()
    counts.update({name: count - before[name] for name, count in device.counts.items()})

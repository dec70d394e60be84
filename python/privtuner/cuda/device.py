"""A GPU: what is missing to use one, its memory, its streams, launching kernels. The only module that imports CuPy."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from privtuner.copies import Stays
from privtuner.cuda import sources
from privtuner.errors import EngineError, InputError
from privtuner.packages import advice

__all__ = [
    "OPTIONS",
    "CudaDevice",
    "Device",
    "PageLocked",
    "Status",
    "Stream",
    "available",
    "constant",
    "devices",
    "open_device",
    "status",
]

_MINIMUM_CAPABILITY = (8, 0)
_INSTALL = f"{advice('cupy')}, for a driver of 580 or newer; with 12 in place of 13 from 525 on"
_SMALLER = "use a GPU with more memory, several of them, fewer tokens at once, or a larger limit"
_SHARED_BYTES = 48 << 10  # what a block may have without being asked
OPTIONS = ("--std=c++17", "--fmad=false")
"""NVRTC options. No FMA contraction: results must equal the processor's bit for bit."""


class Status(NamedTuple):
    """Whether a GPU can be used, and why not."""

    available: bool
    reason: str
    """The devices found; or what is missing (CuPy, driver, device) and what to install."""


class PageLocked(np.ndarray[Any, np.dtype[np.uint8]]):
    """Bytes of page-locked host memory.

    They are handed out again once the last array and the last memoryview of them is gone, and no sooner. A copy on its
    way refers to nothing: whoever starts one keeps the bytes until the stream is through.
    """


class Stream(Protocol):
    """A queue of work, done in order. Two streams do not wait for each other unless told to."""

    def __enter__(self) -> Any:
        """Launches, uploads and downloads inside go to this stream."""
        ...

    def __exit__(self, *_: object) -> None:
        """Return to the stream that was current before."""
        ...

    def wait(self, other: Stream | None = None) -> None:
        """Make later work wait for all that is by now in ``other``, or else in the thread's current stream."""
        ...

    def synchronize(self) -> None:
        """Block until everything in it is done."""
        ...


class Device(Protocol):
    """What the kernels' callers need of a device; arrays are those of ``xp``, which follows NumPy.

    Attributes:
        name: "cuda:0" and so on. xp: the array module. multiprocessors: how many blocks run at once, at least.
        constants: what `constant` uploaded. kept: what a layer above keeps for this device, by the layer's name.
    """

    name: str
    xp: Any
    multiprocessors: int
    constants: dict[tuple[str, tuple[int, ...], bytes], Any]
    kept: dict[str, Any]

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        """Run ``kernel`` on ``grid`` blocks of ``threads`` threads, with ``shared`` bytes of dynamic shared memory.

        Does not wait for it. Arguments are checked against the kernel's signature: contiguous device arrays of the
        right dtype, and numbers.

        Raises:
            InputError: they do not fit it.
        """
        ...

    def empty(self, shape: tuple[int, ...], dtype: Any, what: str = "a work array") -> Any:
        """An uninitialised array.

        Raises:
            EngineError: the device, or the limit set for it, has not that much memory left; names the bytes and `what`.
        """
        ...

    def upload(self, array: npt.NDArray[Any], what: str = "an array") -> Any:
        """A copy on the device, in the current stream. The array, not page-locked, may be changed once this returns."""
        ...

    def download(self, array: Any) -> npt.NDArray[Any]:
        """A copy on the host; waits for what the current stream holds."""
        ...

    def page_locked(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """`PageLocked` memory, copied from and to without a detour, while kernels run. For nothing that is secret.

        Raises:
            EngineError: the host has not that much left.
        """
        ...

    def copy_in(self, host: npt.NDArray[Any], array: Any) -> None:
        """Start a copy from page-locked memory; ``host`` must stay as it is until the stream has done it."""
        ...

    def copy_out(self, array: Any, host: npt.NDArray[Any]) -> None:
        """Start a copy to page-locked memory; it is there once the stream has done it."""
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Make this the current device of the thread, with this device's memory."""
        ...

    def free_bytes(self) -> int:
        """Memory that is left, within the limit."""
        ...


_CONSTANTS_LOCK = threading.Lock()
_MAX_CONSTANTS, _MAX_CONSTANT_BYTES = 1024, 4096


def constant(device: Device, values: npt.NDArray[Any]) -> Any:
    """A small public table on the device, for any stream: the same one whenever the same values are asked for.

    What is large, or one of too many, is uploaded for the current stream alone.
    """
    kept, key = device.constants, (values.dtype.str, values.shape, values.tobytes())
    found = kept.get(key)
    if found is not None:
        return found
    if values.nbytes > _MAX_CONSTANT_BYTES or len(kept) >= _MAX_CONSTANTS:
        return device.upload(values)
    with _CONSTANTS_LOCK:
        if key not in kept:
            uploaded = device.upload(values)
            device.download(uploaded)  # it is there now, for every stream
            kept[key] = uploaded  # never let go of: no stream would know when
        return kept[key]


@lru_cache(maxsize=1)
def _cupy() -> Any:
    """CuPy, or the text of what is missing."""
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError:
        return f"CuPy is not installed: {_INSTALL}"
    except ImportError as error:
        return f"CuPy is installed but does not load ({error}): {_INSTALL}"
    if not hasattr(cupy, "cuda"):
        return f"a folder called cupy is in the way of CuPy, or CuPy is not installed: {_INSTALL}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return (
            f"CuPy {cupy.__version__} is installed, but no NVIDIA driver or device answers ({error}): install the "
            "NVIDIA driver, and in a container pass the GPU on (docker run --gpus all)"
        )
    if count == 0:
        return "the NVIDIA driver reports no device; CUDA_VISIBLE_DEVICES may hide it"
    return cupy


def status() -> Status:
    """Say whether a GPU can be used, which, and why not."""
    cupy = _cupy()
    if isinstance(cupy, str):
        return Status(False, cupy)
    names = []
    for index in range(cupy.cuda.runtime.getDeviceCount()):
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        names.append(f"cuda:{index} {properties['name'].decode()}")
    return Status(True, f"{', '.join(names)}; CuPy {cupy.__version__}")


def available() -> bool:
    """Whether a GPU can be used."""
    return status().available


def devices(names: str = "cuda", memory_bytes: int | None = None) -> list[CudaDevice]:
    """Open the devices that ``names`` lists: "cuda" for all, "cuda:1" for one, "cuda:0,cuda:2" for several.

    Args:
        names: as above.
        memory_bytes: the most memory taken on each, all that is free when None.

    Raises:
        InputError: not of that form, or a device twice.
        EngineError: CuPy, the driver or the device is missing; says which and what to install.
    """
    parts = names.split(",")
    if names != "cuda" and not all(part.startswith("cuda:") and part[5:].isdecimal() for part in parts):
        raise InputError(f"device {names!r}: choose cpu, cuda (every GPU), cuda:0, or several as cuda:0,cuda:1")
    if len(set(parts)) != len(parts):
        raise InputError(f"device {names!r} names a GPU twice")
    if memory_bytes is not None and memory_bytes < 1:
        raise InputError(f"memory_bytes is {memory_bytes}; give at least 1")
    cupy = _cupy()
    if isinstance(cupy, str):
        raise EngineError(f"no GPU can be used: {cupy}")
    count = cupy.cuda.runtime.getDeviceCount()
    indices = range(count) if names == "cuda" else [int(part[5:]) for part in parts]
    return [open_device(index, memory_bytes) for index in indices]


def open_device(index: int = 0, memory_bytes: int | None = None) -> CudaDevice:
    """Open one GPU; see `devices`."""
    cupy = _cupy()
    if isinstance(cupy, str):
        raise EngineError(f"no GPU can be used: {cupy}")
    count = cupy.cuda.runtime.getDeviceCount()
    if not 0 <= index < count:
        raise EngineError(f"there is no device cuda:{index}: this machine shows {count}, cuda:0 to cuda:{count - 1}")
    return CudaDevice(cupy, index, memory_bytes)


class _CudaStream:
    def __init__(self, cupy: Any, device: Any) -> None:
        self._cupy, self._device = cupy, device
        with device:
            self.raw = cupy.cuda.Stream(non_blocking=True)

    def __enter__(self) -> Any:
        return self.raw.__enter__()

    def __exit__(self, *details: object) -> None:
        self.raw.__exit__(*details)

    def wait(self, other: Stream | None = None) -> None:
        with self._device:  # an event is made for the current device, and recorded there alone
            source = self._cupy.cuda.get_current_stream() if other is None else other.raw  # type: ignore[attr-defined]
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(source)
            self.raw.wait_event(event)

    def synchronize(self) -> None:
        self.raw.synchronize()


class CudaDevice(Stays):
    """An NVIDIA GPU through CuPy; see `Device`. Safe to use from several threads."""

    stays = "an open GPU cannot be pickled: its memory is this process's; call privtuner.cuda.devices in the other"

    def __init__(self, cupy: Any, index: int, memory_bytes: int | None = None) -> None:
        self.xp = cupy
        self.name = f"cuda:{index}"
        self.constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}
        self.kept: dict[str, Any] = {}
        self._index = index
        device = self._device()
        major, minor = divmod(int(device.compute_capability), 10)
        if (major, minor) < _MINIMUM_CAPABILITY:
            raise EngineError(
                f"{self.name} has compute capability {major}.{minor}; the kernels need 8.0 (A100 and newer), whose "
                "tensor cores multiply bytes"
            )
        self.capability = (major, minor)
        self.multiprocessors = int(device.attributes["MultiProcessorCount"])
        self._pool = cupy.cuda.MemoryPool()
        self._limit = memory_bytes
        if memory_bytes is not None:
            with device:  # a pool's limits are those of the current device
                self._pool.set_limit(size=memory_bytes)
        self._modules: dict[str, Any] = {}
        self._functions: dict[str, tuple[Any, int]] = {}  # by kernel, with the dynamic shared memory it may have
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """See `Device`."""
        with self._device(), self.xp.cuda.using_allocator(self._pool.malloc):
            try:
                yield
            except self.xp.cuda.memory.OutOfMemoryError as error:  # of an array that CuPy made on its own
                raise EngineError(f"{self.name}: {error}; {_SMALLER}") from error

    def _device(self) -> Any:
        """A new object for the device: older CuPy keeps in it which device was current before, whatever the thread."""
        return self.xp.cuda.Device(self._index)

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        """See `Device`."""
        entry = sources.kernels()[kernel]
        if threads > entry.max_threads:
            raise InputError(f"kernel {kernel} takes blocks of at most {entry.max_threads} threads, got {threads}")
        function, allowed = self._functions.get(kernel, (None, 0))
        if function is None or shared > allowed:
            function = self._load(entry, shared)
        function(grid, (threads,), entry.arguments(arguments), shared_mem=shared)

    def _load(self, entry: sources.Kernel, shared: int) -> Any:
        with self._lock, self._device():
            function, allowed = self._functions.get(entry.name, (None, _SHARED_BYTES))
            if function is None:
                if entry.unit not in self._modules:
                    code = sources.source(entry.unit)
                    self._modules[entry.unit] = self.xp.RawModule(code=code, options=OPTIONS, backend="nvrtc")
                function = self._modules[entry.unit].get_function(entry.name)
                # CuPy shares it with other CudaDevices of this GPU, whose launches may need what is allowed by now.
                allowed = max(allowed, function.max_dynamic_shared_size_bytes)
            if shared > allowed:
                function.max_dynamic_shared_size_bytes = shared
            self._functions[entry.name] = (function, max(shared, allowed))
            return function

    def empty(self, shape: tuple[int, ...], dtype: Any, what: str = "a work array") -> Any:
        """See `Device`."""
        try:
            return self.xp.empty(shape, dtype)
        except self.xp.cuda.memory.OutOfMemoryError as error:
            raise self._too_large(int(np.prod(shape)) * np.dtype(dtype).itemsize, what) from error

    def upload(self, array: npt.NDArray[Any], what: str = "an array") -> Any:
        """See `Device`."""
        host, out = np.ascontiguousarray(array), self.empty(array.shape, array.dtype, what)
        if host.nbytes:  # pageable: CUDA has taken a copy when the call returns, and the stream orders what follows
            out.data.copy_from_host_async(host.ctypes.data, host.nbytes, self.xp.cuda.get_current_stream())
        return out

    def download(self, array: Any) -> npt.NDArray[Any]:
        """See `Device`."""
        host: npt.NDArray[Any] = self.xp.asnumpy(array)
        return host

    def page_locked(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """See `Device`. CuPy's pool keeps freed memory, in powers of two."""
        try:
            memory = self.xp.cuda.alloc_pinned_memory(max(1, nbytes))
        except self.xp.cuda.runtime.CUDARuntimeError as error:
            raise EngineError(
                f"the host has not {nbytes} bytes of page-locked memory left ({error}): use fewer tokens at once"
            ) from error
        return np.frombuffer(memory, np.uint8, nbytes).view(PageLocked)

    def copy_in(self, host: npt.NDArray[Any], array: Any) -> None:
        """See `Device`."""
        stream = self.xp.cuda.get_current_stream()
        array.data.copy_from_host_async(host.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: Any, host: npt.NDArray[Any]) -> None:
        """See `Device`."""
        stream = self.xp.cuda.get_current_stream()
        array.data.copy_to_host_async(host.ctypes.data, array.nbytes, stream)

    def stream(self) -> Stream:
        """See `Device`."""
        return _CudaStream(self.xp, self._device())

    def free_bytes(self) -> int:
        """See `Device`."""
        with self._device():
            free = self.xp.cuda.runtime.memGetInfo()[0] + self._pool.free_bytes()
            return int(free if self._limit is None else min(free, self._limit - self._pool.used_bytes()))

    def _too_large(self, nbytes: int, what: str) -> EngineError:
        limit = "" if self._limit is None else f", of a limit of {self._limit}"
        return EngineError(
            f"{what} takes {nbytes} bytes and {self.name} has {self.free_bytes()} left{limit}: {_SMALLER}"
        )

"""The CUDA kernels on the host: compiled as C++, run thread by thread, on arrays that stand in for CuPy's.

With ``PRIVTUNER_TEST_GPU=1`` the kernels run on the first GPU instead, every launch with its arrays copied there and
back, so that the same tests prove the same bits of the GPU's code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cuda_arrays import DeviceArray, Xp, host
from privtuner.cuda import sources
from privtuner.cuda.device import CudaDevice, PageLocked, open_device
from privtuner.errors import EngineError, InputError

_RUNNER = r"""
extern "C" __attribute__((visibility("default")))
int pt_launch(const char* name, unsigned gx, unsigned gy, unsigned gz, unsigned threads, unsigned long shared,
              int backwards, void** args) {
  for (const pt::Entry* entry = pt::entries(); entry; entry = entry->next) {
    if (std::strcmp(entry->name, name) != 0) continue;
    std::vector<unsigned long long> memory(shared / 8 + 2);
    for (unsigned i = 0; i < gx * gy * gz; ++i) {
      const unsigned b = backwards ? gx * gy * gz - 1 - i : i;
      for (auto& word : memory) word = 0xabcdef0123456789u;
      unsigned char* base = reinterpret_cast<unsigned char*>(memory.data());
      base += (16 - reinterpret_cast<unsigned long>(base) % 16) % 16;
      const pt::Block block{b % gx, b / gx % gy, b / gx / gy, threads, base, backwards != 0};
      entry->run(block, args);
    }
    return 0;
  }
  return 1;
}
"""


@cache
def library(unit: str) -> ctypes.CDLL:
    """Compile a unit as C++; fails the test that asks when there is no compiler: building privtuner needs one."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / f"{unit}.cpp", Path(folder) / f"{unit}.so"
        source.write_text(sources.source(unit) + _RUNNER)
        flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
        flags += ["-fno-gnu-unique", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))


ON_GPU = os.environ.get("PRIVTUNER_TEST_GPU") == "1"


@cache
def _gpu() -> CudaDevice:
    return open_device(0)


def launch_on_gpu(
    entry: sources.Kernel, grid: tuple[int, ...], threads: int, values: tuple[Any, ...], shared: int
) -> None:
    """Copy the arrays there, whole, as kernels reach beyond a view; launch; copy back."""
    gpu = _gpu()
    with gpu.active():
        memory: dict[int, tuple[Any, Any]] = {}
        arguments = []
        for parameter, value in zip(entry.parameters, values, strict=True):
            if not parameter.pointer:
                arguments.append(value)
                continue
            root = value
            while isinstance(root.base, np.ndarray):
                root = root.base
            start = root.ctypes.data
            if start not in memory:
                data = root.reshape(-1).view(np.uint8)
                memory[start] = data, gpu.upload(data)
            place = memory[start][1][value.ctypes.data - start :][: value.nbytes]
            arguments.append(place.view(parameter.dtype))
        gpu.launch(entry.name, grid, threads, *arguments, shared=shared)
        for data, copy in memory.values():
            if data.flags.writeable:
                data[...] = gpu.download(copy)


class _NoStream:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def wait(self, other: Any = None) -> None:
        return None

    def synchronize(self) -> None:
        return None


class HostDevice:
    """A `privtuner.cuda.device.Device` without a GPU. Memory: ``memory_bytes`` at most in one array.

    ``backwards`` runs blocks and threads in the other order, which must change nothing.
    """

    xp = Xp
    multiprocessors = 2
    capability = (9, 0)

    def __init__(self, name: str = "cuda:0", memory_bytes: int | None = None, backwards: bool = False) -> None:
        self.name = name
        self.backwards = backwards
        self._limit = memory_bytes
        self.launched: list[str] = []
        self.constants: dict[Any, Any] = {}
        self.kept: dict[str, Any] = {}

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        entry = sources.kernels()[kernel]
        if threads > entry.max_threads:
            raise InputError(f"kernel {kernel} takes blocks of at most {entry.max_threads} threads, got {threads}")
        if threads % 32 != 0:
            raise InputError(f"{threads} threads are no whole warps")
        if shared > 227 << 10:
            raise InputError(f"{shared} bytes of shared memory: an H100 has 227 KiB a block, an A100 163")
        values = tuple(host(value) for value in entry.arguments(arguments))
        self.launched.append(kernel)
        if ON_GPU:
            launch_on_gpu(entry, grid, threads, values, shared)
            return
        kept = [
            ctypes.c_void_p(value.ctypes.data) if parameter.pointer else np.array(value)
            for parameter, value in zip(entry.parameters, values, strict=True)
        ]
        pointers = (ctypes.c_void_p * max(1, len(kept)))(
            *(ctypes.addressof(value) if isinstance(value, ctypes.c_void_p) else value.ctypes.data for value in kept)
        )
        x, y, z = (*grid, 1, 1)[:3]
        if not (0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16):
            raise InputError(f"kernel {kernel}: a grid of {grid} blocks")
        failed = library(entry.unit).pt_launch(
            kernel.encode(), x, y, z, threads, ctypes.c_ulong(shared), int(self.backwards), pointers
        )
        assert not failed, kernel

    def empty(self, shape: tuple[int, ...], dtype: Any, what: str = "a work array") -> Any:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self._limit is not None and nbytes > self._limit:
            raise EngineError(f"{what} takes {nbytes} bytes and {self.name} has {self._limit} left")
        return self.xp.empty(shape, dtype)

    def upload(self, array: Any, what: str = "an array") -> Any:
        assert isinstance(array, np.ndarray), "only NumPy's arrays are uploaded"
        out = self.empty(array.shape, array.dtype, what)
        host(out)[...] = array
        return out

    def download(self, array: Any) -> Any:
        return self.xp.asnumpy(array)

    def page_locked(self, nbytes: int) -> Any:
        return np.full(nbytes, 0xA5, np.uint8).view(PageLocked)

    def copy_in(self, source: Any, array: Any) -> None:
        whole_bytes(array)[:] = page_locked_bytes(source, array)

    def copy_out(self, array: Any, target: Any) -> None:
        page_locked_bytes(target, array)[:] = whole_bytes(array)

    def stream(self) -> Any:
        return _NoStream()

    def active(self) -> Any:
        return contextlib.nullcontext()

    def free_bytes(self) -> int:
        return 1 << 40 if self._limit is None else self._limit


def whole_bytes(array: Any) -> np.ndarray:
    """What a copy would touch: so many bytes from the first one on, whatever the strides are."""
    assert array.flags.c_contiguous, "copies know no strides"
    return host(array).reshape(-1).view(np.uint8)


def page_locked_bytes(memory: Any, array: Any) -> np.ndarray:
    """So many bytes of page-locked memory as the array has."""
    assert isinstance(memory, PageLocked), "the copy would wait for the device"
    assert memory.flags.c_contiguous, "copies know no strides"
    assert memory.nbytes >= array.nbytes, "the copy would reach beyond the memory"
    return memory.reshape(-1).view(np.uint8)[: array.nbytes]


class NumpyDevice(HostDevice):
    """For tests of kernels and what launches them: its arrays are NumPy's, to be filled and read at hand."""

    def empty(self, shape: tuple[int, ...], dtype: Any, what: str = "a work array") -> Any:
        return host(super().empty(shape, dtype, what))

    def download(self, array: Any) -> Any:
        return np.array(array)

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments: Any, shared: int = 0) -> None:
        given = (DeviceArray(value) if isinstance(value, np.ndarray) else value for value in arguments)
        super().launch(kernel, grid, threads, *given, shared=shared)

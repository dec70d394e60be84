"""What stands in for CuPy's arrays where there is no GPU: NumPy computes, and refuses what CuPy would refuse.

Only what the package uses is here, less than CuPy has. Before something is added: see that CuPy has it, with the same
arguments and results, and that it does not wait for the device, as numbers and lists made of arrays do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_IMPLICIT = "Implicit conversion to a NumPy array is not allowed. Please use device.download, or host in a test."


class DeviceArray:
    """An array that only device code may read: what mixes it with NumPy's arrays fails as it fails with CuPy's."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory

    def _alike(self, memory: np.ndarray) -> DeviceArray:
        return DeviceArray(memory)

    shape = property(lambda self: self._memory.shape)
    dtype = property(lambda self: self._memory.dtype)
    ndim = property(lambda self: self._memory.ndim)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    itemsize = property(lambda self: self._memory.itemsize)
    strides = property(lambda self: self._memory.strides)
    flags = property(lambda self: self._memory.flags)

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, index: Any) -> DeviceArray:
        return self._alike(self._memory[_view(index)])  # one element is an array, too: no copy to the host

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, DeviceArray):
            self._memory[_view(index)] = value._memory
        else:
            self[index].fill(value)

    def fill(self, value: Any) -> None:
        """With one number. As in CuPy, assigning anything but a device array comes here."""
        if isinstance(value, DeviceArray) or np.asarray(value).ndim > 0:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self._memory.fill(np.asarray(value, self.dtype)[()])

    def reshape(self, *shape: Any) -> DeviceArray:
        return self._alike(self._memory.reshape(*shape))

    def view(self, dtype: Any) -> DeviceArray:
        return self._alike(self._memory.view(dtype))

    def __dlpack_device__(self) -> tuple[int, int]:
        return 13, 0  # CUDA's memory, which the host reads, too: PyTorch takes it without CUDA

    def __dlpack__(self, **options: Any) -> Any:
        return self._memory.__dlpack__(**options)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(_IMPLICIT)

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"arithmetic on a device array, or a NumPy function: {_IMPLICIT}")

    def __array_function__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"a NumPy function on a device array: {_IMPLICIT}")

    def __eq__(self, other: object) -> Any:
        raise TypeError(f"a comparison with a device array: {_IMPLICIT}")

    def __bool__(self) -> bool:
        raise TypeError("the truth of a device array waits for the device")

    def __iter__(self) -> Any:
        raise TypeError("a device array, element by element")

    def __repr__(self) -> str:
        return f"<device array {self.shape} of {self.dtype}>"


def _view(index: Any) -> Any:
    """An index that makes a view, never a number."""
    parts = index if isinstance(index, tuple) else (index,)
    for part in parts:
        if not (part is None or part is Ellipsis or isinstance(part, (int, np.integer, slice))):
            raise TypeError(f"an index of {type(part).__name__}: CuPy would make it an array, on its way to the device")
    return parts if any(part is Ellipsis for part in parts) else (*parts, Ellipsis)


def host(array: Any) -> np.ndarray:
    """The memory of a device array itself, for a test to read or to change."""
    return array._memory if isinstance(array, DeviceArray) else array


class Xp:
    """The functions of CuPy that the package uses."""

    ndarray = DeviceArray

    @staticmethod
    def empty(shape: Any, dtype: Any) -> DeviceArray:
        out = np.empty(shape, dtype)
        out.view(np.uint8).fill(0xA5)  # nobody may count on zeros
        return DeviceArray(out)

    @staticmethod
    def ascontiguousarray(a: DeviceArray, dtype: Any = None) -> DeviceArray:
        contiguous = np.ascontiguousarray(_given(a), dtype)
        return a if contiguous is a._memory else DeviceArray(contiguous)

    @staticmethod
    def isfinite(x: DeviceArray) -> DeviceArray:
        return DeviceArray(np.isfinite(_given(x)))

    @staticmethod
    def asnumpy(a: DeviceArray) -> np.ndarray:
        return np.array(_given(a))

    @staticmethod
    def from_dlpack(x: Any) -> DeviceArray:
        """Of what says it lies on a GPU, and is the host's memory."""
        if x.__dlpack_device__()[0] == 1:
            raise TypeError("CPU arrays cannot be directly imported to CuPy.")

        class OnHost:
            __dlpack__ = staticmethod(x.__dlpack__)
            __dlpack_device__ = staticmethod(lambda: (1, 0))

        return DeviceArray(np.from_dlpack(OnHost()))


def _given(a: Any) -> np.ndarray:
    if not isinstance(a, DeviceArray):
        raise TypeError(f"Unsupported type {type(a)}")  # CuPy's ascontiguousarray would copy it to the device
    return a._memory

"""The linear scheme on a processor and on GPUs, and OpenFHE's, behind one way to call them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest

import openfhe_cases
from cuda_arrays import host
from cuda_host import ON_GPU, HostDevice
from evaluators import NEEDS_OPENFHE
from privtuner import _core, cuda, linear, schemes
from privtuner.cpu import CpuClient, CpuServer
from privtuner.cuda import linear as device_linear
from privtuner.cuda.client import CudaClient
from privtuner.cuda.linear import decryption
from privtuner.cuda.server import CudaServer
from privtuner.openfhe.client import Pending
from privtuner.openfhe.server import OpenFheServer
from privtuner.parties import LinearClient, LinearServer

LINEAR = ["cpu", "host", *(["gpu"] if ON_GPU else [])]
"""Where the linear scheme runs: the processor, a GPU's kernels compiled as C++, and a GPU where tests are to use it."""

ALL = [*LINEAR, pytest.param("openfhe", marks=NEEDS_OPENFHE)]
"""Every scheme on every device."""


class OnDevice:
    """An array that says it lies on a GPU."""

    def __init__(self, array: np.ndarray, place: tuple[int, int] = (2, 0)) -> None:
        self._array, self._place = array, place

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._place

    def __dlpack__(self, **_: Any) -> Any:
        return self._array.__dlpack__()


class Backend(ABC):
    """Both halves of an exchange, of one scheme on one device: the functions of `privtuner.linear` there.

    Attributes:
        name: of the backend.
        scheme: what is on the wire.
        secret: the class of what decrypts.
        title: what its ``repr`` calls that class.
    """

    name: str
    scheme: ClassVar[str] = "linear"
    secret: ClassVar[type]
    title: ClassVar[str] = ""

    @abstractmethod
    def encrypt(self, x: Any, spec: Any, direction: Any = "forward", masks: Any = None) -> tuple[Any, Any]:
        """The request for a batch, and what decrypts the reply."""

    @abstractmethod
    def blocks(self, prepared: linear.QuantisedWeight, request: Any, block_rows: int = 32) -> Iterator[Any]:
        """The reply in blocks; as the functions do, checks the request before the first one is asked for."""

    @abstractmethod
    def decrypt(self, reply: Any, secret: Any) -> np.ndarray:
        """The result in a whole reply or its blocks."""

    def apply(self, prepared: linear.QuantisedWeight, request: Any) -> bytes:
        """The reply in one message, of one block where the scheme allows."""
        return b"".join(self.blocks(prepared, request, prepared.spec.d_out + prepared.spec.d_in))

    def reply(self, prepared: linear.QuantisedWeight, request: Any) -> list[bytes]:
        """The reply in blocks of 32 outputs, to be rearranged."""
        return [bytes(block) for block in self.blocks(prepared, request)]

    def forms(self, x: np.ndarray) -> list[Any]:
        """The batch in every kind of array that `encrypt` takes."""
        return [x]

    @abstractmethod
    def client(self, mask_cache_bytes: int | None = None) -> LinearClient:
        """The data owner's half."""

    @abstractmethod
    def server(self) -> LinearServer:
        """The server's half."""


class Cpu(Backend):
    name = "cpu"
    secret, title = linear.OneTimeKey, "privtuner.linear.OneTimeKey"
    encrypt = staticmethod(linear.encrypt)
    decrypt = staticmethod(linear.decrypt)
    decryption = (linear._core, "Decryption")
    client = CpuClient
    server = CpuServer

    def blocks(self, prepared: linear.QuantisedWeight, request: Any, block_rows: int = 32) -> Iterator[Any]:
        return linear.apply_blocks(prepared, request, block_rows)

    def begin(self, secret: linear.OneTimeKey) -> Any:
        """A decryption that is fed block by block."""
        return _core.Decryption(secret)


class Cuda(Backend):
    secret, title = device_linear.DeviceOneTimeKey, "privtuner.cuda.linear.DeviceOneTimeKey"
    decryption = (decryption, "Decryption")

    def __init__(self, name: str, device: Any) -> None:
        self.name, self.device = name, device

    def encrypt(self, x: Any, spec: Any, direction: Any = "forward", masks: Any = None) -> tuple[Any, Any]:
        return device_linear.encrypt(self.device, x, spec, direction, masks=masks)

    def decrypt(self, reply: Any, secret: Any) -> np.ndarray:
        return device_linear.decrypt(reply, secret)

    def blocks(self, prepared: linear.QuantisedWeight, request: Any, block_rows: int = 32) -> Iterator[Any]:
        return device_linear.apply_blocks(device_linear.DeviceLayer(self.device, prepared), request, block_rows)

    def begin(self, secret: Any) -> Any:
        return decryption.Decryption(secret)

    def forms(self, x: np.ndarray) -> list[Any]:
        if not x.dtype.isnative or x.dtype == np.longdouble:  # a GPU has no such arrays
            return [x]
        return [x, OnDevice(x) if isinstance(self.device, HostDevice) else self.device.upload(x)]

    def client(self, mask_cache_bytes: int | None = None) -> LinearClient:
        return CudaClient(self.device, mask_cache_bytes)

    def server(self) -> LinearServer:
        return CudaServer([self.device])


class OpenFhe(Backend):
    name = scheme = "openfhe"
    secret = Pending

    def __init__(self) -> None:
        self._client = schemes.scheme("openfhe").client()

    def encrypt(self, x: Any, spec: Any, direction: Any = "forward", masks: Any = None) -> tuple[Any, Any]:
        return self._client.encrypt(x, spec, direction)

    def decrypt(self, reply: Any, secret: Any) -> np.ndarray:
        return self._client.decrypt([reply] if isinstance(reply, (bytes, bytearray, memoryview)) else reply, secret)

    def blocks(self, prepared: linear.QuantisedWeight, request: Any, block_rows: int = 32) -> Iterator[Any]:
        return openfhe_cases.apply_blocks(prepared, request, block_rows)

    def client(self, mask_cache_bytes: int | None = None) -> LinearClient:
        return self._client

    def server(self) -> LinearServer:
        return OpenFheServer()


@cache
def backend_of(name: str) -> Backend:
    """The backend of one of the names in `ALL`."""
    if name == "cpu":
        return Cpu()
    if name == "openfhe":
        return OpenFhe()
    return Cuda(name, HostDevice() if name == "host" else cuda.devices("cuda:0")[0])


def to_host(y: Any, backend: Backend) -> np.ndarray:
    """A client's result as an array of NumPy."""
    if isinstance(y, np.ndarray):
        return y
    return host(y) if backend.name == "host" else backend.device.download(y)

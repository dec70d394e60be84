"""The schemes there are, and what computes each of them on which device. Everything that names one reads it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from privtuner import cuda, openfhe
from privtuner.cpu import CpuClient, CpuServer
from privtuner.errors import InputError
from privtuner.parties import LinearClient, LinearServer

__all__ = ["SCHEMES", "Backend", "Scheme", "scheme"]


class Backend(NamedTuple):
    """One scheme on one kind of device.

    Attributes:
        server: makes the server's half, of the device's name and the most bytes to take on each GPU (None: all).
        client: makes the data owner's half, of the device and the bytes of mask products to keep (None: no limit).
        status: says whether it can be used on this machine, and why not.
        prepare: loads what a client needs and limits its threads, before there is a client.
    """

    server: Callable[[str, int | None], LinearServer]
    client: Callable[[str | cuda.Device, int | None], LinearClient]
    status: Callable[[], cuda.Status | openfhe.library.Status]
    prepare: Callable[[int | None], object] = lambda _: None


class Scheme(NamedTuple):
    """A way to encrypt linear layers: what is on the wire between a client and a server, whatever their devices.

    Attributes:
        name: what the command line and the protocol call it.
        carries: what a request carries, in a few words.
        request: the kind of its requests in the head of a message, see `privtuner.wire.Head`.
        backends: kind of device -> what computes there.
    """

    name: str
    carries: str
    request: str
    backends: Mapping[str, Backend]

    def server(self, device: str = "cpu", memory_bytes: int | None = None) -> LinearServer:
        """Return the server's half.

        Args:
            device: "cpu", or GPUs: "cuda" for all of them, "cuda:1", "cuda:0,cuda:1".
            memory_bytes: the most memory taken on each GPU, all that is free when None.

        Raises:
            InputError: the scheme does not run on ``device``.
            EngineError: CuPy, the driver or the GPU is missing; the message says what to install.
        """
        return self._backend(device).server(device, memory_bytes)

    def client(self, device: str | cuda.Device = "cpu", mask_cache_bytes: int | None = None) -> LinearClient:
        """Return the data owner's half, with fresh keys where it has any.

        Args:
            device: "cpu", or a GPU: "cuda" for the first one, "cuda:1", or an open device.
            mask_cache_bytes: memory for mask products, None for no limit; see `privtuner.linear.MaskCache`. OpenFHE's
                ciphertexts have no masks.

        Raises:
            InputError: the scheme does not run on ``device``, or ``mask_cache_bytes`` is negative.
            EngineError: what it needs is missing on this machine; the message says what to install.
        """
        if mask_cache_bytes is not None and mask_cache_bytes < 0:
            raise InputError(f"mask_cache_bytes = {mask_cache_bytes}: must not be negative")
        return self._backend(device).client(device, mask_cache_bytes)

    def prepare(self, device: str = "cpu", threads: int | None = None) -> None:
        """Load what a client needs, and let it use so many threads (None: all that it takes by itself).

        Raises:
            InputError: the scheme does not run on ``device``.
            EngineError: what it needs is missing on this machine; the message says what to install.
        """
        self._backend(device).prepare(threads)

    def _backend(self, device: str | cuda.Device) -> Backend:
        kind = device.partition(":")[0] if isinstance(device, str) else "cuda"
        if kind in self.backends:
            return self.backends[kind]
        others = [other.name for other in SCHEMES.values() if kind in other.backends]
        hint = f"device {' or '.join(self.backends)}" + (f", or the scheme {' or '.join(others)}" if others else "")
        raise InputError(f"the scheme {self.name} does not run on {device!r}: choose {hint}")


def _cuda_client(device: str | cuda.Device, mask_cache_bytes: int | None) -> LinearClient:
    if isinstance(device, str):
        device = cuda.devices("cuda:0" if device == "cuda" else device)[0]
    return cuda.CudaClient(device, mask_cache_bytes)


def _prepare_openfhe(threads: int | None) -> None:
    openfhe.library.library()
    if threads is not None:
        openfhe.set_num_threads(threads)


SCHEMES: Mapping[str, Scheme] = {
    "linear": Scheme(
        name="linear",
        carries="ring learning with errors, with secrets of one request",
        request="request",
        backends={
            "cpu": Backend(
                server=lambda *_: CpuServer(),
                client=lambda _, masks: CpuClient(masks),
                status=lambda: cuda.Status(True, "built in"),
            ),
            "cuda": Backend(
                server=lambda device, memory: cuda.CudaServer(cuda.devices(device, memory)),
                client=_cuda_client,
                status=lambda: cuda.status(),
            ),
        },
    ),
    "openfhe": Scheme(
        name="openfhe",
        carries="CKKS ciphertexts of OpenFHE, for which only data owners need OpenFHE",
        request="openfhe_request",
        backends={
            "cpu": Backend(
                server=lambda *_: openfhe.OpenFheServer(),
                client=lambda *_: openfhe.OpenFheClient(),
                status=lambda: openfhe.status(),
                prepare=_prepare_openfhe,
            ),
        },
    ),
}
"""Name -> scheme, the default first."""


def scheme(name: str) -> Scheme:
    """Return the scheme called ``name``.

    Raises:
        InputError: there is none.
    """
    if name not in SCHEMES:
        raise InputError(f"unknown scheme {name!r}; choose {' or '.join(SCHEMES)}")
    return SCHEMES[name]

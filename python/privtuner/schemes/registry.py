"""The schemes there are, and what computes them on which device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from privtuner.cpu import CpuClient, CpuServer
from privtuner.errors import InputError
from privtuner.openfhe.server import OpenFheServer
from privtuner.schemes.protocol import LinearClient, LinearServer

if TYPE_CHECKING:
    from privtuner.cuda import Device

__all__ = ["SCHEMES", "client_of", "server_of"]

SCHEMES = ("native", "openfhe")
"""Names of the engines of linear layers: this package's own scheme, and CKKS of OpenFHE."""


def server_of(name: str, device: str = "cpu", memory_bytes: int | None = None) -> LinearServer:
    """Return the server's half of the engine called ``name``.

    Args:
        name: one of `SCHEMES`.
        device: "cpu", or of the native engine GPUs: "cuda" for all of them, "cuda:1", "cuda:0,cuda:1".
        memory_bytes: the most memory taken on each GPU, all that is free when None.

    Raises:
        privtuner.errors.InputError: there is none of that name, or not on that device.
        privtuner.errors.EngineError: CuPy, the driver or the GPU is missing; the message says what to install.
    """
    if _known(name, device) == "openfhe":
        return OpenFheServer()
    if device == "cpu":
        return CpuServer()
    from privtuner import cuda
    from privtuner.cuda.server import CudaServer

    return CudaServer(cuda.devices(device, memory_bytes))


def client_of(name: str, mask_cache_bytes: int | None = None, device: str | Device = "cpu") -> LinearClient:
    """Return the data owner's half of the engine called ``name``, with fresh keys where it has any.

    Args:
        name: one of `SCHEMES`.
        mask_cache_bytes: of the native engine, see :class:`CpuClient`; the others have no masks.
        device: "cpu", or of the native engine a GPU: "cuda" for the first one, "cuda:1", or an open device.

    Raises:
        privtuner.errors.InputError: there is none of that name, or not on that device, or ``mask_cache_bytes`` is
            negative.
        privtuner.errors.EngineError: it is missing on this machine; the message says what to install.
    """
    if mask_cache_bytes is not None and mask_cache_bytes < 0:
        raise InputError(f"mask_cache_bytes = {mask_cache_bytes}: must not be negative")
    if _known(name, device) == "openfhe":
        from privtuner import openfhe

        return openfhe.OpenFheClient()
    if device == "cpu":
        return CpuClient(mask_cache_bytes)
    from privtuner import cuda
    from privtuner.cuda.client import CudaClient

    if isinstance(device, str):
        device = cuda.devices("cuda:0" if device == "cuda" else device)[0]
    return CudaClient(device, mask_cache_bytes)


def _known(name: str, device: object) -> str:
    if name not in SCHEMES:
        raise InputError(f"unknown engine {name!r}; choose {' or '.join(SCHEMES)}")
    if name == "openfhe" and device != "cpu":
        raise InputError(f"the engine openfhe does not run on {device}: choose device cpu, or the engine native")
    return name

"""Engines compute the server's half of an encrypted product, owners the data owner's; transports carry the bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from privtuner.engines.base import Engine, Layer, Owner, Transport
from privtuner.engines.native import LocalTransport, NativeEngine, NativeOwner
from privtuner.engines.openfhe import OpenFheEngine
from privtuner.errors import InputError

if TYPE_CHECKING:
    from privtuner.cuda import Device

__all__ = [
    "ENGINES",
    "Engine",
    "Layer",
    "LocalTransport",
    "NativeEngine",
    "NativeOwner",
    "OpenFheEngine",
    "Owner",
    "Transport",
    "engine_of",
    "owner_of",
]

ENGINES = ("native", "openfhe")
"""Names of the engines of linear layers: this package's own scheme, and CKKS of OpenFHE."""


def engine_of(name: str, device: str = "cpu", memory_bytes: int | None = None) -> Engine:
    """Return the server's half of the engine called ``name``.

    Args:
        name: one of `ENGINES`.
        device: "cpu", or of the native engine GPUs: "cuda" for all of them, "cuda:1", "cuda:0,cuda:1".
        memory_bytes: the most memory taken on each GPU, all that is free when None.

    Raises:
        privtuner.errors.InputError: there is none of that name, or not on that device.
        privtuner.errors.EngineError: CuPy, the driver or the GPU is missing; the message says what to install.
    """
    if _known(name, device) == "openfhe":
        return OpenFheEngine()
    if device == "cpu":
        return NativeEngine()
    from privtuner import cuda
    from privtuner.engines.cuda import CudaEngine

    return CudaEngine(cuda.devices(device, memory_bytes))


def owner_of(name: str, mask_cache_bytes: int | None = None, device: str | Device = "cpu") -> Owner:
    """Return the data owner's half of the engine called ``name``, with fresh keys where it has any.

    Args:
        name: one of `ENGINES`.
        mask_cache_bytes: of the native engine, see :class:`NativeOwner`; the others have no masks.
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

        return openfhe.Owner()
    if device == "cpu":
        return NativeOwner(mask_cache_bytes)
    from privtuner import cuda
    from privtuner.engines.cuda import CudaOwner

    if isinstance(device, str):
        device = cuda.devices("cuda:0" if device == "cuda" else device)[0]
    return CudaOwner(device, mask_cache_bytes)


def _known(name: str, device: object) -> str:
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; choose {' or '.join(ENGINES)}")
    if name == "openfhe" and device != "cpu":
        raise InputError(f"the engine openfhe does not run on {device}: choose device cpu, or the engine native")
    return name

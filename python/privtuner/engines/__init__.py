"""Engines compute the server's half of an encrypted product, owners the data owner's; transports carry the bytes."""

from __future__ import annotations

from privtuner.engines.base import Engine, Layer, Owner, Transport
from privtuner.engines.native import LocalTransport, NativeEngine, NativeOwner
from privtuner.engines.openfhe import OpenFheEngine
from privtuner.errors import InputError

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


def engine_of(name: str) -> Engine:
    """Return the server's half of the engine called ``name``.

    Raises:
        privtuner.errors.InputError: there is none of that name.
    """
    return OpenFheEngine() if _known(name) == "openfhe" else NativeEngine()


def owner_of(name: str, mask_cache_bytes: int | None = None) -> Owner:
    """Return the data owner's half of the engine called ``name``, with fresh keys where it has any.

    Args:
        name: one of `ENGINES`.
        mask_cache_bytes: of the native engine, see :class:`NativeOwner`; the others have no masks.

    Raises:
        privtuner.errors.InputError: there is none of that name, or ``mask_cache_bytes`` is negative.
        privtuner.errors.EngineError: it is missing on this machine; the message says what to install.
    """
    if _known(name) == "openfhe":
        from privtuner import openfhe

        if mask_cache_bytes is not None and mask_cache_bytes < 0:
            raise InputError(f"mask_cache_bytes = {mask_cache_bytes}: must not be negative")
        return openfhe.Owner()
    return NativeOwner(mask_cache_bytes)


def _known(name: str) -> str:
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}; choose {' or '.join(ENGINES)}")
    return name

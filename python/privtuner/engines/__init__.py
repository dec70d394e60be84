"""Engines compute the server's half of an encrypted product; transports carry the bytes to one and back."""

from __future__ import annotations

from privtuner.engines.base import Engine, Layer, Transport
from privtuner.engines.native import LocalTransport, NativeEngine

__all__ = ["Engine", "Layer", "LocalTransport", "NativeEngine", "Transport"]

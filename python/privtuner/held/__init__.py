"""Adapters that a server holds and trains on ciphertexts."""

from __future__ import annotations

from privtuner.held.layer import HeldClient, HeldLora

__all__ = ["HeldClient", "HeldLora"]

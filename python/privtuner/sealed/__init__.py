"""Blocks that a server evaluates whole on ciphertexts."""

from __future__ import annotations

from privtuner.sealed.blocks import SealedClient, SealedMLP

__all__ = ["SealedClient", "SealedMLP"]

"""STAND-IN until branch enc is merged."""

from __future__ import annotations

from typing import Any, NamedTuple

SealedModel = Any


class EncryptedAdapters(NamedTuple):
    """Stand-in."""

    values: Any
    velocity: Any

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Stand-in."""
        return tuple(self)

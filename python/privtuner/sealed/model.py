"""STAND-IN until branch enc is merged."""

from __future__ import annotations

from typing import Any, NamedTuple

SealedModel = Any


class EncryptedAdapters(NamedTuple):
    values: Any
    velocity: Any = None

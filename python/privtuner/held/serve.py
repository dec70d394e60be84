"""A server of one layer whose adapters it holds."""

from __future__ import annotations

from typing import Any

from privtuner.held.layer import HeldLora
from privtuner.nn import OwnerBundle, Split
from privtuner.service.server import Server

__all__ = ["HELD_LAYER", "held_server"]

HELD_LAYER = "held"
"""Wire name of the layer."""


def held_server(layer: HeldLora, **options: Any) -> Server:
    """Return a server of this one layer, and of no bundle.

    Args:
        layer: what it serves.
        **options: ``host``, ``port`` and others of the server.
    """
    nothing = OwnerBundle(config={}, architecture="HeldLora", dtype="float32", groups={}, specs={}, tensors={})
    return Server(Split({HELD_LAYER: layer}, nothing), name="held adapters", **options)

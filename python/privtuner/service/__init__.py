"""Server and data owner in two processes, over gRPC."""

from __future__ import annotations

from privtuner.service.client import RemoteTransport
from privtuner.service.counts import LayerCounts, ServerCounts
from privtuner.service.server import Server

__all__ = ["LayerCounts", "RemoteTransport", "Server", "ServerCounts"]

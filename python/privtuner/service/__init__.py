"""Server and data owner in two processes, over gRPC."""

from __future__ import annotations

from privtuner.service.client import RemoteTransport
from privtuner.service.counts import LayerCounts, ServerCounts
from privtuner.service.pins import KnownBundles
from privtuner.service.security import ClientCredentials, ServerCredentials, Token
from privtuner.service.server import Server
from privtuner.service.tenants import Tenants

__all__ = [
    "ClientCredentials",
    "KnownBundles",
    "LayerCounts",
    "RemoteTransport",
    "Server",
    "ServerCounts",
    "ServerCredentials",
    "Tenants",
    "Token",
]

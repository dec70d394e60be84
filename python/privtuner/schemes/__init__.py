"""Schemes are what is on the wire, devices what computes: a server's and a data owner's half for each pair."""

from __future__ import annotations

from privtuner.schemes.host import LocalTransport
from privtuner.schemes.protocol import Layer, LinearClient, LinearServer, Transport
from privtuner.schemes.registry import SCHEMES, client_of, server_of

__all__ = ["SCHEMES", "Layer", "LinearClient", "LinearServer", "LocalTransport", "Transport", "client_of", "server_of"]

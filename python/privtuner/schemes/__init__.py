"""Schemes are what is on the wire, devices what computes: a server's and a client's half for each pair of them."""

from __future__ import annotations

from privtuner.parties import LinearClient, LinearServer, Transport
from privtuner.schemes.host import Host, LocalTransport
from privtuner.schemes.registry import SCHEMES, Backend, Scheme, scheme

__all__ = [
    "SCHEMES",
    "Backend",
    "Host",
    "LinearClient",
    "LinearServer",
    "LocalTransport",
    "Scheme",
    "Transport",
    "scheme",
]

"""Who calls: the name by which shares, quotas and counts are kept."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

__all__ = ["Tenant", "Tenants"]


@dataclass(frozen=True)
class Tenant:
    """One of those who share a server.

    Attributes:
        name: tells it from others.
    """

    name: str


class Tenants:
    """Tells the tenants of a server apart: by the host they call from."""

    def of(self, context: Any) -> Tenant:
        """Return who makes a call, of its `grpc.ServicerContext`."""
        return Tenant(_host_of(context.peer()))


def _host_of(peer: str) -> str:
    """Return the host of what gRPC calls a peer; of an IPv6 address the network of 64 bits, which is one customer's."""
    family, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if family == "ipv6":
        address = ipaddress.IPv6Address(host)
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return host

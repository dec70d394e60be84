"""What client and server agree on: methods, metadata, message sizes, addresses.

Calls carry raw bytes, no protobuf. Every call names the protocol version in its metadata.

    Hello   nothing -> JSON: protocol, version, model, scheme, preset, layers, whether it is sealed, bytes of the bundle
    Bundle  nothing -> stream of pieces of the owner's bundle: u16 length of the file name, name, contents
    Apply   stream of a request's bytes, layer name in the metadata -> stream of the reply's blocks
    Job     stream of the owner's messages of a sealed model's job <-> stream of the server's, see
            `privtuner.sealed.messages`
    Stats   nothing -> JSON: what the server has seen, see ServerCounts
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Iterator, Mapping

from privtuner.errors import InputError, MessageError

__all__ = [
    "CALLER_BYTES",
    "CALLER_KEY",
    "LARGEST_BYTES",
    "LAYER_KEY",
    "MESSAGE_BYTES",
    "PROTOCOL",
    "PROTOCOL_KEY",
    "SERVICE",
    "channel_options",
    "is_loopback",
    "join_files",
    "method",
    "parse_address",
    "split_files",
]

PROTOCOL = 3
"""Version of everything in this file; both sides must speak the same."""

SERVICE = "privtuner.Linear"
PROTOCOL_KEY = "privtuner-protocol"
LAYER_KEY = "privtuner-layer-bin"

CALLER_KEY = "privtuner-caller-bin"
"""Metadata: what a client that has no name drew for itself, so that `Stats` shows it its own counts and no others'."""
CALLER_BYTES = 16

MESSAGE_BYTES = 1 << 20
"""Size of one gRPC message of a longer stream: large enough to amortise its cost, small enough to overlap."""

LARGEST_BYTES = 64 << 20
"""Longest gRPC message that either side takes: one or two ciphertexts of the largest ring."""

_NAME = struct.Struct("<H")


def method(name: str) -> str:
    """Return the path of a method for a gRPC channel."""
    return f"/{SERVICE}/{name}"


def channel_options(keepalive_seconds: float) -> list[tuple[str, int]]:
    """Return options that both ends need.

    Args:
        keepalive_seconds: silence after which the other end is asked for a sign of life, and time it has to answer.
    """
    milliseconds = max(1, round(keepalive_seconds * 1000))
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", LARGEST_BYTES),
        ("grpc.keepalive_time_ms", milliseconds),
        ("grpc.keepalive_timeout_ms", milliseconds),
        ("grpc.http2.ping_timeout_ms", milliseconds),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        # A proxy from the environment would see, and slow down, what is meant for this machine.
        ("grpc.enable_http_proxy", 0),
        # Two servers must not share a port without anybody noticing.
        ("grpc.so_reuseport", 0),
    ]


def parse_address(address: str, least_port: int = 1) -> tuple[str, int]:
    """Split ``HOST:PORT``, where an IPv6 host stands in brackets.

    Raises:
        privtuner.errors.InputError: ``address`` has no such form, or the port is not in ``least_port``..65535.
    """
    host, separator, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not host or (":" in host and not bracketed) or "/" in host:
        raise InputError(f"server address {address!r} is not HOST:PORT, e.g. 127.0.0.1:50051")
    if not (port.isascii() and port.isdigit() and least_port <= int(port) <= 65535):
        raise InputError(f"server address {address!r}: the port must be a number from {least_port} to 65535")
    return host[1:-1] if bracketed else host, int(port)


def is_loopback(host: str) -> bool:
    """Return whether ``host`` can be reached from this machine only. Names other than localhost count as not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_files(files: Mapping[str, bytes]) -> Iterator[bytes]:
    """Yield ``files`` as messages of about ``MESSAGE_BYTES``, each beginning with the name of its file."""
    for name, content in files.items():
        encoded = name.encode()
        head = _NAME.pack(len(encoded)) + encoded
        # A file without contents still needs one message.
        for start in range(0, max(1, len(content)), MESSAGE_BYTES):
            yield head + content[start : start + MESSAGE_BYTES]


def join_files(messages: Iterable[bytes]) -> dict[str, bytes]:
    """Return the files that `split_files` cut.

    Raises:
        privtuner.errors.MessageError: a message is too short for the name it announces, or the name is not UTF-8.
    """
    pieces: dict[str, list[bytes]] = {}
    for message in messages:
        if len(message) < _NAME.size:
            raise MessageError(f"bundle: a message of {len(message)} bytes is too short; fetch the bundle again")
        (length,) = _NAME.unpack_from(message)
        body = _NAME.size + length
        if len(message) < body:
            raise MessageError(
                f"bundle: a message of {len(message)} bytes announces a file name of {length}; fetch the bundle again"
            )
        try:
            name = message[_NAME.size : body].decode()
        except UnicodeDecodeError as error:
            raise MessageError("bundle: a file name is not UTF-8; fetch the bundle again") from error
        pieces.setdefault(name, []).append(message[body:])
    return {name: b"".join(parts) for name, parts in pieces.items()}

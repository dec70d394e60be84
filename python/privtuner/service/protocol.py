"""What client and server agree on: methods, metadata, message sizes, addresses.

Calls carry raw bytes, no protobuf. Every call names the protocol version in its metadata, and every call after Hello
the bundle that the client began with: a server with another one refuses it. No gRPC message is longer
than `MESSAGE_BYTES`, so that neither side takes memory for one before it knows what is due: what is longer is cut. A
piece of just `MESSAGE_BYTES` goes on in the next one, a shorter one ends the message.

    Hello   nothing -> JSON: protocol, version, model, scheme, preset, layers, whether it is sealed, digest and bytes of
            the bundle
    Bundle  nothing -> stream of pieces of the owner's bundle: u16 length of the file name, name, contents
    Apply   a request, layer name in the metadata -> stream of the reply's blocks
    Job     stream of the owner's messages of a sealed model's job <-> stream of the server's, see
            `privtuner.sealed.messages`
    Stats   nothing -> JSON: what the server has seen, see ServerCounts
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Iterator, Mapping

from privtuner.errors import InputError, MessageError
from privtuner.linear import BytesLike
from privtuner.parties import BLOCK_BYTES

__all__ = [
    "CALLER_BYTES",
    "CALLER_KEY",
    "LARGEST_BYTES",
    "LAYER_KEY",
    "MESSAGE_BYTES",
    "MODEL_KEY",
    "PROTOCOL",
    "PROTOCOL_KEY",
    "SERVICE",
    "channel_options",
    "cut",
    "is_loopback",
    "join",
    "join_files",
    "method",
    "parse_address",
    "split_files",
]

PROTOCOL = 4
"""Version of everything in this file; both sides must speak the same."""

SERVICE = "privtuner.Linear"
PROTOCOL_KEY = "privtuner-protocol"
LAYER_KEY = "privtuner-layer-bin"
MODEL_KEY = "privtuner-model"
"""Of every call after the first: the digest of the bundle that the client began with."""

CALLER_KEY = "privtuner-caller-bin"
"""Metadata: what a client that has no name drew for itself, so that `Stats` shows it its own counts and no others'."""
CALLER_BYTES = 16

MESSAGE_BYTES = BLOCK_BYTES + 4096
"""Longest gRPC message: a block with its head is one, and at 100 KB/s it takes 11 s."""

LARGEST_BYTES = 64 << 20
"""Longest message in pieces that a client takes: one or two ciphertexts of the largest ring."""

_SLACK_BYTES = 64  # so that a message just beyond the limit is refused here, where the reason is known
_KEEPALIVE_SECONDS, _ACKNOWLEDGE_SECONDS = 30.0, 120.0
_WINDOW_BYTES = 2 << 20

_NAME = struct.Struct("<H")
_MOST_FILES = 64
_MESSAGE_COST = 256  # about what Python takes for an object: empty messages are no way round the limit


def method(name: str) -> str:
    """Return the path of a method for a gRPC channel."""
    return f"/{SERVICE}/{name}"


def channel_options() -> list[tuple[str, int]]:
    """Return options that both ends need.

    After 30 s of silence the other end is asked for a sign of life. The answer waits behind all bytes that are on their
    way, which are up to a few megabytes (windows of HTTP/2, buffers of TCP); at 100 KB/s that takes most of a minute.
    So there are 120 s for it, and whatever else arrives counts as well: a line is given up when nothing moves.
    """
    return [
        ("grpc.max_send_message_length", MESSAGE_BYTES + _SLACK_BYTES),
        ("grpc.max_receive_message_length", MESSAGE_BYTES + _SLACK_BYTES),
        # Identity alone: 0.3 MB of gzip unpack to more than a gigabyte. Ciphertexts do not shrink.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.keepalive_time_ms", round(1000 * _KEEPALIVE_SECONDS)),
        ("grpc.keepalive_timeout_ms", round(1000 * _ACKNOWLEDGE_SECONDS)),
        ("grpc.http2.ping_timeout_ms", round(1000 * _ACKNOWLEDGE_SECONDS)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        # What a stream may send ahead of its reader; measured windows grow to 16 MB a stream, read or not.
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),
        # Who waits for a server to come back decides itself when to try again.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # A proxy from the environment would see, and slow down, what is meant for this machine.
        ("grpc.enable_http_proxy", 0),
        # A connection for each transport, also where several in one process lead to one server.
        ("grpc.use_local_subchannel_pool", 1),
        # Two servers must not share a port without anybody noticing.
        ("grpc.so_reuseport", 0),
    ]


def cut(message: BytesLike) -> Iterator[bytes]:
    """Yield a message in pieces of `MESSAGE_BYTES`, of which the last one is shorter."""
    view = memoryview(message)
    for start in range(0, len(view) + 1, MESSAGE_BYTES):
        yield bytes(view[start : start + MESSAGE_BYTES])  # gRPC takes nothing else


def join(pieces: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Yield the messages that `cut` cut, none longer than ``limit`` bytes.

    Raises:
        privtuner.errors.MessageError: one is longer, or has no end.
    """
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > limit or len(piece) > MESSAGE_BYTES:
            raise MessageError(f"a message of {size} bytes or more, at most {limit} are due; use the same version")
        parts.append(piece)
        if len(piece) < MESSAGE_BYTES:
            yield parts[0] if len(parts) == 1 else b"".join(parts)
            parts, size = [], 0
    if parts:
        raise MessageError(f"a message ends after {size} bytes, in its middle; send it again")


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
    """Yield ``files`` as messages of about a megabyte, each beginning with the name of its file."""
    for name, content in files.items():
        encoded = name.encode()
        head = _NAME.pack(len(encoded)) + encoded
        # A file without contents still needs one message.
        for start in range(0, max(1, len(content)), BLOCK_BYTES):
            yield head + content[start : start + BLOCK_BYTES]


def join_files(messages: Iterable[bytes], limit: int) -> dict[str, bytes]:
    """Return the files that `split_files` cut, names included at most ``limit`` bytes.

    Raises:
        privtuner.errors.MessageError: they are longer, or too many; a message is too short for the name it announces,
            or the name is not UTF-8.
    """
    pieces: dict[str, list[bytes]] = {}
    size = 0
    for message in messages:
        size += len(message) + _MESSAGE_COST
        if size > limit:
            raise MessageError(
                f"bundle: more than {limit} bytes; allow a longer one (max_bundle_bytes) if you trust this server"
            )
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
        if name not in pieces and len(pieces) == _MOST_FILES:
            raise MessageError(f"bundle: more than {_MOST_FILES} files; fetch the bundle again")
        pieces.setdefault(name, []).append(message[body:])
    return {name: b"".join(parts) for name, parts in pieces.items()}

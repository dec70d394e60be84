"""One envelope for every message: a head of 72 bytes in the clear, a checksum, and a body.

    head : "PVTN" | version u16 | kind u8 | direction u8 | parameters u64 | subject [16] | request [16]
           | tokens u32 | features u32 | length u64 | checksum u64

Little-endian. The head says what a message is and whom it is for, the same way for every scheme; what the body holds is
the business of its kind. The checksum guards against accidents, not against attackers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.errors import InputError

__all__ = ["DIRECTIONS", "HEAD_BYTES", "KINDS", "VERSION", "Head", "announced", "open", "peek", "seal"]

BytesLike = bytes | bytearray | memoryview

VERSION: int = _core.wire.VERSION
"""Version of the wire, heads and all bodies: both sides must speak the same."""
HEAD_BYTES: int = _core.wire.HEAD_BYTES
"""Length of a head."""
KINDS: tuple[str, ...] = _core.wire.KINDS
"""Names of the kinds of messages."""
DIRECTIONS: tuple[str, ...] = _core.wire.DIRECTIONS
"""Names of what a request may ask for."""

_NO_ID = bytes(16)
_LENGTH = struct.Struct("<Q")
_LENGTH_AT = HEAD_BYTES - 16


class Head(NamedTuple):
    """What a message says of itself in the clear. A field that its kind does not use is 0 (of ``direction``: forward).

    Attributes:
        kind: one of `KINDS`.
        direction: one of `DIRECTIONS`: what a request asks for, or what a reply answers.
        parameters: hash of the parameter set.
        subject: 16 bytes that name the layer.
        request: 16 bytes that name the request.
        tokens, features: shape of what is encrypted.
        length: bytes of the body, which follow the head.
    """

    kind: str
    direction: str
    parameters: int
    subject: bytes
    request: bytes
    tokens: int
    features: int
    length: int


def announced(data: BytesLike) -> tuple[Head, int]:
    """Read the head at the front of ``data``, which may be the beginning of a message alone.

    Returns:
        The head, with length 0, and the bytes of the whole message as it announces them.

    Raises:
        MessageError: no message of this version, an unknown kind or direction, or shorter than a head.
    """
    head = bytearray(data[:HEAD_BYTES])
    if len(head) < HEAD_BYTES:
        peek(head)  # raises
    (length,) = _LENGTH.unpack_from(head, _LENGTH_AT)
    _LENGTH.pack_into(head, _LENGTH_AT, 0)
    return peek(head), HEAD_BYTES + length


def peek(data: BytesLike) -> Head:
    """Read the head of the message at the front of ``data``, which others may follow.

    Its length is that of a body that is there; the checksum is not looked at.

    Raises:
        MessageError: no message of this version, an unknown kind or direction, or truncated.
    """
    return Head(*_core.wire.peek(data))


def seal(
    kind: str,
    parts: Iterable[BytesLike | npt.NDArray[np.generic]],
    *,
    direction: str = "forward",
    parameters: int = 0,
    subject: bytes = _NO_ID,
    request: bytes = _NO_ID,
    tokens: int = 0,
    features: int = 0,
) -> bytes:
    """Make a message whose body is ``parts``, one after the other.

    Args:
        kind: one of `KINDS`.
        parts: contiguous buffers, each copied once.
        direction: one of `DIRECTIONS`.
        parameters: hash of the parameter set.
        subject: 16 bytes that name the layer.
        request: 16 bytes that name the request.
        tokens: rows of what is encrypted.
        features: columns of it.

    Raises:
        InputError: a field that a head cannot hold.
    """
    for name, value, bits in (("parameters", parameters, 64), ("tokens", tokens, 32), ("features", features, 32)):
        if not 0 <= value < 1 << bits:
            raise InputError(f"{name} = {value}: must be in [0, 2**{bits})")
    return _core.wire.seal(kind, list(parts), direction, parameters, subject, request, tokens, features)


def open(kind: str, data: BytesLike) -> tuple[Head, memoryview]:  # noqa: A001
    """Check a message of this kind, checksum included, and return its head and a view of its body.

    Raises:
        MessageError: no message of this version, another kind, truncated, corrupted, or with bytes left over.
    """
    return Head(*_core.wire.open(kind, data)), memoryview(data)[HEAD_BYTES:]

"""What a data owner with OpenFHE and a server exchange: residues of ciphertexts under a clear head.

OpenFHE's own serialisation trusts what it reads; these messages are read from strangers. All numbers are
little-endian; a message is::

    magic "PVOR", u16 version, u8 kind (1 request, 2 block of a reply), u8 direction (0 forward, 1 backward)
    16 bytes layer, 16 bytes request
    u32 N, u32 towers, u32 tokens, u32 features, u32 first, u32 total
    u64 modulus of each tower
    u64 residues [group][tower][feature][component 2][N], N / 2 tokens a group, in OpenFHE's evaluation format
    u32 CRC-32 of everything before it

``features`` are those of the ciphertexts in the message; a block holds the reply's features from ``first`` on, of
``total``. Both are 0 in a request.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ..errors import MessageError
from ..linear import Direction

__all__ = ["BLOCK", "MAGIC", "MAX_TOKENS", "REQUEST", "Head", "read", "request_shape", "row_bytes", "write"]

BytesLike: TypeAlias = bytes | bytearray | memoryview
Residues: TypeAlias = npt.NDArray[np.uint64]

MAGIC = b"PVOR"
REQUEST, BLOCK = 1, 2
MAX_TOKENS = 1 << 24
"""In one request."""

_VERSION = 1
_HEAD = struct.Struct("<4sHBB16s16sIIIIII")
_CRC = struct.Struct("<I")
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
_NAMES = {REQUEST: "request", BLOCK: "reply"}
_LARGEST = {"tokens": MAX_TOKENS, "features": 1 << 16, "towers": 64, "total": 1 << 16}


@dataclass(frozen=True)
class Head:
    """The clear part of a message; see the module's text.

    Attributes:
        kind: REQUEST or BLOCK. direction: "forward" or "backward".
        layer: of 16 bytes, :attr:`privtuner.linear.Public.id`. request: of 16 bytes.
        ring_dimension: N. moduli: one for each tower.
        tokens, features, first, total: as above.
    """

    kind: int
    direction: Direction
    layer: bytes
    request: bytes
    ring_dimension: int
    moduli: tuple[int, ...]
    tokens: int
    features: int
    first: int = 0
    total: int = 0

    @property
    def groups(self) -> int:
        """Ciphertexts that hold one feature of all tokens."""
        return -(-self.tokens // (self.ring_dimension // 2))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the residues: (groups, towers, features, 2, N)."""
        return (self.groups, len(self.moduli), self.features, 2, self.ring_dimension)


def write(head: Head, residues: Sequence[Residues]) -> bytes:
    """Make a message.

    Args:
        head: what it says in clear.
        residues: uint64 arrays that have ``head.shape`` when laid one after the other.
    """
    parts: list[bytes | memoryview] = [
        _HEAD.pack(
            MAGIC,
            _VERSION,
            head.kind,
            _DIRECTIONS.index(head.direction),
            head.layer,
            head.request,
            head.ring_dimension,
            len(head.moduli),
            head.tokens,
            head.features,
            head.first,
            head.total,
        )
        + struct.pack(f"<{len(head.moduli)}Q", *head.moduli)
    ]
    parts += [np.ascontiguousarray(array, "<u8").data.cast("B") for array in residues]
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([*parts, _CRC.pack(crc)])


def read(data: BytesLike, kind: int) -> tuple[Head, Residues]:
    """Head and residues, the latter a view of ``data`` where its words are aligned.

    Words are not compared with their moduli here.

    Raises:
        MessageError: malformed, truncated, corrupted, of another version or kind, or with impossible values.
    """
    what, view = _NAMES[kind], memoryview(data)
    if len(view) < _HEAD.size + _CRC.size:
        raise MessageError(f"{what}: {len(view)} bytes are shorter than a head: truncated?")
    magic, version, found, direction, layer, request, n, towers, tokens, features, first, total = _HEAD.unpack_from(
        view
    )
    if magic != MAGIC:
        raise MessageError(f"{what}: this is no message of the OpenFHE engine; use the same --engine on both sides")
    if version != _VERSION:
        raise MessageError(
            f"{what}: message version {version}, this build speaks version {_VERSION}: install the same privtuner on "
            "both sides"
        )
    if found != kind or direction >= len(_DIRECTIONS):
        raise MessageError(f"{what}: kind {found} or direction {direction} is unknown or out of place")
    if n < 1024 or n > 65536 or n & (n - 1):
        raise MessageError(f"{what}: ring dimension {n} is not a power of two from 1024 to 65536")
    for name, value in (("towers", towers), ("tokens", tokens), ("features", features)):
        if not 1 <= value <= _LARGEST[name]:
            raise MessageError(f"{what}: {value} {name}; from 1 to {_LARGEST[name]} are possible")
    if kind == REQUEST and (first, total) != (0, 0):
        raise MessageError(f"{what}: it carries a range of features, which only replies have")
    if kind == BLOCK and not first + features <= total <= _LARGEST["total"]:
        raise MessageError(f"{what}: features {first} to {first + features} of {total}")
    start = _HEAD.size + 8 * towers
    if len(view) < start + _CRC.size:
        raise MessageError(f"{what}: {len(view)} bytes do not hold the moduli of {towers} towers: truncated?")
    moduli = struct.unpack_from(f"<{towers}Q", view, _HEAD.size)
    for q in moduli:
        if q >= 1 << 60 or q % (2 * n) != 1:
            raise MessageError(f"{what}: modulus {q} is not 1 modulo 2 N = {2 * n}, or not below 2^60")
    if len(set(moduli)) != towers:
        raise MessageError(f"{what}: the same modulus twice")
    head = Head(kind, _DIRECTIONS[direction], layer, request, n, moduli, tokens, features, first, total)
    wanted = start + 8 * head.groups * towers * features * 2 * n + _CRC.size
    if len(view) != wanted:
        raise MessageError(f"{what}: {len(view)} bytes where {wanted} are due: truncated, or with bytes left over")
    if zlib.crc32(view[: -_CRC.size]) != _CRC.unpack_from(view, wanted - _CRC.size)[0]:
        raise MessageError(f"{what}: the checksum does not fit: damaged on its way; send it again")
    words = np.require(np.frombuffer(view[start : -_CRC.size], "<u8"), requirements="A").reshape(head.shape)
    return head, cast("Residues", words)


def request_shape(data: BytesLike) -> tuple[str, int]:
    """Direction and tokens as the head of a request states them, ("unknown", 0) if it is too short."""
    if len(data) < _HEAD.size:
        return "unknown", 0
    fields = _HEAD.unpack_from(data)
    return (_DIRECTIONS[fields[3]] if fields[3] < len(_DIRECTIONS) else "unknown"), fields[8]


def row_bytes(data: BytesLike) -> int:
    """Bytes that one feature takes in the reply to a request, by its head alone; 0 if it is too short."""
    if len(data) < _HEAD.size:
        return 0
    fields = _HEAD.unpack_from(data)
    n, towers, tokens = fields[6:9]
    return int(8 * 2 * n * towers * -(-tokens // max(1, n // 2)))

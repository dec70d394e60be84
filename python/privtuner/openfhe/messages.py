"""What a data owner with OpenFHE and a server exchange: residues of ciphertexts.

OpenFHE's own serialisation trusts what it reads; these messages are read from strangers. One body in the envelope of
`privtuner.wire`, of the kinds "openfhe_request" and "openfhe_reply", little-endian::

    u32 N | u32 towers | u32 first | u32 total | u64 modulus of each tower
    u64 residues [group][tower][feature][component 2][N], N / 2 tokens a group, in OpenFHE's evaluation format

The head names the layer (subject), and tokens and features of the ciphertexts in the message; a block holds the reply's
features from ``first`` on, of ``total``. Both are 0 in a request.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from privtuner import _core, wire
from privtuner.errors import MessageError
from privtuner.linear import Direction

__all__ = ["BLOCK", "REQUEST", "Head", "read", "write"]

BytesLike: TypeAlias = bytes | bytearray | memoryview
Residues: TypeAlias = npt.NDArray[np.uint64]

REQUEST, BLOCK = "openfhe_request", "openfhe_reply"

_PREFIX = struct.Struct("<IIII")
_NAMES = {REQUEST: "request", BLOCK: "reply"}
_LARGEST = {"towers": 64, "tokens": _core.MAX_TOKENS, "features": 1 << 16, "total": 1 << 16}


@dataclass(frozen=True)
class Head:
    """The clear part of a message; see the module's text.

    Attributes:
        kind: REQUEST or BLOCK. direction: "forward" or "backward".
        layer: 16 bytes, `privtuner.linear.LayerSpec.id`. request: 16 bytes.
        ring_dimension: N. moduli: one for each tower.
        tokens, features, first, total: as above.
    """

    kind: str
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
        """Shape of the residues: (groups, towers, features, 2, N)."""
        return (self.groups, len(self.moduli), self.features, 2, self.ring_dimension)


def write(head: Head, residues: Sequence[Residues]) -> bytes:
    """Make the bytes of a message.

    Args:
        head: what it says in clear.
        residues: uint64 arrays that have ``head.shape`` when laid one after the other.
    """
    prefix = _PREFIX.pack(head.ring_dimension, len(head.moduli), head.first, head.total)
    return wire.seal(
        head.kind,
        [prefix, np.array(head.moduli, "<u8"), *(np.ascontiguousarray(array, "<u8") for array in residues)],
        direction=head.direction,
        subject=head.layer,
        request=head.request,
        tokens=head.tokens,
        features=head.features,
    )


def read(data: BytesLike, kind: str) -> tuple[Head, Residues]:
    """The clear part of a message and its residues, these a view of ``data`` where its words are aligned.

    Words are not compared with their moduli here.

    Raises:
        MessageError: malformed, truncated, corrupted, of another version or kind, or with impossible values.
    """
    what, (outer, body) = _NAMES[kind], wire.open(kind, data)
    if outer.parameters != 0:
        raise MessageError(f"{what}: parameters {outer.parameters} are not used here")
    if len(body) < _PREFIX.size:
        raise MessageError(f"{what}: a body of {len(body)} bytes: truncated?")
    n, towers, first, total = _PREFIX.unpack_from(body)
    if n < 1024 or n > 65536 or n & (n - 1):
        raise MessageError(f"{what}: ring dimension {n} is not a power of two from 1024 to 65536")
    for name, value in (("towers", towers), ("tokens", outer.tokens), ("features", outer.features)):
        if not 1 <= value <= _LARGEST[name]:
            raise MessageError(f"{what}: {value} {name}; from 1 to {_LARGEST[name]} are possible")
    if kind == REQUEST and (first, total) != (0, 0):
        raise MessageError(f"{what}: it carries a range of features, which only replies have")
    if kind == BLOCK and not first + outer.features <= total <= _LARGEST["total"]:
        raise MessageError(f"{what}: features {first} to {first + outer.features} of {total}")
    start = _PREFIX.size + 8 * towers
    if len(body) < start:
        raise MessageError(f"{what}: {len(body)} bytes do not hold the moduli of {towers} towers: truncated?")
    moduli = struct.unpack_from(f"<{towers}Q", body, _PREFIX.size)
    for q in moduli:
        if q >= 1 << 60 or q % (2 * n) != 1:
            raise MessageError(f"{what}: modulus {q} is not 1 modulo 2 N = {2 * n}, or not below 2^60")
    if len(set(moduli)) != towers:
        raise MessageError(f"{what}: the same modulus twice")
    direction = cast("Direction", outer.direction)
    head = Head(kind, direction, outer.subject, outer.request, n, moduli, outer.tokens, outer.features, first, total)
    wanted = start + 8 * head.groups * towers * head.features * 2 * n
    if len(body) != wanted:
        raise MessageError(f"{what}: {len(body)} bytes where {wanted} are due: truncated, or with bytes left over")
    words = np.require(np.frombuffer(body[start:], "<u8"), requirements="A").reshape(head.shape)
    return head, cast("Residues", words)

"""Messages with fields that their writers would never write, under a checksum that fits."""

from typing import Any

from privtuner import wire


def resealed(message: bytes, *patches: tuple[int, bytes], cut: int | None = None, **fields: Any) -> bytes:
    """The message with other fields in its head, or other bytes at these places of its body (up to ``cut``)."""
    head = wire.peek(message)
    body = bytearray(message[wire.HEAD_BYTES :][:cut])
    for at, new in patches:
        body[at : at + len(new)] = new
    kept = {name: getattr(head, name) for name in wire.Head._fields if name not in ("kind", "length")}
    return wire.seal(fields.pop("kind", head.kind), [body], **{**kept, **fields})

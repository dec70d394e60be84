"""Requests to blocks that a server evaluates on ciphertexts, and the replies.

The server keeps nothing of a request: each brings the keys it needs. Messages, little-endian:

    head    : "PVBK" | version u16 | kind u8 | direction u8 | block id [16] | request id [16] | tokens u32 | count u32
    request : head, count parts: bytes u64 | message of keys or of an encrypted tensor, or what the direction says
    reply   : head, count features from | first u32 | of all u32 | message of an encrypted tensor
"""

from __future__ import annotations

import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from ..ckks.evaluator import Evaluator
from ..ckks.keys import EvaluationKeys
from ..ckks.parameters import BytesLike, Parameters
from ..ckks.tensor import EncryptedTensor
from ..errors import CkksError, InputError, MessageError, SecretError

__all__ = [
    "DIRECTIONS",
    "MAGIC",
    "VERSION",
    "Block",
    "Pending",
    "computed",
    "read_keys",
    "read_reply",
    "read_request",
    "read_tensor",
    "reply_head",
    "request_shape",
    "token_rows",
    "write_reply",
    "write_request",
]

Array = npt.NDArray[np.float64]

MAGIC = b"PVBK"
VERSION = 1
"""Of these messages and of the public parts of blocks."""
DIRECTIONS = ("forward", "backward", "gradient", "step", "describe")
"""What a request asks for; its place here is the number on the wire."""

_REQUEST, _REPLY = 1, 2
_HEAD = struct.Struct("<4sHBB16s16sII")
_LENGTH = struct.Struct("<Q")
_RANGE = struct.Struct("<II")
_BLOCK_BYTES = 4 << 20  # about the size of one message of a reply
_SAME = 1e-9  # relative; scales that agree differ by roundings of doubles

# One request at a time in a process: each uses all threads, and memory by the gigabyte.
_working = threading.Lock()


MakeEvaluator: TypeAlias = Callable[[Parameters, "EvaluationKeys | None"], Any]
"""Makes an `Evaluator`, or another engine with its operations, ``upload`` and ``download``."""


class Block(ABC):
    """Something a server holds and evaluates on ciphertexts: answers requests."""

    id: bytes
    """16 bytes that name the block; every message carries it."""

    @abstractmethod
    def answer(self, request: BytesLike, evaluator: MakeEvaluator = Evaluator) -> Iterator[bytes]:
        """Yield the reply to ``request``, some features in each message. All is computed before the first.

        Args:
            request: what the block's client made.
            evaluator: makes what computes, from parameters and evaluation keys: `Evaluator`, or one on a GPU.

        Raises:
            MessageError: the request is malformed, meant for another block, or its tensors have other shapes, levels
                or scales than the block takes; found before any work starts.
        """
        ...


@dataclass(frozen=True, repr=False, eq=False)
class Pending:
    """What the data owner keeps of a request until its reply arrives.

    Attributes:
        block: id of the block that was asked. request: of the request. direction: which way.
        shape: of the result. factors: (tokens, 1), what each token's result is multiplied by: it tells of the values,
            so this is never copied or pickled.
    """

    block: bytes
    request: bytes
    direction: str
    shape: tuple[int, int]
    factors: Array | None = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecretError("what decrypts a reply is never copied or pickled: it stays in the process that asked")


def request_shape(request: BytesLike) -> tuple[str, int]:
    """Direction and tokens as the head of a request states them, ("unknown", 0) if it is none."""
    if len(request) < _HEAD.size:
        return "unknown", 0
    magic, _, _, direction, _, _, tokens, _ = _HEAD.unpack_from(request)
    if magic != MAGIC or direction >= len(DIRECTIONS):
        return "unknown", 0
    return DIRECTIONS[direction], tokens


def token_rows(name: str, values: npt.ArrayLike, features: int, slots: int) -> Array:
    """Values as float64 (tokens, features), checked.

    Raises:
        InputError: another shape, more tokens than ``slots``, NaN or infinity.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.shape[1] != features or not 1 <= len(array) <= slots:
        raise InputError(f"{name} has shape {array.shape}; pass (tokens, {features}) with 1 to {slots} tokens")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity")
    return array


def _head(kind: int, direction: str, block: bytes, request: bytes, tokens: int, count: int) -> bytes:
    return _HEAD.pack(MAGIC, VERSION, kind, DIRECTIONS.index(direction), block, request, tokens, count)


def _read_head(what: str, data: BytesLike, kind: int) -> tuple[str, bytes, bytes, int, int]:
    if len(data) < _HEAD.size:
        raise MessageError(f"{what} of {len(data)} bytes: shorter than its head: truncated?")
    magic, version, found, direction, block, request, tokens, count = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise MessageError(f"{what}: not a message of a sealed block")
    if version != VERSION:
        raise MessageError(
            f"{what}: message version {version}, this build speaks version {VERSION}: install the same privtuner on "
            "both sides"
        )
    if found != kind or direction >= len(DIRECTIONS):
        raise MessageError(f"{what}: kind {found} or direction {direction} is unknown or out of place")
    return DIRECTIONS[direction], block, request, tokens, count


def reply_head(direction: str, block: bytes, request: bytes) -> bytes:
    """A reply without features: what answers a step."""
    return _head(_REPLY, direction, block, request, 0, 0)


def write_request(direction: str, block: bytes, request: bytes, tokens: int, parts: Sequence[bytes]) -> bytes:
    """Make a request of these parts."""
    pieces = [_head(_REQUEST, direction, block, request, tokens, len(parts))]
    for part in parts:
        pieces += [_LENGTH.pack(len(part)), part]
    return b"".join(pieces)


def read_request(data: BytesLike, block: bytes) -> tuple[str, bytes, int, list[memoryview]]:
    """Direction, request id, tokens and parts of a request to ``block``.

    Raises:
        MessageError: malformed, or for another block.
    """
    direction, asked, request, tokens, count = _read_head("request", data, _REQUEST)
    if asked != block:
        raise MessageError("the request is meant for another block, or for other weights; fetch the bundle again")
    view, at = memoryview(data), _HEAD.size
    parts: list[memoryview] = []
    while at < len(view) and len(parts) < count:
        end = at + _LENGTH.size
        if end > len(view) or end + _LENGTH.unpack_from(view, at)[0] > len(view):
            raise MessageError(f"request: part {len(parts) + 1} of {count} is truncated")
        at = end + _LENGTH.unpack_from(view, at)[0]
        parts.append(view[end:at])
    if len(parts) != count or at != len(view):
        raise MessageError(
            f"request: {len(view)} bytes do not hold its {count} parts: truncated, or with bytes left over"
        )
    return direction, request, tokens, parts


def read_keys(part: memoryview, parameters: Parameters, *, packing: bool = False) -> EvaluationKeys:
    """Read a relinearisation key and, if wanted, those of packing.

    Raises:
        MessageError: malformed, or other keys.
    """
    wanted = parameters.key_bytes(1 + (len(parameters._core.packing_elements) if packing else 0))
    if len(part) != wanted:
        raise MessageError(
            f"request: {len(part)} bytes of keys, {wanted} are due: relinearisation"
            + (" and packing" if packing else "")
        )
    keys = EvaluationKeys.from_bytes(parameters, part)
    if not keys.relinearisation:
        raise MessageError("request: it lacks the relinearisation key")
    return keys


def read_tensor(
    part: memoryview, parameters: Parameters, shape: tuple[int, int], layout: tuple[int, float], what: str
) -> EncryptedTensor:
    """Read an encrypted tensor that must have this shape, and this level and scale.

    Raises:
        MessageError: malformed, or another shape, level or scale.
    """
    tensor = EncryptedTensor.from_bytes(parameters, part)
    level, scale = layout
    if tensor.shape != shape or tensor.level != level:
        raise MessageError(
            f"{what}: shape {tensor.shape} at level {tensor.level}, the block takes {shape} at level {level}"
        )
    if np.abs(tensor.scale / scale - 1).max() > _SAME:
        raise MessageError(f"{what}: scale {float(tensor.scale[0]):.6g}, the block takes {scale:.6g}")
    return tensor


def computed(run: Callable[[], EncryptedTensor]) -> EncryptedTensor:
    """What ``run`` returns, once no other request is worked on.

    Raises:
        MessageError: the ciphertexts do not allow it.
    """
    try:
        with _working:
            return run()
    except CkksError as error:
        raise MessageError(f"the request cannot be computed: {error}") from error


def write_reply(result: EncryptedTensor, direction: str, block: bytes, request: bytes) -> Iterator[bytes]:
    """Yield the messages of a reply, some features in each."""
    tokens, features = result.shape
    width = max(1, _BLOCK_BYTES * features // result.message_bytes)
    engine = Evaluator(result.parameters)
    for first in range(0, features, width):
        some = engine.select(result, slice(first, min(first + width, features)))
        head = _head(_REPLY, direction, block, request, tokens, some.shape[1])
        yield head + _RANGE.pack(first, features) + some.to_bytes()


def read_reply(
    blocks: Iterable[BytesLike], pending: Pending, parameters: Parameters
) -> Iterator[tuple[int, EncryptedTensor]]:
    """Yield the first feature and the tensor of each message of a reply.

    Raises:
        MessageError: malformed, incomplete, or the reply to another request.
    """
    tokens, features = pending.shape
    done = 0
    for data in blocks:
        direction, block, request, _, _ = _read_head("reply", data, _REPLY)
        if (direction, block, request) != (pending.direction, pending.block, pending.request):
            raise MessageError("reply: it answers another request; send the request again")
        if len(data) < _HEAD.size + _RANGE.size:
            raise MessageError("reply: truncated")
        first, total = _RANGE.unpack_from(data, _HEAD.size)
        if first != done or total != features:
            raise MessageError(f"reply: features from {first} of {total} where those from {done} of {features} are due")
        tensor = EncryptedTensor.from_bytes(parameters, memoryview(data)[_HEAD.size + _RANGE.size :])
        if tensor.shape[0] != tokens or done + tensor.shape[1] > features:
            raise MessageError(f"reply: shape {tensor.shape} does not fit ({tokens}, {features - done}) that are due")
        yield done, tensor
        done += tensor.shape[1]
    if done != features:
        raise MessageError(f"reply: it ends after {done} of {features} features; send the request again")

"""Requests to blocks that a server evaluates on ciphertexts, and the replies.

The server keeps nothing of a request: each brings the keys it needs. Bodies in the envelope of `privtuner.wire`, whose
subject is the block, little-endian:

    sealed_request : 1 to 4 parts: bytes u64 | message of keys or of an encrypted tensor, or what the direction says
    sealed_reply   : first feature u32 | of all u32 | message of an encrypted tensor; nothing in answer to a step

Neither side believes the other about a ciphertext: level, scale, bound and error are constants of the block, which its
public part states (`Layout`), and no message carries more of them than the level, to be compared.
"""

from __future__ import annotations

import math
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from privtuner import wire
from privtuner.ckks.evaluator import Evaluator
from privtuner.ckks.keys import EvaluationKeys, SecretKey
from privtuner.ckks.parameters import BytesLike, Parameters
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import CkksError, InputError, MessageError, SecretError

__all__ = [
    "LAYOUT_BYTES",
    "Block",
    "Layout",
    "MakeEvaluator",
    "Pending",
    "computed",
    "read_keys",
    "read_reply",
    "read_request",
    "read_tensor",
    "token_rows",
    "write_reply",
    "write_request",
]

Array = npt.NDArray[np.float64]

_LENGTH = struct.Struct("<Q")
_RANGE = struct.Struct("<II")
_LAYOUT = struct.Struct("<Idii")
_MOST_PARTS = 4
LAYOUT_BYTES = _LAYOUT.size
"""Length of a serialised `Layout`."""
_BLOCK_BYTES = 4 << 20  # about the size of one message of a reply

# One request at a time in a process: each uses all threads, and memory by the gigabyte.
_working = threading.Lock()


MakeEvaluator: TypeAlias = Callable[[Parameters, "EvaluationKeys | None"], Any]
"""Makes an `Evaluator`, or another engine with its operations, ``upload`` and ``download``."""


class Layout(NamedTuple):
    """What all ciphertexts of a block's replies are like, known to both sides before any request.

    Bound and noise are powers of two for all features, so they say nothing of single weights.
    """

    level: int
    """Multiplications left."""
    scale: float
    """Value = slot / scale."""
    bound_bits: int
    """|value| <= 2^bound_bits."""
    noise_bits: int
    """The slots' errors have a standard deviation of at most 2^noise_bits."""

    @classmethod
    def of(cls, result: EncryptedTensor) -> Layout:
        """The layout of what a block computes, from its dry run."""
        return cls(result.level, float(result.scale[0]), _bits(result.bound), _bits(float(result.noise.max())))

    def planned(self, parameters: Parameters, tokens: int, features: int) -> EncryptedTensor:
        """A planned tensor of this layout.

        Raises:
            CkksError: there is no such level, or values up to the bound do not fit it at this scale.
        """
        return Evaluator(parameters).planned(
            tokens,
            features,
            bound=math.ldexp(1, self.bound_bits),
            level=self.level,
            scale=self.scale,
            noise=math.ldexp(1, self.noise_bits),
        )

    def to_bytes(self) -> bytes:
        """Serialise."""
        return _LAYOUT.pack(*self)

    @classmethod
    def from_bytes(cls, data: BytesLike, parameters: Parameters) -> Layout:
        """Read what `to_bytes` wrote.

        Raises:
            MessageError: no result has this level, scale, bound or error.
        """
        layout = cls(*_LAYOUT.unpack(data))
        if not (layout.level <= parameters.depth and max(abs(layout.bound_bits), abs(layout.noise_bits)) <= 1000):
            raise MessageError(f"sealed block: impossible {layout}; fetch the bundle again")
        try:
            layout.planned(parameters, 1, 1)
        except (CkksError, InputError) as error:
            raise MessageError(f"sealed block: impossible {layout}: {error}") from error
        return layout


def _bits(value: float) -> int:
    return math.ceil(math.log2(value))


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
            MessageError: the request is malformed, meant for another block, or its tensors have other shapes or levels
                than the block takes; found before any work starts.
        """
        ...


@dataclass(repr=False, eq=False)
class Pending:
    """What decrypts the reply to one request, once. Never copied or pickled.

    Attributes:
        block: id of the block that was asked. request: of the request. direction: which way.
        expected: the planned result: shape, level, scale, bound and error.
        factors: (tokens, 1), what each token's result is multiplied by; None for 1.
    """

    block: bytes
    request: bytes
    direction: str
    expected: EncryptedTensor
    secret: SecretKey | None
    factors: Array | None = None

    def take_secret(self) -> SecretKey:
        """The secret key of the request, which is given away with this.

        Raises:
            SecretError: it was given away before.
        """
        secret, self.secret = self.secret, None
        if secret is None:
            raise SecretError("a reply to this request was decrypted already, or refused; send a request anew")
        return secret

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecretError("what decrypts a reply is never copied or pickled: it stays in the process that asked")


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


def write_request(direction: str, block: bytes, request: bytes, tokens: int, parts: Sequence[bytes]) -> bytes:
    """Make a request of these parts."""
    pieces = [piece for part in parts for piece in (_LENGTH.pack(len(part)), part)]
    return wire.seal("sealed_request", pieces, direction=direction, subject=block, request=request, tokens=tokens)


def read_request(data: BytesLike, block: bytes) -> tuple[str, bytes, int, list[memoryview]]:
    """Direction, request id, tokens and parts of a request to ``block``.

    Raises:
        MessageError: malformed, or for another block.
    """
    head, body = wire.open("sealed_request", data)
    if head.subject != block:
        raise MessageError("the request is meant for another block, or for other weights; fetch the bundle again")
    if (head.parameters, head.features) != (0, 0):
        raise MessageError("sealed_request: a field it does not use is not zero")
    at = 0
    parts: list[memoryview] = []
    while at < len(body):
        start = at + _LENGTH.size
        if len(parts) == _MOST_PARTS or start > len(body):
            raise MessageError(f"request: bytes are left over after {len(parts)} parts; at most {_MOST_PARTS} are due")
        at = start + _LENGTH.unpack_from(body, at)[0]
        if at > len(body):
            raise MessageError(f"request: part {len(parts) + 1} is truncated")
        parts.append(body[start:at])
    return head.direction, head.request, head.tokens, parts


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


def read_tensor(part: memoryview, expected: EncryptedTensor, what: str) -> EncryptedTensor:
    """Read an encrypted tensor of the shape and level of ``expected``, with its scale, bound and error.

    Raises:
        MessageError: malformed, or another shape or level.
    """
    try:
        return EncryptedTensor.from_bytes(expected.parameters, part, expected)
    except MessageError as error:
        raise MessageError(f"{what}: {error}") from error


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


def write_reply(result: EncryptedTensor | None, direction: str, block: bytes, request: bytes) -> Iterator[bytes]:
    """Yield the messages of a reply, some features in each; a single one without features for None."""

    def seal(*parts: bytes) -> bytes:
        return wire.seal("sealed_reply", parts, direction=direction, subject=block, request=request)

    if result is None:
        yield seal()
        return
    features = result.shape[1]
    width = max(1, _BLOCK_BYTES * features // result.message_bytes)
    engine = Evaluator(result.parameters)
    for first in range(0, features, width):
        some = engine.select(result, slice(first, min(first + width, features)))
        yield seal(_RANGE.pack(first, features), some.to_bytes())


def read_reply(blocks: Iterable[BytesLike], pending: Pending) -> Iterator[tuple[int, EncryptedTensor]]:
    """Yield the first feature and the tensor of each message of a reply.

    Raises:
        MessageError: malformed, incomplete, the reply to another request, or with ciphertexts that are not as expected.
    """
    engine, features, done = Evaluator(pending.expected.parameters), pending.expected.shape[1], 0
    for data in blocks:
        head, body = wire.open("sealed_reply", data)
        if (head.direction, head.subject, head.request) != (pending.direction, pending.block, pending.request):
            raise MessageError("reply: it answers another request; send the request again")
        if (head.parameters, head.tokens, head.features) != (0, 0, 0):
            raise MessageError("sealed_reply: a field it does not use is not zero")
        if len(body) < _RANGE.size:
            raise MessageError("reply: truncated")
        first, total = _RANGE.unpack_from(body)
        if first != done or total != features:
            raise MessageError(f"reply: features from {first} of {total} where those from {done} of {features} are due")
        part = body[_RANGE.size :]
        count = wire.peek(part).features
        if not 1 <= count <= features - done:
            raise MessageError(f"reply: {count} features where 1 to {features - done} are due")
        yield done, read_tensor(part, engine.select(pending.expected, slice(done, done + count)), "reply")
        done += count
    if done != features:
        raise MessageError(f"reply: it ends after {done} of {features} features; send the request again")

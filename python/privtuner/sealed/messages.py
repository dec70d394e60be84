"""Messages of a job: what data owner and server say to each other on one bidirectional stream, and the stream's ends.

Each is a `privtuner.wire` message of kind ``job``. Its head names the model (subject), the run (request) and the
parameters; its body, little-endian::

    type u8 | last u8 | 0 u16 | number u32 | payload

``number`` counts the messages of one direction from 0, so one that is lost, repeated or out of order is noticed.
``last`` ends what travels in pieces: keys, tensors, the training state. A job::

    owner                                       server
    open       nonce [32]
                                                welcome    nonce [32] | digest [32] of its saved state, 0 for none
    public_key, keys                            both checked against the nonces of both sides
    fresh, resume, or stored: the server's own  ready      step u64
    forward    (or embed) then inputs, mask     refresh, ... pooled
    backward   rate f64 | momentum f64          refresh, ... kept, done  step u64
               then gradient
      adapters in the clear at the server: clip f64 follows the momentum, and before kept:
                                                norm, masked
    opened     words u64, a number each
    release                                     released
    refreshed  answers each refresh, in order

No length on the wire decides how much memory is taken: what a message may hold follows from the model's public part.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from privtuner import wire
from privtuner.ckks.evaluator import Evaluator
from privtuner.ckks.parameters import Parameters
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import LostError, MessageError

__all__ = [
    "NONCE_BYTES",
    "STEP",
    "Link",
    "Message",
    "Rates",
    "Stream",
    "Type",
    "largest_message",
    "pieces_of",
]

NONCE_BYTES = 32
"""Length of each side's nonce, of which all keys' uniform halves come."""

STEP = struct.Struct("<Q")
"""A step's number."""

_KIND = "job"
_BODY = struct.Struct("<BBHI")
_RATES, _CLIP = struct.Struct("<dd"), struct.Struct("<d")
_PIECE_BYTES = 4 << 20  # large enough to amortise the cost of a message, small enough to overlap with the next
_AHEAD = 4  # messages that wait at each end for whoever takes them


class Type(IntEnum):
    """What a message is. Those of the owner are below 32, those of the server above."""

    OPEN = 1
    PUBLIC_KEY = 2
    KEYS = 3
    FRESH = 4
    RESUME = 5
    STORED = 6
    EMBED = 7
    FORWARD = 8
    BACKWARD = 9
    INPUTS = 10
    MASK = 11
    GRADIENT = 12
    REFRESHED = 13
    RELEASE = 14
    OPENED = 15
    WELCOME = 32
    READY = 33
    REFRESH = 34
    POOLED = 35
    KEPT = 36
    DONE = 37
    RELEASED = 38
    NORM = 39
    MASKED = 40


class Message(NamedTuple):
    """A message that was read and checked.

    Attributes:
        type: what it is.
        last: whether it ends what travels in pieces.
        payload: the rest of its body.
    """

    type: Type
    last: bool
    payload: memoryview


class Rates(NamedTuple):
    """How a step is taken: ``velocity = momentum velocity + gradient``, ``adapter -= rate velocity``.

    Attributes:
        rate, momentum: of the step.
        clip: the norm that the gradient is clipped to where the server has adapters in the clear; None where not.
    """

    rate: float
    momentum: float
    clip: float | None = None

    def to_bytes(self) -> bytes:
        """Serialise."""
        return _RATES.pack(self.rate, self.momentum) + (b"" if self.clip is None else _CLIP.pack(self.clip))

    @classmethod
    def from_bytes(cls, data: wire.BytesLike, *, clipped: bool) -> Rates:
        """Read what `to_bytes` wrote, with a clipping norm or without.

        Raises:
            MessageError: another length, a rate outside [0, 1e6], a momentum outside [0, 1), a norm outside
                [1e-6, 1e6].
        """
        size = _RATES.size + (_CLIP.size if clipped else 0)
        if len(data) != size:
            raise MessageError(f"job: {len(data)} bytes of rates, {size} are due")
        rates = cls(*_RATES.unpack_from(data), *(_CLIP.unpack_from(data, _RATES.size) if clipped else (None,)))
        if rates.clip is not None and not 1e-6 <= rates.clip <= 1e6:
            raise MessageError(f"job: a clipping norm of {rates.clip:g}; give 1e-6 to 1e6")
        if not (0 <= rates.rate <= 1e6 and 0 <= rates.momentum < 1):
            raise MessageError(f"job: rate {rates.rate:g} and momentum {rates.momentum:g}; give 0 to 1e6, and [0, 1)")
        return rates


class Stream:
    """One end of a bidirectional stream: two short queues, and a thread that fills one of them.

    Every wait has a deadline. An end of the stream, also one that comes while nobody waits, is noticed by the next
    `send`, `receive` or `check`.

    Args:
        peer: how errors call the other side.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._changed = threading.Condition()
        self._inbox: deque[bytes] = deque()
        self._outbox: deque[bytes] = deque()
        self._ended = self._closed = False
        self._failure: Exception | None = None
        self._cancel: Callable[[], object] = lambda: None

    def listen(self, incoming: Iterable[bytes]) -> None:
        """Take what ``incoming`` yields, in a thread of its own, a few messages ahead of `receive`.

        Where it has a method ``cancel``, `abandon` calls it.
        """
        self._cancel = getattr(incoming, "cancel", self._cancel)
        threading.Thread(target=self._take, args=(incoming,), name="privtuner-job", daemon=True).start()

    def outgoing(self) -> Iterator[bytes]:
        """Yield what is sent, until `close`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outbox or self._closed)
                if not self._outbox:
                    return
                message = self._outbox.popleft()
                self._changed.notify_all()
            yield message

    def send(self, message: bytes, seconds: float) -> None:
        """Hand over a message, once there is room.

        Raises:
            LostError: the other side took nothing for ``seconds``, or the stream ended.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._outbox) < _AHEAD or self._over(), seconds):
                raise LostError(f"{self._peer} took no message for {seconds:g} s")
            self._check()
            self._outbox.append(message)
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Return whether a message came, or the end, within ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._inbox) or self._over(), seconds)

    def receive(self, seconds: float) -> bytes | None:
        """Return the next message, or None where the other side ended the stream in order.

        Raises:
            LostError: none came for ``seconds``, or the stream broke.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._inbox or self._over(), seconds):
                raise LostError(f"{self._peer} sent nothing for {seconds:g} s")
            if self._failure is not None or self._closed:
                self._check()
            if not self._inbox:
                return None
            message = self._inbox.popleft()
            self._changed.notify_all()
        return message

    def check(self) -> None:
        """Raise what ended the stream, if something did and no message is left.

        Raises:
            LostError: the stream ended. PrivtunerError: what the other side's end was refused with.
        """
        with self._changed:
            self._check()

    def close(self) -> None:
        """End the stream: what was sent before still goes out, nothing more comes in."""
        with self._changed:
            self._closed = True
            self._inbox.clear()
            self._changed.notify_all()

    def abandon(self) -> None:
        """End the stream in the middle of a job: the other side is to stop at once."""
        self.close()
        self._cancel()

    def _over(self) -> bool:
        return self._ended or self._closed

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed or (self._ended and not self._inbox):
            raise LostError(f"the stream of {self._peer} ended in the middle of a job")

    def _take(self, incoming: Iterable[bytes]) -> None:
        failure: Exception | None = None
        try:
            for message in incoming:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._inbox) < _AHEAD or self._closed)
                    if self._closed:
                        break
                    self._inbox.append(message)
                    self._changed.notify_all()
        except Exception as error:  # whatever a transport raises reaches whoever waits for its messages
            failure = error
        with self._changed:
            self._failure, self._ended = failure, True
            self._changed.notify_all()
        close = getattr(incoming, "close", None)
        if close is not None:
            close()


class Link:
    """Messages over a stream: numbered, of one model and run, with a count of their bytes.

    Args:
        stream: this side's end.
        subject: the model's id. request: the run's id. parameters: hash of the parameter set.
        largest: bytes of the longest message that is read.
    """

    def __init__(self, stream: Stream, subject: bytes, request: bytes, parameters: int, largest: int) -> None:
        self.stream, self.request = stream, request
        self._subject, self._parameters, self._largest = subject, parameters, largest
        self._sent = self._received = 0
        self.bytes_in = self.bytes_out = 0

    def send(self, type: Type, *payload: wire.BytesLike, last: bool = True, seconds: float) -> None:
        """Send one message. Raises LostError as `Stream.send`."""
        body = _BODY.pack(type, last, 0, self._sent)
        message = wire.seal(
            _KIND, [body, *payload], subject=self._subject, request=self.request, parameters=self._parameters
        )
        self.stream.send(message, seconds)
        self._sent += 1
        self.bytes_out += len(message)

    def receive(self, types: Collection[Type], *, seconds: float) -> Message | None:
        """Read the next message, which must be of one of ``types``; None where the stream ended in order.

        Raises:
            MessageError: too long, malformed, of another model or run, repeated or out of order, of another type.
            LostError: as `Stream.receive`.
        """
        data = self.stream.receive(seconds)
        if data is None:
            return None
        if len(data) > self._largest:
            raise MessageError(f"job: a message of {len(data)} bytes, at most {self._largest} are due")
        self.bytes_in += len(data)
        head, body = wire.open(_KIND, data)
        if head.subject != self._subject or head.parameters != self._parameters:
            raise MessageError("job: it is meant for another model, or for other weights; fetch the bundle again")
        if self._received == 0 and Type.OPEN in types:
            self.request = head.request  # the owner names the run
        if head.request != self.request:
            raise MessageError("job: a message of another run; begin again")
        if (head.direction, head.tokens, head.features) != ("forward", 0, 0):
            raise MessageError("job: a field it does not use is not zero")
        if len(body) < _BODY.size:
            raise MessageError(f"job: a body of {len(body)} bytes is truncated")
        kind, last, zero, number = _BODY.unpack_from(body)
        if number != self._received:
            raise MessageError(f"job: message {number} where {self._received} is due: repeated or out of order")
        if kind not in types or last > 1 or zero != 0:
            due = " or ".join(sorted(other.name.lower() for other in types))
            raise MessageError(f"job: a message of type {kind} where {due} is due")
        self._received += 1
        return Message(Type(kind), bool(last), body[_BODY.size :])

    def expect(self, *types: Type, seconds: float) -> Message:
        """Read as `receive`, where the stream must not end.

        Raises:
            MessageError, LostError: as `receive`, or the stream ended.
        """
        message = self.receive(types, seconds=seconds)
        if message is None:
            self.stream.check()
            raise LostError("the stream ended in the middle of a job")
        return message

    def send_bytes(self, type: Type, data: wire.BytesLike, *, seconds: float) -> None:
        """Send what is long in pieces."""
        view = memoryview(data)
        for start in range(0, max(1, len(view)), _PIECE_BYTES):
            end = start + _PIECE_BYTES
            self.send(type, view[start:end], last=end >= len(view), seconds=seconds)

    def receive_bytes(self, type: Type, size: int, *, seconds: float) -> bytearray:
        """Read what `send_bytes` sent, which must be ``size`` bytes; no more are ever held.

        Raises:
            MessageError, LostError: as `expect`, or another size.
        """
        data = bytearray()
        while True:
            message = self.expect(type, seconds=seconds)
            total = len(data) + len(message.payload)
            if not len(message.payload) and not message.last:
                raise MessageError(f"job: an empty piece of {type.name.lower()}")
            if total > size or (message.last and total < size):
                raise MessageError(f"job: {total} bytes of {type.name.lower()}, {size} are due")
            data += message.payload
            if message.last:
                return data

    def send_tensor(self, type: Type, tensor: EncryptedTensor, *, seconds: float) -> None:
        """Send a tensor, some features in each message."""
        for last, piece in pieces_of(tensor):
            self.send(type, piece.to_bytes(), last=last, seconds=seconds)

    def receive_tensor(
        self,
        type: Type,
        expected: EncryptedTensor,
        *,
        seconds: float,
        first: Message | None = None,
    ) -> list[EncryptedTensor]:
        """Read what `send_tensor` sent, in pieces: of the shape and level of ``expected``, with its scale and bound.

        Args:
            type: of the messages.
            expected: a planned tensor.
            seconds: deadline of each message.
            first: the first message, where it was read already.

        Raises:
            MessageError, LostError: as `expect`, or another shape or level, too few or too many features.
        """
        engine, features = Evaluator(expected.parameters), expected.shape[1]
        parts: list[EncryptedTensor] = []
        done = 0
        while True:
            message = first or self.expect(type, seconds=seconds)
            first = None
            count = wire.peek(message.payload).features
            if not 1 <= count <= features - done or message.last != (done + count == features):
                raise MessageError(
                    f"{type.name.lower()}: {done + count} features{' at its end' if message.last else ''}, "
                    f"{features} are due"
                )
            planned = engine.select(expected, slice(done, done + count))
            try:
                parts.append(EncryptedTensor.from_bytes(expected.parameters, message.payload, planned))
            except MessageError as error:
                raise MessageError(f"{type.name.lower()}: {error}") from error
            done += count
            if message.last:
                return parts


def pieces_of(tensor: EncryptedTensor) -> Iterator[tuple[bool, EncryptedTensor]]:
    """Yield neighbouring features of a tensor, about 4 MiB at a time, with whether they are the last."""
    features, engine = tensor.shape[1], Evaluator(tensor.parameters)
    width = max(1, _PIECE_BYTES * features // tensor.message_bytes)
    for start in range(0, features, width):
        end = min(start + width, features)
        yield end == features, engine.select(tensor, slice(start, end))


def largest_message(parameters: Parameters) -> int:
    """Bytes of the longest message of a job: 8 MiB, or two whole ciphertexts where these are longer."""
    return max(8 << 20, 2 * 16 * parameters.ring_dimension * (parameters.depth + 1)) + 4096

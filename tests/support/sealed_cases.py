"""A sealed model of one block that takes a moment: the interface of the real one, on a ring that protects nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from privtuner import ckks, wire
from privtuner.ckks.evaluator import Evaluator, Matrix
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import InputError
from privtuner.nn import OwnerBundle, Split
from privtuner.schemes import LocalTransport
from privtuner.sealed.messages import _BODY, _KIND, Type
from privtuner.sealed.model import EncryptedAdapters
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.server import SealedService
from privtuner.sealed.state import piece_limit
from privtuner.service import RemoteTransport, Server

PARAMETERS = ckks.Parameters.INSECURE(6)
WIDTH, PERIOD = 4, 4
SLOTS = PARAMETERS.slots
SEQUENCES = SLOTS // PERIOD


def planned_packed(bound):
    core = Evaluator(PARAMETERS)._core.planned_packed(np.ones((WIDTH, 1)), 6, bound, np.zeros(0))
    return EncryptedTensor(core, PARAMETERS)


def reveal(ev, x):
    """Revealed with an error that is ten times the one that is there, whatever bounds predict."""
    return ev.reveal(ev.assume(x, 64.0, error=1e-8), error=1e-3)


PAIRS = WIDTH // 2
"""Ciphertexts that carry the features of a wide tensor in a refresh."""


class Keys(NamedTuple):
    rotations: tuple[int, ...] = ()
    conjugation: bool = True
    packing: bool = True


class Refresh(NamedTuple):
    stage: str
    ciphertexts: int
    level: int = 6


@dataclass(frozen=True)
class TinyShape:
    pooler: bool = False
    clear: bool = False


SCHEDULES = {
    "embed": (Refresh("product", PAIRS),),
    "forward": (Refresh("product", PAIRS),),
    "backward": (Refresh("gradient", 1), Refresh("velocity", 1), Refresh("adapters", 1)),
}


@dataclass(frozen=True)
class TinyPublic:
    id: bytes
    pooling: str = "first"
    shape: TinyShape = field(default_factory=TinyShape)

    parameters = PARAMETERS
    period, batch, width = PERIOD, SEQUENCES, WIDTH
    keys = Keys()
    adapter_numbers = WIDTH
    inputs = Evaluator(PARAMETERS).planned(SLOTS, WIDTH)
    mask = Evaluator(PARAMETERS).planned(SLOTS, 1)
    gradient = Evaluator(PARAMETERS).planned(SLOTS, WIDTH)
    adapters = tuple(planned_packed(bound) for bound in (4.0, 64.0))
    state_limit = piece_limit(adapters)
    pooled = reveal(Evaluator(PARAMETERS), Evaluator(PARAMETERS).planned(SLOTS, WIDTH, level=4, noise=2.0**30))

    def schedule(self, task):
        return SCHEDULES[task]

    def arrange(self, x, lengths):
        values, mask = np.zeros((PERIOD, SEQUENCES, WIDTH)), np.zeros((PERIOD, SEQUENCES, 1))
        for sequence, length in enumerate(lengths):
            values[:length, sequence] = x[sequence, :length]
            mask[:length, sequence] = 1
        if np.abs(values).max() > self.inputs.bound:
            raise InputError(f"an embedding is beyond {self.inputs.bound:g}")
        return values.reshape(SLOTS, WIDTH), mask.reshape(SLOTS, 1)

    def read_pooled(self, values):
        return values[:SEQUENCES]

    def spread(self, gradient, lengths):
        values = np.zeros((SLOTS, WIDTH))
        values[: len(gradient)] = gradient
        return values

    def initial_adapters(self, secret):
        """The same for all, so that tests can compute what becomes of them."""
        return tuple(
            secret.encrypt_packed(np.full((WIDTH, 1), value), bound=planned.bound, level=6)
            for value, planned in zip((1.0, 0.0), self.adapters, strict=True)
        )


class TinyModel:
    """pooled = (a (W x + b))^2 at the first position; a (WIDTH,) is adapted."""

    def __init__(self, seed: int = 0, scale: float = 0.5) -> None:
        draw = np.random.default_rng(seed)
        self.matrix = Matrix(draw.uniform(-scale, scale, (WIDTH, WIDTH + 1)), bits=16, per_row=False)
        self.w, self.b = self.matrix.dequantised()[:, :WIDTH], self.matrix.dequantised()[:, WIDTH]
        content = self.matrix.dequantised().tobytes()
        self.secret = hashlib.sha256(b"secret" + content).digest()
        self.public = TinyPublic(hashlib.sha256(b"id" + content).digest()[:16])
        self.before_backward = lambda: None

    def forward(self, ev, x, mask, adapters, keep=False, progress=None):
        h = ev.assume(ev.linear(ev.concatenate([x, mask]), self.matrix), 4.0)
        progress("product")
        y = ev.assume(ev.refresh(ev.multiply(h, ev.expand(adapters.values, WIDTH)), 6), 4.0)
        first = np.zeros(SLOTS)
        first[:SEQUENCES] = 1
        pooled = ev.assume(ev.multiply_plain(ev.square(y), first), 64.0)
        return reveal(ev, self.last(ev, pooled)), (h, y) if keep else None

    def last(self, ev, pooled):
        return pooled

    def backward(self, ev, saved, gradient, adapters, progress=None):
        self.before_backward()
        h, y = saved
        progress("gradient")
        each = ev.multiply(ev.multiply(ev.multiply(gradient, y), h), 2.0)
        return ev.refresh(ev.assume(ev.pack_slot_sums(each), 64.0), 6, packed=True)

    def step(self, ev, adapters, gradients, rate, momentum):
        velocity = ev.add(ev.multiply(adapters.velocity, momentum), ev.multiply(gradients, 1.0))
        velocity = ev.refresh(ev.assume(velocity, 64.0), 6, packed=True)
        values = ev.subtract(ev.multiply(adapters.values, 1.0), ev.multiply(velocity, rate))
        return EncryptedAdapters(ev.refresh(ev.assume(values, 4.0), 6, packed=True), velocity)

    # The same in the clear

    def pooled(self, x, a):
        return (a * (x[:, 0] @ self.w.T + self.b)) ** 2

    def gradient(self, x, a, g):
        h = x[:, 0] @ self.w.T + self.b
        return (g * 2 * a * h * h).sum(axis=0)


def batch(count=3, seed=1):
    draw = np.random.default_rng(seed)
    return draw.uniform(-1, 1, (count, PERIOD, WIDTH)), draw.integers(1, PERIOD + 1, count)


class Twin:
    """The adapter's training in the clear."""

    def __init__(self, model: TinyModel) -> None:
        self.model, self.a, self.velocity = model, np.ones(WIDTH), np.zeros(WIDTH)

    def step(self, x, g, rate, momentum):
        self.velocity = momentum * self.velocity + self.model.gradient(x, self.a, g)
        self.a = self.a - rate * self.velocity


TOLERANCE = TinyPublic.pooled.budget().error
"""What the flood leaves."""

G = np.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH) / SEQUENCES
"""Gradients up to the bound of the owner."""


def train(owner: SealedOwner, twin: Twin, steps: int = 1, rate: float = 8.0) -> None:
    """Take steps at both, and check the pooled vectors before each and after the last."""
    x, lengths = batch()
    for _ in range(steps):
        check(owner.forward(x, lengths), twin)
        owner.backward(G, rate, 0.5)
        twin.step(x, G, rate, 0.5)
    check(owner.embed(x, lengths), twin)


def check(pooled, twin: Twin) -> None:
    assert np.abs(pooled - twin.model.pooled(batch()[0], twin.a)).max() < TOLERANCE


@contextmanager
def served(kind: str, model: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A transport to a service of the model, and the service, or the gRPC server around it."""
    service = SealedService(model, **options)
    if kind == "local":
        yield LocalTransport({}, sealed=service), service
        return
    bundle = OwnerBundle({"model_type": "bert"}, "BertModel", "float32", {}, {}, {})
    with Server(Split({}, bundle), sealed=service) as running, RemoteTransport(running.address) as transport:
        yield transport, running


class Between:
    """A transport that shows every message to ``up`` or ``down``, which returns what goes on in its place.

    Attributes:
        seen: ("up" or "down", message) of all that went on, in order.
    """

    def __init__(self, transport: Any, up: Callable[..., Any] | None = None, down: Callable[..., Any] | None = None):
        self.transport, self.seen, self.closed = transport, [], False
        self.up, self.down = up or (lambda message: [message]), down or (lambda message: [message])

    def job(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        for message in self.transport.job(self._pass("up", messages)):
            yield from self._pass("down", [message])

    def _pass(self, direction: str, messages: Iterable[bytes]) -> Iterator[bytes]:
        for message in messages:
            for other in (self.up if direction == "up" else self.down)(message):
                self.seen.append((direction, other))
                yield other


def type_of(message: bytes) -> Type:
    return Type(_BODY.unpack_from(message, wire.HEAD_BYTES)[0])


def inner(message: bytes, cut: int = 0, **fields: Any) -> bytes:
    """The same message with the message that it carries altered: fields of its head, or bytes cut off its body."""
    carried = memoryview(message)[wire.HEAD_BYTES + _BODY.size :]
    head = wire.peek(carried)
    body = carried[wire.HEAD_BYTES : len(carried) - cut]
    kept = {name: getattr(head, name) for name in ("parameters", "subject", "request", "tokens", "features")}
    return remade(message, wire.seal(head.kind, [body], **{**kept, **fields}))


def remade(message: bytes, payload: bytes | None = None, **fields: Any) -> bytes:
    """The same message with some fields of head or body, or its payload, replaced."""
    head, body = wire.open(_KIND, message)
    names = ("type", "last", "zero", "number")
    values = dict(zip(names, _BODY.unpack_from(body), strict=True))
    for name in names:
        values[name] = fields.pop(name, values[name])
    kept = {name: getattr(head, name) for name in ("parameters", "subject", "request", "tokens", "features")}
    rest = body[_BODY.size :] if payload is None else payload
    return wire.seal(_KIND, [_BODY.pack(*values.values()), rest], **{**kept, **fields})

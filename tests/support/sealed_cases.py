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
from privtuner.ckks.keys import EvaluationKeys, PublicKey, SecretKey
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.nn import OwnerBundle, Split
from privtuner.schemes import LocalTransport
from privtuner.sealed.messages import _BODY, _KIND, Type
from privtuner.sealed.model import EncryptedAdapters
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.server import SealedService
from privtuner.service import RemoteTransport, Server

PARAMETERS = ckks.Parameters.INSECURE(6)
WIDTH, PERIOD = 4, 4
SLOTS = PARAMETERS.slots
SEQUENCES = SLOTS // PERIOD


class Keys(NamedTuple):
    rotations: tuple[int, ...]
    relinearisation: bool
    conjugation: bool
    packing: bool


class Refresh(NamedTuple):
    stage: str
    ciphertexts: int
    level: int


@dataclass(frozen=True)
class Layout:
    features: int
    level: int
    bound: float
    scale: float | None = None
    noise: float | None = None

    def planned(self, parameters):
        return Evaluator(parameters).planned(
            SLOTS, self.features, bound=self.bound, level=self.level, scale=self.scale, noise=self.noise
        )


@dataclass(frozen=True)
class TinyShape:
    width: int = WIDTH
    period: int = PERIOD
    pool: str = "first"
    pooler: bool = False


@dataclass(frozen=True)
class TinyPublic:
    id: bytes
    parameters: ckks.Parameters = PARAMETERS
    shape: TinyShape = field(default_factory=TinyShape)
    sequences: int = SEQUENCES
    keys: Keys = Keys(tuple(1 << bit for bit in range(SLOTS.bit_length() - 1)), True, False, False)
    input: Layout = Layout(WIDTH, 6, 1.0)
    mask: Layout = Layout(1, 6, 1.0)
    gradient: Layout = Layout(WIDTH, 6, 1.0)
    adapters: Layout = Layout(WIDTH, 6, 4.0)
    velocity: Layout = Layout(WIDTH, 6, 64.0)
    pooled: Layout = Layout(WIDTH, 4, 64.0, noise=4096.0)
    forward: tuple[Refresh, ...] = (Refresh("product", WIDTH, 6),)
    train_forward: tuple[Refresh, ...] = (Refresh("product", WIDTH, 6),)
    backward: tuple[Refresh, ...] = (Refresh("gradient", WIDTH, 6),)
    step: tuple[Refresh, ...] = (Refresh("velocity", WIDTH, 6), Refresh("adapters", WIDTH, 6))

    def arrange(self, x, lengths):
        values, mask = np.zeros((PERIOD, SEQUENCES, WIDTH)), np.zeros((PERIOD, SEQUENCES, 1))
        for sequence, length in enumerate(lengths):
            values[:length, sequence] = x[sequence, :length]
            mask[:length, sequence] = 1
        return values.reshape(SLOTS, WIDTH), mask.reshape(SLOTS, 1)

    def read_pooled(self, values):
        return values[:SEQUENCES]

    def spread(self, gradient, lengths):
        values = np.zeros((SLOTS, WIDTH))
        values[: len(gradient)] = gradient
        return values

    def initial_adapters(self, generator):
        return np.ones((SLOTS, WIDTH))


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
        y = ev.assume(ev.refresh(ev.multiply(h, adapters.values), 6), 4.0)
        first = np.zeros(SLOTS)
        first[:SEQUENCES] = 1
        pooled = ev.assume(ev.multiply_plain(ev.square(y), first), 64.0)
        return ev.reveal(pooled), (h, y) if keep else None

    def backward(self, ev, saved, gradient, adapters, progress=None):
        self.before_backward()
        h, y = saved
        progress("gradient")
        each = ev.multiply(ev.multiply(ev.multiply(gradient, y), h), 2.0)
        return ev.assume(ev.refresh(ev.assume(ev.sum_slots(each), 64.0), 6), 64.0)

    def step(self, ev, adapters, gradients, rate, momentum):
        velocity = gradients
        if adapters.velocity is not None:
            velocity = ev.add(ev.multiply(adapters.velocity, momentum), ev.multiply(gradients, 1.0))
        velocity = ev.refresh(ev.assume(velocity, 64.0), 6)
        values = ev.subtract(ev.multiply(adapters.values, 1.0), ev.multiply(velocity, rate))
        return EncryptedAdapters(ev.refresh(ev.assume(values, 4.0), 6), velocity)

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


TOLERANCE = 1e-6
"""Some ten times the error predicted for a value that was refreshed at a level of 40 bits, squared and summed."""

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
    service = SealedService(model, evaluator=StandInEvaluator, **options)
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
        self.transport, self.seen = transport, []
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


class StandInEvaluator(Evaluator):
    """Refreshes without masks."""

    def __init__(self, parameters, keys=None, refresher=None):
        super().__init__(parameters, keys)
        self.refresher = refresher

    def refresh(self, x, level=None):
        x = self.multiply(x, 1.0) if x.scale[0] != PARAMETERS.scale(x.level) else x
        while x.level > 2:
            x = self.multiply(self.drop_level(x, 3), 1.0)
        parts = [self.select(x, slice(f, f + 2)) for f in range(0, x.shape[1], 2)]
        planned = [self.planned(*part.shape, bound=x.bound, level=level) for part in parts]
        replies = self.refresher.exchange(part.to_bytes() for part in parts)
        return self.concatenate(
            [EncryptedTensor.from_bytes(PARAMETERS, r, p) for r, p in zip(replies, planned, strict=True)]
        )

    def reveal(self, x):
        return x


class StandInSecretKey(SecretKey):
    bound = 64.0

    def refresh(self, message, level):
        planned = Evaluator(PARAMETERS).planned(SLOTS, 2, bound=self.bound, level=2)
        values = self.decrypt(EncryptedTensor.from_bytes(PARAMETERS, message, planned))
        return self.encrypt(values, bound=self.bound, level=level).to_bytes()

    def encrypt_packed(self, values, *, bound, level):
        return self.encrypt(values, bound=bound, level=level)

    def decrypt_packed(self, tensor):
        return self.decrypt(tensor)

    def public_key(self, common):
        return super().public_key()

    def evaluation_keys(self, common, **options):
        return super().evaluation_keys(**options)


def stand_in(monkeypatch: Any) -> None:
    from privtuner.sealed import owner, server

    monkeypatch.setattr(owner, "SecretKey", StandInSecretKey)
    for name, cls in (("PublicKey", PublicKey), ("EvaluationKeys", EvaluationKeys)):

        class Reader:
            @staticmethod
            def from_bytes(parameters, data, common, cls=cls):
                return cls.from_bytes(parameters, data)

        monkeypatch.setattr(server, name, Reader)

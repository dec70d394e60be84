"""LoRA adapters that the server holds, as in PrivTuner: one linear layer, many devices.

**Only for a server that is trusted to follow the protocol.** The device decrypts what comes in the place of a gradient
and sends it back in the clear: a server that deviates reads the device's inputs. See "Adapters held by the
server" in SECURITY.md.

The device keeps its data and labels, the server weight and adapters::

    layer = HeldLora(weight, r=4)                             # server
    device = HeldClient(layer.answer)                         # or through a transport

    y = device.forward(x)                                     # (W + s B A) x on ciphertexts
    da, db = device.gradient(x, g)                            # computed on ciphertexts, decrypted here
    device.step(da, db)                                       # in the clear, as they are or clipped
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privtuner import _core, wire
from privtuner.ckks.evaluator import Evaluator, Matrix
from privtuner.ckks.keys import SecretKey
from privtuner.ckks.parameters import BytesLike, Parameters, require_secure
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.copies import Stays
from privtuner.errors import InputError, MessageError
from privtuner.sealed.exchange import (
    Block,
    MakeEvaluator,
    Pending,
    computed,
    read_keys,
    read_reply,
    read_request,
    read_tensor,
    token_rows,
    write_reply,
    write_request,
)

__all__ = ["HeldClient", "HeldLora", "HeldPublic", "LoraAdapter"]

Array = npt.NDArray[np.float64]

_HELD = struct.Struct("<IIIIddddq")
# Adam divides gradients by their size; where there is none, as of A while B is zero, it would step by their noise.
_DAMPING = 1e-4


@dataclass(frozen=True)
class HeldPublic:
    """What a device must know of a `HeldLora` to foresee the layer's ciphertexts and its own adapter. No weight.

    Attributes:
        id: 16 bytes that name the layer and its weight; every message carries it.
        parameters: of the encryption.
        d_in, d_out: features of input and output. r: rank of the adapters.
        adam, lr, seed: see `HeldLora`. factor: alpha / r.
        input_bound: |x| <= input_bound, for every request.
        largest: the weight's largest entry in size, which its quantisation tells.
    """

    id: bytes
    parameters: Parameters
    d_in: int
    d_out: int
    r: int
    adam: bool
    lr: float
    factor: float
    input_bound: float
    largest: float
    seed: int

    def adapter(self) -> LoraAdapter:
        """The adapter that every device starts from."""
        a = np.random.default_rng(self.seed).uniform(-1, 1, (self.r, self.d_in)) / math.sqrt(self.d_in)
        return LoraAdapter(a, np.zeros((self.d_out, self.r)), lr=self.lr, adam=self.adam)

    def unit(self, adapter: LoraAdapter) -> float:
        """What an integer stands for in the quantised W + s B A: the device needs no weight to know it."""
        return (self.largest + float(np.abs(self.factor * adapter.b @ adapter.a).max())) / _core.MAX_WEIGHT_16

    def expected_forward(self, adapter: LoraAdapter, tokens: int) -> EncryptedTensor:
        """What the layer makes of so many tokens, as a planned tensor: the worst case over all weights."""
        engine = Evaluator(self.parameters)
        worst = Matrix.of_integers(np.full((self.d_out, self.d_in), _core.MAX_WEIGHT_16, np.int16), self.unit(adapter))
        return engine.linear(engine.planned(tokens, self.d_in, bound=self.input_bound, level=1), worst)

    def expected_gradient(self, adapter: LoraAdapter, tokens: int) -> EncryptedTensor:
        """The gradients of this adapter from so many tokens, as a planned tensor."""
        engine = Evaluator(self.parameters)
        x = engine.planned(tokens, self.d_in, bound=self.input_bound, level=2)
        return _gradient(engine, adapter, x, engine.planned(tokens, self.d_out, bound=1.0, level=2))

    def to_bytes(self) -> bytes:
        """Serialise."""
        numbers = (self.lr, self.factor, self.input_bound, self.largest, self.seed)
        fields = _HELD.pack(self.d_in, self.d_out, self.r, self.adam, *numbers)
        return wire.seal("held_public", [fields, self.parameters.to_bytes()], subject=self.id)

    @classmethod
    def from_bytes(cls, data: BytesLike) -> HeldPublic:
        """Read what `to_bytes` wrote.

        Raises:
            MessageError: malformed, of another version, or with values that no layer has.
        """
        head, body = wire.open("held_public", data)
        if head != wire.Head("held_public", "forward", 0, head.subject, bytes(16), 0, 0, len(body)):
            raise MessageError("held adapter: its public part uses a field of the head that it has no use for")
        if len(body) < _HELD.size:
            raise MessageError(f"held adapter: a public part of {len(body)} bytes is truncated; fetch it again")
        d_in, d_out, r, adam, lr, factor, bound, largest, seed = _HELD.unpack_from(body)
        numbers = (lr, factor, bound, largest)
        if not (1 <= d_in <= 65536 and 1 <= d_out <= 65536 and 1 <= r <= max(d_in, d_out) and adam <= 1 and seed >= 0):
            raise MessageError(f"held adapter: shape ({d_out}, {d_in}), rank {r} or another field is impossible")
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise MessageError(f"held adapter: {numbers} must be positive numbers; fetch it again")
        parameters = Parameters.from_bytes(body[_HELD.size :])
        if parameters.depth < 2:
            raise MessageError(f"held adapter: {parameters.name} has no two levels")
        return cls(head.subject, parameters, d_in, d_out, r, bool(adam), *numbers, seed=seed)


class LoraAdapter:
    """The pair (A, B) of one device, in the clear, and how it is stepped.

    Args:
        a: (r, d_in). b: (d_out, r).
        lr: learning rate. adam: Adam (Kingma and Ba, 2015), damped; plain gradient descent otherwise.
    """

    def __init__(self, a: Array, b: Array, *, lr: float, adam: bool) -> None:
        self.a, self.b = a, b
        self.lr, self.adam, self.steps = lr, adam, 0
        self._moments = [np.zeros((2, *matrix.shape)) for matrix in (a, b)]

    def step(self, da: Array, db: Array) -> None:
        """Move A and B against their gradients."""
        self.steps += 1
        moved = []
        for matrix, gradient, moments in zip((self.a, self.b), (da, db), self._moments, strict=True):
            direction = gradient
            if self.adam:
                moments[0] = 0.9 * moments[0] + 0.1 * gradient
                moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
                mean, square = moments[0] / (1 - 0.9**self.steps), moments[1] / (1 - 0.999**self.steps)
                direction = mean / (np.sqrt(square) + _DAMPING)
            moved.append(matrix - self.lr * direction)
        self.a, self.b = moved


class HeldLora(Stays, Block):
    """y = (W + s B A) x with the adapters of all devices held by the server, as in PrivTuner (s = alpha / r).

    The server has W, A and B in the clear. It sees neither inputs nor outputs, and of the gradient only what the device
    returns, in the clear and perhaps clipped: **the adapter gradient is what both sides know.** A device is known by
    an id of its choice; who knows the id can use and move that adapter. The layer is linear, so whoever asks it often
    enough can solve for W + s B A: this protects the data, not the weight.

    Args:
        weight: (d_out, d_in), frozen.
        r: rank. alpha: the update is scaled by alpha / r.
        parameters: default the smallest secure set of two levels.
        lr: learning rate. adam: see `LoraAdapter`.
        seed: of A, which every device starts from; B starts at zero. In [0, 2^63).
        input_bound: what |x| stays below; inputs are refused above it. Gradients carry noise in proportion to it: keep
            it tight.
        max_devices: adapters kept; further devices are refused.

    Attributes:
        public: for devices.

    Raises:
        InputError: weight, rank, rate or parameters are unusable.
    """

    stays = "adapters held for devices stay in the process that serves them; make a HeldLora of the weight in the other"

    def __init__(
        self,
        weight: npt.ArrayLike,
        r: int = 4,
        alpha: float = 8.0,
        *,
        parameters: Parameters | None = None,
        lr: float = 1e-2,
        adam: bool = True,
        seed: int = 0,
        input_bound: float = 8.0,
        max_devices: int = 64,
    ) -> None:
        self.weight = np.array(weight, np.float64)
        if self.weight.ndim != 2 or 0 in self.weight.shape or not np.isfinite(self.weight).all():
            raise InputError(f"weight has shape {self.weight.shape}; pass a finite matrix (d_out, d_in)")
        d_out, d_in = self.weight.shape
        parameters = Parameters.secure(2) if parameters is None else parameters
        if parameters.depth < 2:
            raise InputError(f"{parameters.name} has {parameters.depth} levels, a held adapter takes 2; use more")
        if not 1 <= r <= max(d_in, d_out):
            raise InputError(f"r is {r}; a layer of shape ({d_out}, {d_in}) takes ranks from 1 to {max(d_in, d_out)}")
        for name, value in (("alpha", alpha), ("lr", lr), ("input_bound", input_bound)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; give a positive number")
        if not 0 <= seed < 1 << 63:
            raise InputError(f"seed is {seed}; give a whole number in [0, 2^63)")
        self.factor, self._most = alpha / r, max_devices
        self._adapters: dict[bytes, LoraAdapter] = {}
        self._lock = threading.Lock()
        identity = hashlib.sha256(parameters.to_bytes() + self.weight.tobytes() + struct.pack("<dI", alpha, r))
        self.id = identity.digest()[:16]
        largest = float(np.abs(self.weight).max()) or 1.0
        self.public = HeldPublic(
            self.id, parameters, d_in, d_out, r, adam, lr, self.factor, float(input_bound), largest, seed
        )

    def adapter(self, device: bytes) -> LoraAdapter:
        """The adapter of a device, made when it is first asked for.

        Raises:
            MessageError: there are ``max_devices`` others.
        """
        with self._lock:
            if device not in self._adapters:
                if len(self._adapters) >= self._most:
                    raise MessageError(f"the server holds adapters of {self._most} devices and takes no more")
                self._adapters[device] = self.public.adapter()
            return self._adapters[device]

    def forward(self, engine: Evaluator, adapter: LoraAdapter, x: EncryptedTensor) -> EncryptedTensor:
        """y = (W + s B A) x, (tokens, d_out), at the level of x."""
        effective, unit = self.weight + self.factor * adapter.b @ adapter.a, self.public.unit(adapter)
        return engine.linear(x, Matrix.of_integers(np.rint(effective / unit).astype(np.int16), unit))

    def gradient(
        self, engine: Evaluator, adapter: LoraAdapter, x: EncryptedTensor, g: EncryptedTensor
    ) -> EncryptedTensor:
        """The gradients of A and of B summed over tokens, r packed features each; s is left out."""
        return _gradient(engine, adapter, x, g)

    def answer(self, request: BytesLike, evaluator: MakeEvaluator = Evaluator) -> Iterator[bytes]:
        """Yield the reply to ``request``; see `Block`. A step is answered by an empty message."""
        if wire.peek(request).direction == "describe":
            wire.open("sealed_request", request)
            yield self.public.to_bytes()
            return
        direction, request_id, tokens, parts = read_request(request, self.id)
        if not parts or len(parts[0]) != 16:
            raise MessageError("request: its first part must be the device's id of 16 bytes")
        device = bytes(parts[0])
        if direction == "step":
            self._step(device, parts[1:])
            yield from write_reply(None, direction, self.id, request_id)
            return
        run = self._runner(device, direction, tokens, parts[1:], evaluator)
        yield from write_reply(computed(run), direction, self.id, request_id)

    def _runner(
        self, device: bytes, direction: str, tokens: int, parts: list[memoryview], evaluator: MakeEvaluator
    ) -> Callable[[], EncryptedTensor]:
        public = self.public
        wanted = {"forward": 1, "gradient": 3}.get(direction)
        if wanted != len(parts):
            raise MessageError(
                f"a held adapter answers forward (input), gradient (keys, input, output gradient) and step requests, "
                f"not '{direction}' with {len(parts)} parts"
            )
        if not 1 <= tokens <= public.parameters.slots:
            raise MessageError(f"request: {tokens} tokens, the layer takes 1 to {public.parameters.slots} at a time")
        planner, level = Evaluator(public.parameters), 1 if direction == "forward" else 2
        x = planner.planned(tokens, public.d_in, bound=public.input_bound, level=level)
        x = read_tensor(parts[-2 if wanted == 3 else -1], x, "input")
        if direction == "forward":
            engine = evaluator(public.parameters, None)
            return lambda: engine.download(self.forward(engine, self.adapter(device), engine.upload(x)))
        g = read_tensor(parts[2], planner.planned(tokens, public.d_out, bound=1.0, level=level), "output gradient")
        engine = evaluator(public.parameters, read_keys(parts[0], public.parameters, packing=True))
        return lambda: engine.download(self.gradient(engine, self.adapter(device), engine.upload(x), engine.upload(g)))

    def _step(self, device: bytes, parts: list[memoryview]) -> None:
        r, d_in, d_out = self.public.r, self.public.d_in, self.public.d_out
        if len(parts) != 1 or len(parts[0]) != 8 * r * (d_in + d_out):
            raise MessageError(f"step: expected one part of {8 * r * (d_in + d_out)} bytes, the two gradients")
        values = np.frombuffer(parts[0], "<f8")
        if not np.isfinite(values).all():
            raise MessageError("step: the gradient holds NaN or infinity")
        adapter = self.adapter(device)
        with self._lock:
            adapter.step(
                self.factor * values[: r * d_in].reshape(r, d_in), self.factor * values[r * d_in :].reshape(d_out, r)
            )

    def __repr__(self) -> str:
        return f"HeldLora(d_in={self.public.d_in}, d_out={self.public.d_out}, r={self.public.r})"


def _gradient(engine: Evaluator, adapter: LoraAdapter, x: EncryptedTensor, g: EncryptedTensor) -> EncryptedTensor:
    u = engine.linear(g, Matrix(adapter.b, bits=16, per_row=False), transpose=True)
    h = engine.linear(x, Matrix(adapter.a, bits=16, per_row=False))
    rows = [
        engine.pack_slot_sums(engine.multiply(many, engine.select(one, slice(i, i + 1))))
        for many, one in ((x, u), (g, h))
        for i in range(len(adapter.a))
    ]
    return engine.concatenate(rows)


class HeldClient:
    """A device's side of a `HeldLora`: outputs, adapter gradients, steps. Makes a secret key for every request.

    Args:
        send: carries a request to the layer and returns its reply.
        public: the layer's public part, or None to ask for it.
        allow_insecure: accept INSECURE parameters, for tests.

    Attributes:
        device: 16 random bytes, the device's id.
        adapter: the device's copy of its adapter, stepped as the server's is: what replies are like follows from it.
    """

    def __init__(
        self,
        send: Callable[[bytes], Iterable[BytesLike]],
        public: HeldPublic | None = None,
        *,
        allow_insecure: bool = False,
    ) -> None:
        if public is None:
            public = HeldPublic.from_bytes(b"".join(send(write_request("describe", bytes(16), bytes(16), 0, []))))
        require_secure(public.parameters, allow_insecure)
        self.public, self._send = public, send
        self.device = secrets.token_bytes(16)
        self.adapter = public.adapter()

    def forward(self, x: npt.ArrayLike) -> Array:
        """Outputs (tokens, d_out) of inputs (tokens, d_in), at most ``parameters.slots`` tokens."""
        public = self.public
        inputs, secret = token_rows("x", x, public.d_in, public.parameters.slots), SecretKey(public.parameters)
        parts = [secret.encrypt(inputs, bound=public.input_bound, level=1).to_bytes()]
        pieces = self._ask("forward", parts, public.expected_forward(self.adapter, len(inputs)))
        return np.concatenate([secret.decrypt(piece) for piece in pieces], axis=1)

    def gradient(self, x: npt.ArrayLike, g: npt.ArrayLike) -> tuple[Array, Array]:
        """Gradients of A and B, summed over tokens, but for the factor s that the server's step applies.

        They will be sent back in the clear, so they carry noise that drowns the ciphertext's, as the device predicts
        it: else they would tell of the secret key (Li, Micciancio, EUROCRYPT 2021).

        Args:
            x: (tokens, d_in), at most ``parameters.slots`` tokens.
            g: (tokens, d_out), the loss's gradient by the outputs.
        """
        public = self.public
        inputs = token_rows("x", x, public.d_in, public.parameters.slots)
        outputs = token_rows("g", g, public.d_out, public.parameters.slots)
        if len(outputs) != len(inputs):
            raise InputError(f"x has {len(inputs)} tokens and g {len(outputs)}; give one gradient a token")
        largest, secret = float(np.abs(outputs).max()) or 1.0, SecretKey(public.parameters)
        parts = [
            secret.evaluation_keys(packing=True).to_bytes(),
            secret.encrypt(inputs, bound=public.input_bound, level=2).to_bytes(),
            secret.encrypt(outputs / largest, bound=1.0, level=2).to_bytes(),
        ]
        engine, expected = Evaluator(public.parameters), public.expected_gradient(self.adapter, len(inputs))
        packed = engine.concatenate(list(self._ask("gradient", parts, expected)))
        matrices, at = [], 0
        for features in (public.d_in, public.d_out):
            rows, width = [], -(-features // public.parameters.ring_dimension)
            for _ in range(public.r):
                sums = engine.select(packed, slice(at, at + width))
                rows.append(secret.decrypt_flooded(sums, sums=features))
                at += width
            matrices.append(largest * np.array(rows))
        return matrices[0], matrices[1].T

    def step(self, da: npt.ArrayLike, db: npt.ArrayLike) -> None:
        """Have the server step the adapter by these gradients (r, d_in) and (d_out, r), and step the copy here."""
        da, db = (np.asarray(gradient, "<f8") for gradient in (da, db))
        shapes = (self.adapter.a.shape, self.adapter.b.shape)
        if (da.shape, db.shape) != shapes:
            raise InputError(f"gradients of shapes {da.shape} and {db.shape}; pass {shapes[0]} and {shapes[1]}")
        body = b"".join(gradient.tobytes() for gradient in (da, db))
        for _ in self._send(write_request("step", self.public.id, bytes(16), 0, [self.device, body])):
            pass
        self.adapter.step(self.public.factor * da, self.public.factor * db)

    def _ask(self, direction: str, parts: list[bytes], expected: EncryptedTensor) -> Iterator[EncryptedTensor]:
        pending = Pending(self.public.id, secrets.token_bytes(16), direction, expected, None)
        parts = [self.device, *parts]
        request = write_request(direction, pending.block, pending.request, expected.shape[0], parts)
        for _, piece in read_reply(self._send(request), pending):
            yield piece

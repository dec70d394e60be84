"""LoRA adapters that the server holds, as in PrivTuner: one linear layer, many devices.

**Only for a server that is trusted to follow the protocol.** The device decrypts what comes in the place of a gradient
and sends it back in the clear: a server that deviates reads the device's inputs, or its secret key, within a few steps.
See "Adapters held by the server" in SECURITY.md.

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

from ..ckks.evaluator import Evaluator, Matrix
from ..ckks.keys import SecretKey
from ..ckks.parameters import BytesLike, Parameters, require_secure
from ..ckks.tensor import EncryptedTensor
from ..copies import Stays
from ..errors import InputError, MessageError
from ..sealed import exchange
from ..sealed.exchange import (
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

_HELD = struct.Struct("<4sHH16sIII")
_HELD_MAGIC = b"PVBL"
# Adam divides gradients by their size; where there is none, as of A while B is zero, it would step by their noise.
_DAMPING = 1e-4


@dataclass(frozen=True)
class HeldPublic:
    """What a device must know of a `HeldLora`: shape, rank and parameters.

    Attributes:
        id: 16 bytes that name the layer and its weight; every message carries it.
        parameters: of the encryption.
        d_in, d_out: features of input and output. r: rank of the adapters.
    """

    id: bytes
    parameters: Parameters
    d_in: int
    d_out: int
    r: int

    def to_bytes(self) -> bytes:
        """Serialise."""
        return (
            _HELD.pack(_HELD_MAGIC, exchange.VERSION, 0, self.id, self.d_in, self.d_out, self.r)
            + self.parameters.to_bytes()
        )

    @classmethod
    def from_bytes(cls, data: BytesLike) -> HeldPublic:
        """Read what `to_bytes` wrote.

        Raises:
            MessageError: malformed, of another version, or with values that no layer has.
        """
        if len(data) < _HELD.size:
            raise MessageError(f"held adapter: a public part of {len(data)} bytes is truncated; fetch it again")
        magic, version, zero, name, d_in, d_out, r = _HELD.unpack_from(data)
        if magic != _HELD_MAGIC or zero != 0 or version != exchange.VERSION:
            raise MessageError(f"held adapter: this is no public part of one, or not of version {exchange.VERSION}")
        parameters = Parameters.from_bytes(bytes(memoryview(data)[_HELD.size :]))
        if not (1 <= d_in <= 65536 and 1 <= d_out <= 65536 and 1 <= r <= 65536 and parameters.depth >= 2):
            raise MessageError(f"held adapter: shape ({d_out}, {d_in}), rank {r} or {parameters.name} is impossible")
        return cls(name, parameters, d_in, d_out, r)


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
        seed: of A, which every device starts from; B starts at zero.
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
        for name, value in (("alpha", alpha), ("lr", lr)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}; give a positive number")
        self.factor, self._lr, self._adam, self._seed, self._most = alpha / r, lr, adam, seed, max_devices
        self._adapters: dict[bytes, LoraAdapter] = {}
        self._lock = threading.Lock()
        identity = hashlib.sha256(parameters.to_bytes() + self.weight.tobytes() + struct.pack("<dI", alpha, r))
        self.id = identity.digest()[:16]
        self.public = HeldPublic(self.id, parameters, d_in, d_out, r)

    def adapter(self, device: bytes) -> LoraAdapter:
        """The adapter of a device, made when it is first asked for.

        Raises:
            MessageError: there are ``max_devices`` others.
        """
        with self._lock:
            if device not in self._adapters:
                if len(self._adapters) >= self._most:
                    raise MessageError(f"the server holds adapters of {self._most} devices and takes no more")
                public, rng = self.public, np.random.default_rng(self._seed)
                a = rng.uniform(-1, 1, (public.r, public.d_in)) / math.sqrt(public.d_in)
                self._adapters[device] = LoraAdapter(
                    a, np.zeros((public.d_out, public.r)), lr=self._lr, adam=self._adam
                )
            return self._adapters[device]

    def forward(self, engine: Evaluator, adapter: LoraAdapter, x: EncryptedTensor) -> EncryptedTensor:
        """Y (tokens, d_out), at the level of x."""
        effective = self.weight + self.factor * adapter.b @ adapter.a
        return engine.linear(x, Matrix(effective, bits=16, per_row=False))

    def gradient(
        self, engine: Evaluator, adapter: LoraAdapter, x: EncryptedTensor, g: EncryptedTensor
    ) -> EncryptedTensor:
        """The gradients of A and of B summed over tokens, r packed features each; s is left out."""
        u = engine.linear(g, Matrix(adapter.b, bits=16, per_row=False), transpose=True)
        h = engine.linear(x, Matrix(adapter.a, bits=16, per_row=False))
        rows = [
            engine.pack_slot_sums(engine.multiply(many, engine.select(one, slice(i, i + 1))))
            for many, one in ((x, u), (g, h))
            for i in range(self.public.r)
        ]
        return engine.concatenate(rows)

    def answer(self, request: BytesLike, evaluator: MakeEvaluator = Evaluator) -> Iterator[bytes]:
        """Yield the reply to ``request``; see :class:`Block`. A step is answered by an empty message."""
        if exchange.request_shape(request)[0] == "describe":
            yield self.public.to_bytes()
            return
        direction, request_id, tokens, parts = read_request(request, self.id)
        if not parts or len(parts[0]) != 16:
            raise MessageError("request: its first part must be the device's id of 16 bytes")
        device = bytes(parts[0])
        if direction == "step":
            self._step(device, parts[1:])
            yield exchange.reply_head(direction, self.id, request_id)
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
        level = 1 if direction == "forward" else 2
        layout = (level, public.parameters.scale(level))
        x = read_tensor(parts[-2 if wanted == 3 else -1], public.parameters, (tokens, public.d_in), layout, "input")
        if direction == "forward":
            engine = evaluator(public.parameters, None)
            return lambda: engine.download(self.forward(engine, self.adapter(device), engine.upload(x)))
        g = read_tensor(parts[2], public.parameters, (tokens, public.d_out), layout, "output gradient")
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


class HeldClient:
    """A device's side of a `HeldLora`: outputs, adapter gradients, steps. Holds one secret key and the device's id.

    Args:
        send: carries a request to the layer and returns its reply.
        public: the layer's public part, or None to ask for it.
        input_bound: what |x| stays below; declared with every input, so it is public. Gradients carry noise in
            proportion to it: keep it tight.
        allow_insecure: accept INSECURE parameters, for tests.
    """

    def __init__(
        self,
        send: Callable[[bytes], Iterable[BytesLike]],
        public: HeldPublic | None = None,
        *,
        input_bound: float = 8.0,
        allow_insecure: bool = False,
    ) -> None:
        if public is None:
            public = HeldPublic.from_bytes(b"".join(send(write_request("describe", bytes(16), bytes(16), 0, []))))
        self.public, self._send, self._bound = public, send, input_bound
        self.device = secrets.token_bytes(16)
        self._secret = SecretKey(require_secure(public.parameters, allow_insecure))
        self._keys = self._secret.evaluation_keys(packing=True).to_bytes()

    def forward(self, x: npt.ArrayLike) -> Array:
        """Outputs (tokens, d_out) of inputs (tokens, d_in), at most ``parameters.slots`` tokens."""
        inputs = token_rows("x", x, self.public.d_in, self.public.parameters.slots)
        parts = [self._secret.encrypt(inputs, bound=self._bound, level=1).to_bytes()]
        pieces = self._ask("forward", parts, (len(inputs), self.public.d_out))
        return np.concatenate([self._secret.decrypt(piece) for piece in pieces], axis=1)

    def gradient(self, x: npt.ArrayLike, g: npt.ArrayLike) -> tuple[Array, Array]:
        """Gradients of A and B, summed over tokens, but for the factor s that the server's step applies.

        They will be sent back in the clear, so they carry noise that drowns the ciphertext's: else they would tell of
        the secret key (Li, Micciancio, EUROCRYPT 2021).

        Args:
            x: (tokens, d_in), at most ``parameters.slots`` tokens.
            g: (tokens, d_out), the loss's gradient by the outputs.
        """
        public = self.public
        inputs = token_rows("x", x, public.d_in, public.parameters.slots)
        outputs = token_rows("g", g, public.d_out, public.parameters.slots)
        if len(outputs) != len(inputs):
            raise InputError(f"x has {len(inputs)} tokens and g {len(outputs)}; give one gradient a token")
        largest = float(np.abs(outputs).max()) or 1.0
        parts = [
            self._keys,
            self._secret.encrypt(inputs, bound=self._bound, level=2).to_bytes(),
            self._secret.encrypt(outputs / largest, bound=1.0, level=2).to_bytes(),
        ]
        engine = Evaluator(public.parameters)
        rings = [-(-features // public.parameters.ring_dimension) for features in (public.d_in, public.d_out)]
        packed = engine.concatenate(list(self._ask("gradient", parts, (len(inputs), public.r * sum(rings)))))
        matrices, at = [], 0
        for features, width in zip((public.d_in, public.d_out), rings, strict=True):
            rows = []
            for _ in range(public.r):
                sums = engine.select(packed, slice(at, at + width))
                rows.append(self._secret.reveal(sums, sums=features))
                at += width
            matrices.append(largest * np.array(rows))
        return matrices[0], matrices[1].T

    def step(self, da: npt.ArrayLike, db: npt.ArrayLike) -> None:
        """Have the server step the adapter by these gradients (r, d_in) and (d_out, r)."""
        flat = np.concatenate([np.asarray(gradient, "<f8").ravel() for gradient in (da, db)])
        for _ in self._send(write_request("step", self.public.id, bytes(16), 0, [self.device, flat.tobytes()])):
            pass

    def _ask(self, direction: str, parts: list[bytes], shape: tuple[int, int]) -> Iterator[EncryptedTensor]:
        pending = Pending(self.public.id, secrets.token_bytes(16), direction, shape)
        request = write_request(direction, pending.block, pending.request, shape[0], [self.device, *parts])
        for _, piece in read_reply(self._send(request), pending, self.public.parameters):
            yield piece

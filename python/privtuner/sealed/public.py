"""What the data owner must know of a sealed model: shapes, levels, and every refresh in order. No weight."""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from privtuner import wire
from privtuner.ckks import EncryptedTensor, Evaluator, Parameters, SecretKey
from privtuner.ckks.keys import elements_of
from privtuner.errors import InputError, MessageError
from privtuner.sealed.adapters import BOUND, GRADIENT_BOUND, Matrices, initial_numbers, matrices_of, numbers_of
from privtuner.sealed.clear_adapters import numbers_limit
from privtuner.sealed.clipping import NORM_FLOOD, NORM_LEVEL, OPENED_LEVEL
from privtuner.sealed.schedule import Refresh
from privtuner.sealed.shape import Placement, Pooling, Shape, Target
from privtuner.sealed.state import piece_limit

__all__ = ["Keys", "Public", "Refresh", "Task"]

Array = npt.NDArray[np.float64]
BytesLike = bytes | bytearray | memoryview
Task = Literal["embed", "forward", "backward"]

_HEAD = struct.Struct("<6I 2d 5B I 3I 4d I 2I")
_MOST_REFRESHES = 1 << 16
_MOST_NAME = 64
_MOST_KEY_BYTES = 8 << 30
_MOST_NUMBERS = 1 << 27  # a gigabyte of initial adapters
_TARGETS = get_args(Target)
_POOLINGS = get_args(Pooling)
_PLACEMENTS = get_args(Placement)


class Keys(NamedTuple):
    """The evaluation keys that the server needs beside that for products, as `SecretKey.evaluation_keys` takes them.

    Attributes:
        rotations: steps, rising.
        conjugation: for refreshes of two features in one ciphertext.
        packing: for adapters.
    """

    rotations: tuple[int, ...]
    conjugation: bool
    packing: bool


@dataclass(frozen=True)
class Public:
    """The public part of a `privtuner.sealed.model.SealedModel`.

    Attributes:
        id: 16 bytes that name the model, its weights and its plan.
        parameters: of the encryption.
        shape: of the encoder.
        input_bound: |x| <= input_bound for embeddings.
        gradient_bound: |g| <= gradient_bound for gradients; a power of two up to one.
        input_level, gradient_level: of what the owner encrypts.
        pooled_level, pooled_bound, pooled_noise: of what it decrypts; the noise is mostly what the server adds.
        keys: the evaluation keys.
        forward, backward: all refreshes of a forward pass, and of a backward pass with the step after it.
    """

    id: bytes
    parameters: Parameters
    shape: Shape
    input_bound: float
    gradient_bound: float
    input_level: int
    gradient_level: int
    pooled_level: int
    pooled_bound: float
    pooled_noise: float
    keys: Keys
    forward: tuple[Refresh, ...]
    backward: tuple[Refresh, ...]

    @property
    def key_bytes(self) -> int:
        """Bytes of the evaluation keys on the wire, which go to the server once a connection."""
        return self.parameters.key_bytes(1 + len(elements_of(self.parameters, *self.keys)))

    @property
    def period(self) -> int:
        """Tokens of a sequence with its padding."""
        return self.shape.period

    @property
    def batch(self) -> int:
        """Sequences of one pass."""
        return self.parameters.slots // self.shape.period

    @property
    def width(self) -> int:
        """Features of a token, and of a pooled vector."""
        return self.shape.width

    @property
    def pooling(self) -> Pooling:
        """What `read_pooled` returns: the ``"first"`` token's vector, or for ``"mean"`` the sum over the real ones."""
        return self.shape.pool

    @property
    def adapter_numbers(self) -> int:
        """Numbers packed in each ciphertext of the adapters."""
        return self.shape.chunks.numbers

    def schedule(self, task: Task) -> tuple[Refresh, ...]:
        """All refreshes of a task in order; ``"backward"`` includes the step, ``"embed"`` is a forward pass alone."""
        return self.backward if task == "backward" else self.forward

    # Planned tensors: what is encrypted and what comes

    @cached_property
    def inputs(self) -> EncryptedTensor:
        """The embeddings, (slots, width)."""
        return self._planned(self.width, self.input_bound, self.input_level)

    @cached_property
    def mask(self) -> EncryptedTensor:
        """The mask of real positions, (slots, 1)."""
        return self._planned(1, 1.0, self.parameters.depth)

    @cached_property
    def gradient(self) -> EncryptedTensor:
        """The gradient of the loss, (slots, width), of `spread`."""
        return self._planned(self.width, self.gradient_bound, self.gradient_level)

    @cached_property
    def pooled(self) -> EncryptedTensor:
        """What is revealed, (slots, ceil(width / period))."""
        ciphertexts = -(-self.width // self.period)
        return self._planned(ciphertexts, self.pooled_bound, self.pooled_level, self.pooled_noise)

    @cached_property
    def adapters(self) -> tuple[EncryptedTensor, ...]:
        """Values and velocities of all adapters, packed: (slots, `Shape.adapter_ciphertexts`) each; none for rank 0.

        None either where the server has them in the clear.
        """
        if not self.shape.rank or self.shape.clear:
            return ()
        return tuple(packed_layout(self.parameters, self.shape, bound) for bound in (BOUND, GRADIENT_BOUND))

    @cached_property
    def opened(self) -> EncryptedTensor:
        """The clipped gradient under its mask, packed, (slots, `Shape.adapter_ciphertexts`), where it is opened."""
        scale = self.parameters.scale(OPENED_LEVEL)
        ev = Evaluator(self.parameters)
        return ev.planned(ev.slots, self.shape.adapter_ciphertexts, level=0, scale=scale)

    @cached_property
    def square(self) -> EncryptedTensor:
        """The clipped gradient's squared norm, one packed number; its noise is what the server adds."""
        noise = NORM_FLOOD * self.parameters.scale(NORM_LEVEL) * self.parameters.slots**0.5
        return self._planned(1, 1.0, NORM_LEVEL, noise)

    @property
    def state_limit(self) -> int:
        """Bytes that the locked pieces of the training state have together, at most."""
        return numbers_limit(self.shape) if self.shape.clear else piece_limit(self.adapters)

    def _planned(self, features: int, bound: float, level: int, noise: float | None = None) -> EncryptedTensor:
        ev = Evaluator(self.parameters)
        return ev.planned(ev.slots, features, bound=bound, level=level, noise=noise)

    # Layouts

    def arrange(self, embeddings: npt.ArrayLike, lengths: npt.ArrayLike) -> tuple[Array, Array]:
        """Lay embeddings out in slots: position by position, and at each the sequences.

        Args:
            embeddings: (n, at most `period`, width), n at most `batch`; what is beyond a length is not looked at.
            lengths: whole numbers (n,), from 1 on.

        Returns:
            float64 (slots, width), zero where no token is, and (slots, 1), 1 where one is.

        Raises:
            InputError: shapes that do not fit, or a value beyond `input_bound` or not finite.
        """
        x = np.asarray(embeddings, np.float64)
        if x.ndim != 3 or x.shape[2] != self.width or x.shape[1] > self.period or 0 in x.shape:
            raise InputError(f"embeddings of shape {x.shape}: expected (n, at most {self.period}, {self.width})")
        real = self._real(len(x), lengths)
        if np.asarray(lengths).max() > x.shape[1]:
            raise InputError(f"a length is above the {x.shape[1]} tokens there are")
        values = np.zeros((self.period, self.batch, self.width))
        values[: x.shape[1], : len(x)] = x.transpose(1, 0, 2)
        values[~real] = 0.0
        if not (np.abs(values) <= self.input_bound).all():
            raise InputError(
                f"an embedding is beyond {self.input_bound:g}, or not finite: the server's domains are too narrow"
            )
        return values.reshape(-1, self.width), real.reshape(-1, 1).astype(np.float64)

    def spread(self, gradient: npt.ArrayLike, lengths: npt.ArrayLike) -> Array:
        """Lay out the gradient by what `read_pooled` returned: float64 (slots, width).

        Args:
            gradient: (n, width), entries up to `gradient_bound`.
            lengths: as for `arrange`.

        Raises:
            InputError: shapes that do not fit, or an entry beyond that or not finite.
        """
        g = np.asarray(gradient, np.float64)
        if g.ndim != 2 or g.shape[1] != self.width or not len(g):
            raise InputError(f"a gradient of shape {g.shape}: expected (n, {self.width})")
        if not (np.abs(g) <= self.gradient_bound).all():
            raise InputError(f"a gradient has an entry beyond {self.gradient_bound:g}, or not finite: scale it down")
        real = self._real(len(g), lengths)
        values = np.zeros((self.period, self.batch, self.width))
        if self.pooling == "mean":
            values[:, : len(g)] = g * real[:, : len(g), None]
        else:
            values[0, : len(g)] = g
        return values.reshape(-1, self.width)

    def read_pooled(self, values: npt.ArrayLike) -> Array:
        """The pooled vectors from the slots of `pooled`: float64 (batch, width), of ``"mean"`` the sums.

        Raises:
            InputError: values of another shape.
        """
        slots = np.asarray(values, np.float64)
        if slots.shape != self.pooled.shape:
            raise InputError(f"pooled values of shape {slots.shape}: expected {self.pooled.shape}")
        vectors = slots.reshape(self.period, self.batch, -1).transpose(1, 2, 0).reshape(self.batch, -1)
        return np.ascontiguousarray(vectors[:, : self.width])

    def _real(self, count: int, lengths: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Where tokens are, (period, batch)."""
        counts = np.asarray(lengths)
        if not 1 <= count <= self.batch:
            raise InputError(f"{count} sequences: expected 1 to {self.batch}")
        if counts.shape != (count,) or counts.dtype.kind not in "iu":
            raise InputError(
                f"lengths of shape {counts.shape} and dtype {counts.dtype}: expected {count} whole numbers"
            )
        if counts.min() < 1 or counts.max() > self.period:
            raise InputError(f"lengths must be from 1 to {self.period}")
        return np.arange(self.period)[:, None] < np.pad(counts, (0, self.batch - count))

    # Adapters

    def initial_adapters(self, secret: SecretKey) -> tuple[EncryptedTensor, ...]:
        """Encrypt fresh adapters, A drawn from the operating system's generator and B zero, and velocities of zero."""
        if not self.adapters:
            return ()
        numbers = initial_numbers(self.shape, np.random.Generator(np.random.PCG64(secrets.randbits(256))))
        return self._encrypt(secret, numbers), self._encrypt(secret, np.zeros_like(numbers), GRADIENT_BOUND)

    def _encrypt(self, secret: SecretKey, numbers: Array, bound: float = BOUND) -> EncryptedTensor:
        return secret.encrypt_packed(numbers, bound=bound, level=self.parameters.depth)

    def adapter_matrices(self, numbers: npt.ArrayLike) -> Matrices:
        """A (rank, width) and B (width, rank) of each (layer, target), from numbers (numbers, ciphertexts)."""
        return matrices_of(self.shape, numbers)

    def adapter_columns(self, matrices: Mapping[tuple[int, Target], tuple[npt.ArrayLike, npt.ArrayLike]]) -> Array:
        """The inverse of `adapter_matrices`."""
        return numbers_of(self.shape, matrices)

    # Bytes

    def to_bytes(self) -> bytes:
        """Serialise."""
        s, k = self.shape, self.keys
        name = s.activation.encode()
        flags = sum(1 << i for i, target in enumerate(_TARGETS) if target in s.targets)
        names = sorted({refresh.stage for refresh in self.forward + self.backward})
        head = _HEAD.pack(
            *(s.layers, s.width, s.heads, s.hidden, s.period, s.rank, s.eps, s.alpha),
            *(_POOLINGS.index(s.pool), s.pooler, flags, _PLACEMENTS.index(s.placement)),
            *(k.conjugation + 2 * k.packing, len(k.rotations)),
            *(self.input_level, self.gradient_level, self.pooled_level),
            *(self.input_bound, self.gradient_bound, self.pooled_bound, self.pooled_noise),
            *(len(names), len(self.forward), len(self.backward)),
        )
        parts = [head, _text(name), *(_text(stage.encode()) for stage in names)]
        parts.append(np.array(k.rotations, "<u4").tobytes())
        index = {stage: number for number, stage in enumerate(names)}
        rows = [(index[r.stage], r.ciphertexts, r.level) for r in self.forward + self.backward]
        parts += [np.array(rows, "<u4").tobytes(), self.parameters.to_bytes()]
        return wire.seal("sealed_public", parts, subject=self.id)

    @classmethod
    def from_bytes(cls, data: BytesLike) -> Public:
        """Read what `to_bytes` wrote.

        Raises:
            MessageError: malformed, truncated, of another version, or with values that no model has.
        """
        head, body = wire.open("sealed_public", data)
        if head != wire.Head("sealed_public", "forward", 0, head.subject, bytes(16), 0, 0, len(body)):
            raise MessageError("sealed model: its public part uses a field of the head that it has no use for")
        reader = _Reader(body)
        (
            (layers, width, heads, hidden, period, rank, eps, alpha, pool, pooler, flags, placement, packed, rotations),
            (input_level, gradient_level, pooled_level, input_bound, gradient_bound, pooled_bound, noise),
            (names, forward, backward),
        ) = _parts(_HEAD.unpack(reader.take(_HEAD.size)), 14, 7, 3)
        known = pool < len(_POOLINGS) and placement < len(_PLACEMENTS)
        if not known or pooler > 1 or flags >= 1 << len(_TARGETS) or packed > 3:
            raise MessageError("sealed model: an impossible shape; fetch it again")
        if forward + backward > _MOST_REFRESHES or names > forward + backward or rotations > _MOST_REFRESHES:
            raise MessageError(f"sealed model: {forward + backward} refreshes are more than any model has")
        try:
            targets = tuple(target for i, target in enumerate(_TARGETS) if flags >> i & 1)
            shape = Shape(
                *(layers, width, heads, hidden, period, eps, reader.text(), _POOLINGS[pool], bool(pooler), rank, alpha),
                *(targets, _PLACEMENTS[placement]),
            )
        except InputError as error:
            raise MessageError(f"sealed model: {error}") from None
        stages = [reader.text() for _ in range(names)]
        steps = np.frombuffer(reader.take(4 * rotations), "<u4")
        rows = np.frombuffer(reader.take(12 * (forward + backward)), "<u4").reshape(-1, 3)
        parameters = Parameters.from_bytes(reader.rest())
        depth, slots = parameters.depth, parameters.slots
        levels = np.array([input_level, gradient_level, pooled_level])
        numbers = (input_bound, gradient_bound, pooled_bound, noise)
        if (
            slots % period
            or (levels > depth).any()
            or not all(math.isfinite(v) and v > 0 for v in numbers)
            or (rows[:, 0] >= names).any()
            or ((rows[:, 1] < 1) | (rows[:, 1] > 1 << 20)).any()
            or ((rows[:, 2] < 2) | (rows[:, 2] > depth)).any()
            or (len(steps) and (steps.min() < 1 or steps.max() >= slots or (np.diff(steps.astype(np.int64)) < 1).any()))
        ):
            raise MessageError("sealed model: levels, bounds or refreshes that no model has; fetch it again")
        refreshes = tuple(Refresh(stages[name], int(count), int(level)) for name, count, level in rows)
        keys = Keys(tuple(int(step) for step in steps), bool(packed & 1), bool(packed & 2))
        public = cls(
            *(head.subject, parameters, shape, input_bound, gradient_bound, input_level, gradient_level),
            *(pooled_level, pooled_bound, noise, keys, refreshes[:forward], refreshes[forward:]),
        )
        count = shape.chunks.numbers * shape.adapter_ciphertexts if shape.rank else 0
        if public.key_bytes > _MOST_KEY_BYTES or count > _MOST_NUMBERS:
            raise MessageError(
                f"sealed model: {public.key_bytes:,} bytes of keys, {count:,} numbers of adapters: more than any "
                "model has"
            )
        return public


def packed_layout(parameters: Parameters, shape: Shape, bound: float) -> EncryptedTensor:
    """A planned tensor of all adapters' numbers."""
    ev = Evaluator(parameters)
    numbers = np.zeros((shape.chunks.numbers, shape.adapter_ciphertexts))
    core = ev._core.planned_packed(numbers, parameters.depth, bound, np.zeros(0))
    return EncryptedTensor(core, parameters)


def _parts(values: tuple[Any, ...], *sizes: int) -> list[tuple[Any, ...]]:
    ends = list(accumulate(sizes))
    return [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _text(data: bytes) -> bytes:
    return struct.pack("<B", len(data)) + data


class _Reader:
    def __init__(self, body: memoryview) -> None:
        self._body, self._at = body, 0

    def take(self, size: int) -> memoryview:
        if len(self._body) - self._at < size:
            raise MessageError(f"sealed model: a public part of {len(self._body)} bytes is truncated; fetch it again")
        self._at += size
        return self._body[self._at - size : self._at]

    def text(self) -> str:
        (size,) = self.take(1)
        data = bytes(self.take(size))
        if not 1 <= size <= _MOST_NAME or not data.isascii():
            raise MessageError("sealed model: a name that no model has; fetch it again")
        return data.decode()

    def rest(self) -> memoryview:
        return self.take(len(self._body) - self._at)

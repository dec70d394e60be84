"""Blocks of a model that the server evaluates whole on ciphertexts: the sealed mode.

The data owner sees a block's outputs and gradients; the server sees ciphertexts. **The weights are not secret from the
data owner**: one backward request can give them; nor is the data safe from a server that deviates from the protocol.
See "Sealed blocks" in SECURITY.md::

    block = SealedMLP(w1, b1, w2, b2, gelu())                             # server; weights and biases stay here
    client = SealedClient(block.public.parameters)                        # data owner; one secret key a request

    request, pending = client.request(block.public, x)                    # y = W2 act(W1 x + b1) + b2
    y = client.decrypt(block.answer(request), pending)
    request, pending = client.request(block.public, x, g)                 # W1^T ((W2^T g) o act'(W1 x + b1))
    gx = client.decrypt(block.answer(request), pending)
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from privtuner import _core, wire
from privtuner.ckks.evaluator import Evaluator, Matrix
from privtuner.ckks.keys import SecretKey
from privtuner.ckks.parameters import BytesLike, Parameters, require_secure
from privtuner.ckks.polynomial import Polynomial
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import CkksError, InputError, MessageError
from privtuner.sealed.exchange import (
    LAYOUT_BYTES,
    Block,
    Layout,
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

__all__ = ["SealedClient", "SealedMLP", "SealedPublic"]

Array = npt.NDArray[np.float64]

_PUBLIC = struct.Struct("<IIdddII")
_MOST_SETS = 4  # of parameters in a bundle


@dataclass(frozen=True)
class SealedPublic:
    """What the data owner must know of a `SealedMLP`: shape, parameters, and what its ciphertexts are like.

    No weight, no bias.

    Attributes:
        id: 16 bytes that name the block and its weights; every message carries it.
        parameters: of the encryption.
        d_in, d_out: features of input and output.
        input_bound: |x| <= input_bound, for every request.
        input_unit, gradient_unit: scales of inputs and of output gradients, in units of the chain's: they make what
            the server gets from its first product arrive at the scale the next step wants. They tell the largest
            weight of each of the two matrices.
        forward_level, backward_level: levels of inputs.
        forward_reply, backward_reply: what the ciphertexts of every reply are like, from a dry run of the block.
    """

    id: bytes
    parameters: Parameters
    d_in: int
    d_out: int
    input_bound: float
    input_unit: float
    gradient_unit: float
    forward_level: int
    backward_level: int
    forward_reply: Layout
    backward_reply: Layout

    def encrypt_input(self, secret: SecretKey, x: npt.ArrayLike, direction: str) -> EncryptedTensor:
        """Encrypt inputs (tokens, d_in), at most ``parameters.slots`` tokens, as `SealedMLP` expects them."""
        level, scale = self.input_layout(direction)
        return secret.encrypt(x, bound=self.input_bound, level=level, scale=scale)

    def encrypt_gradient(self, secret: SecretKey, g: npt.ArrayLike) -> EncryptedTensor:
        """Encrypt output gradients (tokens, d_out) with |g| <= 1."""
        level, scale = self.gradient_layout()
        return secret.encrypt(g, bound=1.0, level=level, scale=scale)

    def input_layout(self, direction: str) -> tuple[int, float]:
        """Level and scale of inputs."""
        level = self.forward_level if direction == "forward" else self.backward_level
        return level, self.parameters.scale(level) * self.input_unit

    def gradient_layout(self) -> tuple[int, float]:
        """Level and scale of output gradients: they meet act'(z) two levels above the end."""
        return 2, self.parameters.scale(2) * self.gradient_unit

    def expected_input(self, tokens: int, direction: str) -> EncryptedTensor:
        """What `encrypt_input` makes of so many tokens, as a planned tensor."""
        level, scale = self.input_layout(direction)
        return Evaluator(self.parameters).planned(tokens, self.d_in, bound=self.input_bound, level=level, scale=scale)

    def expected_gradient(self, tokens: int) -> EncryptedTensor:
        """What `encrypt_gradient` makes of so many tokens, as a planned tensor."""
        level, scale = self.gradient_layout()
        return Evaluator(self.parameters).planned(tokens, self.d_out, bound=1.0, level=level, scale=scale)

    def expected_reply(self, tokens: int, direction: str) -> EncryptedTensor:
        """What the block computes of so many tokens, as a planned tensor."""
        if direction == "forward":
            return self.forward_reply.planned(self.parameters, tokens, self.d_out)
        return self.backward_reply.planned(self.parameters, tokens, self.d_in)

    def to_bytes(self) -> bytes:
        """Serialise."""
        fields = (self.d_in, self.d_out, self.input_bound, self.input_unit, self.gradient_unit)
        parts = [_PUBLIC.pack(*fields, self.forward_level, self.backward_level)]
        parts += [self.forward_reply.to_bytes(), self.backward_reply.to_bytes(), self.parameters.to_bytes()]
        return wire.seal("sealed_public", parts, subject=self.id)

    @classmethod
    def from_bytes(cls, data: BytesLike, sets: dict[bytes, Parameters] | None = None) -> SealedPublic:
        """Read what `to_bytes` wrote.

        Args:
            data: the message.
            sets: the parameter sets of a bundle's blocks by their messages, filled here: 24 bytes of a message become
                up to some 100 MB, so blocks share them, and there may be at most 4.

        Raises:
            MessageError: malformed, of another version, or with values that no block has; a fifth parameter set.
        """
        head, body = wire.open("sealed_public", data)
        if head != wire.Head("sealed_public", "forward", 0, head.subject, bytes(16), 0, 0, len(body)):
            raise MessageError("sealed block: its public part uses a field of the head that it has no use for")
        starts = (_PUBLIC.size, _PUBLIC.size + LAYOUT_BYTES, _PUBLIC.size + 2 * LAYOUT_BYTES)
        if len(body) < starts[-1]:
            raise MessageError(f"sealed block: a public part of {len(body)} bytes is truncated; fetch it again")
        d_in, d_out, bound, unit, gradient, forward, backward = _PUBLIC.unpack_from(body)
        if not (1 <= d_in <= 65536 and 1 <= d_out <= 65536):
            raise MessageError(f"sealed block: shape ({d_out}, {d_in}) is impossible")
        if not all(math.isfinite(number) and number > 0 for number in (bound, unit, gradient)):
            raise MessageError(
                f"sealed block: bound and units {bound}, {unit}, {gradient} must be positive numbers; fetch it again"
            )
        sets, encoded = {} if sets is None else sets, bytes(body[starts[-1] :])
        if encoded not in sets and len(sets) == _MOST_SETS:
            raise MessageError(f"sealed block: the bundle's blocks have more than {_MOST_SETS} parameter sets")
        parameters = sets[encoded] = sets.get(encoded) or Parameters.from_bytes(encoded)
        if not all(2 <= level <= parameters.depth for level in (forward, backward)):
            raise MessageError(f"sealed block: levels {forward}, {backward} are impossible in {parameters.name}")
        replies = [Layout.from_bytes(body[start : start + LAYOUT_BYTES], parameters) for start in starts[:2]]
        return cls(head.subject, parameters, d_in, d_out, bound, unit, gradient, forward, backward, *replies)

    def __repr__(self) -> str:
        return f"SealedPublic(d_in={self.d_in}, d_out={self.d_out}, {self.parameters.name}, id={self.id.hex()})"


@dataclass(frozen=True)
class _Chunk:
    """Hidden features that are worked on at a time."""

    w1: Matrix  # (hidden, d_in)
    b1: Array
    w2: Matrix  # (d_out, hidden)


class SealedMLP(Block):
    """y = W2 act(W1 x + b1) + b2 at the server, on ciphertexts, with its gradient by x.

    Weights are rounded to 16 bits with one scale for each matrix. Hidden features are worked on in chunks, so that
    memory stays bounded whatever their number.

    Args:
        w1: (hidden, d_in). b1: (hidden,), or None for zeros.
        w2: (d_out, hidden). b2: (d_out,), or None for zeros.
        activation: the polynomial in place of act. **Nothing sees whether W1 x + b1 stays in its domain** but the
            check of the decrypted outputs' size, so measure it on data like the owner's.
        parameters: default the smallest secure set that is deep enough.
        chunk: hidden features at a time.
        input_bound: what |x| stays below; the data owner's inputs are refused above it. It costs no precision.

    Attributes:
        public: for the data owner.
        w1, w2: the rounded weights in force. b1, b2: the biases.
        activation, slope: the polynomial and its derivative.

    Raises:
        InputError: shapes that do not fit, values that are not finite, parameters not deep enough, chunk < 1.
    """

    def __init__(
        self,
        w1: npt.ArrayLike,
        b1: npt.ArrayLike | None,
        w2: npt.ArrayLike,
        b2: npt.ArrayLike | None,
        activation: Polynomial,
        *,
        parameters: Parameters | None = None,
        chunk: int = 256,
        input_bound: float = 64.0,
    ) -> None:
        first, delta1 = _quantised("w1", w1)
        second, delta2 = _quantised("w2", w2)
        (hidden, d_in), d_out = first.shape, len(second)
        if second.shape[1] != hidden:
            raise InputError(f"w1 has {hidden} rows and w2 {second.shape[1]} columns; both are the hidden features")
        if chunk < 1:
            raise InputError(f"chunk is {chunk}; give at least 1 hidden feature at a time")
        if not (math.isfinite(input_bound) and input_bound > 0):
            raise InputError(f"input_bound is {input_bound}; give a positive number")
        self.b1, self.b2 = _vector("b1", b1, hidden), _vector("b2", b2, d_out)
        self.w1, self.w2 = delta1 * first.astype(np.float64), delta2 * second.astype(np.float64)
        self.activation, self.slope = activation, activation.derivative()
        forward_level, backward_level = 1 + _levels(self.activation), 2 + _levels(self.slope)
        depth = max(forward_level, backward_level)
        if parameters is None:
            parameters = Parameters.secure(depth)
        if parameters.depth < depth:
            raise InputError(f"{parameters.name} has {parameters.depth} levels, the block takes {depth}; use more")
        self._chunks = [
            _Chunk(Matrix.of_integers(first[rows], delta1), self.b1[rows], Matrix.of_integers(second[:, rows], delta2))
            for rows in (slice(start, start + chunk) for start in range(0, hidden, chunk))
        ]
        identity = hashlib.sha256(parameters.to_bytes())
        for array in (first, second, self.b1, self.b2, np.array([delta1, delta2, input_bound])):
            identity.update(np.ascontiguousarray(array).tobytes())
        identity.update(repr((activation.coefficients, activation.basis, activation.domain)).encode())
        self.id = identity.digest()[:16]
        nothing = Layout(0, 1.0, 0, 0)
        self.public = SealedPublic(
            id=self.id,
            parameters=parameters,
            d_in=d_in,
            d_out=d_out,
            input_bound=float(input_bound),
            input_unit=delta1 / _width(activation),
            gradient_unit=delta2,
            forward_level=forward_level,
            backward_level=backward_level,
            forward_reply=nothing,
            backward_reply=nothing,
        )
        forward_reply, backward_reply = self._dry_run()
        self.public = replace(self.public, forward_reply=forward_reply, backward_reply=backward_reply)

    def _dry_run(self) -> tuple[Layout, Layout]:
        """What replies are like: of the weights, powers of two from above for all features alone."""
        engine, public = Evaluator(self.public.parameters), self.public
        y = self.forward(engine, public.expected_input(1, "forward"))
        gx = self.backward(engine, public.expected_input(1, "backward"), public.expected_gradient(1))
        return Layout.of(y), Layout.of(gx)

    def answer(self, request: BytesLike, evaluator: MakeEvaluator = Evaluator) -> Iterator[bytes]:
        """Yield the reply to ``request``, see `Block`."""
        direction, request_id, tokens, parts = read_request(request, self.id)
        result = computed(self._runner(direction, tokens, parts, evaluator))
        yield from write_reply(result, direction, self.id, request_id)

    def forward(self, engine: Evaluator, x: EncryptedTensor) -> EncryptedTensor:
        """y (tokens, d_out) at level 1, from inputs of `SealedPublic.encrypt_input`."""
        total: EncryptedTensor | None = None
        for chunk in self._chunks:
            y = engine.linear(engine.polynomial(self._hidden(engine, x, chunk), self.activation), chunk.w2)
            total = y if total is None else engine.add(total, y)
        assert total is not None  # noqa: S101 - there is at least one hidden feature
        return engine.add(total, self.b2)

    def backward(self, engine: Evaluator, x: EncryptedTensor, g: EncryptedTensor) -> EncryptedTensor:
        """W1^T ((W2^T g) o act'(W1 x + b1)), (tokens, d_in) at level 1."""
        total: EncryptedTensor | None = None
        for chunk in self._chunks:
            slope = engine.polynomial(self._hidden(engine, x, chunk), self.slope)
            through = engine.multiply(engine.linear(g, chunk.w2, transpose=True), slope)
            gx = engine.linear(through, chunk.w1, transpose=True)
            total = gx if total is None else engine.add(total, gx)
        assert total is not None  # noqa: S101 - as above
        return total

    def exact(self, x: npt.ArrayLike, g: npt.ArrayLike | None = None) -> Array:
        """The same in the clear, in double precision: outputs, or with ``g`` the gradient by x."""
        z = np.asarray(x, np.float64) @ self.w1.T + self.b1
        if g is None:
            y: Array = self.activation(z) @ self.w2.T + self.b2
            return y
        gx: Array = (np.asarray(g, np.float64) @ self.w2 * self.slope(z)) @ self.w1
        return gx

    def _hidden(self, engine: Evaluator, x: EncryptedTensor, chunk: _Chunk) -> EncryptedTensor:
        z = engine.add(engine.linear(x, chunk.w1), chunk.b1)
        low, high = self.activation.domain
        return engine.assume(z, max(abs(low), abs(high)))

    def _runner(
        self, direction: str, tokens: int, parts: list[memoryview], evaluator: MakeEvaluator
    ) -> Callable[[], EncryptedTensor]:
        """Read and check everything, and return what computes the result."""
        public = self.public
        if direction not in ("forward", "backward"):
            raise MessageError(f"a sealed block answers forward and backward requests, not '{direction}'")
        tensors = 1 if direction == "forward" else 2
        if len(parts) != 1 + tensors:
            raise MessageError(
                f"a {direction} request has {1 + tensors} parts, this one {len(parts)}: keys, input"
                + (", output gradient" if tensors == 2 else "")
            )
        if not 1 <= tokens <= public.parameters.slots:
            raise MessageError(f"request: {tokens} tokens, the block takes 1 to {public.parameters.slots} at a time")
        x = read_tensor(parts[1], public.expected_input(tokens, direction), "input")
        keys = read_keys(parts[0], public.parameters)
        engine = evaluator(public.parameters, keys)
        if direction == "forward":
            return lambda: engine.download(self.forward(engine, engine.upload(x)))
        g = read_tensor(parts[2], public.expected_gradient(tokens), "output gradient")
        return lambda: engine.download(self.backward(engine, engine.upload(x), engine.upload(g)))

    def __repr__(self) -> str:
        shape = f"d_in={self.public.d_in}, hidden={len(self.b1)}, d_out={self.public.d_out}"
        return f"SealedMLP({shape}, {self.activation!r})"


class SealedClient:
    """The data owner's side: requests, each under a secret key of its own, and replies. Several threads may share it.

    Results are the data owner's to keep: who sends a decrypted value back in the clear tells the server of the secret
    (`privtuner.ckks.SecretKey.decrypt`).

    Args:
        parameters: of the blocks it will ask, `SealedPublic.parameters`.
        allow_insecure: accept INSECURE parameters, for tests.

    Raises:
        InputError: the parameters have less than 128 bits of security.
    """

    def __init__(self, parameters: Parameters, *, allow_insecure: bool = False) -> None:
        self.parameters = require_secure(parameters, allow_insecure)

    def request(self, public: SealedPublic, x: npt.ArrayLike, g: npt.ArrayLike | None = None) -> tuple[bytes, Pending]:
        """Make a request for outputs, or with ``g`` for the gradient by ``x``.

        The gradient is linear in each token's ``g``, so every token's is divided by its largest entry, which stays
        here, and the result is multiplied by it: full precision, and no bound to declare.

        Args:
            public: the block's public part.
            x: (tokens, d_in), at most ``parameters.slots`` tokens.
            g: (tokens, d_out), gradient by the outputs.

        Returns:
            The request, and what `decrypt` needs.

        Raises:
            InputError: wrong shape, other parameters, NaN or infinity, or |x| above the block's bound.
        """
        if public.parameters != self.parameters:
            raise InputError(f"the block uses {public.parameters.name}, this client {self.parameters.name}")
        inputs = token_rows("x", x, public.d_in, self.parameters.slots)
        above = np.abs(inputs) > public.input_bound
        if above.any():
            token, feature = (int(i) for i in np.argwhere(above)[0])
            raise InputError(
                f"x[{token}, {feature}] is above {public.input_bound:g} in size, the most that the block takes; "
                "ask the server for a larger input_bound"
            )
        direction = "forward" if g is None else "backward"
        secret = SecretKey(self.parameters)
        parts = [secret.evaluation_keys().to_bytes(), public.encrypt_input(secret, inputs, direction).to_bytes()]
        factors = None
        if g is not None:
            gradient = token_rows("g", g, public.d_out, self.parameters.slots)
            if len(gradient) != len(inputs):
                raise InputError(f"x has {len(inputs)} tokens and g {len(gradient)}; give one gradient a token")
            factors = np.abs(gradient).max(axis=1, keepdims=True)
            factors[factors == 0] = 1.0
            parts.append(public.encrypt_gradient(secret, gradient / factors).to_bytes())
        request_id = secrets.token_bytes(16)
        expected = public.expected_reply(len(inputs), direction)
        pending = Pending(public.id, request_id, direction, expected, secret, factors)
        return write_request(direction, public.id, request_id, len(inputs), parts), pending

    def decrypt(self, blocks: Iterable[BytesLike], pending: Pending) -> Array:
        """Decrypt the reply to the request that ``pending`` belongs to, message by message as they arrive.

        Uses up ``pending``, whatever comes of it: a secret key decrypts one reply.

        Raises:
            MessageError: malformed, incomplete, the reply to another request, or ciphertexts of another level or shape
                than the block's public part states.
            SecretError: a reply to this request was decrypted before.
            CkksError: a value is beyond its bound: an input left the domain of the block's activation.
        """
        secret, out = pending.take_secret(), np.empty(pending.expected.shape)
        for first, tensor in read_reply(blocks, pending):
            try:
                out[:, first : first + tensor.shape[1]] = secret.decrypt(tensor)
            except CkksError as error:
                raise CkksError(
                    f"the block's reply is out of bounds, so W1 x + b1 left the domain of its activation: the server "
                    f"needs a wider one ({error})"
                ) from error
        return out if pending.factors is None else out * pending.factors

    def __repr__(self) -> str:
        return f"<client of sealed blocks, {self.parameters.name}>"


def _quantised(name: str, weight: npt.ArrayLike) -> tuple[npt.NDArray[np.int16], float]:
    array = np.asarray(weight, np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{name} has shape {array.shape}; pass a matrix")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity")
    delta = (float(np.abs(array).max()) or 1.0) / _core.MAX_WEIGHT_16
    return np.rint(array / delta).astype(np.int16), delta


def _vector(name: str, values: npt.ArrayLike | None, size: int) -> Array:
    array = np.zeros(size) if values is None else np.array(values, np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise InputError(f"{name} has shape {array.shape}; pass {size} finite numbers")
    return array


def _levels(polynomial: Polynomial) -> int:
    return max(1, polynomial.depth)


def _width(polynomial: Polynomial) -> float:
    """What an input's scale is divided by so that the evaluation takes no level to map the domain."""
    low, high = polynomial.domain
    return max(1.0, (high - low) / 2) if polynomial.basis == "chebyshev" else 1.0

"""Encrypted linear layers: four functions, bytes in and bytes out.

The model owner prepares a weight; the data owner encrypts a batch of activations (or of output gradients); the model
owner multiplies without seeing it; the data owner decrypts::

    prepared = prepare(weight)                    # model owner
    request, secret = encrypt(x, prepared.spec)  # data owner
    reply = apply(prepared, request)               # model owner
    y = decrypt(reply, secret)                     # data owner: y ~ x @ weight.T

Ring learning with errors in Z_q[X]/(X^2048 + 1), one feature of up to 2,048 tokens a ciphertext, so that a linear map
over features is one integer matrix product modulo q (Bae, Cheon, Hanrot, Park, Stehle, "Plaintext-Ciphertext Matrix
Multiplication and FHE Bootstrapping: Fast and Fused", CRYPTO 2024). Secrets serve one request. Decryption cannot fail:
each token is scaled so that no output can leave the range of the modulus, whatever its values.

The quantisation of the weight is the only loss a user can see: the product is that of ``scale[:, None] * W_int``, in
both directions, up to `error_bound`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.copies import Immutable
from privtuner.errors import InputError

__all__ = [
    "DEFAULT_BLOCK_ROWS",
    "PRESETS",
    "Direction",
    "LayerSpec",
    "MaskCache",
    "Noise",
    "OneTimeKey",
    "QuantisedWeight",
    "apply",
    "apply_blocks",
    "decrypt",
    "encrypt",
    "error_bound",
    "noise",
    "prepare",
    "ring",
]

Direction = Literal["forward", "backward"]
BytesLike = bytes | bytearray | memoryview

PRESETS: tuple[str, ...] = _core.PRESETS
"""Names of the parameter sets: ``linear-w8`` (8-bit weights, log2 q = 32) and ``linear-w16`` (16-bit, log2 q = 50)."""

OneTimeKey = _core.OneTimeKey
"""What decrypts the reply to one request. Never copied or pickled; wiped when its decryption ends, however it
ends, or by ``wipe()``."""

DEFAULT_BLOCK_ROWS = 256
"""Output features in one block of a reply: small enough to overlap decryption with the product that follows."""


class LayerSpec(Immutable):
    """What the data owner must know of a layer: shape, preset, scales. Not the weight.

    Attributes:
        id: 16 bytes that name the layer and its weights; every message carries it.
        preset: name of the parameter set.
        d_out, d_in: shape of the weight.
        scale: float64 (d_out,), of each row: ``weight[k] ~ scale[k] * W_int[k]``.
    """

    def __init__(self, core: _core.LayerSpec) -> None:
        self._core = core
        self.id: bytes = core.id
        self.preset: str = core.preset
        self.d_out: int = core.d_out
        self.d_in: int = core.d_in
        self.scale: npt.NDArray[np.float64] = core.scale
        self.scale.setflags(write=False)

    def features(self, direction: Direction) -> tuple[int, int]:
        """Features of the input and of the output of a product in that direction.

        Raises:
            InputError: it is neither "forward" nor "backward".
        """
        if direction not in ("forward", "backward"):
            raise InputError(f"direction {direction!r}: choose 'forward' or 'backward'")
        return (self.d_in, self.d_out) if direction == "forward" else (self.d_out, self.d_in)

    def norm(self, direction: Direction) -> float:
        """Bound on the Euclidean norms of the rows of the integers that are applied in that direction, at least 1.

        Raises:
            InputError: it is neither "forward" nor "backward".
        """
        self.features(direction)
        return max(self._core.norm_forward if direction == "forward" else self._core.norm_backward, 1.0)

    def to_bytes(self) -> bytes:
        """Serialise, with a version, a parameter hash, lengths and a checksum."""
        return self._core.to_bytes()

    @classmethod
    def from_bytes(cls, data: BytesLike) -> LayerSpec:
        """Read what `to_bytes` wrote.

        Raises:
            MessageError: malformed, truncated, corrupted, or of another version or unknown parameters.
        """
        return cls(_core.LayerSpec.from_bytes(data))

    def __reduce__(self) -> tuple[Any, ...]:
        return (LayerSpec.from_bytes, (self.to_bytes(),))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerSpec) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash((self.id, self.preset))

    def __repr__(self) -> str:
        return f"LayerSpec(preset={self.preset!r}, d_out={self.d_out}, d_in={self.d_in}, id={self.id.hex()})"


class QuantisedWeight(Immutable):
    """A quantised weight at the model owner's, ready for `apply`: one byte a weight (two for ``linear-w16``).

    A pickled one holds the weight.
    """

    def __init__(self, core: _core.QuantisedWeight) -> None:
        self._core = core
        self.spec = LayerSpec(core.spec())

    def quantised(self) -> npt.NDArray[np.int8] | npt.NDArray[np.int16]:
        """The integers W_int, (d_out, d_in), int8 or int16: the weight in force is ``scale[:, None] * W_int``."""
        return self._core.quantised()

    def __reduce__(self) -> tuple[Any, ...]:
        spec = self.spec
        return (QuantisedWeight._of, (spec.preset, spec.id, self.quantised(), spec.scale))

    @classmethod
    def _of(cls, *parts: Any) -> QuantisedWeight:
        return cls(_core.QuantisedWeight(*parts))

    def __repr__(self) -> str:
        return f"QuantisedWeight({self.spec!r})"


class MaskCache:
    """Keeps the products of one public mask with the layers it met, at the data owner's.

    A request is a mask product and a data product. The mask depends on a public seed alone, so a data owner who keeps
    the seed for a while needs the product ``W_int @ mask`` of a layer once: later requests cost the server half the
    work for a full group of tokens, and their replies carry the data half alone. Each request still has secrets of its
    own: many secrets under one public matrix (SECURITY.md gives the argument). The server keeps nothing.

    Args:
        max_bytes: largest total size. A layer takes 2,048 words for each of its outputs, 8 KB with ``linear-w8``, in
            each direction. Layers that do not fit send their mask product with every reply.

    Copies and pickles are empty caches of the same size, with a mask of their own.
    """

    def __init__(self, max_bytes: int = 1 << 62) -> None:
        if not 0 <= max_bytes < 1 << 63:
            raise InputError(f"max_bytes = {max_bytes}: must be in [0, 2**63)")
        self._core = _core.MaskCache(max_bytes)

    @property
    def bytes(self) -> int:
        """Bytes kept now."""
        return self._core.bytes

    @property
    def max_bytes(self) -> int:
        """Largest total size in bytes."""
        return self._core.max_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return (MaskCache, (self.max_bytes,))

    def __repr__(self) -> str:
        return f"MaskCache(bytes={self.bytes}, max_bytes={self.max_bytes})"


def ring(preset: str) -> tuple[int, int]:
    """Ring dimension N and modulus q of a preset: what its security rests on.

    Raises:
        InputError: an unknown preset.
    """
    info = _preset_info(preset)
    return info["n"], info["q"]


def _preset_info(preset: str) -> dict[str, Any]:
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    return _core.preset_info(preset)


def prepare(weight: npt.ArrayLike, preset: str = "linear-w8") -> QuantisedWeight:
    """Quantise a weight for encrypted products (model owner).

    Symmetric, per output row: ``scale[k] = max|weight[k]| / 127`` (32639 for ``linear-w16``), rounded to nearest even.

    Args:
        weight: (d_out, d_in) of a floating dtype, every value finite in float32; both dimensions in [1, 65536].
        preset: one of `PRESETS`.

    Raises:
        InputError: wrong shape or dtype, a value that is not finite in float32 (its place is named), or an unknown
            preset.
    """
    w = np.asarray(weight)
    if w.ndim != 2 or 0 in w.shape:
        raise InputError(f"weight has shape {w.shape}: expected (d_out, d_in), neither zero")
    if not np.issubdtype(w.dtype, np.floating):
        raise InputError(f"weight has dtype {w.dtype}: expected a floating dtype")
    info = _preset_info(preset)
    w = w.astype(np.float64)
    require_finite("weight", w)
    largest = np.abs(w).max(axis=1)
    if largest.max() > np.finfo(np.float32).max:
        raise InputError(f"weight[{int(largest.argmax())}]: every value must be finite in float32")
    delta = largest / info["max_weight"]
    integers: npt.NDArray[Any] = np.zeros(w.shape, np.int8 if info["weight_bytes"] == 1 else np.int16)
    rows = delta > 0
    # Rows whose largest weight is so small that the division is subnormal round beyond the range without the clip.
    scaled = np.rint(w[rows] / delta[rows, None])
    integers[rows] = np.clip(scaled, -info["max_weight"], info["max_weight"]).astype(integers.dtype)
    identity = hashlib.sha256(f"{preset}|{w.shape[0]}|{w.shape[1]}|".encode())
    identity.update(delta.tobytes())
    identity.update(integers.tobytes())
    return QuantisedWeight(_core.QuantisedWeight(preset, identity.digest()[:16], integers, delta))


def encrypt(
    x: npt.ArrayLike, spec: LayerSpec, direction: Direction = "forward", masks: MaskCache | None = None
) -> tuple[bytes, OneTimeKey]:
    """Encrypt a batch for one layer (data owner).

    Args:
        x: activations (tokens, d_in) forward, or output gradients (tokens, d_out) backward; float16, float32 or
            float64 (used as float32), every value finite; 1 to 2**24 tokens.
        spec: the description of the layer that will answer.
        direction: ``"forward"`` for ``x @ W.T``, ``"backward"`` for ``x @ W``.
        masks: the data owner's cache of mask products; without one the request has a public mask of its own.

    Returns:
        The request, at most ``112 + 4 * x.size`` bytes (8 a value with ``linear-w16``), and the secret that decrypts
        its reply. The seed of all randomness is 32 fresh bytes of the operating system.

    Raises:
        InputError: wrong shape or dtype, a value that is not finite in float32, or no tokens.
    """
    for name, value, kind in (("spec", spec, LayerSpec), ("masks", masks, (MaskCache, type(None)))):
        if not isinstance(value, kind):  # the core's own refusal would show all arguments, and so the batch
            raise InputError(f"{name} is of type {type(value).__name__}: see encrypt")
    cache = None if masks is None else masks._core
    return _core.encrypt(spec._core, direction, as_batch(x, spec, direction), cache)


def apply_blocks(
    prepared: QuantisedWeight, request: BytesLike, block_rows: int = DEFAULT_BLOCK_ROWS
) -> Iterator[bytes]:
    """Answer a request in blocks of ``block_rows`` outputs, as they are computed (model owner).

    Args:
        prepared: the layer the request is meant for.
        request: bytes from `encrypt`.
        block_rows: outputs a block, rounded up to a multiple of 32.

    Returns:
        An iterator over the blocks of one reply, in order. The request is checked before this function returns.

    Raises:
        MessageError: the request is malformed, truncated, corrupted, or meant for another layer.
        InputError: ``block_rows`` is not positive.
    """
    step = row_step(block_rows)
    job = _core.Job(prepared._core, request)
    return (job.rows(begin, min(step, job.features_out - begin)) for begin in range(0, job.features_out, step))


def row_step(block_rows: int) -> int:
    """Round ``block_rows`` up to where row ranges of a product may start.

    Raises:
        InputError: it is not positive.
    """
    if block_rows < 1:
        raise InputError(f"block_rows = {block_rows}: must be positive")
    return -(-block_rows // _core.ROW_STEP) * _core.ROW_STEP


def apply(prepared: QuantisedWeight, request: BytesLike) -> bytes:
    """Answer a request (model owner): the blocks of `apply_blocks` as one message.

    Raises:
        MessageError: the request is malformed, truncated, corrupted, or meant for another layer.
    """
    return b"".join(apply_blocks(prepared, request, prepared.spec.d_out + prepared.spec.d_in))


def decrypt(reply: BytesLike | Iterable[BytesLike], secret: OneTimeKey) -> npt.NDArray[np.float32]:
    """Decrypt a reply (data owner). Uses up the secret, whatever comes of it: a second reply needs a new request.

    Args:
        reply: the whole reply, or an iterable of its blocks, which are decrypted as they arrive.
        secret: from the `encrypt` that made the request.

    Returns:
        float32 (tokens, d_out) forward, (tokens, d_in) backward.

    Raises:
        MessageError: a block is malformed, truncated, corrupted, out of order, or answers another request.
        SecretError: the secret was used or wiped.
        InputError: ``secret`` is no secret.
    """
    if not isinstance(secret, OneTimeKey):
        raise InputError(f"secret is of type {type(secret).__name__}: expected the Secret that encrypt returned")
    decryption = _core.Decryption(secret)
    try:
        for block in [reply] if isinstance(reply, (bytes, bytearray, memoryview)) else reply:
            decryption.feed(block)
        return decryption.finish()
    finally:
        secret.wipe()


def error_bound(spec: LayerSpec, x: npt.ArrayLike, direction: Direction = "forward") -> npt.NDArray[np.float64]:
    """Guaranteed largest encryption error of each output, for any randomness.

    The difference between the decrypted output and ``x @ (scale[:, None] * W_int).T`` (backward: ``x @ (...)``)
    in exact arithmetic: noise, rounding of the input, bits left out of the reply, and the rounding of the float32
    result. The quantisation of the weight is not part of it. By Cauchy-Schwarz over |error| <= 21: a worst case,
    from which typical errors are far.

    Args:
        spec: the description of the layer.
        x: the batch, as for `encrypt`.
        direction: as for `encrypt`.

    Returns:
        float64, the shape of the output.

    Raises:
        InputError: as for `encrypt`.
    """
    batch = as_batch(x, spec, direction).astype(np.float64)
    require_finite("x", batch)
    forward = direction == "forward"
    if not forward:
        batch = batch * spec.scale
    norm = spec.norm(direction)
    noise = _core.noise_bound(spec.preset, batch.shape[1], norm)
    length = np.sqrt((batch * batch).sum(axis=1))
    # One unit of the scaled integers, slightly enlarged for the rounding of the scales themselves.
    unit = length / _core.token_room(spec._core, direction) * (1 + 2**-30)
    scale = spec.scale if forward else np.ones(spec.d_in)
    tiny = float(np.finfo(np.float32).smallest_subnormal)
    rounding = (length * norm)[:, None] * scale * 2**-23 + tiny
    bound: npt.NDArray[np.float64] = unit[:, None] * scale * noise + rounding
    return bound


class Noise(NamedTuple):
    """What the product of an honest server is off by, in one direction of one layer, whatever the scheme.

    A token, its features times the scales of the columns it meets (1 forward, `LayerSpec.scale` backward), is scaled
    until its Euclidean length is ``room`` and rounded. The matrix of integers is applied to that, the output divided
    by what the token was scaled by and multiplied with the scale of its row. All numbers are in units of the rounded
    token.

    Attributes:
        room: length of a scaled token.
        deviation: sub-Gaussian parameter of the random error of each feature of the input: E exp(t error) <=
            exp(t^2 deviation^2 / 2) for all t. Errors are independent and of mean 0.
        largest: bound on the absolute value of that error.
        rounding: bound on every other error of a feature of the input.
        dropped: bound on what is systematically lost of an output.
        added: sub-Gaussian parameter of what decryption adds to an output, independent of all else.
    """

    room: float
    deviation: float
    largest: float
    rounding: float
    dropped: float
    added: float = 0.0


def noise(spec: LayerSpec, direction: Direction) -> Noise:
    """Return what products of this scheme are off by.

    Errors are centred binomial, sums of 2 eta signs over 2: of parameter sqrt(eta / 2), and at most eta.

    Raises:
        InputError: an unknown direction.
    """
    spec.features(direction)
    dropped = float(2 ** (_core.preset_info(spec.preset)["dropped_bits"] - 1))
    rounding = 0.5
    eta = _core.noise_bound(spec.preset, 1, 1.0) - dropped - rounding
    return Noise(_core.token_room(spec._core, direction), float(np.sqrt(eta / 2)), eta, rounding, dropped)


def require_finite(name: str, values: npt.NDArray[Any], at: tuple[int, ...] = ()) -> None:
    """Refuse ``values``, the part of an array at ``at``, for the first one that is not finite.

    Raises:
        InputError: there is one; names its place.
    """
    finite = np.isfinite(values)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(f"{name}{[*at, *place]} is {values[place]}: every value must be finite")


def check_batch(x: Any, spec: LayerSpec, direction: Direction) -> None:
    """Refuse what is no batch for a layer, be it an array of NumPy or of a device.

    Raises:
        InputError: an unknown direction, a dtype that is not floating, another shape, or too many tokens.
    """
    features, _ = spec.features(direction)
    if x.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"x has dtype {x.dtype}: expected float16, float32 or float64")
    if x.ndim != 2 or x.shape[1] != features or x.shape[0] == 0:
        raise InputError(
            f"x has shape {tuple(x.shape)}: expected (tokens, {features}) with at least one token ({direction} "
            "direction)"
        )
    if x.shape[0] > _core.MAX_TOKENS:
        raise InputError(f"x has {x.shape[0]} tokens: a request carries 1 to {_core.MAX_TOKENS}")


def as_batch(x: npt.ArrayLike, spec: LayerSpec, direction: Direction) -> npt.NDArray[np.float32]:
    """Bring a batch of the host to float32, contiguous; ``x`` itself where it is that.

    Raises:
        InputError: as `check_batch`, or a float64 that is not finite, in float64 or in float32.
    """
    batch = np.asarray(x)
    check_batch(batch, spec, direction)
    if batch.dtype == np.float64:
        require_finite("x", batch)
        with np.errstate(over="ignore"):  # an overflow is found just below and named
            batch = batch.astype(np.float32)
        require_finite("x (as float32)", batch)
    return np.ascontiguousarray(batch, dtype=np.float32)

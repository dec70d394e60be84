"""The data owner's encryption on a device."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner import _core, linear
from privtuner.cuda import sampling
from privtuner.cuda.device import Device
from privtuner.cuda.linear import lanes
from privtuner.cuda.linear.lanes import (
    THREADS,
    TILE_BYTES,
    Slot,
    context_of,
    lane_rows,
    message_of,
    pieces,
    tiles,
    upload_weights,
    wipe,
)
from privtuner.cuda.linear.secret import DeviceOneTimeKey
from privtuner.errors import InputError
from privtuner.linear import Direction, LayerSpec, MaskCache

__all__ = ["encrypt", "encrypt_words"]

_NORM_LANES = 8  # of linear.cu


class _Encryption:
    """One batch on its way to words. Work goes to the current stream."""

    def __init__(self, device: Device, secret: DeviceOneTimeKey, x: Any, mask_seed: bytes) -> None:
        self._device, self._secret, self._ring, self._x = device, secret, secret._ring, x
        self._mask_seed: Any = mask_seed  # 32 bytes, in `prepare` words of the device
        self.tokens, self.width = (int(size) for size in x.shape)
        self._groups = self._ring.groups(self.tokens)
        self._error_length = min(self.tokens, self._ring.n)
        self._weight: Any = None
        self._scales: Any = None
        self._seed: Any = None

    def prepare(self, seed: bytearray) -> None:
        """Check and scale the batch, make its secrets."""
        device, secret, ring, spec = self._device, self._secret, self._ring, self._secret._spec
        direction: Direction = secret._reply.direction
        delta, ones = secret._context.weights(spec) if secret._in_lanes else upload_weights(device, spec)
        self._mask_seed = sampling.seed_words(device, self._mask_seed)
        self._weight, secret._weight = (ones, delta) if direction == "forward" else (delta, ones)
        self._scales = device.empty((self.tokens,), np.float64, "scales")
        secret._inverse_scales = device.empty((self.tokens,), np.float64, "scales")
        device.launch(
            "linear_scales",
            (-(-self.tokens * _NORM_LANES // THREADS),),
            THREADS,
            self._scales,
            secret._inverse_scales,
            self._x,
            self._weight,
            _core.token_room(spec._core, direction),
            self.tokens,
            self.width,
            shared=8 * THREADS,
        )
        _require_finite(device, "x", self._x, device.download(device.xp.isfinite(secret._inverse_scales)))
        self._seed = sampling.seed_words(device, seed)
        secret._factors = ring.secrets(self._seed, self._groups)

    def piece_rows(self) -> int:
        """Features of one piece: what fits into a lane's memory."""
        ring = self._ring
        words = (self._groups + 1) * ring.n + self.tokens
        feature = words * ring.word_bytes + self._groups * self._error_length
        return lane_rows(self._device, feature, self.width)

    def run(self, slot: Slot, first: int, out: Any) -> None:
        """Words of features from ``first`` on into ``out``, (features, tokens), contiguous."""
        ring, device, rows = self._ring, self._device, int(out.shape[0])
        masks = slot.array("masks", rows * ring.n, ring.dtype, "masks").reshape(rows, ring.n)
        shape = (self._groups, rows, ring.n)
        product = slot.array("product", int(np.prod(shape)), ring.dtype, "products with secrets").reshape(shape)
        shape = (rows, self._groups, self._error_length)
        errors = slot.array("errors", int(np.prod(shape)), np.dtype(np.int8), "errors").reshape(shape)
        ring.masks(self._mask_seed, first, rows, masks)
        ring.multiply_masks(masks, self._secret._factors, product)
        sampling.binomial(device, self._seed, first, rows, range(self._groups), self._error_length, out=errors)
        ring.launch(
            "embed",
            tiles(self.tokens, rows),
            out,
            product,
            errors,
            self._x,
            self._weight,
            self._scales,
            ring.q,
            ring.n,
            self.tokens,
            self.width,
            first,
            rows,
            self._groups,
            self._error_length,
            shared=TILE_BYTES,
        )

    def wipe(self) -> None:
        """Zeros over what only the encryption needed, in the current stream."""
        wipe(*(array for array in (self._scales, self._seed) if array is not None))


def encrypt(
    device: Device,
    x: Any,
    spec: LayerSpec,
    direction: Direction = "forward",
    *,
    masks: MaskCache | None = None,
    seed: bytes | None = None,
    mask_seed: bytes | None = None,
    request: bytes | None = None,
) -> tuple[memoryview, DeviceOneTimeKey]:
    """Encrypt a batch on the device; the request is that of `privtuner.linear.encrypt`.

    The request is a read-only view of page-locked memory that is used again when the view is gone, and was written by
    the device itself; ``bytes`` of it makes a copy.

    Args:
        device: where to.
        x: as for `privtuner.linear.encrypt`: a host array, or an array of the device, anything with ``__dlpack__``,
            which is taken as it lies there if it is float32 and contiguous.
        spec: the description of the layer that will answer.
        direction: "forward" for ``x @ W.T``, "backward" for ``x @ W``.
        masks: the data owner's cache of mask products; those of this device are kept in its memory.
        seed: 32 bytes, secret, for tests alone: fresh ones of the operating system when None, as for the next two.
        mask_seed: 32 bytes, public.
        request: 16 bytes that name the request.

    Raises:
        InputError: wrong shape or dtype, a value that is not finite in float32, no tokens, or x lies on another device.
        EngineError: the device's memory does not suffice.
    """
    context = context_of(device)
    slots = [Slot(context), Slot(context)]
    secret: DeviceOneTimeKey | None = None
    work: _Encryption | None = None
    own: Any = None  # a copy of the batch that was made here
    key = _key(seed)
    try:
        context.lanes[0].wait()  # a batch may be work of the caller's stream that is not done yet
        with context.lane(0):
            batch, copied = _batch(device, x, spec, direction)
            own = batch if copied else None
            tokens, width = (int(size) for size in batch.shape)
            name, mask = request or secrets.token_bytes(16), mask_seed or secrets.token_bytes(32)
            mask = mask if masks is None else masks._core.seed
            secret = DeviceOneTimeKey._of(context, spec, direction, tokens, name, masks, in_lanes=True)
            work = _Encryption(device, secret, batch, mask)
            work.prepare(key)
        context.fork()
        message = device.page_locked(_core.linear_request_bytes(spec.preset, width, tokens))
        body = message[_core.LINEAR_REQUEST_PREFIX :]
        row_bytes = tokens * secret._ring.word_bytes
        step = min(work.piece_rows(), max(1, lanes.PIECE_BYTES // row_bytes, -(-width // 8)))  # some for each lane
        for number, first, rows in pieces(width, step):
            with context.lane(number):
                words = slots[number % 2].array("words", rows * tokens, secret._ring.dtype).reshape(rows, tokens)
                work.run(slots[number % 2], first, words)
                device.copy_out(words, body[first * row_bytes : (first + rows) * row_bytes])
    except BaseException:
        if secret is not None:
            secret.wipe()
        raise
    finally:
        key[:] = bytes(len(key))
        context.join()
        with context.lane(0):
            for slot in slots:
                slot.wipe()
            if work is not None:
                work.wipe()
            if own is not None:
                wipe(own)
        context.finish()
    _core.linear_seal_request(
        spec.preset, message, direction, spec.id, name, mask, tokens, width, not secret._reply.mask_known
    )
    return message_of(message), secret


def encrypt_words(
    device: Device,
    x: Any,
    spec: LayerSpec,
    direction: Direction = "forward",
    *,
    mask_seed: bytes,
    seed: bytes | None = None,
) -> tuple[Any, DeviceOneTimeKey]:
    """Encrypt a batch that lies on the device into words that stay there; see `encrypt`.

    Args:
        device: where to.
        x: float32, (tokens, features), contiguous.
        spec: the description of the layer.
        direction: "forward" or "backward".
        mask_seed: 32 bytes, public: whoever answers expands the same mask from it.
        seed: 32 bytes, for tests alone.

    Returns:
        Words (features, tokens), uint32 or uint64, in [0, q), and the secret for `decrypt_words`.

    Raises:
        InputError: as `encrypt`.
        EngineError: the device's memory does not suffice.
    """
    context = context_of(device)
    linear.check_batch(x, spec, direction)
    secret = DeviceOneTimeKey._of(context, spec, direction, int(x.shape[0]), bytes(16), None, in_lanes=False)
    slot, work = Slot(context), _Encryption(device, secret, x, mask_seed)
    key = _key(seed)
    with device.active():
        try:
            work.prepare(key)
            words = device.empty((work.width, work.tokens), secret._ring.dtype, "a request")
            for _, first, rows in pieces(work.width, work.piece_rows()):
                work.run(slot, first, words[first : first + rows])
        except BaseException:
            secret.wipe()
            raise
        finally:
            key[:] = bytes(len(key))
            slot.wipe()
            work.wipe()
    return words, secret


def _key(seed: bytes | None) -> bytearray:
    """Draw 32 secret bytes, to be overwritten after use, straight from the operating system: no other copy exists."""
    if seed is not None:
        return bytearray(seed)
    key = bytearray(32)
    _core.os_random(key)
    return key


def _batch(device: Device, x: Any, spec: LayerSpec, direction: Direction) -> tuple[Any, bool]:
    """Return x on the device, float32 and contiguous, and whether that is a copy made here."""
    place = x.__dlpack_device__() if hasattr(x, "__dlpack_device__") else (1, 0)
    if place[0] not in (2, 13):  # DLPack's numbers of CUDA's memory, plain and managed; everything else is the host's
        return device.upload(linear.as_batch(x, spec, direction), "a batch"), True
    if place[0] == 2 and f"cuda:{int(place[1])}" != device.name:
        raise InputError(f"x lies on cuda:{int(place[1])} and is to be encrypted on {device.name}: move it there")
    given = device.xp.from_dlpack(x)
    linear.check_batch(given, spec, direction)
    if given.dtype == np.float64:
        _require_finite_tokens(device, "x", given)
        with np.errstate(over="ignore"):  # an overflow is found just below and named
            narrow = device.xp.ascontiguousarray(given, dtype=np.float32)
        try:
            _require_finite_tokens(device, "x (as float32)", narrow)
        except InputError:
            wipe(narrow)
            raise
        return narrow, True
    batch = device.xp.ascontiguousarray(given, dtype=np.float32)
    return batch, not (given.dtype == np.float32 and given.flags.c_contiguous)


def _require_finite_tokens(device: Device, name: str, x: Any) -> None:
    _require_finite(device, name, x, np.all(device.download(device.xp.isfinite(x)), axis=1))


def _require_finite(device: Device, name: str, x: Any, finite: npt.NDArray[Any]) -> None:
    """Refuse the first value that is not finite, in the first of the tokens that are not ``finite``."""
    if not finite.all():
        token = int(finite.argmin())
        linear.require_finite(name, device.download(x[token]), (token,))

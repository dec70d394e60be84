"""Encrypted linear layers on the device: the scheme of `privtuner.linear`, the same bytes on the wire.

Messages are opened and sealed on the host; their words are copied through page-locked memory and everything else is
done by kernels. Two streams, called lanes, take turns with pieces of a message: while one copies, the other computes.
What is secret (secrets, errors, products with secrets, scales, batches in clear that were made here) is overwritten
with zeros once it was used.

Two levels. `open_request`, `answer`, `apply_blocks`, `encrypt` and `decrypt` speak bytes, use the lanes, and are done
with every copy when they return. `Product`, `apply`, `apply_many`, `encrypt_words` and `decrypt_words` take and give
device arrays and put their work into the current stream.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core, linear
from ..errors import EngineError, InputError, MessageError, SecretError
from ..linear import BytesLike, Direction, Prepared, Public
from . import gemm, sampling
from .device import Device
from .ntt import Transforms

__all__ = [
    "DeviceLayer",
    "DeviceMasks",
    "DeviceSecret",
    "Opened",
    "Product",
    "answer",
    "apply",
    "apply_blocks",
    "apply_many",
    "decrypt",
    "decrypt_words",
    "encrypt",
    "encrypt_words",
    "open_request",
]

_PIECE_BYTES = 8 << 20  # of a message, copied at once
_WORK_BYTES = 256 << 20  # of device memory that a lane takes, unless one feature needs more
_MAX_TOKENS = 1 << 24
_THREADS = 256
_NORM_LANES, _TILE_ROWS, _TILE_TOKENS = 8, 32, 128  # of linear.cu
_TILE_BYTES = 4 * (_TILE_ROWS + 1) * _TILE_TOKENS
_PRODUCT_TILE = 128  # rows, and about the columns, that a block of threads of a product has
_TILES_EACH = 4  # of these for every multiprocessor, to keep it busy
_Id = bytes  # of a layer or a request
_USED = "this secret was used already: a secret decrypts one reply; encrypt again for another"


class _Ring:
    """A preset on a device: its numbers, its tables, and kernels for its words."""

    def __init__(self, device: Device, preset: str) -> None:
        info = _core.preset_info(preset)
        self.preset = preset
        self.n, self.q = int(info["n"]), int(info["q"])
        self.bits = self.q.bit_length()
        self.word_bytes, self.reply_bytes = int(info["word_bytes"]), int(info["reply_bytes"])
        self.dropped_bits = int(info["dropped_bits"])
        self.dtype: Any = np.dtype(np.uint32 if self.word_bytes == 4 else np.uint64)
        self.reply_dtype: Any = np.dtype(np.uint8 if self.word_bytes == 4 else np.uint32)  # of shortened rows
        self._device = device
        self._order = device.upload(np.zeros(1, np.uint32))
        self._transforms = Transforms(device, self.n, [self.q], self.word_bytes)

    def launch(self, kernel: str, grid: tuple[int, ...], *arguments: Any, shared: int = 0) -> None:
        name = f"linear_{kernel}{8 * self.word_bytes}"
        self._device.launch(name, grid, _THREADS, *arguments, shared=shared)

    def groups(self, tokens: int) -> int:
        return -(-tokens // self.n)

    def masks(self, seed: bytes, first: int, rows: int, out: Any = None) -> Any:
        """Mask polynomials ``first`` to ``first + rows``, (rows, n), in the transform's domain."""
        n, q = self.n, self.q
        return sampling.uniform(self._device, seed, sampling.MASK, first, rows, n, q, self.word_bytes, out=out)

    def secrets(self, seed: Any, groups: int) -> tuple[Any, Any]:
        """A ternary secret for each group: prepared factors, two arrays (groups, n)."""
        words = self._device.empty((groups, self.n), self.dtype, "secrets")
        ternary = sampling.ternary(self._device, seed, 0, groups, self.n)
        try:
            self.launch("residues", (-(-ternary.size // _THREADS),), words, ternary, self.q, ternary.size)
            self._transforms.forward(words, self._order)
            values, companions = self._transforms.prepare(words, self._order)
        finally:
            _wipe(ternary, words)
        return values, companions

    def multiply_masks(self, masks: Any, factors: tuple[Any, Any] | None, out: Any) -> None:
        """Into out (groups, rows, n): masks (rows, n) times the secret of each group, as coefficients."""
        if factors is None:
            raise SecretError(_USED)
        values, companions = factors
        for group in range(out.shape[0]):
            one = slice(group, group + 1)
            self._transforms.multiply(masks, values[one], companions[one], self._order, out[group])
        self._transforms.inverse(out, self._order)


class _Context:
    """What this module keeps for a device: two lanes and the tables of the presets."""

    def __init__(self, device: Device) -> None:
        self.device = device
        with device.active():
            self.lanes = (device.stream(), device.stream())
        self._rings: dict[str, _Ring] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lane(self, index: int) -> Iterator[None]:
        """Work goes to one of the lanes, the even or the odd one."""
        with self.device.active(), self.lanes[index % 2]:
            yield

    def ring(self, preset: str) -> _Ring:
        with self._lock:
            if preset not in self._rings:
                with self.lane(0):
                    self._rings[preset] = _Ring(self.device, preset)
                self.lanes[0].synchronize()
            return self._rings[preset]

    def fork(self) -> None:
        """The odd lane sees what the even one did."""
        self.lanes[1].wait(self.lanes[0])

    def join(self) -> None:
        """The even lane sees what the odd one did: memory goes back to the even one after it."""
        self.lanes[0].wait(self.lanes[1])

    def finish(self) -> None:
        """Wait for both lanes, so that page-locked memory can be used for something else."""
        for lane in self.lanes:
            lane.synchronize()


_CONTEXTS_LOCK = threading.Lock()


def _context(device: Device) -> _Context:
    """The one context of a device, which lives as long as the device does."""
    with _CONTEXTS_LOCK:
        kept: dict[str, Any] = vars(device)
        if "_linear_context" not in kept:
            kept["_linear_context"] = _Context(device)
        context: _Context = kept["_linear_context"]
        return context


def _features(public: Public, direction: str) -> tuple[int, int]:
    """Features of the input and of the output."""
    return (public.d_in, public.d_out) if direction == "forward" else (public.d_out, public.d_in)


def _wipe(*arrays: Any) -> None:
    for array in arrays:
        array.fill(0)


def _pieces(count: int, step: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, length) of the pieces of a range."""
    for number, begin in enumerate(range(0, count, step)):
        yield number, begin, min(step, count - begin)


# ---- the model owner's half ----


class DeviceLayer:
    """A prepared weight on a device, one or two bytes a weight, which stays there.

    Args:
        device: where to.
        prepared: from `privtuner.linear.prepare`.

    Attributes:
        device: as given.
        public: of the layer.
        nbytes: device memory it takes.

    Raises:
        EngineError: the device's memory does not suffice.
    """

    def __init__(self, device: Device, prepared: Prepared) -> None:
        self.device = device
        self.public = prepared.public
        self._context = _context(device)
        self._ring = self._context.ring(self.public.preset)
        with self._context.lane(0):
            self._weights = gemm.Weights(device, prepared.quantised())
        self._context.lanes[0].synchronize()  # whatever stream uses them first finds them there
        self.nbytes = int(self._weights.nbytes)

    def __repr__(self) -> str:
        return f"DeviceLayer({self.public!r} on {self.device.name}, {self.nbytes} bytes)"


class Product:
    """Requests of one layer and direction side by side, packed for one product that is taken row range by row range.

    Args:
        layer: the layer.
        direction: "forward" or "backward".
        requests: of each its number of tokens, and the 32 bytes of its mask seed, or None where it wants no product
            of the mask.
        fill: called with the place for the words of each request, device arrays (features, tokens), before they are
            packed. Every word it writes must be in [0, q).

    Raises:
        EngineError: the device's memory does not suffice.
    """

    def __init__(
        self,
        layer: DeviceLayer,
        direction: Direction,
        requests: Sequence[tuple[int, bytes | None]],
        fill: Callable[[list[Any]], None],
    ) -> None:
        self._layer, self._transpose = layer, direction == "backward"
        ring, device = layer._ring, layer.device
        depth, self.rows_out = _features(layer.public, direction)
        self._data: list[tuple[int, int]] = []  # first column and tokens of each request
        self._masks: list[int | None] = []  # first column of each mask
        self.columns = 0
        for tokens, seed in requests:
            self._data.append((self.columns, tokens))
            self.columns += tokens
            self._masks.append(None if seed is None else self.columns)
            self.columns += 0 if seed is None else ring.n
        residues = device.empty((depth, 1, self.columns), ring.dtype, f"{len(requests)} requests")
        for (_, seed), at in zip(requests, self._masks, strict=True):
            if seed is not None and at is not None:
                self._expand(seed, residues[:, 0, at : at + ring.n])
        fill([residues[:, 0, at : at + tokens] for at, tokens in self._data])
        self._packed = gemm.pack(device, residues, ring.bits)

    def _expand(self, seed: bytes, out: Any) -> None:
        ring = self._layer._ring
        if out.flags.c_contiguous:
            ring.masks(seed, 0, out.shape[0], out)
            return
        step = max(1, _WORK_BYTES // (ring.n * ring.word_bytes))
        for _, first, rows in _pieces(out.shape[0], step):
            out[first : first + rows] = ring.masks(seed, first, rows)

    def rows(self, begin: int = 0, count: int | None = None) -> list[tuple[Any, Any]]:
        """Compute a range of the outputs.

        Args:
            begin: the first one, a multiple of 32.
            count: how many, all that follow when None.

        Returns:
            Of each request its rows as they stand in a reply, uint8 (count, tokens * reply bytes), and the product of
            the mask, (count, N) words, or None.

        Raises:
            InputError: the range does not lie within the outputs, or starts elsewhere.
            EngineError: the device's memory does not suffice.
        """
        layer, ring, device = self._layer, self._layer._ring, self._layer.device
        count = self.rows_out - begin if count is None else count
        if begin % linear.row_step(1) != 0 or begin < 0 or count < 1 or begin + count > self.rows_out:
            raise InputError(
                f"rows [{begin}, {begin + count}) must start at a multiple of {linear.row_step(1)} and end by "
                f"{self.rows_out}"
            )
        product = gemm.multiply(layer._weights, self._transpose, self._packed, [ring.q], begin, count)
        replies = []
        for (column, tokens), mask in zip(self._data, self._masks, strict=True):
            kept = device.empty((count, tokens * ring.reply_bytes), np.uint8, "a reply")
            blocks = -(-tokens // _THREADS)
            ring.launch(
                "shorten",
                (blocks * count,),
                kept.view(ring.reply_dtype),
                product,
                ring.dropped_bits,
                tokens,
                column,
                self.columns,
                blocks,
            )
            words = None if mask is None else device.xp.ascontiguousarray(product[:, 0, mask : mask + ring.n])
            replies.append((kept, words))
        return replies


def apply_many(
    layer: DeviceLayer,
    direction: Direction,
    requests: Sequence[tuple[Any, bytes | None]],
    row_begin: int = 0,
    row_count: int | None = None,
) -> list[tuple[Any, Any]]:
    """Multiply several requests by one layer, as one product over their columns.

    Args:
        layer: the layer.
        direction: "forward" or "backward".
        requests: of each the words, a device array (features in, tokens) of uint32 (linear-w8) or uint64 (linear-w16),
            every one in [0, q), and the 32 bytes of its mask seed, or None where no product of the mask is wanted.
        row_begin: first output, a multiple of 32.
        row_count: outputs, all that follow when None.

    Returns:
        Of each request its part of a reply: data, uint8 (row_count, tokens * reply bytes), rows as on the wire; and
        mask, (row_count, N) words, the product with the mask of that seed, or None.

    Raises:
        InputError: words of another shape or dtype, an unknown direction, or an unusable row range.
        EngineError: the device's memory does not suffice.
    """
    depth, _ = _features(layer.public, _checked(direction))
    for words, _ in requests:
        if words.ndim != 2 or words.shape[0] != depth or words.shape[1] == 0 or words.dtype != layer._ring.dtype:
            raise InputError(
                f"words of shape {tuple(words.shape)} and dtype {words.dtype}: expected ({depth}, tokens) of "
                f"{layer._ring.dtype} ({direction} direction)"
            )

    def fill(places: list[Any]) -> None:
        for place, (words, _) in zip(places, requests, strict=True):
            place[...] = words

    shapes = [(int(words.shape[1]), seed) for words, seed in requests]
    return Product(layer, direction, shapes, fill).rows(row_begin, row_count)


def apply(
    layer: DeviceLayer,
    direction: Direction,
    words: Any,
    seed: bytes | None,
    row_begin: int = 0,
    row_count: int | None = None,
) -> tuple[Any, Any]:
    """Multiply one request by a layer; see `apply_many`."""
    return apply_many(layer, direction, [(words, seed)], row_begin, row_count)[0]


@dataclass(frozen=True)
class Opened:
    """A request that was checked.

    Attributes:
        direction: "forward" or "backward".
        tokens, features: its shape.
        request: 16 bytes that name it.
        seed: 32 bytes, of its mask.
        mask_wanted: whether the reply carries the product of the mask.
        body: uint8, the words as they stand in the message.
    """

    direction: Direction
    tokens: int
    features: int
    request: bytes
    seed: bytes
    mask_wanted: bool
    body: npt.NDArray[np.uint8]


def open_request(layer: DeviceLayer, request: BytesLike) -> Opened:
    """Check a request to a layer. Does not touch the device.

    Args:
        layer: the layer.
        request: bytes from an ``encrypt``; they must stay as they are while the result is in use.

    Raises:
        MessageError: malformed, truncated, corrupted, a word is not below q, or meant for another layer.
    """
    public = layer.public
    header = _core.linear_open_request(public.preset, request)
    if header["layer"] != public.id:
        raise MessageError("request: meant for another layer, or other weights of this one")
    direction: Direction = header["direction"]
    wanted, _ = _features(public, direction)
    if header["features"] != wanted:
        raise MessageError(
            f"request: {header['features']} features, this layer takes {wanted} in the {direction} direction"
        )
    body = np.frombuffer(request, np.uint8, offset=_core.LINEAR_REQUEST_PREFIX)
    return Opened(direction, header["tokens"], wanted, header["request"], header["seed"], header["mask_wanted"], body)


def apply_blocks(layer: DeviceLayer, request: BytesLike, block_rows: int = 256) -> Iterator[bytes]:
    """Answer a request on the device; as `privtuner.linear.apply_blocks`, with the same arguments, bytes and errors.

    Raises:
        MessageError: the request is malformed, truncated, corrupted, or meant for another layer.
        InputError: ``block_rows`` is not positive.
        EngineError: the device's memory does not suffice; raised while iterating.
    """
    blocks = answer(layer, [open_request(layer, request)], block_rows)
    return (block for (block,) in blocks)


def answer(layer: DeviceLayer, requests: Sequence[Opened], block_rows: int = 256) -> Iterator[list[bytes]]:
    """Answer several requests of one direction to one layer together.

    Args:
        layer: the layer.
        requests: from `open_request`, at least one.
        block_rows: outputs a block, rounded up to a multiple of 32.

    Returns:
        An iterator over lists: the next block of every reply.

    Raises:
        InputError: ``block_rows`` is not positive, or the directions differ.
        EngineError: the device's memory does not suffice; raised while iterating.
    """
    step = linear.row_step(block_rows)
    if len({request.direction for request in requests}) != 1:
        raise InputError("requests of both directions, or none: one product serves one direction")
    return _answer(layer, requests, step)


def _answer(layer: DeviceLayer, requests: Sequence[Opened], step: int) -> Iterator[list[bytes]]:
    context, ring = layer._context, layer._ring
    pending: _Strip | None = None
    try:
        with context.lane(0):
            product = _loaded(layer, requests)
        context.fork()
        # Several blocks at once: a few tiles for every multiprocessor, in no more memory than a lane has.
        tall = _TILES_EACH * layer.device.multiprocessors * _PRODUCT_TILE**2 // product.columns
        most = min(_WORK_BYTES, layer.device.free_bytes() // 4) // (2 * product.columns * ring.word_bytes)
        whole = math.lcm(step, _PRODUCT_TILE)  # blocks that fill whole tiles
        height = min(tall, most) // whole * whole or step * max(1, min(tall, most) // step)
        for number, begin, count in _pieces(product.rows_out, height):
            with context.lane(number):
                following = _Strip(layer, requests, product, number, begin, count, step)
            if pending is not None:
                yield from pending.blocks()
            pending = following
        if pending is not None:
            yield from pending.blocks()
    finally:
        context.join()
        context.finish()


class _Strip:
    """Some blocks of the replies: computed, and on their way to page-locked memory, in one lane."""

    def __init__(
        self,
        layer: DeviceLayer,
        requests: Sequence[Opened],
        product: Product,
        lane: int,
        begin: int,
        count: int,
        step: int,
    ) -> None:
        self._layer, self._requests, self._lane = layer, requests, lane % 2
        self._results = product.rows(begin, count)  # kept until the copies are done
        self._messages: list[tuple[int, int, list[npt.NDArray[np.uint8]]]] = []
        for _, first, rows in _pieces(count, step):
            messages = []
            for request, (data, mask) in zip(requests, self._results, strict=True):
                messages.append(self._copied(request, data, mask, slice(first, first + rows)))
            self._messages.append((begin + first, rows, messages))

    def _copied(self, request: Opened, data: Any, mask: Any, rows: slice) -> npt.NDArray[np.uint8]:
        device, preset = self._layer.device, self._layer.public.preset
        count = rows.stop - rows.start
        size = _core.linear_block_bytes(preset, count, request.tokens, request.mask_wanted)
        message = device.page_locked(size)
        body = message[_core.LINEAR_BLOCK_PREFIX :]
        data_bytes = count * data.shape[1]
        device.copy_out(data[rows], body[:data_bytes])
        if mask is not None:
            device.copy_out(mask[rows], body[data_bytes:])
        return message

    def blocks(self) -> Iterator[list[bytes]]:
        """The next block of each reply, sealed."""
        public = self._layer.public
        self._layer._context.lanes[self._lane].synchronize()
        for begin, rows, messages in self._messages:
            sealed = []
            for request, message in zip(self._requests, messages, strict=True):
                _core.linear_seal_block(
                    public.preset,
                    message,
                    request.direction,
                    public.id,
                    request.request,
                    request.tokens,
                    _features(public, request.direction)[1],
                    begin,
                    rows,
                    request.mask_wanted,
                )
                sealed.append(message.tobytes())
            yield sealed


def _loaded(layer: DeviceLayer, requests: Sequence[Opened]) -> Product:
    """The product of requests whose words are in host memory; they are copied while the masks are expanded."""
    context, ring = layer._context, layer._ring

    def fill(places: list[Any]) -> None:
        context.fork()  # the places are memory of the even lane
        slots = [_Slot(context, 0), _Slot(context, 1)]
        turn = 1  # the even lane is busy with the masks
        for place, request in zip(places, requests, strict=True):
            row_bytes = request.tokens * ring.word_bytes
            for _, first, rows in _pieces(request.features, max(1, _PIECE_BYTES // row_bytes)):
                slot, piece = slots[turn % 2], request.body[first * row_bytes : (first + rows) * row_bytes]
                slot.wait()
                with context.lane(turn):
                    place[first : first + rows] = slot.copy_in("words", piece, ring.dtype).reshape(rows, request.tokens)
                turn += 1
        context.join()
        context.finish()  # the slots' page-locked memory is free again

    requested = [(request.tokens, request.seed if request.mask_wanted else None) for request in requests]
    return Product(layer, requests[0].direction, requested, fill)


class _Slot:
    """Memory of one lane that one piece after the other passes through, page-locked and on the device."""

    def __init__(self, context: _Context, lane: int) -> None:
        self._context, self._lane = context, context.lanes[lane]
        self._host: dict[str, npt.NDArray[np.uint8]] = {}
        self._device: dict[str, Any] = {}

    def wait(self) -> None:
        """Until the piece before has left it."""
        self._lane.synchronize()

    def copy_in(self, name: str, source: npt.NDArray[np.uint8], dtype: Any) -> Any:
        """Start the copy of bytes of the host, after `wait`; the device array is good until the next piece."""
        host = self._host.get(name)
        if host is None or host.nbytes < source.nbytes:
            host = self._host[name] = self._context.device.page_locked(source.nbytes)
        host[: source.nbytes] = source
        target = self.array(name, source.nbytes // dtype.itemsize, dtype)
        self._context.device.copy_in(host[: source.nbytes], target)
        return target

    def array(self, name: str, size: int, dtype: Any, what: str = "a work array") -> Any:
        """A device array that lives on, its content with it, while it is long enough."""
        kept = self._device.get(name)
        if kept is None or kept.size < size:
            if kept is not None:
                _wipe(kept)
            kept = self._device[name] = self._context.device.empty((size,), dtype, what)
        return kept[:size]

    def wipe(self) -> None:
        """Zeros over everything on the device, in the current stream."""
        _wipe(*self._device.values())


# ---- the data owner's half ----


class DeviceMasks:
    """`privtuner.linear.MaskCache` in device memory: the products of one public mask with the layers it met.

    Args:
        device: where they are kept.
        max_bytes: largest total size; None for what the device has, less what work needs.

    Raises:
        InputError: ``max_bytes`` is negative.
    """

    def __init__(self, device: Device, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise InputError(f"max_bytes = {max_bytes}: must not be negative")
        self._device = device
        self.seed = secrets.token_bytes(32)
        self.max_bytes = max_bytes
        self._entries: dict[tuple[_Id, str], Any] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Bytes kept now."""
        return self._bytes

    def __repr__(self) -> str:
        return f"DeviceMasks(bytes={self.bytes}, max_bytes={self.max_bytes}, on {self._device.name})"

    def find(self, layer: _Id, direction: str, nbytes: int) -> Any:
        """The complete product of a layer, or None where there is none of that many bytes: the id proves nothing."""
        with self._lock:
            found = self._entries.get((layer, direction))
        return None if found is None or found.nbytes != nbytes else found

    def reserve(self, rows: int, n: int, dtype: Any) -> Any:
        """Space for a product, (rows, n), or None where it would not fit. Not found before `insert`."""
        nbytes = rows * n * dtype.itemsize
        with self._lock:
            if self.max_bytes is not None and self._bytes + nbytes > self.max_bytes:
                return None
        if nbytes > self._device.free_bytes() // 2:
            return None
        try:
            return self._device.empty((rows, n), dtype, "a mask product")
        except EngineError:
            return None

    def insert(self, layer: _Id, direction: str, product: Any) -> None:
        """Keep a complete product, unless there is one or it does not fit any more."""
        with self._lock:
            if self.max_bytes is not None and self._bytes + product.nbytes > self.max_bytes:
                return  # another reply filled the cache meanwhile
            if (layer, direction) not in self._entries:
                self._entries[layer, direction] = product
                self._bytes += product.nbytes


class DeviceSecret:
    """What decrypts the reply to one request. Never copied or pickled; wiped after one decryption or by `wipe`."""

    __slots__ = (
        "_context",
        "_direction",
        "_factors",
        "_in_lanes",
        "_inverse_scales",
        "_lock",
        "_mask",
        "_masks",
        "_public",
        "_request",
        "_ring",
        "_tokens",
        "_used",
        "_weight",
    )
    _context: _Context
    _ring: _Ring
    _public: Public
    _direction: Direction
    _tokens: int
    _request: bytes
    _in_lanes: bool  # where its work is; else in the caller's stream
    _lock: threading.Lock  # held by a decryption at work, and by wipe
    _used: bool
    _factors: tuple[Any, Any] | None  # prepared, of every group
    _inverse_scales: Any  # 1 / Delta_t, (tokens,)
    _weight: Any  # of every output
    _masks: DeviceMasks | None
    _mask: Any  # the product of the mask, where it was known before the request

    def __init__(self) -> None:
        raise TypeError("No constructor defined: encrypt makes secrets")

    @classmethod
    def _made(
        cls,
        context: _Context,
        public: Public,
        direction: Direction,
        tokens: int,
        request: bytes,
        masks: DeviceMasks | None,
        in_lanes: bool,
    ) -> DeviceSecret:
        secret = cls.__new__(cls)
        secret._used, secret._lock, secret._in_lanes = False, threading.Lock(), in_lanes
        secret._factors = secret._inverse_scales = secret._weight = secret._mask = None
        secret._context, secret._ring = context, context.ring(public.preset)
        secret._public, secret._direction, secret._tokens, secret._request = public, direction, tokens, request
        secret._masks = masks
        if masks is not None:
            rows = _features(public, direction)[1]
            secret._mask = masks.find(public.id, direction, rows * secret._ring.n * secret._ring.word_bytes)
        return secret

    @property
    def used(self) -> bool:
        """Whether it was used or wiped."""
        return self._used

    @property
    def tokens(self) -> int:
        """Of the request."""
        return self._tokens

    def wipe(self) -> None:
        """Overwrite it with zeros. Waits for a decryption that is running in another thread."""
        with self._lock:
            self._erase()

    def _require_unused(self) -> None:
        if self._used:
            raise SecretError(_USED)

    def _erase(self) -> None:
        self._used = True
        arrays = [array for array in (*(self._factors or ()), self._inverse_scales) if array is not None]
        self._factors = self._inverse_scales = self._mask = None
        if self._in_lanes:
            self._context.join()
        with self._context.lane(0) if self._in_lanes else self._context.device.active():
            _wipe(*arrays)

    def __del__(self) -> None:
        if getattr(self, "_used", True):
            return
        with contextlib.suppress(Exception):  # the driver may be gone when the interpreter ends, and memory with it
            self._erase()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SecretError("a secret is never copied or pickled: it serves one decryption in this process")

    def __repr__(self) -> str:
        used = ", used" if self._used else ""
        return f"<privtuner.cuda.linear.DeviceSecret of one {self._direction} request, {self._tokens} tokens{used}>"


class _Encryption:
    """One batch on its way to words. Work goes to the current stream."""

    def __init__(self, device: Device, secret: DeviceSecret, x: Any, mask_seed: bytes) -> None:
        self._device, self._secret, self._ring, self._x = device, secret, secret._ring, x
        self._mask_seed = mask_seed
        self.tokens, self.width = (int(size) for size in x.shape)
        self._groups = self._ring.groups(self.tokens)
        self._error_length = min(self.tokens, self._ring.n)
        self._weight: Any = None
        self._scales: Any = None
        self._seed: Any = None

    def prepare(self, seed: bytearray) -> None:
        """Check and scale the batch, make its secrets."""
        device, secret, ring, public = self._device, self._secret, self._ring, self._secret._public
        forward = secret._direction == "forward"
        delta, ones = device.upload(public.delta), device.upload(np.ones(public.d_in))
        self._weight, secret._weight = (ones, delta) if forward else (delta, ones)
        norm = max(public._core.norm_forward if forward else public._core.norm_backward, 1.0)
        # 2^-40 covers the rounding of the norms and of the products with the scales.
        room = (ring.q / 2 - _core.noise_bound(public.preset, self.width, norm)) * (1 - 2.0**-40) / norm
        self._scales = device.empty((self.tokens,), np.float64, "scales")
        secret._inverse_scales = device.empty((self.tokens,), np.float64, "scales")
        device.launch(
            "linear_scales",
            (-(-self.tokens * _NORM_LANES // _THREADS),),
            _THREADS,
            self._scales,
            secret._inverse_scales,
            self._x,
            self._weight,
            room,
            self.tokens,
            self.width,
            shared=8 * _THREADS,
        )
        finite = device.download(device.xp.isfinite(secret._inverse_scales))
        if not finite.all():
            _refuse(device, self._x, int(finite.argmin()))
        self._seed = sampling.seed_words(device, seed)
        secret._factors = ring.secrets(self._seed, self._groups)

    def piece_rows(self) -> int:
        """Features of one piece: what fits into a lane's memory."""
        ring = self._ring
        words = (self._groups + 1) * ring.n + self.tokens
        feature = words * ring.word_bytes + self._groups * self._error_length
        rows = min(_WORK_BYTES, self._device.free_bytes() // 4) // feature
        return max(1, min(rows, self.width))

    def run(self, slot: _Slot, first: int, out: Any) -> None:
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
            _tiles(self.tokens, rows),
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
            shared=_TILE_BYTES,
        )

    def wipe(self) -> None:
        """Zeros over what only the encryption needed, in the current stream."""
        _wipe(*(array for array in (self._scales, self._seed) if array is not None))


def encrypt(
    device: Device,
    x: Any,
    public: Public,
    direction: Direction = "forward",
    *,
    masks: DeviceMasks | None = None,
    seed: bytes | None = None,
    mask_seed: bytes | None = None,
    request: bytes | None = None,
) -> tuple[bytes, DeviceSecret]:
    """Encrypt a batch on the device; the request is that of `privtuner.linear.encrypt`.

    Args:
        device: where to.
        x: as for `privtuner.linear.encrypt`: a host array, or an array of the device, anything with ``__dlpack__``,
            which is taken as it lies there if it is float32 and contiguous.
        public: of the layer that will answer.
        direction: "forward" for ``x @ W.T``, "backward" for ``x @ W``.
        masks: the owner's cache of mask products on this device.
        seed: 32 bytes, secret, for tests alone: fresh ones of the operating system when None, as for the next two.
        mask_seed: 32 bytes, public.
        request: 16 bytes that name the request.

    Raises:
        InputError: wrong shape or dtype, a value that is not finite in float32, no tokens, or x lies on another device.
        EngineError: the device's memory does not suffice.
    """
    context = _context(device)
    slots = [_Slot(context, 0), _Slot(context, 1)]
    work: _Encryption | None = None
    own: Any = None  # a copy of the batch that was made here
    key = bytearray(seed or secrets.token_bytes(32))
    try:
        with context.lane(0):
            batch, copied = _batch(device, x, public, direction)
            own = batch if copied else None
            tokens, width = (int(size) for size in batch.shape)
            name, mask = request or secrets.token_bytes(16), mask_seed or secrets.token_bytes(32)
            mask = mask if masks is None else masks.seed
            secret = DeviceSecret._made(context, public, direction, tokens, name, masks, in_lanes=True)
            work = _Encryption(device, secret, batch, mask)
            work.prepare(key)
        context.fork()
        message = device.page_locked(_core.linear_request_bytes(public.preset, width, tokens))
        body = message[_core.LINEAR_REQUEST_PREFIX :]
        row_bytes = tokens * secret._ring.word_bytes
        step = min(work.piece_rows(), max(1, _PIECE_BYTES // row_bytes, -(-width // 8)))  # some for each lane
        for number, first, rows in _pieces(width, step):
            with context.lane(number):
                words = slots[number % 2].array("words", rows * tokens, secret._ring.dtype).reshape(rows, tokens)
                work.run(slots[number % 2], first, words)
                device.copy_out(words, body[first * row_bytes : (first + rows) * row_bytes])
    finally:
        key[:] = bytes(len(key))
        context.join()
        with context.lane(0):
            for slot in slots:
                slot.wipe()
            if work is not None:
                work.wipe()
            if own is not None:
                _wipe(own)
        context.finish()
    _core.linear_seal_request(
        public.preset, message, direction, public.id, name, mask, tokens, width, secret._mask is None
    )
    return message.tobytes(), secret


def encrypt_words(
    device: Device,
    x: Any,
    public: Public,
    direction: Direction = "forward",
    *,
    mask_seed: bytes,
    seed: bytes | None = None,
) -> tuple[Any, DeviceSecret]:
    """Encrypt a batch that lies on the device into words that stay there; see `encrypt`.

    Args:
        device: where to.
        x: float32, (tokens, features), contiguous.
        public: of the layer.
        direction: "forward" or "backward".
        mask_seed: 32 bytes, public: whoever answers expands the same mask from it.
        seed: 32 bytes, for tests alone.

    Returns:
        Words (features, tokens), uint32 or uint64, in [0, q), and the secret for `decrypt_words`.

    Raises:
        InputError: as `encrypt`.
        EngineError: the device's memory does not suffice.
    """
    context = _context(device)
    _checked_shape(x, public, direction)
    secret = DeviceSecret._made(context, public, direction, int(x.shape[0]), bytes(16), None, in_lanes=False)
    slot, work = _Slot(context, 0), _Encryption(device, secret, x, mask_seed)
    key = bytearray(seed or secrets.token_bytes(32))
    with device.active():
        try:
            work.prepare(key)
            words = device.empty((work.width, work.tokens), secret._ring.dtype, "a request")
            for _, first, rows in _pieces(work.width, work.piece_rows()):
                work.run(slot, first, words[first : first + rows])
        finally:
            key[:] = bytes(len(key))
            slot.wipe()
            work.wipe()
    return words, secret


class Decryption:
    """Decrypts a reply block by block; see `decrypt`. ``close`` it whatever happened."""

    def __init__(self, secret: DeviceSecret, on_device: bool = False) -> None:
        secret._require_unused()
        self._secret, self._context, self._ring = secret, secret._context, secret._ring
        device, ring = self._context.device, self._ring
        self._outputs = _features(secret._public, secret._direction)[1]
        self._next_row = 0
        self._turn = 0
        self._slots = [_Slot(self._context, 0), _Slot(self._context, 1)]
        self._filling: Any = None
        self._on_device = on_device
        shape = (secret._tokens, self._outputs)
        if (
            on_device
        ):  # memory of the caller's stream, as others may read it long after: what it did before must be over
            with device.active():
                self._y = device.empty(shape, np.float32, "a decrypted reply")
                device.download(self._y[:1, :1])
        with self._context.lane(0):
            if not on_device:
                self._y = device.empty(shape, np.float32, "a decrypted reply")
            if secret._masks is not None and secret._mask is None:
                self._filling = secret._masks.reserve(self._outputs, ring.n, ring.dtype)
        piece = ring.n * ring.word_bytes + secret._tokens * ring.reply_bytes
        self._step = max(1, min(_PIECE_BYTES // piece, _most_rows(device, ring, secret._tokens)))
        self._context.fork()

    @property
    def complete(self) -> bool:
        return self._next_row == self._outputs

    def feed(self, block: BytesLike) -> None:
        """One or more whole blocks; see `decrypt` for what is raised."""
        secret, public = self._secret, self._secret._public
        data = memoryview(block)
        with secret._lock:
            if not self.complete:
                secret._require_unused()
            while len(data) > 0:
                header = _core.linear_open_block(public.preset, data)
                self._check(header)
                first, rows = header["row_begin"], header["row_count"]
                body = np.frombuffer(data[_core.LINEAR_BLOCK_PREFIX : header["size"]], np.uint8)
                self._rows(first, rows, body)
                self._next_row += rows
                data = data[header["size"] :]
            if self.complete and not secret._used:
                self._context.join()
                if self._filling is not None and secret._masks is not None:
                    secret._masks.insert(public.id, secret._direction, self._filling)
                    self._filling = None
                secret._erase()
                self._context.fork()  # whoever finds the product finds it whole in both lanes

    def _check(self, header: dict[str, Any]) -> None:
        secret, public = self._secret, self._secret._public
        if header["layer"] != public.id:
            raise MessageError("reply block: comes from another layer")
        if header["request"] != secret._request:
            raise MessageError("reply block: answers another request")
        if header["direction"] != secret._direction:
            raise MessageError(f"reply block: is {header['direction']}, the request was {secret._direction}")
        if (header["tokens"], header["features"]) != (secret._tokens, self._outputs):
            raise MessageError(
                f"reply block: shape ({header['tokens']}, {header['features']}), expected ({secret._tokens}, "
                f"{self._outputs})"
            )
        if header["row_begin"] != self._next_row:
            raise MessageError(
                f"reply block: starts at output {header['row_begin']}, expected {self._next_row}: reordered, repeated "
                "or lost"
            )
        if header["mask_present"] == (secret._mask is not None):
            raise MessageError(
                "reply block: carries a mask product nobody asked for"
                if header["mask_present"]
                else "reply block: lacks the mask product that was asked for"
            )

    def _rows(self, first: int, count: int, body: npt.NDArray[np.uint8]) -> None:
        """Decrypt ``count`` rows: their data stands in front of their mask products, if there are any."""
        secret, ring = self._secret, self._ring
        data_bytes, mask_bytes = secret._tokens * ring.reply_bytes, ring.n * ring.word_bytes
        data, masks = body[: count * data_bytes], body[count * data_bytes :]
        for _, begin, rows in _pieces(count, self._step):
            slot, at, lane = self._slots[self._turn % 2], first + begin, self._turn
            slot.wait()
            with self._context.lane(lane):
                reply = slot.copy_in("data", data[begin * data_bytes : (begin + rows) * data_bytes], ring.reply_dtype)
                if secret._mask is None:
                    piece = masks[begin * mask_bytes : (begin + rows) * mask_bytes]
                    mask = slot.copy_in("masks", piece, ring.dtype).reshape(rows, ring.n)
                else:
                    mask = secret._mask[at : at + rows]
                if self._filling is not None:
                    self._filling[at : at + rows] = mask
                _reveal(secret, slot, reply, mask, self._y, at)
            self._turn += 1

    def finish(self) -> Any:
        """The result, once every row has arrived."""
        if not self.complete:
            raise MessageError(f"reply: ends after output {self._next_row} of {self._outputs}: truncated")
        self._context.join()
        self._context.finish()
        if self._on_device:
            return self._y
        with self._context.lane(0):
            return self._context.device.download(self._y)

    def close(self) -> None:
        """Overwrite what is secret and wait for all copies."""
        self._context.join()
        with self._context.lane(0):
            for slot in self._slots:
                slot.wipe()
            if not self._on_device:
                _wipe(self._y)
        self._context.finish()


def decrypt(reply: BytesLike | Iterable[BytesLike], secret: DeviceSecret, on_device: bool = False) -> Any:
    """Decrypt a reply on the device where its request was made. Uses up the secret.

    Args:
        reply: the whole reply, or an iterable of its blocks, which are decrypted as they arrive.
        secret: from the `encrypt` that made the request.
        on_device: return an array of the device, of the current stream; ``torch.from_dlpack`` takes it as it lies.

    Returns:
        float32 (tokens, d_out) forward, (tokens, d_in) backward; a NumPy array unless ``on_device``.

    Raises:
        MessageError, SecretError, InputError: as `privtuner.linear.decrypt`.
        EngineError: the device's memory does not suffice.
    """
    if not isinstance(secret, DeviceSecret):
        raise InputError(f"secret is of type {type(secret).__name__}: expected the DeviceSecret that encrypt returned")
    decryption = Decryption(secret, on_device)
    try:
        for block in [reply] if isinstance(reply, (bytes, bytearray, memoryview)) else reply:
            decryption.feed(block)
        return decryption.finish()
    finally:
        decryption.close()


def decrypt_words(data: Any, mask: Any, secret: DeviceSecret) -> Any:
    """Decrypt a whole reply that lies on the device, as `apply` returned it. Uses up the secret.

    Args:
        data: uint8 (outputs, tokens * reply bytes).
        mask: (outputs, N) words.
        secret: from `encrypt_words`.

    Returns:
        float32 (tokens, outputs), a device array.

    Raises:
        SecretError: the secret was used or wiped.
        InputError: an array of another shape or dtype.
    """
    ring, device = secret._ring, secret._context.device
    outputs = _features(secret._public, secret._direction)[1]
    for name, array, shape, dtype in (
        ("data", data, (outputs, secret._tokens * ring.reply_bytes), np.dtype(np.uint8)),
        ("mask", mask, (outputs, ring.n), ring.dtype),
    ):
        if array.shape != shape or array.dtype != dtype:
            raise InputError(f"{name} is {array.dtype} {tuple(array.shape)}; it must be {dtype} {shape}")
    with secret._lock, device.active():
        secret._require_unused()
        y = device.empty((secret._tokens, outputs), np.float32, "a decrypted reply")
        slot = _Slot(secret._context, 0)
        for _, first, rows in _pieces(outputs, _most_rows(device, ring, secret._tokens)):
            part = slice(first, first + rows)
            _reveal(secret, slot, data[part].view(ring.reply_dtype), mask[part], y, first)
        slot.wipe()
        secret._erase()
    return y


def _most_rows(device: Device, ring: _Ring, tokens: int) -> int:
    """Rows of a piece that is decrypted: what fits into a lane's memory."""
    row = (ring.groups(tokens) + 1) * ring.n * ring.word_bytes + tokens * ring.reply_bytes
    return max(1, min(_WORK_BYTES, device.free_bytes() // 4) // row)


def _reveal(secret: DeviceSecret, slot: _Slot, reply: Any, mask: Any, y: Any, first: int) -> None:
    """Columns of y, (tokens, outputs), from ``first`` on: of rows of a reply and of the product of the mask."""
    ring, rows = secret._ring, int(mask.shape[0])
    shape = (ring.groups(secret._tokens), rows, ring.n)
    product = slot.array("product", int(np.prod(shape)), ring.dtype, "products with secrets").reshape(shape)
    ring.multiply_masks(mask, secret._factors, product)
    ring.launch(
        "reveal",
        _tiles(secret._tokens, rows),
        y,
        reply,
        product,
        secret._weight,
        secret._inverse_scales,
        ring.q,
        ring.dropped_bits,
        ring.n,
        secret._tokens,
        int(y.shape[1]),
        first,
        rows,
        shared=_TILE_BYTES,
    )


def _tiles(tokens: int, rows: int) -> tuple[int, int]:
    return -(-tokens // _TILE_TOKENS), -(-rows // _TILE_ROWS)


def _checked(direction: Direction) -> Direction:
    if direction not in ("forward", "backward"):
        raise InputError(f"direction {direction!r}: choose 'forward' or 'backward'")
    return direction


def _checked_shape(x: Any, public: Public, direction: Direction) -> None:
    """As `privtuner.linear.as_batch`, of a device array."""
    features, _ = _features(public, _checked(direction))
    if x.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"x has dtype {x.dtype}: expected float16, float32 or float64")
    if x.ndim != 2 or x.shape[1] != features or x.shape[0] == 0:
        raise InputError(
            f"x has shape {tuple(x.shape)}: expected (tokens, {features}) with at least one token ({direction} "
            "direction)"
        )
    if x.shape[0] > _MAX_TOKENS:
        raise InputError(f"x has {x.shape[0]} tokens: a request carries 1 to {_MAX_TOKENS}")


def _batch(device: Device, x: Any, public: Public, direction: Direction) -> tuple[Any, bool]:
    """Return x on the device, float32 and contiguous, and whether that is a copy made here."""
    place = x.__dlpack_device__() if hasattr(x, "__dlpack_device__") else (1, 0)
    if place[0] not in (2, 13):  # DLPack's numbers of CUDA's memory, plain and managed; everything else is the host's
        batch = linear.as_batch(x, public, direction)
        _checked_shape(batch, public, direction)
        return device.upload(batch, "a batch"), True
    if place[0] == 2 and f"cuda:{int(place[1])}" != device.name:
        raise InputError(f"x lies on cuda:{int(place[1])} and is to be encrypted on {device.name}: move it there")
    given = device.xp.from_dlpack(x)
    _checked_shape(given, public, direction)
    if given.dtype == np.float64:
        _require_finite(device, "x", given)
        with np.errstate(over="ignore"):  # an overflow is found just below and named
            narrow = device.xp.ascontiguousarray(given, dtype=np.float32)
        _require_finite(device, "x (as float32)", narrow)
        return narrow, True
    batch = device.xp.ascontiguousarray(given, dtype=np.float32)
    return batch, not (given.dtype == np.float32 and given.flags.c_contiguous)


def _require_finite(device: Device, name: str, values: Any) -> None:
    finite = device.download(device.xp.isfinite(values))
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        value = device.download(values[place[0]])[place[1]]
        raise InputError(f"{name}{list(place)} is {value}: every value must be finite")


def _refuse(device: Device, x: Any, token: int) -> None:
    """Name the first value of a token that is not finite, as the C++ core does."""
    row = device.download(x[token])
    feature = int(np.isfinite(row).argmin())
    kind = "NaN" if np.isnan(row[feature]) else "infinite"
    raise InputError(f"x[{token}, {feature}] is {kind}: every value must be finite")

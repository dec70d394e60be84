"""The model owner's half on a device: weights that stay there, products of several requests, replies block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner import _core, linear
from privtuner.copies import Stays
from privtuner.cuda import gemm
from privtuner.cuda.device import Device
from privtuner.cuda.linear import lanes
from privtuner.cuda.linear.lanes import (
    THREADS,
    Slot,
    context_of,
    lane_rows,
    message_of,
    page_locked_view,
    pieces,
)
from privtuner.errors import InputError, MessageError
from privtuner.linear import BytesLike, Direction, QuantisedWeight

__all__ = [
    "DeviceLayer",
    "Opened",
    "Product",
    "answer",
    "apply",
    "apply_blocks",
    "apply_many",
    "gather",
    "open_request",
]

_PRODUCT_TILE = 128  # rows, and about the columns, that a block of threads of a product has
_TILES_EACH = 4  # of these for every multiprocessor, to keep it busy


class DeviceLayer(Stays):
    """A prepared weight on a device, one or two bytes a weight, which stays there.

    Args:
        device: where to.
        prepared: from `privtuner.linear.prepare`.

    Attributes:
        device: as given.
        spec: the layer's description.
        nbytes: device memory it takes.

    Raises:
        EngineError: the device's memory does not suffice.
    """

    stays = "a layer on a GPU cannot be pickled: pickle the Prepared it was made of, and copy that in the other process"

    def __init__(self, device: Device, prepared: QuantisedWeight) -> None:
        self.device = device
        self.spec = prepared.spec
        self._context = context_of(device)
        self._ring = self._context.ring(self.spec.preset)
        with self._context.lane(0):
            self._weights = gemm.Weights(device, prepared.quantised())
        self._context.lanes[0].synchronize()  # whatever stream uses them first finds them there
        self.nbytes = int(self._weights.nbytes)

    def __repr__(self) -> str:
        return f"DeviceLayer({self.spec!r} on {self.device.name}, {self.nbytes} bytes)"


class Product:
    """Requests of one layer and direction side by side, packed for one product that is taken row range by row range.

    Args:
        layer: the layer.
        direction: "forward" or "backward".
        requests: the number of tokens of each, and the 32 bytes of its mask seed, or None where it wants no product
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
        depth, self.rows_out = layer.spec.features(direction)
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
        step = max(1, lanes.WORK_BYTES // (ring.n * ring.word_bytes))
        for _, first, rows in pieces(out.shape[0], step):
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
        if begin % _core.ROW_STEP != 0 or begin < 0 or count < 1 or begin + count > self.rows_out:
            raise InputError(
                f"rows [{begin}, {begin + count}) must start at a multiple of {_core.ROW_STEP} and end by "
                f"{self.rows_out}"
            )
        product = gemm.multiply(layer._weights, self._transpose, self._packed, [ring.q], begin, count)
        replies = []
        for (column, tokens), mask in zip(self._data, self._masks, strict=True):
            kept = device.empty((count, tokens * ring.reply_bytes), np.uint8, "a reply")
            blocks = -(-tokens // THREADS)
            ring.launch(
                "shorten",
                (blocks * count,),
                kept,
                product,
                ring.dropped_bits,
                ring.reply_bytes,
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
        requests: the words of each, a device array (features in, tokens) of uint32 (linear-w8) or uint64 (linear-w16),
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
    depth, _ = layer.spec.features(direction)
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
        body: the words as they stand in the message.
    """

    direction: Direction
    tokens: int
    features: int
    request: bytes
    seed: bytes
    mask_wanted: bool
    body: npt.NDArray[np.uint8]


def open_request(layer: DeviceLayer, request: BytesLike) -> Opened:
    """Check a request to a layer. Does not wait for the device.

    A request that lies in page-locked memory, as of `encrypt` or `gather`, is read where it lies; another one is copied
    to such memory while it is checked.

    Args:
        layer: the layer.
        request: bytes from an ``encrypt``; in page-locked memory they must stay as they are while the result is in use.

    Raises:
        MessageError: malformed, truncated, corrupted, a word is not below q, or meant for another layer.
        EngineError: the host has no page-locked memory left.
    """
    spec, copy = layer.spec, None
    memory = page_locked_view(request)
    if memory is None:
        with layer.device.active():
            memory = copy = layer.device.page_locked(len(request))
    header = _core.linear_open_request(spec.preset, request, copy)
    if header["layer"] != spec.id:
        raise MessageError("request: meant for another layer, or other weights of this one")
    direction: Direction = header["direction"]
    wanted, _ = spec.features(direction)
    if header["features"] != wanted:
        raise MessageError(
            f"request: {header['features']} features, this layer takes {wanted} in the {direction} direction"
        )
    body = memory[_core.LINEAR_REQUEST_PREFIX :]
    return Opened(direction, header["tokens"], wanted, header["request"], header["seed"], header["mask_wanted"], body)


def gather(device: Device, parts: Sequence[BytesLike]) -> memoryview:
    """A message from its parts, in page-locked memory: where `open_request` reads it without another copy.

    Raises:
        EngineError: the host has no page-locked memory left.
    """
    with device.active():
        memory = device.page_locked(sum(len(part) for part in parts))
    at = 0
    for part in parts:
        memory[at : at + len(part)] = np.frombuffer(part, np.uint8)
        at += len(part)
    return message_of(memory)


def apply_blocks(layer: DeviceLayer, request: BytesLike, block_rows: int = 256) -> Iterator[memoryview]:
    """Answer a request on the device; as `privtuner.linear.apply_blocks`, with the same arguments, bytes and errors.

    The blocks are read-only views of page-locked memory, which is used again when they are gone.

    Raises:
        MessageError: the request is malformed, truncated, corrupted, or meant for another layer.
        InputError: ``block_rows`` is not positive.
        EngineError: the device's memory does not suffice; raised while iterating.
    """
    blocks = answer(layer, [open_request(layer, request)], block_rows)
    return (block for (block,) in blocks)


def answer(layer: DeviceLayer, requests: Sequence[Opened], block_rows: int = 256) -> Iterator[list[memoryview]]:
    """Answer several requests of one direction to one layer together.

    Args:
        layer: the layer.
        requests: from `open_request`, at least one.
        block_rows: outputs a block, rounded up to a multiple of 32.

    Returns:
        An iterator over lists: the next block of every reply, as of `apply_blocks`.

    Raises:
        InputError: ``block_rows`` is not positive, or the directions differ.
        EngineError: the device's memory does not suffice; raised while iterating.
    """
    step = linear.row_step(block_rows)
    if len({request.direction for request in requests}) != 1:
        raise InputError("requests of both directions, or none: one product serves one direction")
    return _answer(layer, requests, step)


def _answer(layer: DeviceLayer, requests: Sequence[Opened], step: int) -> Iterator[list[memoryview]]:
    context, ring = layer._context, layer._ring
    pending: _Strip | None = None
    try:
        with context.lane(0):
            product = _load(layer, requests)
        context.fork()
        # Several blocks at once: a few tiles for every multiprocessor, in no more memory than a lane has.
        tall = _TILES_EACH * layer.device.multiprocessors * _PRODUCT_TILE**2 // product.columns
        whole = math.lcm(step, _PRODUCT_TILE)  # blocks that fill whole tiles
        most = lane_rows(layer.device, 2 * product.columns * ring.word_bytes, -(-product.rows_out // whole) * whole)
        height = min(tall, most) // whole * whole or step * max(1, min(tall, most) // step)
        for number, begin, count in pieces(product.rows_out, height):
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
    """Some blocks of the replies, computed in one lane and on their way to page-locked memory."""

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
        for _, first, rows in pieces(count, step):
            messages = []
            for request, (data, mask) in zip(requests, self._results, strict=True):
                messages.append(self._copy(request, data, mask, slice(first, first + rows)))
            self._messages.append((begin + first, rows, messages))

    def _copy(self, request: Opened, data: Any, mask: Any, rows: slice) -> npt.NDArray[np.uint8]:
        device, preset = self._layer.device, self._layer.spec.preset
        count = rows.stop - rows.start
        size = _core.linear_block_bytes(preset, count, request.tokens, request.mask_wanted)
        message = device.page_locked(size)
        body = message[_core.LINEAR_BLOCK_PREFIX :]
        data_bytes = count * data.shape[1]
        device.copy_out(data[rows], body[:data_bytes])
        if mask is not None:
            device.copy_out(mask[rows], body[data_bytes:])
        return message

    def blocks(self) -> Iterator[list[memoryview]]:
        """The next block of each reply, sealed."""
        spec, first = self._layer.spec, self._requests[0]
        self._layer._context.lanes[self._lane].synchronize()
        unsealed = [
            (message, request.request, request.tokens, begin, rows, request.mask_wanted)
            for begin, rows, messages in self._messages
            for request, message in zip(self._requests, messages, strict=True)
        ]
        outputs = spec.features(first.direction)[1]
        _core.linear_seal_blocks(spec.preset, first.direction, spec.id, outputs, unsealed)
        del unsealed
        while self._messages:  # not to hold on to those that were taken
            yield [message_of(message) for message in self._messages.pop(0)[2]]


def _load(layer: DeviceLayer, requests: Sequence[Opened]) -> Product:
    """Return the product of requests in host memory, to be kept until both lanes are done.

    The requests are copied while the masks are expanded.
    """
    context, ring = layer._context, layer._ring

    def fill(places: list[Any]) -> None:
        context.fork()  # the places are memory of the even lane
        slots = [Slot(context), Slot(context)]
        turn = 1  # the even lane is busy with the masks
        for place, request in zip(places, requests, strict=True):
            if place.flags.c_contiguous:  # one request without its mask: it lies there as it is
                with context.lane(turn):
                    layer.device.copy_in(request.body, place)
                continue
            row_bytes = request.tokens * ring.word_bytes
            for _, first, rows in pieces(request.features, max(1, lanes.PIECE_BYTES // row_bytes)):
                slot, piece = slots[turn % 2], request.body[first * row_bytes : (first + rows) * row_bytes]
                with context.lane(turn):
                    place[first : first + rows] = slot.copy_in("words", piece, ring.dtype).reshape(rows, request.tokens)
                turn += 1
        context.join()

    requested = [(request.tokens, request.seed if request.mask_wanted else None) for request in requests]
    return Product(layer, requests[0].direction, requested, fill)

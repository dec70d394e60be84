"""The data owner's decryption on a device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner.cuda.device import Device
from privtuner.cuda.linear import lanes
from privtuner.cuda.linear.lanes import (
    TILE_BYTES,
    Ring,
    Slot,
    lane_rows,
    page_locked_view,
    pieces,
    tiles,
    wipe,
)
from privtuner.cuda.linear.secret import DeviceOneTimeKey
from privtuner.errors import EngineError, InputError
from privtuner.linear import BytesLike

__all__ = ["Decryption", "decrypt", "decrypt_words"]


class Decryption:
    """Decrypts a reply block by block; see `decrypt`. ``close`` it whatever happened."""

    def __init__(self, secret: DeviceOneTimeKey, on_device: bool = False) -> None:
        self._secret, self._context, self._ring = secret, secret._context, secret._ring
        self._reply = secret._reply
        device, ring = self._context.device, self._ring
        tokens, outputs = self._reply.tokens, self._reply.features_out
        self._turn = 0
        self._slots = [Slot(self._context), Slot(self._context)]
        self._sources: list[npt.NDArray[np.uint8]] = []  # of copies that may be on their way
        self._on_device = on_device
        if on_device:
            # Memory of the caller's stream, as others may read it long after: what that did before comes first.
            with device.active():
                self._y = device.empty((tokens, outputs), np.float32, "a decrypted reply")
                self._context.lanes[0].wait()
        with self._context.lane(0):
            if not on_device:
                self._y = device.empty((tokens, outputs), np.float32, "a decrypted reply")
            self._filling = _reserve_product(secret)
        piece = ring.n * ring.word_bytes + tokens * ring.reply_bytes
        self._step = max(1, min(lanes.PIECE_BYTES // piece, _most_rows(device, ring, tokens, outputs)))
        self._context.fork()
        with secret._lock:
            self._reply.begin()

    def feed(self, block: BytesLike) -> None:
        """One or more whole blocks; see `decrypt` for what is raised."""
        secret = self._secret
        with secret._lock:
            try:
                self._read(block)
            except BaseException:
                secret._erase()
                raise
            if self._reply.complete and secret._factors is not None:
                secret._erase()  # in the even lane, after what the odd one did
                if self._filling is not None and secret._masks is not None:
                    self._context.fork()  # whoever finds the product finds it whole in both lanes
                    place = self._context.device.name
                    secret._masks._core.insert(secret._spec._core, self._reply.direction, place, self._filling)

    def _keep(self, source: npt.NDArray[np.uint8]) -> None:
        """Hold on to a block until it is copied, and never to many of them."""
        if sum(kept.nbytes for kept in self._sources) >= 2 * lanes.PIECE_BYTES:
            self._context.join()
            self._context.finish()
            self._sources.clear()
            self._context.fork()
        self._sources.append(source)

    def _read(self, block: BytesLike) -> None:
        data, memory = memoryview(block), page_locked_view(block)
        copied = memory is None
        if memory is None:
            with self._context.device.active():
                memory = self._context.device.page_locked(len(data))
        while len(data) > 0:
            rows = self._reply.next(data, memory if copied else None)
            self._keep(memory[: rows.size])
            self._decrypt_rows(rows.first, rows.count, memory[rows.data], memory[rows.mask])
            self._reply.taken(rows)
            data, memory = data[rows.size :], memory[rows.size :]

    def _decrypt_rows(self, first: int, count: int, data: npt.NDArray[np.uint8], masks: npt.NDArray[np.uint8]) -> None:
        """Decrypt ``count`` rows from ``first`` on, with their mask products where these were not known before."""
        secret, ring = self._secret, self._ring
        data_bytes, mask_bytes = data.size // count, ring.n * ring.word_bytes
        for _, begin, rows in pieces(count, self._step):
            slot, at, lane = self._slots[self._turn % 2], first + begin, self._turn
            with self._context.lane(lane):
                reply = slot.copy_in("data", data[begin * data_bytes : (begin + rows) * data_bytes], data.dtype)
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
        self._reply.finish()
        if self._on_device:
            return self._y
        self._context.join()
        with self._context.lane(0):
            return self._context.device.download(self._y)

    def close(self) -> None:
        """Overwrite what is secret, the secret included, and wait for all copies: then the result is there."""
        self._secret.wipe()
        self._context.join()
        with self._context.lane(0):
            for slot in self._slots:
                slot.wipe()
            if not (self._on_device and self._reply.complete):
                wipe(self._y)
        self._context.finish()


def decrypt(reply: BytesLike | Iterable[BytesLike], secret: DeviceOneTimeKey, on_device: bool = False) -> Any:
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
    if not isinstance(secret, DeviceOneTimeKey):
        raise InputError(
            f"secret is of type {type(secret).__name__}: expected the DeviceOneTimeKey that encrypt returned"
        )
    decryption = Decryption(secret, on_device)
    try:
        for block in [reply] if isinstance(reply, (bytes, bytearray, memoryview)) else reply:
            decryption.feed(block)
        return decryption.finish()
    finally:
        decryption.close()


def decrypt_words(data: Any, mask: Any, secret: DeviceOneTimeKey) -> Any:
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
    tokens, outputs = secret.tokens, secret._reply.features_out
    for name, array, shape, dtype in (
        ("data", data, (outputs, tokens * ring.reply_bytes), np.dtype(np.uint8)),
        ("mask", mask, (outputs, ring.n), ring.dtype),
    ):
        if array.shape != shape or array.dtype != dtype:
            raise InputError(f"{name} is {array.dtype} {tuple(array.shape)}; it must be {dtype} {shape}")
    with secret._lock, device.active():
        y = device.empty((tokens, outputs), np.float32, "a decrypted reply")
        slot = Slot(secret._context)
        secret._reply.begin()
        try:
            for _, first, rows in pieces(outputs, _most_rows(device, ring, tokens, outputs)):
                part = slice(first, first + rows)
                _reveal(secret, slot, data[part], mask[part], y, first)
        finally:
            slot.wipe()
            secret._erase()
    return y


def _most_rows(device: Device, ring: Ring, tokens: int, outputs: int) -> int:
    """Rows that are decrypted at once: what fits into a lane's memory."""
    row = (ring.groups(tokens) + 1) * ring.n * ring.word_bytes + tokens * ring.reply_bytes
    return lane_rows(device, row, outputs)


def _reserve_product(secret: DeviceOneTimeKey) -> Any:
    """Space for the product of the mask on its way to the cache; None where none is wanted, or none is left."""
    reply, ring, device = secret._reply, secret._ring, secret._context.device
    if secret._masks is None or reply.mask_known or not secret._masks._core.fits(secret._spec._core, reply.direction):
        return None
    if reply.features_out * ring.n * ring.word_bytes > device.free_bytes() // 2:  # work needs memory, too
        return None
    try:
        return device.empty((reply.features_out, ring.n), ring.dtype, "a mask product")
    except EngineError:
        return None


def _reveal(secret: DeviceOneTimeKey, slot: Slot, reply: Any, mask: Any, y: Any, first: int) -> None:
    """Write the columns of y (tokens, outputs) from ``first`` on: from rows of a reply and of the mask's product."""
    ring, tokens, rows = secret._ring, secret.tokens, int(mask.shape[0])
    shape = (ring.groups(tokens), rows, ring.n)
    product = slot.array("product", int(np.prod(shape)), ring.dtype, "products with secrets").reshape(shape)
    ring.multiply_masks(mask, secret._factors, product)
    ring.launch(
        "reveal",
        tiles(tokens, rows),
        y,
        reply,
        product,
        secret._weight,
        secret._inverse_scales,
        ring.q,
        ring.dropped_bits,
        ring.reply_bytes,
        ring.n,
        tokens,
        int(y.shape[1]),
        first,
        rows,
        shared=TILE_BYTES,
    )

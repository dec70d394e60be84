"""Products of public masks, kept by the data owner in device memory."""

from __future__ import annotations

import secrets
import threading
from typing import Any

from ...copies import Stays
from ...errors import EngineError, InputError
from ..device import Device

__all__ = ["DeviceMasks"]

_Id = bytes  # of a layer; the class has a property of the type's name


class DeviceMasks(Stays):
    """`privtuner.linear.MaskCache` in device memory: the products of one public mask with the layers it met.

    Args:
        device: where they are kept.
        max_bytes: largest total size; None for what the device has, less what work needs.

    Raises:
        InputError: ``max_bytes`` is negative.
    """

    stays = "mask products on a GPU cannot be pickled: the other process makes its own DeviceMasks"

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

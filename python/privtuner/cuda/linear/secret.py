"""What decrypts one reply, in device memory."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from privtuner import _core
from privtuner.cuda.linear.lanes import Context, Ring, wipe
from privtuner.linear import Direction, LayerSpec, MaskCache

__all__ = ["DeviceOneTimeKey"]


class DeviceOneTimeKey:
    """What decrypts the reply to one request. Never copied or pickled; wiped when its decryption ends or by `wipe`."""

    __slots__ = (
        "_context",
        "_factors",
        "_in_lanes",
        "_inverse_scales",
        "_lock",
        "_mask",
        "_masks",
        "_reply",
        "_ring",
        "_spec",
        "_weight",
    )
    _context: Context
    _ring: Ring
    _spec: LayerSpec
    _reply: _core.Reply  # what it decrypts, and whether it may still
    _in_lanes: bool  # where its work is; else in the caller's stream
    _lock: threading.Lock  # held by a decryption at work, and by wipe
    _factors: Any  # two arrays, prepared, of every group; None once wiped
    _inverse_scales: Any  # 1 / Delta_t, (tokens,)
    _weight: Any  # of every output
    _masks: MaskCache | None
    _mask: Any  # the product of the mask, where it was known before the request

    def __init__(self) -> None:
        raise TypeError("No constructor defined: encrypt makes secrets")

    @classmethod
    def _of(
        cls,
        context: Context,
        spec: LayerSpec,
        direction: Direction,
        tokens: int,
        request: bytes,
        masks: MaskCache | None,
        in_lanes: bool,
    ) -> DeviceOneTimeKey:
        secret = cls.__new__(cls)
        secret._lock, secret._in_lanes = threading.Lock(), in_lanes
        secret._context, secret._ring = context, context.ring(spec.preset)
        secret._spec, secret._masks = spec, masks
        secret._factors = secret._inverse_scales = secret._weight = None
        secret._mask = None if masks is None else masks._core.find(spec._core, direction, context.device.name)
        secret._reply = _core.Reply(spec._core, direction, tokens, request, secret._mask is not None)
        return secret

    @property
    def used(self) -> bool:
        """Whether it was used or wiped."""
        return self._reply.used

    @property
    def tokens(self) -> int:
        """Number of tokens in the request."""
        return self._reply.tokens

    def wipe(self) -> None:
        """Overwrite it with zeros. Waits for a decryption that is running in another thread."""
        with self._lock:
            self._erase()

    def _erase(self) -> None:
        self._reply.end()
        arrays = [array for array in (*(self._factors or ()), self._inverse_scales) if array is not None]
        self._factors = self._inverse_scales = self._mask = None
        if not arrays:
            return
        if self._in_lanes:
            self._context.join()
        with self._context.lane(0) if self._in_lanes else self._context.device.active():
            wipe(*arrays)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the driver may be gone when the interpreter ends, and memory with it
            self._erase()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._reply.__reduce_ex__(protocol)  # refuses

    def __repr__(self) -> str:
        return f"<privtuner.cuda.linear.DeviceOneTimeKey of {self._reply.describe()}>"

"""What decrypts one reply, in device memory."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from ...errors import SecretError
from ...linear import Direction, Public
from .lanes import Context, Ring, features_of, wipe
from .masks import DeviceMasks

__all__ = ["DeviceSecret"]

_USED = "this secret was used already: a secret decrypts one reply; encrypt again for another"


class DeviceSecret:
    """What decrypts the reply to one request. Never copied or pickled; wiped when its decryption ends or by `wipe`."""

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
    _context: Context
    _ring: Ring
    _public: Public
    _direction: Direction
    _tokens: int
    _request: bytes
    _in_lanes: bool  # where its work is; else in the caller's stream
    _lock: threading.Lock  # held by a decryption at work, and by wipe
    _used: bool  # a decryption has begun, or it was wiped
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
        context: Context,
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
            rows = features_of(public, direction)[1]
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

    def _unwiped(self) -> tuple[Any, Any]:
        """The prepared factors of every group."""
        if self._factors is None:
            raise SecretError(_USED)
        return self._factors

    def _take(self) -> None:
        """For the one decryption there is, which erases it in the end. Under the lock."""
        if self._used:
            raise SecretError(_USED)
        self._used = True

    def _erase(self) -> None:
        self._used = True
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
        raise SecretError("a secret is never copied or pickled: it serves one decryption in this process")

    def __repr__(self) -> str:
        used = ", used" if self._used else ""
        return f"<privtuner.cuda.linear.DeviceSecret of one {self._direction} request, {self._tokens} tokens{used}>"

"""Small files that a server reads again when they change, so that a certificate or a tenant needs no restart."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from privtuner.errors import InputError

__all__ = ["Reread", "read_small"]

_log = logging.getLogger(__name__)
_LARGEST = 16 << 20
Value = TypeVar("Value")


class Reread(Generic[Value]):
    """What files hold, as of their last state that could be used.

    Args:
        files: which.
        load: reads and checks them.
        what: they are, for the log.

    Attributes:
        value: what ``load`` returned last.

    Raises:
        privtuner.errors.InputError: ``load`` did, at the first time.
    """

    def __init__(self, files: Sequence[Path], load: Callable[[], Value], what: str) -> None:
        self._files, self._load, self._what = tuple(files), load, what
        self._lock = threading.Lock()
        # Before they are read: what changes meanwhile is noticed the next time.
        self._seen = self._state()
        self.value = load()

    def poll(self) -> Value | None:
        """Return what the files hold, if that is new and can be used; what cannot is logged, and the old one stays."""
        with self._lock:
            state = self._state()
            if state == self._seen:
                return None
            self._seen = state
            try:
                self.value = self._load()
            except InputError as error:
                _log.warning("the %s stays as it was: %s", self._what, error)
                return None
        _log.info("read a new %s", self._what)
        return self.value

    def _state(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_state, self._files))


def read_small(path: Path) -> bytes:
    """Return what a file of certificates, tokens or names holds.

    Raises:
        privtuner.errors.InputError: it cannot be read, is empty, or is far too long for that.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({os.strerror(error.errno or 0)}); check name and permissions"
        ) from None
    if not content or len(content) > _LARGEST:
        raise InputError(f"{path} is {'empty' if not content else 'too long for what it should be'}; give another file")
    return content


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns

"""Deadlines by progress: what waits for the other side without anything moving is ended."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Watch", "Watchdog"]

_LINGER_SECONDS = 10.0


class Watchdog:
    """Ends waits that see no progress, by one thread for all of them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: dict[Watch, float] = {}
        self._wakes = math.inf
        self._running = False

    def watch(self, seconds: float, cancel: Callable[[], object]) -> Watch:
        """Return what calls ``cancel``, once, when a wait sees no progress for ``seconds``."""
        return Watch(self, seconds, cancel)

    def _run(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                late = [watch for watch, end in self._ends.items() if end <= now]
                for watch in late:
                    del self._ends[watch]
                    watch.expired = True
                if not late:
                    self._wakes = min(self._ends.values(), default=now + _LINGER_SECONDS)
                    self._changed.wait(self._wakes - now)
                    if not self._ends and time.monotonic() >= self._wakes:
                        self._running = False
                        return
            for watch in late:
                watch._cancel()


class Watch:
    """The waits of one call.

    Attributes:
        seconds: without progress, that end a wait.
        expired: whether that happened.
    """

    def __init__(self, dog: Watchdog, seconds: float, cancel: Callable[[], object]) -> None:
        self._dog, self.seconds, self._cancel, self.expired = dog, seconds, cancel, False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that the other side is waited for while the block runs."""
        dog = self._dog
        with dog._changed:
            end = dog._ends[self] = time.monotonic() + self.seconds
            if not dog._running:
                dog._running = True
                threading.Thread(target=dog._run, name="privtuner-watchdog", daemon=True).start()
            elif end < dog._wakes:
                dog._changed.notify()
        try:
            yield
        finally:
            with dog._changed:
                dog._ends.pop(self, None)

    def moved(self) -> None:
        """Say that something moved, as another thread sees it."""
        with self._dog._changed:
            if self in self._dog._ends:
                self._dog._ends[self] = time.monotonic() + self.seconds

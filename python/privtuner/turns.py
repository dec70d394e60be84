"""Turns to compute: whoever computed least goes first, however many it asks for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Turn", "Turns"]

_CHECK_SECONDS = 0.5
_NAMES = 1000


class Turns:
    """The right to compute, for so many at a time, shared fairly among tenants.

    Each tenant has a clock that runs while it computes, and the turn goes to the waiting one whose clock is least
    behind: equal shares of time, whatever single turns take (start-time fair queueing: P. Goyal, H. M. Vin, H. Cheng,
    SIGCOMM 1996). A tenant that comes, or comes back, starts where the turns are now, so that pauses save nothing up.

    Args:
        width: how many compute at a time.
    """

    def __init__(self, width: int = 1) -> None:
        self._changed = threading.Condition()
        self._free = width
        self._clocks: dict[str, float] = {}
        self._now = 0.0  # the clock of the tenant that was served last
        self._waiting: list[Turn] = []
        self._serving: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def turn(self, tenant: str, check: Callable[[], object] = lambda: None) -> Iterator[Turn]:
        """Wait for a turn, and hold it while the block runs.

        Args:
            tenant: whose.
            check: called every half second while it waits; what it raises ends that.
        """
        turn = Turn(self, tenant, check)
        turn._begin()
        try:
            yield turn
        finally:
            turn._end()


class Turn:
    """One holder's turn."""

    def __init__(self, turns: Turns, tenant: str, check: Callable[[], object]) -> None:
        self._turns, self._tenant, self._check = turns, tenant, check
        self._start = 0.0
        self._holds = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Give the turn up while the block waits for somebody else, and wait for another one after it."""
        self._end()
        yield
        self._begin()

    def _begin(self) -> None:
        turns = self._turns
        with turns._changed:
            if self._tenant not in turns._serving and all(one._tenant != self._tenant for one in turns._waiting):
                turns._clocks[self._tenant] = max(turns._clocks.get(self._tenant, 0.0), turns._now)
            turns._waiting.append(self)
            try:
                while not self._is_next():
                    turns._changed.wait(_CHECK_SECONDS)
                    self._check()
            finally:
                turns._waiting.remove(self)
                turns._changed.notify_all()
            turns._free -= 1
            turns._now = turns._clocks[self._tenant]
            turns._serving[self._tenant] = turns._serving.get(self._tenant, 0) + 1
            self._holds = True
        self._start = time.perf_counter()

    def _is_next(self) -> bool:
        turns = self._turns
        return turns._free > 0 and min(turns._waiting, key=lambda one: turns._clocks[one._tenant]) is self

    def _end(self) -> None:
        if not self._holds:
            return
        turns, self._holds = self._turns, False
        with turns._changed:
            turns._free += 1
            turns._clocks[self._tenant] += time.perf_counter() - self._start
            turns._serving[self._tenant] -= 1
            if not turns._serving[self._tenant]:
                del turns._serving[self._tenant]
            # Clocks behind the present are as good as none, and strangers' names must not pile up.
            active = {one._tenant for one in turns._waiting} | set(turns._serving)
            ahead = {name for name, clock in turns._clocks.items() if clock > turns._now}
            kept = active if len(active | ahead) > _NAMES else active | ahead
            turns._clocks = {name: clock for name, clock in turns._clocks.items() if name in kept}
            turns._changed.notify_all()

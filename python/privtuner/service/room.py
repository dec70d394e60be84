"""Room for what calls hold for a while, such as memory, in shares that leave some for whoever comes next."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from privtuner.service.refusal import busy

__all__ = ["Room"]


class _Waiter(NamedTuple):
    tenant: str
    units: int
    most: int


class Room:
    """So many units that calls hold for a while.

    A tenant may hold no more than stays free beside it: alone half of all, beside k others that take what they can a
    (k + 2)th, and as much is free for whoever comes next. (Dynamic thresholds: A. K. Choudhury, E. L. Hahne, IEEE/ACM
    Transactions on Networking 6, 1998.) Those who wait are served in their order, but for tenants that have no share
    left; and nobody overtakes a tenant that holds nothing.

    Args:
        total: all units there are.
        what: what they are, for refusals.
    """

    def __init__(self, total: int, what: str) -> None:
        self.total, self._what = total, what
        self._changed = threading.Condition()
        self._free = total
        self._held: dict[str, int] = {}
        self._waiting: list[_Waiter] = []

    @property
    def largest(self) -> int:
        """Units that one call may hold."""
        return self.total // 2

    @property
    def held(self) -> int:
        """Units that are held."""
        with self._changed:
            return self.total - self._free

    def wait_until_empty(self, seconds: float) -> int:
        """Wait until nothing is held, and return how much still is after ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self._free == self.total, seconds)
            return self.total - self._free

    @contextmanager
    def hold(self, tenant: str, units: int, seconds: float = 0.0, most: int | None = None) -> Iterator[None]:
        """Hold ``units``, at most `largest`, while the block runs.

        Args:
            tenant: for whom.
            units: how many.
            seconds: how long to wait for them.
            most: units that this tenant may hold.

        Raises:
            Refusal: there was no room for so long.
        """
        self._take(_Waiter(tenant, units, self.total if most is None else most), seconds)
        try:
            yield
        finally:
            with self._changed:
                self._free += units
                self._held[tenant] -= units
                if not self._held[tenant]:
                    del self._held[tenant]
                self._changed.notify_all()

    def _take(self, waiter: _Waiter, seconds: float) -> None:
        tenant, units, _ = waiter
        with self._changed:
            self._waiting.append(waiter)
            try:
                if not self._changed.wait_for(lambda: self._is_next(waiter), seconds):
                    raise busy(f"the server has no room for more {self._what}")
                self._free -= units
                self._held[tenant] = self._held.get(tenant, 0) + units
            finally:
                self._waiting = [other for other in self._waiting if other is not waiter]
                self._changed.notify_all()

    def _is_next(self, waiter: _Waiter) -> bool:
        for other in self._waiting:
            if other is waiter:
                break
            if other.tenant == waiter.tenant or not self._held.get(other.tenant):
                return False
        held = self._held.get(waiter.tenant, 0) + waiter.units
        return held <= min(waiter.most, self._free - waiter.units)

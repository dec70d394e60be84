"""What one tenant may take of a server: a day's work, and what it holds at a time."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from privtuner.errors import InputError
from privtuner.service.refusal import Refusal

__all__ = ["Ledger", "Quota"]

_DAY = 86400


@dataclass(frozen=True)
class Quota:
    """Limits of one tenant; None: only the share that `privtuner.service.room.Room` leaves it.

    Attributes:
        requests: requests, or tasks of a sealed model, a day (of UTC).
        tokens: tokens in them a day.
        bytes: bytes to and from it a day, of requests, replies, bundles and tasks.
        calls: calls in progress.
        memory: bytes of requests held.
        sessions: sessions of a sealed model, each with its evaluation keys.
        adapters: runs whose encrypted adapters are on the server's disk; the oldest ones give way.
    """

    requests: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    calls: int | None = None
    memory: int | None = None
    sessions: int | None = None
    adapters: int | None = None

    @classmethod
    def parse(cls, entries: Mapping[str, Any]) -> Quota:
        """Read a quota from a table of a file, an entry for each limit.

        Raises:
            InputError: an entry that is no limit, or no whole number from 0 on.
        """
        if not isinstance(entries, Mapping):
            raise InputError(f"limits: a {type(entries).__name__} in place of a table")
        names = [known.name for known in dataclasses.fields(cls)]
        for name, value in entries.items():
            if name not in names:
                raise InputError(f"limits: {name!r} is none; known: {', '.join(names)}")
            if type(value) is not int or value < 0:
                raise InputError(f"limits: {name} = {value!r}; give a whole number, at least 0")
        return cls(**entries)


@dataclass
class _Day:
    """What a tenant took in a day."""

    number: int
    requests: int = 0
    tokens: int = 0
    bytes: int = 0


class Ledger:
    """Counts what tenants took today, against their quotas. Safe to use from several threads.

    It is kept in memory: a server that is started again begins anew.

    Args:
        now: seconds since 1970.
    """

    def __init__(self, now: Any = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._days: dict[str, _Day] = {}

    def charge(self, tenant: str, quota: Quota, *, requests: int = 0, tokens: int = 0, bytes: int = 0) -> None:
        """Count what a tenant asks for, all of it or nothing.

        Raises:
            Refusal: it is more than the quota leaves.
        """
        asked = {"requests": requests, "tokens": tokens, "bytes": bytes}
        with self._lock:
            day = self._today(tenant)
            for name, more in asked.items():
                limit = getattr(quota, name)
                if limit is not None and getattr(day, name) + more > limit:
                    hours = 24 - self._now() % _DAY / 3600
                    raise Refusal(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"the quota of {limit} {name} a day is used up, or this would be beyond it; the next day "
                        f"begins in {hours:.1f} h, or ask the server's operator for more",
                    )
            for name, more in asked.items():
                setattr(day, name, getattr(day, name) + more)

    def spent(self, tenant: str, *, requests: int = 0, tokens: int = 0, bytes: int = 0) -> None:
        """Count what a tenant took, though it may be more than its quota; the next `charge` is refused then."""
        with self._lock:
            day = self._today(tenant)
            day.requests, day.tokens, day.bytes = day.requests + requests, day.tokens + tokens, day.bytes + bytes

    def _today(self, tenant: str) -> _Day:
        number = int(self._now() // _DAY)
        day = self._days.get(tenant)
        if day is None or day.number != number:
            if day is None:  # names of strangers must not pile up
                self._days = {name: old for name, old in self._days.items() if old.number == number}
            day = self._days[tenant] = _Day(number)
        return day

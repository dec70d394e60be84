"""Counts what the encrypted layers send, receive and wait for."""

from __future__ import annotations

import threading
from dataclasses import dataclass

__all__ = ["Traffic", "TrafficMeter"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Sums over encrypted products.

    Attributes:
        requests: products asked for; one for a whole group of layers fed by the same tensor.
        tokens: rows encrypted, summed over requests.
        bytes_up: bytes of all requests.
        bytes_down: bytes of all replies.
        seconds: time from the start of encryption to the end of decryption.
        wait_seconds: the part of ``seconds`` spent waiting for the transport; the rest is the data owner's own work.
    """

    requests: int = 0
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.requests + other.requests,
            self.tokens + other.tokens,
            self.bytes_up + other.bytes_up,
            self.bytes_down + other.bytes_down,
            self.seconds + other.seconds,
            self.wait_seconds + other.wait_seconds,
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.requests - other.requests,
            self.tokens - other.tokens,
            self.bytes_up - other.bytes_up,
            self.bytes_down - other.bytes_down,
            self.seconds - other.seconds,
            self.wait_seconds - other.wait_seconds,
        )


class TrafficMeter:
    """Traffic of one model by layer and direction. Safe to use from several threads.

    What one training step moved is the difference of two totals::

        before = meter.total()
        trainer_step()
        print((meter.total() - before).bytes_up)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], Traffic] = {}

    def __getstate__(self) -> dict[tuple[str, str], Traffic]:
        return self.snapshot()

    def __setstate__(self, counts: dict[tuple[str, str], Traffic]) -> None:
        self._lock, self._counts = threading.Lock(), dict(counts)

    def add(self, layer: str, direction: str, traffic: Traffic) -> None:
        """Add ``traffic`` to the count of ``layer`` (wire name) and ``direction`` ("forward" or "backward")."""
        with self._lock:
            key = (layer, direction)
            self._counts[key] = self._counts.get(key, Traffic()) + traffic

    def total(self) -> Traffic:
        """Return the sum over all layers and both directions."""
        return sum(self.snapshot().values(), Traffic())

    def snapshot(self) -> dict[tuple[str, str], Traffic]:
        """Return the counts by (wire name, direction) as they are now."""
        with self._lock:
            return dict(self._counts)

    def reset(self) -> None:
        """Set every count to zero."""
        with self._lock:
            self._counts.clear()

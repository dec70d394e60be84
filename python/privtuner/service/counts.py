"""What a server has seen, in numbers: the whole of what it learns beside ciphertexts."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from privtuner.errors import MessageError
from privtuner.foreign import foreign_entry, foreign_json, foreign_text
from privtuner.sealed.server import TaskCounts
from privtuner.wire import Head

__all__ = ["Counter", "LayerCounts", "ServerCounts"]


@dataclass(slots=True)
class LayerCounts:
    """Answered requests of one layer in one direction.

    Attributes:
        requests: how many were answered in full.
        tokens: rows in them.
        largest: rows of the largest one.
        bytes_in: bytes of the requests.
        bytes_out: bytes of the replies.
        seconds: time from the last byte of a request to the last byte of its reply, summed; of a sealed model's task,
            from its first byte.
        refreshes: ciphertexts that owners refreshed.
    """

    requests: int = 0
    tokens: int = 0
    largest: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    refreshes: int = 0


@dataclass(frozen=True)
class ServerCounts:
    """What a server has seen since it started.

    Attributes:
        layers: (wire name, "forward" or "backward") -> counts; of a sealed model's tasks, ("sealed", the task's name).
        bundles: owner bundles sent.
        refused: requests answered with an error.
    """

    layers: Mapping[tuple[str, str], LayerCounts] = field(default_factory=dict)
    bundles: int = 0
    refused: int = 0

    def total(self) -> LayerCounts:
        """Return the sum over layers and directions; ``largest`` is the largest of all."""
        total = LayerCounts()
        for counts in self.layers.values():
            total.requests += counts.requests
            total.tokens += counts.tokens
            total.largest = max(total.largest, counts.largest)
            total.bytes_in += counts.bytes_in
            total.bytes_out += counts.bytes_out
            total.seconds += counts.seconds
            total.refreshes += counts.refreshes
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "layers": [
                {"layer": layer, "direction": direction, **dataclasses.asdict(counts)}
                for (layer, direction), counts in sorted(self.layers.items())
            ],
            "bundles": self.bundles,
            "refused": self.refused,
        }

    def to_json(self) -> bytes:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict()).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ServerCounts:
        """Return the counts that `to_json` wrote.

        Raises:
            privtuner.errors.MessageError: ``data`` is something else.
        """
        what = "the server's counts"
        entries = foreign_json(data, what)
        layers = {}
        for entry in foreign_entry(entries, "layers", list, what):
            if not isinstance(entry, dict):
                raise MessageError(f"{what}: a layer without entries; use the same version")
            names = [foreign_text(foreign_entry(entry, name, str, what)) for name in ("layer", "direction")]
            counts = LayerCounts()
            for name, none in dataclasses.asdict(counts).items():
                setattr(counts, name, foreign_entry(entry, name, type(none), what))
            layers[names[0], names[1]] = counts
        others = (foreign_entry(entries, name, int, what) for name in ("bundles", "refused"))
        return cls(layers, *others)


class Counter:
    """Adds up `ServerCounts`. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: dict[tuple[str, str], LayerCounts] = {}
        self._bundles = 0
        self._refused = 0

    def count_answer(self, layer: str, head: Head, bytes_in: int, bytes_out: int, seconds: float) -> None:
        """Count one request that was answered in full, by what its head says of it."""
        with self._lock:
            counts = self._layers.setdefault((layer, head.direction), LayerCounts())
            counts.requests += 1
            counts.tokens += head.tokens
            counts.largest = max(counts.largest, head.tokens)
            counts.bytes_in += bytes_in
            counts.bytes_out += bytes_out
            counts.seconds += seconds

    def count_task(self, task: TaskCounts) -> None:
        """Count one task of a sealed model that was done in full."""
        with self._lock:
            counts = self._layers.setdefault(("sealed", task.task), LayerCounts())
            counts.requests += 1
            counts.tokens += task.tokens
            counts.largest = max(counts.largest, task.tokens)
            counts.bytes_in += task.bytes_in
            counts.bytes_out += task.bytes_out
            counts.seconds += task.seconds
            counts.refreshes += task.refreshes

    def count_bundle(self) -> None:
        """Count one bundle sent."""
        with self._lock:
            self._bundles += 1

    def count_refusal(self) -> None:
        """Count one request that was answered with an error."""
        with self._lock:
            self._refused += 1

    def snapshot(self) -> ServerCounts:
        """Return the counts as they are now."""
        with self._lock:
            layers = {key: dataclasses.replace(counts) for key, counts in self._layers.items()}
            return ServerCounts(layers, self._bundles, self._refused)

"""What a server has seen, in numbers: the whole of what it learns beside ciphertexts.

`Counter` is the one place that counts. What clients may ask for, metrics, logs and the audit log are views of it.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from privtuner.errors import MessageError
from privtuner.foreign import foreign_json, foreign_text
from privtuner.sealed.server import TaskCounts
from privtuner.wire import Head

__all__ = [
    "ANONYMOUS",
    "CANCELLED",
    "LATENCIES",
    "OK",
    "Account",
    "Counter",
    "Event",
    "LayerCounts",
    "Load",
    "ServerCounts",
    "View",
]

ANONYMOUS = "anonymous"
"""Tenant of all who need not say who they are."""

_log = logging.getLogger(__name__)

OK, CANCELLED = "OK", "CANCELLED"
"""Outcomes; every other one is a gRPC status code's name as well."""

LATENCIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Seconds: upper ends, included, of the classes of a histogram; the last class has none."""

_CALLERS = 256  # anonymous callers told apart at a time
_NOTHING = (0,) * (len(LATENCIES) + 1)


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
        histogram: how many took up to each of `LATENCIES` seconds and more than the one before, and longer than all.
    """

    requests: int = 0
    tokens: int = 0
    largest: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    refreshes: int = 0
    histogram: tuple[int, ...] = _NOTHING

    def add(self, other: LayerCounts) -> None:
        """Add the counts of other requests; ``largest`` becomes the largest of all."""
        self.requests += other.requests
        self.tokens += other.tokens
        self.largest = max(self.largest, other.largest)
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.seconds += other.seconds
        self.refreshes += other.refreshes
        self.histogram = tuple(map(sum, zip(self.histogram, other.histogram, strict=True)))

    def quantile(self, part: float) -> float:
        """Seconds within which ``part`` (0..1) of the requests were answered, rounded up to one of `LATENCIES`.

        Infinity where it took longer than the last of them; 0 without requests.
        """
        wanted, seen = part * self.requests, 0
        for end, count in zip((*LATENCIES, math.inf), self.histogram, strict=True):
            seen += count
            if seen and seen >= wanted:
                return end
        return 0.0


@dataclass(frozen=True)
class ServerCounts:
    """What a server has seen since it started.

    Attributes:
        layers: (wire name, "forward" or "backward") -> counts; of a sealed model's tasks, ("sealed", the task's name).
        bundles: owner bundles sent.
        refusals: gRPC's name of an error -> calls that ended with it; "CANCELLED" are those that clients gave up.
        tenant: whose calls these are; empty: everybody's.
    """

    layers: Mapping[tuple[str, str], LayerCounts] = field(default_factory=dict)
    bundles: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)
    tenant: str = ""

    @property
    def refused(self) -> int:
        """Calls answered with an error."""
        return sum(count for reason, count in self.refusals.items() if reason != CANCELLED)

    def total(self) -> LayerCounts:
        """Return the sum over layers and directions; ``largest`` is the largest of all."""
        total = LayerCounts()
        for counts in self.layers.values():
            total.add(counts)
        return total

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "tenant": self.tenant,
            "layers": [
                {"layer": layer, "direction": direction, **dataclasses.asdict(counts)}
                for (layer, direction), counts in sorted(self.layers.items())
            ],
            "bundles": self.bundles,
            "refusals": dict(self.refusals),
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
        found = foreign_json(data, "the server's counts")
        try:
            layers = {(_text(entry["layer"]), _text(entry["direction"])): _counts(entry) for entry in found["layers"]}
            refusals = {_text(reason): _whole(count) for reason, count in found["refusals"].items()}
            return cls(layers, _whole(found["bundles"]), refusals, _text(found["tenant"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MessageError("the server's counts are malformed; use the same version on both sides") from error


class Event(NamedTuple):
    """What became of a call, or of a part of one that counts by itself. It holds nothing of what was sent.

    Attributes:
        call: method of the service.
        outcome: "OK", or gRPC's name of what it ended with.
        tenant: who called.
        caller: tells callers of one tenant apart, where that has no name.
        peer: where the connection comes from, as gRPC names it.
        layer: wire name, "sealed" for a task; empty where it is about none, or none that is served.
        direction: of the request, or the task's name.
        counts: of this one request alone.
        key: SHA-256 of the public key that a task of a sealed model computed under.
        state: digest of the locked adapters that it left.
    """

    call: str
    outcome: str
    tenant: str
    caller: bytes
    peer: str
    layer: str = ""
    direction: str = ""
    counts: LayerCounts = LayerCounts()
    key: bytes = b""
    state: bytes = b""

    def to_dict(self) -> dict[str, str | int | float]:
        """Return what is known, for a log."""
        known = {"call": self.call, "outcome": self.outcome, "tenant": self.tenant, "peer": self.peer}
        entry: dict[str, str | int | float] = {**known}
        if self.layer:
            counts = self.counts
            entry |= {"layer": self.layer, "direction": self.direction, "tokens": counts.tokens}
            entry |= {"bytes_in": counts.bytes_in, "bytes_out": counts.bytes_out, "seconds": round(counts.seconds, 6)}
        for name, digest in (("key", self.key), ("state", self.state)):
            if digest:
                entry[name] = digest.hex()
        return entry


class Load(NamedTuple):
    """What a server has on its hands now.

    Attributes:
        running: method -> calls in progress.
        waiting: calls that wait for their turn to compute.
        held_bytes: bytes of messages that are held for calls.
        held_bytes_limit: the most that may be; 0: not limited.
    """

    running: Mapping[str, int] = {}
    waiting: int = 0
    held_bytes: int = 0
    held_bytes_limit: int = 0


class View(NamedTuple):
    """What the operator of a server sees of it.

    Attributes:
        model, scheme, version: what is served, and by which version.
        counts: of all calls.
        tenants: of each tenant.
        load: now.
        placement: device -> bytes of layers there.
        memory_bytes: resident memory of the process; 0 where that is not known.
    """

    model: str
    scheme: str
    version: str
    counts: ServerCounts
    tenants: Mapping[str, ServerCounts]
    load: Load
    placement: Mapping[str, int]
    memory_bytes: int = 0


class _Sums:
    """Events added up."""

    def __init__(self) -> None:
        self.layers: dict[tuple[str, str], LayerCounts] = {}
        self.bundles = 0
        self.refusals: dict[str, int] = {}

    def add(self, event: Event) -> None:
        if event.outcome != OK:
            self.refusals[event.outcome] = self.refusals.get(event.outcome, 0) + 1
        elif event.layer:
            self.layers.setdefault((event.layer, event.direction), LayerCounts()).add(event.counts)
        else:
            self.bundles += 1

    def copy(self, tenant: str) -> ServerCounts:
        layers = {key: dataclasses.replace(counts) for key, counts in self.layers.items()}
        return ServerCounts(layers, self.bundles, dict(self.refusals), tenant)


class Counter:
    """Adds up what calls report. Safe to use from several threads.

    Args:
        record: called with every event, before it counts. What it raises reaches the call that reports it.
        admit: what `Account.admit` calls: raises where calls are not to be taken.
    """

    def __init__(
        self,
        *,
        record: Callable[[Event], object] | None = None,
        admit: Callable[[], object] | None = None,
    ) -> None:
        self._record, self._admit = record, admit
        self._lock = threading.Lock()
        self._all = _Sums()
        self._tenants: dict[str, _Sums] = {}
        self._callers: OrderedDict[bytes, _Sums] = OrderedDict()
        self._running: dict[str, int] = {}

    def account(self, name: str, peer: str = "") -> Account:
        """Return the account of one call to the method ``name`` from ``peer``, a context manager around the call."""
        return Account(self, name, peer)

    def snapshot(self) -> ServerCounts:
        """Return the counts of all calls: for the operator of the server."""
        with self._lock:
            return self._all.copy("")

    def by_tenant(self) -> dict[str, ServerCounts]:
        """Return the counts of each tenant: for the operator of the server."""
        with self._lock:
            return {tenant: sums.copy(tenant) for tenant, sums in self._tenants.items()}

    def running(self) -> dict[str, int]:
        """Return how many calls to each method are in progress."""
        with self._lock:
            return dict(self._running)

    def seen_by(self, tenant: str, caller: bytes = b"") -> ServerCounts:
        """Return the counts that a caller may know: those of its tenant, or its own alone if that is `ANONYMOUS`."""
        with self._lock:
            own = self._callers.get(caller) if tenant == ANONYMOUS else self._tenants.get(tenant)
            return (own or _Sums()).copy(tenant)

    def _take(self, event: Event) -> None:
        if self._record is not None:
            self._record(event)
        level = logging.DEBUG if event.outcome == OK else logging.INFO
        if _log.isEnabledFor(level):
            known = event.to_dict()
            words = " ".join(f"{name}={value}" for name, value in known.items())
            _log.log(level, "%s", words, extra={"call": known})
        with self._lock:
            self._all.add(event)
            self._tenants.setdefault(event.tenant, _Sums()).add(event)
            if event.tenant == ANONYMOUS and event.caller:
                self._callers.setdefault(event.caller, _Sums()).add(event)
                self._callers.move_to_end(event.caller)
                if len(self._callers) > _CALLERS:
                    self._callers.popitem(last=False)

    def _begin(self, name: str) -> None:
        with self._lock:
            self._running[name] = self._running.get(name, 0) + 1

    def _end(self, name: str) -> None:
        with self._lock:
            self._running[name] -= 1


class Account:
    """The account of one call in progress, from `Counter.account`: what its handler reports here is counted.

    A call that ends without a report because nobody reads on counts as cancelled.
    """

    def __init__(self, counter: Counter, name: str, peer: str) -> None:
        self._counter, self._name, self._peer = counter, name, peer
        self._tenant, self._caller, self._told = ANONYMOUS, b"", False

    def caller(self, tenant: str, caller: bytes = b"") -> None:
        """Say who calls; as long as nobody does it is `ANONYMOUS`.

        Args:
            tenant: its name, or `ANONYMOUS`.
            caller: tells callers of `ANONYMOUS` apart.
        """
        self._tenant, self._caller = tenant, caller

    def admit(self) -> None:
        """Ask, before anything is answered, whether calls are taken; the counter's ``admit`` may raise."""
        if self._counter._admit is not None:
            self._counter._admit()

    def seen(self) -> ServerCounts:
        """Return the counts that the caller may know."""
        return self._counter.seen_by(self._tenant, self._caller)

    def answered(self, layer: str, head: Head, bytes_in: int, bytes_out: int, seconds: float) -> None:
        """Report a request that was answered in full, by what its head says of it."""
        self._report(OK, layer, head.direction, _one(head.tokens, bytes_in, bytes_out, seconds))

    def task(self, task: TaskCounts) -> None:
        """Report a task of a sealed model that was done in full."""
        counts = _one(task.tokens, task.bytes_in, task.bytes_out, task.seconds, task.refreshes)
        self._report(OK, "sealed", task.task, counts, task.key, task.state)

    def sent_bundle(self) -> None:
        """Report an owner's bundle that was sent in full."""
        self._report(OK)

    def refused(self, reason: str) -> None:
        """Report that the call ends with an error, by gRPC's name of it."""
        self._report(reason)

    def __enter__(self) -> Account:
        self._counter._begin(self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._counter._end(self._name)
        if kind is GeneratorExit and not self._told:
            self._report(CANCELLED)

    def _report(self, outcome: str, *what: Any) -> None:
        self._told = True
        self._counter._take(Event(self._name, outcome, self._tenant, self._caller, self._peer, *what))


def _one(tokens: int, bytes_in: int, bytes_out: int, seconds: float, refreshes: int = 0) -> LayerCounts:
    place = bisect.bisect_left(LATENCIES, seconds)
    histogram = tuple(int(number == place) for number in range(len(_NOTHING)))
    return LayerCounts(1, tokens, tokens, bytes_in, bytes_out, seconds, refreshes, histogram)


def _counts(entry: Any) -> LayerCounts:
    names = [known.name for known in dataclasses.fields(LayerCounts) if known.name not in ("seconds", "histogram")]
    seconds, histogram = float(entry["seconds"]), tuple(map(_whole, entry["histogram"]))
    if not 0 <= seconds < math.inf or len(histogram) != len(_NOTHING):
        raise ValueError("not seconds, or not a histogram")
    return LayerCounts(**{name: _whole(entry[name]) for name in names}, seconds=seconds, histogram=histogram)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a name")
    return foreign_text(value)

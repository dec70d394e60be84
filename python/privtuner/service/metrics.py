"""What a server has seen, for Prometheus: an endpoint of its operator, and the way back from its text.

Labels are names of layers, tenants and gRPC's errors: sets that the operator chooses, so their number is bounded.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.request
import wsgiref.simple_server
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from privtuner.errors import InputError, ServiceError
from privtuner.service.counts import LATENCIES, LayerCounts, Load, ServerCounts, View
from privtuner.service.protocol import is_loopback, parse_address

__all__ = ["Metrics", "check_metrics_address", "fetch_view"]

_SECONDS = 5.0  # for a request to the endpoint, and for its answer
_MOST_BYTES = 16 << 20
_LAYER, _TENANT = ("layer", "direction"), ("tenant",)
_COUNTED = {
    "tokens": ("privtuner_{}tokens", "Rows of answered requests."),
    "bytes_in": ("privtuner_{}received_bytes", "Bytes of answered requests."),
    "bytes_out": ("privtuner_{}sent_bytes", "Bytes of replies."),
    "refreshes": ("privtuner_{}refreshes", "Ciphertexts that owners refreshed."),
}
"""Field of LayerCounts -> name of its counter and what it counts."""


class Metrics:
    """Answers HTTP requests with a server's metrics, one at a time, from a thread of its own. A context manager.

    There is no encryption or authentication, and whoever asks sees the counts of all tenants: it is for the operator.

    Args:
        view: returns what the server has seen.
        address: HOST:PORT to listen on, port 0 for a free one.
        exposed: listen on an address that other machines can reach.

    Attributes:
        address: HOST:PORT that answers.

    Raises:
        privtuner.errors.InputError: ``address`` is not HOST:PORT, is not loopback without ``exposed``, or cannot be
            bound.
    """

    def __init__(self, view: Callable[[], View], address: str, *, exposed: bool = False) -> None:
        host, port = check_metrics_address(address, exposed)
        registry = CollectorRegistry()
        registry.register(_Collector(view))
        ProcessCollector(registry=registry)
        try:
            self._server = _Endpoint(host, port)
        except (OSError, UnicodeError, OverflowError) as error:
            raise InputError(f"cannot listen for metrics on {address}: {error}; choose another --metrics") from error
        self._server.set_app(make_wsgi_app(registry, disable_compression=True))
        self.address = f"{f'[{host}]' if ':' in host else host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="privtuner-metrics", daemon=True)

    def __enter__(self) -> Metrics:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def check_metrics_address(address: str, exposed: bool = False) -> tuple[str, int]:
    """Return host and port of an address that `Metrics` may listen on.

    Raises:
        privtuner.errors.InputError: see `Metrics`.
    """
    host, port = parse_address(address, least_port=0)
    if not (is_loopback(host) or exposed):
        raise InputError(
            f"--metrics {address}: other machines can reach that address, and whoever asks there sees the counts of "
            "all tenants. Listen on 127.0.0.1, or allow it explicitly (--expose-metrics)"
        )
    return host, port


class _Endpoint(wsgiref.simple_server.WSGIServer):
    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def handle_error(self, *_: Any) -> None:
        """Say nothing of callers that went away."""


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    timeout = _SECONDS  # a caller that says nothing must not stop the others

    def log_message(self, *_: Any) -> None:
        """Say nothing of requests."""


class _Collector(Collector):
    """Turns a view into families of metrics."""

    def __init__(self, view: Callable[[], View]) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        view = self._view()
        facts = {"model": view.model, "scheme": view.scheme, "version": view.version}
        yield InfoMetricFamily("privtuner", "What is served.", facts)
        yield from _layers(view.counts)
        yield CounterMetricFamily("privtuner_bundles", "Owner bundles sent.", view.counts.bundles)
        yield _family(
            "privtuner_refusals",
            "Calls that ended with an error, by gRPC's name of it; CANCELLED: clients gave them up.",
            ("reason",),
            (((reason,), count) for reason, count in view.counts.refusals.items()),
        )
        yield from _tenants(view)
        load = view.load
        calls = GaugeMetricFamily("privtuner_calls_running", "Calls in progress.", labels=("call",))
        for name, count in load.running.items():
            calls.add_metric((name,), count)
        yield calls
        yield GaugeMetricFamily("privtuner_calls_waiting", "Calls that wait for their turn.", load.waiting)
        yield GaugeMetricFamily("privtuner_held_bytes", "Bytes of messages held for calls.", load.held_bytes)
        yield GaugeMetricFamily(
            "privtuner_held_bytes_limit", "The most that may be held; 0: not limited.", load.held_bytes_limit
        )
        devices = GaugeMetricFamily("privtuner_layers_bytes", "Bytes of layers on a device.", labels=("device",))
        for device, held in view.placement.items():
            devices.add_metric((device,), held)
        yield devices


def _layers(counts: ServerCounts) -> Iterator[Metric]:
    seconds = HistogramMetricFamily(
        "privtuner_request_seconds", "Time from the last byte of a request to that of its reply.", labels=_LAYER
    )
    ends = [*map(str, LATENCIES), "+Inf"]
    for key, layer in counts.layers.items():
        buckets = list(zip(ends, accumulate(layer.histogram), strict=True))
        seconds.add_metric(key, buckets, layer.seconds)
    yield seconds
    for field, (name, text) in _COUNTED.items():
        values = ((key, getattr(layer, field)) for key, layer in counts.layers.items())
        yield _family(name.format(""), text, _LAYER, values)


def _tenants(view: View) -> Iterator[Metric]:
    totals = {(tenant,): counts.total() for tenant, counts in view.tenants.items()}
    for field, (name, text) in (("requests", ("privtuner_{}requests", "Answered requests.")), *_COUNTED.items()):
        values = ((key, getattr(total, field)) for key, total in totals.items())
        yield _family(name.format("tenant_"), text, _TENANT, values)
    yield _family(
        "privtuner_tenant_refusals",
        "Calls that ended with an error.",
        ("tenant", "reason"),
        (((tenant, why), n) for tenant, counts in view.tenants.items() for why, n in counts.refusals.items()),
    )


def _family(
    name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def fetch_view(address: str) -> View:
    """Ask a `Metrics` endpoint what its server has seen. Sizes of the largest requests are not told there.

    Raises:
        privtuner.errors.InputError: ``address`` is not HOST:PORT.
        privtuner.errors.ServiceError: nothing answers, or something other than such an endpoint.
    """
    parse_address(address)
    # A proxy from the environment has no part in this.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/metrics", timeout=_SECONDS) as answer:
            text = answer.read(_MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ServiceError(
            f"no metrics at {address} ({error}); start the server with 'privtuner serve --metrics {address}'"
        ) from error
    try:
        if len(text) > _MOST_BYTES:
            raise ValueError("too long")
        return _view(text.decode())
    except (ArithmeticError, LookupError, ValueError) as error:
        raise ServiceError(f"what answers at {address} has no metrics of a privtuner server") from error


def _view(text: str) -> View:
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    (facts,) = (sample.labels for sample in found["privtuner_info"])

    def values(name: str, *labels: str) -> Iterator[tuple[tuple[str, ...], int]]:
        for sample in found.get(name, ()):
            yield tuple(sample.labels[label] for label in labels), int(sample.value)

    def single(name: str) -> int:
        return next((value for _, value in values(name)), 0)

    layers: dict[tuple[str, ...], LayerCounts] = {}
    for sample in found.get("privtuner_request_seconds_sum", ()):
        layers[tuple(sample.labels[label] for label in _LAYER)] = LayerCounts(seconds=float(sample.value))
    buckets: dict[tuple[str, ...], list[int]] = {key: [0] for key in layers}
    for key, value in values("privtuner_request_seconds_bucket", *_LAYER):
        buckets[key].append(value)
    for key, layer in layers.items():
        layer.requests = buckets[key][-1]
        layer.histogram = tuple(after - before for before, after in pairwise(buckets[key]))
        if len(layer.histogram) != len(LATENCIES) + 1:
            raise ValueError("a histogram of other classes")
    tenants = {tenant: LayerCounts(requests=n) for (tenant,), n in values("privtuner_tenant_requests_total", *_TENANT)}
    for field, (name, _) in _COUNTED.items():
        for key, value in values(f"{name.format('')}_total", *_LAYER):
            setattr(layers[key], field, value)
        for (tenant,), value in values(f"{name.format('tenant_')}_total", *_TENANT):
            setattr(tenants[tenant], field, value)
    refusals: dict[str, dict[str, int]] = {}
    for (tenant, reason), value in values("privtuner_tenant_refusals_total", "tenant", "reason"):
        refusals.setdefault(tenant, {})[reason] = value
    return View(
        facts["model"],
        facts["scheme"],
        facts["version"],
        ServerCounts(
            {(layer, direction): counts for (layer, direction), counts in layers.items()},
            single("privtuner_bundles_total"),
            {reason: value for (reason,), value in values("privtuner_refusals_total", "reason")},
        ),
        {
            tenant: ServerCounts({("", ""): total}, 0, refusals.get(tenant, {}), tenant)
            for tenant, total in tenants.items()
        },
        Load(
            {call: value for (call,), value in values("privtuner_calls_running", "call")},
            single("privtuner_calls_waiting"),
            single("privtuner_held_bytes"),
            single("privtuner_held_bytes_limit"),
        ),
        {device: value for (device,), value in values("privtuner_layers_bytes", "device")},
        single("process_resident_memory_bytes"),
    )

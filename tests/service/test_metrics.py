"""The endpoint for Prometheus, read as Prometheus does and as `privtuner top` does."""

import re
import socket
import threading
import urllib.request
from contextlib import contextmanager
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from prometheus_client.parser import text_string_to_metric_families

from accounts import calling
from privtuner import wire
from privtuner.errors import InputError, ServiceError
from privtuner.service.counts import ANONYMOUS, Counter, Load, View
from privtuner.service.metrics import Metrics, fetch_view

LOAD = Load({"Apply": 2, "Job": 0}, 3, 4096, 1 << 30)


def filled():
    counter = Counter()
    for tenant, layer, direction, seconds in (
        ("acme", "fc", "forward", 0.002),
        ("acme", "fc", "backward", 0.02),
        (ANONYMOUS, 'odd "name"\n', "forward", 1000.0),
    ):
        with calling(counter, tenant, b"caller") as account:
            head = wire.peek(wire.seal("request", [], direction=direction, tokens=7))
            account.answered(layer, head, 10, 20, seconds)
    with calling(counter, "acme") as account:
        account.refused("ABORTED")
    with calling(counter, ANONYMOUS, name="Bundle") as account:
        account.sent_bundle()
    return counter


@contextmanager
def endpoint(counter):
    def view():
        return View("tiny", "linear", "1.2", counter.snapshot(), counter.by_tenant(), LOAD, {"cuda:0": 77})

    with Metrics(view, "127.0.0.1:0") as metrics:
        yield metrics


def samples(address):
    """Name and labels as Prometheus writes them, without quotes, labels in order -> value."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        " ".join([sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))]): sample.value
        for family in families
        for sample in family.samples
    }


def test_prometheus_reads_every_count():
    with endpoint(filled()) as metrics:
        found = samples(metrics.address)
    forward = "direction=forward layer=fc"
    wanted = {
        f"privtuner_request_seconds_count {forward}": 1,
        f"privtuner_request_seconds_sum {forward}": 0.002,
        f"privtuner_request_seconds_bucket {forward} le=0.001": 0,
        f"privtuner_request_seconds_bucket {forward} le=0.003": 1,
        f"privtuner_request_seconds_bucket {forward} le=300.0": 1,
        f"privtuner_request_seconds_bucket {forward} le=+Inf": 1,
        f"privtuner_tokens_total {forward}": 7,
        f"privtuner_received_bytes_total {forward}": 10,
        f"privtuner_sent_bytes_total {forward}": 20,
        f"privtuner_refreshes_total {forward}": 0,
        'privtuner_tokens_total direction=forward layer=odd "name"\n': 7,
        "privtuner_refusals_total reason=ABORTED": 1,
        "privtuner_bundles_total": 1,
        "privtuner_tenant_requests_total tenant=acme": 2,
        "privtuner_tenant_tokens_total tenant=anonymous": 7,
        "privtuner_tenant_refusals_total reason=ABORTED tenant=acme": 1,
        "privtuner_calls_running call=Apply": 2,
        "privtuner_calls_waiting": 3,
        "privtuner_held_bytes": 4096,
        "privtuner_held_bytes_limit": 1 << 30,
        "privtuner_layers_bytes device=cuda:0": 77,
        "privtuner_info model=tiny scheme=linear version=1.2": 1,
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert found["process_resident_memory_bytes"] > 1e6


def test_labels_are_layers_tenants_and_reasons_alone():
    with endpoint(filled()) as metrics:
        found = samples(metrics.address)
    labels = {name for key in found if key.startswith("privtuner") for name in re.findall(r" (\w+)=", key)}
    assert labels == {*("layer", "direction", "le", "tenant", "reason", "call", "device", "model", "scheme", "version")}


def test_what_is_fetched_is_what_was_counted():
    counter = filled()
    with endpoint(counter) as metrics:
        view = fetch_view(metrics.address)
    assert (view.model, view.scheme, view.version) == ("tiny", "linear", "1.2")
    assert (view.load, view.placement) == (LOAD, {"cuda:0": 77})
    for counts in (wanted := counter.snapshot()).layers.values():
        counts.largest = 0  # is not told
    assert view.counts == wanted
    for tenant, counts in counter.by_tenant().items():
        total, found = counts.total(), view.tenants[tenant].total()
        assert (found.requests, found.tokens, found.bytes_in) == (total.requests, total.tokens, total.bytes_in)
        assert view.tenants[tenant].refusals == counts.refusals
    assert view.memory_bytes > 1e6


def test_caller_that_says_nothing_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr("privtuner.service.metrics._Handler.timeout", 0.2)
    with endpoint(filled()) as metrics:
        host, port = metrics.address.split(":")
        with socket.create_connection((host, int(port))):
            assert fetch_view(metrics.address).model == "tiny"


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:9464", "[::]:0", "example.org:80"])
def test_counts_of_all_tenants_stay_on_this_machine(address):
    with pytest.raises(InputError, match="other machines can reach.*--expose-metrics"):
        Metrics(Counter, address)


def test_counts_are_exposed_when_asked():
    metrics = Metrics(Counter, "0.0.0.0:0", exposed=True)
    assert metrics.address.startswith("0.0.0.0:")
    metrics._server.server_close()


def test_address_that_cannot_be_had():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"cannot listen for metrics on {address}.*choose another"):
            Metrics(Counter, address)
    with pytest.raises(InputError, match="no such host:1"):
        Metrics(Counter, "no such host:1", exposed=True)
    with pytest.raises(InputError, match="HOST:PORT"):
        Metrics(Counter, "9464")


@pytest.fixture
def foreign():
    """A web server that answers what it is told to."""

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_):
            pass

    body = [b""]

    def app(environ, start):
        start("200 OK", [])
        return list(body)

    server = make_server("127.0.0.1", 0, app, handler_class=Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}", body
    server.shutdown()
    thread.join()
    server.server_close()


INFO = b'privtuner_info{model="m",scheme="s",version="1"} 1\n'
ONE = b'privtuner_request_seconds_sum{layer="a",direction="forward"} 1\n'


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xff",
        b"hello",
        b"up 1\n",
        INFO + ONE,  # no buckets
        INFO + b'privtuner_tokens_total{layer="a",direction="forward"} 1\n',
        INFO + b"privtuner_bundles_total NaN\n",
        INFO + b"privtuner_bundles_total +Inf\n",
        INFO + b'privtuner_refusals_total{why="a"} 1\n',
        b"#" * (16 << 20) + b"\n",
    ],
)
def test_what_answers_is_something_else(foreign, answer):
    address, body = foreign
    body[:] = [INFO]
    assert fetch_view(address).model == "m"
    body[:] = [answer]
    with pytest.raises(ServiceError, match="has no metrics of a privtuner server"):
        fetch_view(address)


def test_nothing_answers():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServiceError, match=f"no metrics at {address}.*--metrics {address}"):
        fetch_view(address)

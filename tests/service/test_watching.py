"""A server in use, as its tenants, its operator, a probe and an auditor see it: what each may know, no more."""

import json
import logging
import threading
import time
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from privtuner import cli, linear
from privtuner.cpu import CpuServer
from privtuner.errors import LostError, ServiceError
from privtuner.nn import GroupSpec, OwnerBundle, Split
from privtuner.retries import Retries
from privtuner.service import RemoteTransport, Server
from privtuner.service.audit import AuditLog
from privtuner.service.metrics import Metrics, fetch_view
from privtuner.service.tenants import Tenant

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def split():
    layer = linear.prepare(np.random.default_rng(5).standard_normal((32, 16)))
    groups = {"fc": GroupSpec("linear", {"fc": 32})}
    bundle = OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, {"fc": layer.spec}, {}, files={})
    return Split({"fc": layer}, bundle)


@pytest.fixture
def served(split):
    """Make a server with these options, until the test ends."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Server(split, **options))


@pytest.fixture
def connect():
    with ExitStack() as stack:
        once = Retries(seconds=0)
        yield lambda running: stack.enter_context(RemoteTransport(running.address, connect_seconds=20, retries=once))


def ask(transport, split, tokens=3, seed=0):
    """Send a request; returns its bytes and those of the reply."""
    x = np.random.default_rng(seed).standard_normal((tokens, 16)).astype(np.float32)
    request, secret = linear.encrypt(x, split.server["fc"].spec)
    reply = b"".join(transport.apply("fc", request))
    linear.decrypt(reply, secret)
    return request, reply


class Named:
    """Tenants by a header of their own choice."""

    def of(self, context):
        return Tenant(dict(context.invocation_metadata())["test-name"], authenticated=True)


def name(transport, who, monkeypatch):
    said = transport._metadata
    monkeypatch.setattr(transport, "_metadata", lambda: (*said(), ("test-name", who)))


def test_owners_without_names_do_not_see_each_other(served, connect, split):
    running = served()
    one, two = connect(running), connect(running)
    ask(one, split, tokens=3)
    ask(two, split, tokens=5)
    with pytest.raises(ServiceError):
        list(two.apply("fc", b"short"))
    assert one.counts().total().tokens == 3
    assert two.counts().total().tokens == 5
    assert (one.counts().refused, two.counts().refused) == (0, 1)
    assert connect(running).counts().total().requests == 0
    assert running.counts().total().tokens == 8


def test_a_tenant_sees_its_own_counts_on_every_connection(served, connect, split, monkeypatch):
    running = served(tenants=Named())
    for who, tokens in (("acme", 3), ("acme", 4), ("zenith", 5)):
        transport = connect(running)
        name(transport, who, monkeypatch)
        ask(transport, split, tokens)
    counts = transport.counts()
    assert (counts.tenant, counts.total().tokens) == ("zenith", 5)
    name(other := connect(running), "acme", monkeypatch)
    assert other.counts().total().tokens == 7
    assert {who: seen.total().tokens for who, seen in running.view().tenants.items()} == {"acme": 7, "zenith": 5}


def test_operator_sees_all_and_what_is_in_progress(split, served, connect):
    entered, go_on = threading.Event(), threading.Event()

    class Slow(CpuServer):
        def answer(self, prepared, request, block_bytes=0):
            entered.set()
            assert go_on.wait(20)
            return super().answer(prepared, request, block_bytes)

    running = served(server=Slow(), memory_bytes=1 << 20, name="tiny")
    transport = connect(running)
    worker = threading.Thread(target=ask, args=(transport, split))
    with Metrics(running.view, "127.0.0.1:0") as metrics:
        worker.start()
        assert entered.wait(20)
        during = fetch_view(metrics.address)
        go_on.set()
        worker.join()
        after = fetch_view(metrics.address)
    assert during.load.running["Apply"] == 1
    assert 0 < during.load.held_bytes < during.load.held_bytes_limit == 1 << 20
    assert during.counts.total().requests == 0
    assert (after.counts.total().tokens, after.load.running["Apply"], after.load.held_bytes) == (3, 0, 0)
    assert (after.model, after.scheme) == ("tiny", "linear")


def test_top_shows_layers_and_tenants(split, served, connect, capsys):
    running = served(name="tiny")
    transport = connect(running)
    ask(transport, split, tokens=1234)
    with pytest.raises(ServiceError):
        list(transport.apply("fc", b"short"))
    with Metrics(running.view, "127.0.0.1:0") as metrics:
        assert cli.main(["top", "--metrics", metrics.address, "--once"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    rows = {words[0]: words for line in out.splitlines() if (words := line.split())}
    layer, total, tenant = (rows[first] for first in ("fc", "total", "anonymous"))
    assert layer[:4] == ["fc", "forward", "1", "1,234"]
    assert total[:3] == ["total", "1", "1,234"]
    assert "INVALID_ARGUMENT 1" in out
    assert (tenant[1:3], tenant[-1]) == (["1", "1,234"], "1")


def test_top_as_a_client_shows_its_own_alone(split, served, connect, capsys):
    running = served(name="tiny")
    ask(connect(running), split, tokens=1234)
    assert cli.main(["top", running.address, "--once"]) == 0
    out = capsys.readouterr().out
    assert f"tiny, linear, at {running.address}, as anonymous" in out
    assert "1,234" not in out


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["127.0.0.1:1", "--metrics", "127.0.0.1:2"],
        ["127.0.0.1:1", "--interval", "0"],
        ["127.0.0.1:1", "--interval", "nan"],
    ],
)
def test_top_refuses_what_it_cannot_show(line, capsys):
    assert cli.main(["top", *line]) == 2
    assert "privtuner: error: " in capsys.readouterr().err


def test_audit_log_and_log_hold_nothing_of_a_request(split, served, connect, tmp_path, caplog):
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit, caplog.at_level(logging.DEBUG):
        running = served(audit=audit)
        transport = connect(running)
        transport.fetch_bundle()
        request, reply = ask(transport, split)
        with pytest.raises(ServiceError):
            list(transport.apply("no\x1b[2Jwhere", b"x"))
        running.stop(20)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["call"], entry.get("outcome")) for entry in entries] == [
        ("start", None),
        ("Bundle", "OK"),
        ("Apply", "OK"),
        ("Apply", "INVALID_ARGUMENT"),
        ("end", None),
    ]
    answered = entries[2]
    assert (answered["layer"], answered["tokens"]) == ("fc", 3)
    assert (answered["bytes_in"], answered["bytes_out"]) == (len(request), len(reply))
    assert answered["peer"].startswith("ipv4:127.0.0.1:")
    told = (path.read_text() + caplog.text).encode()
    caller = transport._caller
    for secret in (request, reply, caller):
        pieces = {secret[place : place + 8] for place in range(0, len(secret) - 8, 8)}
        for form in (lambda piece: piece, lambda piece: piece.hex().encode(), lambda piece: repr(piece)[2:-1].encode()):
            assert not any(len(set(piece)) > 4 and form(piece) in told for piece in pieces)
    assert b"2Jwhere" not in told


def test_server_that_cannot_record_calls_refuses_them(split, served, connect, tmp_path, monkeypatch):
    with AuditLog(tmp_path / "audit.jsonl") as audit:
        transport = connect(served(audit=audit))
        ask(transport, split)
        append = audit._append

        def fail(line):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(audit, "_append", fail)
        for _ in range(2):  # the one that fails at its end, and one that is not begun
            with pytest.raises(ServiceError, match="cannot record calls"):
                ask(transport, split)
        assert transport.counts().total().requests == 1
        monkeypatch.setattr(audit, "_append", append)
        ask(transport, split)
    outcomes = [json.loads(line).get("outcome") for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert outcomes.count("OK") == 3  # that of the first failure is written late


def test_health_needs_no_name(served):
    class Nobody:
        def of(self, context):
            raise LostError("who are you?")

    running = served()
    running._tenants = Nobody()
    with grpc.insecure_channel(running.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest(), timeout=20).status == SERVING
        with pytest.raises(grpc.RpcError, match="who are you"):
            list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([]), timeout=20))


def test_health_tells_that_a_server_is_draining(split, served, connect):
    entered, go_on = threading.Event(), threading.Event()

    class Slow(CpuServer):
        def answer(self, prepared, request, block_bytes=0):
            entered.set()
            assert go_on.wait(20)
            return super().answer(prepared, request, block_bytes)

    running = served(server=Slow())
    owner = threading.Thread(target=ask, args=(connect(running), split))
    stopping = threading.Thread(target=running.stop, args=(60,))
    with grpc.insecure_channel(running.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        owner.start()
        assert entered.wait(20)
        stopping.start()
        while check(health_pb2.HealthCheckRequest(), timeout=20).status == SERVING:
            time.sleep(0.01)  # until the thread has begun to stop
        assert owner.is_alive()
        assert stopping.is_alive()
        go_on.set()
        owner.join(20)
        stopping.join(20)
    assert running.counts().total().requests == 1


def test_reflection_is_answered_by_the_server(served):
    ask_for = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(served().address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([ask_for]), timeout=20)
    assert "privtuner.Linear" in [service.name for service in answer.list_services_response.service]

"""What gRPC adds to the contract of a transport: bundles, counts, limits, and a clear error however a server goes."""

import gc
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

import linear_cases as cases
from cuda_arrays import host
from cuda_counts import CountingDevice
from privtuner import linear
from privtuner.cpu import CpuServer
from privtuner.cuda.client import CudaClient
from privtuner.cuda.server import CudaServer
from privtuner.errors import InputError, MessageError, ServiceError
from privtuner.nn import GroupSpec, OwnerBundle, Split
from privtuner.retries import Retries
from privtuner.service import RemoteTransport, Server, client, protocol, server
from privtuner.service.protocol import PROTOCOL_KEY, method

D_OUT, D_IN = 300, 40
ONCE = Retries(seconds=0)
OTHER = {"fc2": (32, 16)}


@pytest.fixture(scope="module")
def split():
    random = np.random.default_rng(5)
    layers = {
        name: linear.prepare(random.standard_normal(shape)) for name, shape in {"fc": (D_OUT, D_IN), **OTHER}.items()
    }
    groups = {name: GroupSpec("linear", {name: layer.spec.d_out}) for name, layer in layers.items()}
    specs = {name: layer.spec for name, layer in layers.items()}
    bundle = OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, specs, {}, files={"vocab.txt": b"a"})
    return Split(layers, bundle)


@pytest.fixture(scope="module")
def running(split):
    with Server(split, name="tiny") as running:
        yield running


@pytest.fixture
def transport(running):
    with RemoteTransport(running.address) as transport:
        yield transport


def batch(tokens=9, features=D_IN, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, features)).astype(np.float32)


class Behaving(CpuServer):
    """Calls ``behave(blocks)`` in place of yielding the right blocks."""

    def __init__(self, behave):
        self.behave = behave

    def answer(self, prepared, request, block_bytes=0):
        return self.behave(linear.apply_blocks(prepared, request, 64))


@contextmanager
def connected(split, **options):
    with Server(split, **options) as running, RemoteTransport(running.address, retries=ONCE) as transport:
        yield running, transport


def test_devices_on_both_sides_of_a_connection(split, monkeypatch):
    """Requests in one message and in many; messages become gRPC's bytes and no page-locked memory is kept."""
    for module in (client, protocol, server):
        monkeypatch.setattr(module, "MESSAGE_BYTES", 4096)
    serving, owning = CountingDevice(), CountingDevice()
    owner, prepared = CudaClient(owning), split.server["fc2"]
    with connected(split, server=CudaServer([serving])) as (_, transport):
        for tokens in (9, 300):
            x = batch(tokens, 16)
            request, secret = owner.encrypt(x, prepared.spec, "forward")
            y = owner.decrypt(transport.apply("fc2", request), secret)
            cases.check_result(prepared, x, host(y), "forward")
        counts = transport.counts().layers["fc2", "forward"]
    assert (counts.requests, counts.tokens, counts.bytes_in) == (2, 309, 2 * 112 + 4 * 16 * 309)
    del request
    gc.collect()
    assert (serving.lent, owning.lent) == (0, 0)


def test_hello_says_what_is_served(transport):
    hello = transport.hello()
    assert hello["model"] == "tiny"
    assert hello["layers"] == 2
    assert hello["preset"] == "linear-w8"


def test_bundle_arrives_whole(split, transport):
    calls = []
    fetched = transport.fetch_bundle(lambda *call: calls.append(call))
    assert fetched.to_files() == split.bundle.to_files()
    size = sum(map(len, split.bundle.to_files().values()))
    assert calls[0] == (0, size)
    assert len(calls) > len(fetched.to_files())
    assert calls == sorted(calls)
    # Every message carries the name of its file as well.
    arrived, total = calls[-1]
    assert arrived == total
    assert size < total < 1.1 * size


def test_long_messages_travel_in_pieces(split, monkeypatch):
    for module in (client, protocol, server):
        monkeypatch.setattr(module, "MESSAGE_BYTES", 1500)
    request, _ = linear.encrypt(batch(), split.server["fc"].spec)
    assert len(request) > 1500
    with connected(split) as (_, transport):
        blocks = list(transport.apply("fc", request))
        assert transport.fetch_bundle().to_files() == split.bundle.to_files()
    assert blocks == list(linear.apply_blocks(split.server["fc"], request, 256))
    assert min(map(len, blocks)) > 1500


def test_server_counts_what_it_saw(split):
    with connected(split) as (running, transport):
        transport.fetch_bundle()
        request, _ = linear.encrypt(batch(), split.server["fc"].spec)
        reply = b"".join(transport.apply("fc", request))
        with pytest.raises(ServiceError):
            list(transport.apply("fc", b"short"))
        counts = transport.counts()
        assert (counts.layers, counts.total()) == (running.counts().layers, running.counts().total())
    (entry,) = counts.to_dict()["layers"]
    assert entry.pop("seconds") > 0
    assert sum(entry.pop("histogram")) == 1
    assert entry == {
        "layer": "fc",
        "direction": "forward",
        "requests": 1,
        "tokens": 9,
        "largest": 9,
        "bytes_in": len(request),
        "bytes_out": len(reply),
        "refreshes": 0,
    }
    assert (counts.bundles, counts.refused) == (1, 1)


def test_unknown_layer(transport):
    with pytest.raises(ServiceError, match="refused layer 'nowhere': no layer is called 'nowhere'"):
        list(transport.apply("nowhere", b"x"))


def test_request_beyond_the_limit(split):
    request, _ = linear.encrypt(batch(), split.server["fc"].spec)
    with (
        connected(split, memory_bytes=2 * len(request) - 2) as (_, transport),
        pytest.raises(
            ServiceError, match=f"{len(request)} bytes is longer than this server's limit of {len(request) - 1}"
        ),
    ):
        list(transport.apply("fc", request))


def test_fault_of_the_server_is_logged_there_and_not_told(split, caplog):
    def behave(blocks):
        yield next(blocks)
        raise ZeroDivisionError("a secret of the server")

    with connected(split, server=Behaving(behave)) as (running, transport):
        request, _ = linear.encrypt(batch(), split.server["fc"].spec)
        with caplog.at_level(logging.ERROR), pytest.raises(ServiceError) as caught:
            list(transport.apply("fc", request))
        assert running.counts().refused == 1
    assert "failed during layer 'fc': the server failed; its log has the reason" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "a secret of the server" in caplog.text


def test_server_that_stops_midway(split):
    stuck = threading.Event()

    def behave(blocks):
        yield next(blocks)
        stuck.wait(20)

    with connected(split, server=Behaving(behave)) as (running, transport):
        request, secret = linear.encrypt(batch(), split.server["fc"].spec)
        reply = transport.apply("fc", request)
        first = next(reply)
        running.stop(0)
        with pytest.raises(ServiceError, match="the connection to .* was lost during layer 'fc'"):
            linear.decrypt([first, *reply], secret)
        stuck.set()


def test_another_thread_closes_in_the_middle_of_a_request(split):
    go_on = threading.Event()

    def behave(blocks):
        yield next(blocks)
        go_on.wait(20)

    with connected(split, server=Behaving(behave)) as (_, transport):
        request, _ = linear.encrypt(batch(), split.server["fc"].spec)
        reply = transport.apply("fc", request)
        next(reply)
        threading.Thread(target=transport.close).start()
        with pytest.raises(ServiceError, match="was closed; open another"):
            list(reply)
        go_on.set()


def test_call_that_is_refused_because_it_is_being_closed(running, monkeypatch):
    transport = RemoteTransport(running.address)
    transport.hello()
    transport._channel.close()  # by another thread, which has said so by the time the call fails

    def begin(*_):
        transport._closing.set()
        raise ValueError("Cannot invoke RPC on closed channel!")

    monkeypatch.setattr(transport._channel, "unary_stream", begin)
    with pytest.raises(ServiceError, match="was closed"):
        list(transport.apply("fc", b"x"))


def test_closing_does_not_wait_for_what_never_ends(running, monkeypatch):
    """As after a KeyboardInterrupt while gRPC set up a call."""
    transport, never = RemoteTransport(running.address), threading.Event()
    transport.hello()
    monkeypatch.setattr(client, "_CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(transport._channel, "close", never.wait)
    transport.close()
    transport.close()
    with pytest.raises(ServiceError, match="was closed"):
        transport.counts()
    never.set()


def test_counts_are_not_waited_for_without_end(split, monkeypatch):
    go_on = threading.Event()
    with Server(split) as running, RemoteTransport(running.address, connect_seconds=0.5, retries=ONCE) as transport:
        transport.hello()
        monkeypatch.setattr(running._counter, "seen_by", lambda *_: go_on.wait(20))
        with pytest.raises(ServiceError, match="Stats"):
            transport.counts()
        go_on.set()


@pytest.mark.parametrize(
    "answer", [b'{"protocol": 4}', b'{"protocol": 4, "model": 5, "scheme": "s", "preset": "p"}', b"[" * 100000]
)
def test_hello_that_lacks_something(answer):
    with (
        foreign_server("privtuner.Linear", Hello=answer) as address,
        RemoteTransport(address) as transport,
        pytest.raises(ServiceError, match="is no privtuner server"),
    ):
        transport.hello()


def test_address_is_tried_before_there_is_a_server(split, running):
    port = int(running.address.rpartition(":")[2])
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}.*another program has the port"):
        server.ensure_free("127.0.0.1", port)
    with pytest.raises(InputError, match="port 65536"):
        server.ensure_free("127.0.0.1", 65536)
    with pytest.raises(InputError, match="can be reached from other machines"):
        server.ensure_free("0.0.0.0", 0)
    for address in ("192.0.2.1", "no such host", "x" * 300):
        with pytest.raises(InputError, match="cannot listen on .*choose another --host or --port"):
            server.ensure_free(address, 0, allow_plaintext=True)


def test_address_that_is_free_stays_free(split):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for address in ("127.0.0.1", "localhost"):
        server.ensure_free(address, port)
    with Server(split, port=port), pytest.raises(InputError):
        server.ensure_free("127.0.0.1", port)
    with Server(split, port=port) as running:  # just after it was used
        assert running.address == f"127.0.0.1:{port}"


def test_reply_that_ends_early_is_noticed(split):
    def behave(blocks):
        yield next(blocks)

    with connected(split, server=Behaving(behave)) as (_, transport):
        request, secret = linear.encrypt(batch(), split.server["fc"].spec)
        with pytest.raises(MessageError):
            linear.decrypt(transport.apply("fc", request), secret)


def test_call_that_nobody_reads_on_ends_at_the_server(split):
    ended = threading.Event()

    def behave(blocks):
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            ended.set()

    with connected(split, server=Behaving(behave)) as (running, transport):
        request, _ = linear.encrypt(batch(), split.server["fc"].spec)
        reply = transport.apply("fc", request)
        next(reply)
        reply.close()
        running.stop(5)
        assert ended.wait(20)


def test_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        RemoteTransport(f"127.0.0.1:{port}") as transport,
        pytest.raises(ServiceError, match=f"no privtuner server answers at 127.0.0.1:{port}.*privtuner serve"),
    ):
        transport.fetch_bundle()


def test_something_else_listens_and_says_nothing():
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        RemoteTransport(f"127.0.0.1:{silent.getsockname()[1]}", connect_seconds=0.3) as transport,
        pytest.raises(ServiceError, match="no privtuner server answers"),
    ):
        transport.hello()


@contextmanager
def foreign_server(service, **methods):
    foreign = grpc.server(ThreadPoolExecutor(1))
    handlers = {name: grpc.unary_unary_rpc_method_handler(lambda *_, a=answer: a) for name, answer in methods.items()}
    foreign.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = foreign.add_insecure_port("127.0.0.1:0")
    foreign.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        foreign.stop(0).wait()


def test_another_grpc_service_listens():
    with (
        foreign_server("something.Else", Hello=b"") as address,
        RemoteTransport(address) as transport,
        pytest.raises(ServiceError, match="is no privtuner server"),
    ):
        transport.hello()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b'{"protocol": null}',
        b'{"protocol": 4, "model": "m", "preset": "p"}',
        b'{"protocol": 4, "model": "m", "scheme": "s", "preset": "p", "bundle_bytes": []}',
        b"\xff",
    ],
)
def test_hello_that_is_none(answer):
    with (
        foreign_server("privtuner.Linear", Hello=answer) as address,
        RemoteTransport(address) as transport,
        pytest.raises(ServiceError, match="is no privtuner server"),
    ):
        transport.hello()


def test_server_of_another_version():
    hello = json.dumps({"protocol": 99, "version": "7.8"}).encode()
    with (
        foreign_server("privtuner.Linear", Hello=hello) as address,
        RemoteTransport(address) as transport,
        pytest.raises(ServiceError, match=r"speaks protocol 99 \(privtuner 7.8\).*same version on both sides"),
    ):
        transport.apply("fc", b"x").__next__()


@pytest.mark.parametrize("spoken", [None, "99"])
@pytest.mark.parametrize("name", ["Bundle", "Apply"])
def test_client_of_another_version(running, name, spoken):
    metadata = () if spoken is None else ((PROTOCOL_KEY, spoken),)
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream(method(name))(b"", metadata=metadata))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "install the same version" in caught.value.details()


def test_bundle_that_is_none(split, monkeypatch):
    with connected(split) as (running, transport):
        monkeypatch.setattr(running, "_files", {"config.json": b"{}"})
        with pytest.raises(MessageError, match="missing"):
            transport.fetch_bundle()


def test_closed_transport(running):
    transport = RemoteTransport(running.address)
    transport.close()
    for call in (transport.hello, transport.fetch_bundle, transport.counts, lambda: next(transport.apply("fc", b""))):
        with pytest.raises(ServiceError, match="was closed"):
            call()


def test_address_is_checked_at_once():
    with pytest.raises(InputError, match="HOST:PORT"):
        RemoteTransport("nowhere")


def test_port_taken(split, running):
    with pytest.raises(ServiceError, match="cannot listen on 127.0.0.1.*another program has the port"):
        Server(split, port=int(running.address.rpartition(":")[2]))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_network_is_not_served_unless_allowed(split, host):
    with pytest.raises(InputError, match="can be reached from other machines.*--allow-plaintext"):
        Server(split, host=host)


def test_network_is_served_when_allowed(split):
    with Server(split, host="0.0.0.0", allow_plaintext=True) as running:
        port = running.address.rpartition(":")[2]
        with RemoteTransport(f"127.0.0.1:{port}") as transport:
            assert transport.hello()["layers"] == 2


@pytest.mark.parametrize(
    ("option", "value"), [("port", -1), ("port", 65536), ("memory_bytes", 1), ("calls", 1), ("patience", 0)]
)
def test_option_out_of_range(split, option, value):
    with pytest.raises(InputError, match=str(value)):
        Server(split, **{option: value})

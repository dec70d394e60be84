"""What strangers can make a server, or a server an owner, hold or wait for: little, and for a while."""

from __future__ import annotations

import dataclasses
import json
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from privtuner import linear
from privtuner.errors import MessageError, ServiceError
from privtuner.nn import GroupSpec, OwnerBundle, Split
from privtuner.retries import Retries
from privtuner.service import RemoteTransport, Server
from privtuner.service.counts import LayerCounts
from privtuner.service.protocol import LAYER_KEY, MESSAGE_BYTES, PROTOCOL, PROTOCOL_KEY, channel_options, method

SAID = ((PROTOCOL_KEY, str(PROTOCOL)), (LAYER_KEY, b"fc"))
LAYER = linear.prepare(np.random.default_rng(5).standard_normal((300, 40)))
REQUEST, SECRET = linear.encrypt(np.ones((9, 40), np.float32), LAYER.spec)


@pytest.fixture(scope="module")
def split():
    groups, specs = {"fc": GroupSpec("linear", {"fc": 300})}, {"fc": LAYER.spec}
    files = {"vocab.txt": bytes(16 << 20)}
    return Split(
        {"fc": LAYER}, OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, specs, {}, files=files)
    )


@contextmanager
def served(split, **options):
    with (
        Server(split, **options) as server,
        grpc.insecure_channel(server.address, options=channel_options()) as channel,
    ):
        yield server, channel


@contextmanager
def answering(**methods):
    """A hostile server: what it answers to each method is an iterator of messages."""
    foreign = grpc.server(ThreadPoolExecutor(4))
    handlers = {
        name: grpc.unary_stream_rpc_method_handler(lambda *_, make=make: make()) for name, make in methods.items()
    }
    foreign.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("privtuner.Linear", handlers),))
    port = foreign.add_insecure_port("127.0.0.1:0")
    foreign.start()
    try:
        with RemoteTransport(f"127.0.0.1:{port}", patience=0.5, retries=Retries(0)) as transport:
            yield transport
    finally:
        foreign.stop(0).wait()


def peak():
    """Most bytes of memory that the process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


SAYS = {"protocol": PROTOCOL, "version": "1", "model": "m", "scheme": "s", "preset": "p", "layers": 1}
SAYS |= {"sealed": False, "bundle_bytes": 1, "bundle": "0" * 64}
HELLO = json.dumps(SAYS).encode()


@pytest.mark.parametrize("name", ["Hello", "Stats", "Bundle", "Job", "Apply"])
def test_compressed_messages_are_refused_before_they_are_unpacked(split, name):
    with served(split) as (_, channel):
        before = peak()
        bomb = channel.stream_stream(method(name))(
            iter([bytes(64 << 20)]), metadata=SAID, compression=grpc.Compression.Gzip
        )
        error = refused(bomb)
        assert peak() < before + (16 << 20) + (64 << 20)  # that of the client itself
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


def test_messages_beyond_the_limit_are_refused_before_they_arrive(split):
    with served(split, patience=20.0) as (_, channel):
        error = refused(channel.unary_stream(method("Apply"))(bytes(MESSAGE_BYTES + 65), metadata=SAID))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()


def test_owners_take_no_longer_messages_either():
    with (
        answering(Hello=lambda: iter([bytes(MESSAGE_BYTES + 65)])) as transport,
        pytest.raises(ServiceError, match="longer message than any"),
    ):
        transport.hello()


@pytest.mark.parametrize("name", ["Hello", "Bundle", "Apply"])
def test_owners_take_nothing_compressed(name):
    foreign = grpc.server(ThreadPoolExecutor(2), compression=grpc.Compression.Gzip)
    answers = {"Hello": HELLO, name: bytes(1 << 19)}
    handlers = {
        key: grpc.unary_stream_rpc_method_handler(lambda *_, answer=answer: iter([answer]))
        for key, answer in answers.items()
    }
    foreign.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("privtuner.Linear", handlers),))
    port = foreign.add_insecure_port("127.0.0.1:0")
    foreign.start()
    with RemoteTransport(f"127.0.0.1:{port}", retries=Retries(0)) as transport, pytest.raises(ServiceError):
        {"Hello": transport.hello, "Bundle": transport.fetch_bundle}.get(
            name, lambda: list(transport.apply("fc", REQUEST))
        )()
    foreign.stop(0).wait()


def endless(message):
    while True:
        yield message


def test_endless_bundles_are_refused():
    with answering(Hello=lambda: iter([HELLO]), Bundle=lambda: endless(b"\1\0a" + bytes(1 << 19))) as transport:
        transport._max_bundle_bytes = 4 << 20
        with pytest.raises(MessageError, match="more than 4194304 bytes"):
            transport.fetch_bundle()


def test_endless_blocks_are_refused(monkeypatch):
    monkeypatch.setattr("privtuner.service.client.LARGEST_BYTES", 4 * MESSAGE_BYTES)
    with (
        answering(Hello=lambda: iter([HELLO]), Apply=lambda: endless(bytes(MESSAGE_BYTES))) as transport,
        pytest.raises(MessageError, match="at most"),
    ):
        list(transport.apply("fc", REQUEST))


@pytest.mark.parametrize("name", ["Bundle", "Apply"])
def test_servers_that_stall_are_left(name):
    go_on = threading.Event()

    def stalling():
        go_on.wait(20)
        return iter(())

    with answering(Hello=lambda: iter([HELLO]), **{name: stalling}) as transport:
        with pytest.raises(ServiceError, match=r"made no progress in .* for 0\.5 s"):
            transport.fetch_bundle() if name == "Bundle" else list(transport.apply("fc", REQUEST))
        go_on.set()


def test_streams_that_send_nothing_stop_nobody_and_end(split):
    """Of one client, as many as it likes."""
    with served(split, patience=0.7) as (server, channel), RemoteTransport(server.address) as transport:
        never = threading.Event()

        def silent():
            never.wait(20)
            yield from ()

        calls = [
            channel.stream_stream(method(name))(silent(), metadata=SAID)
            for name in ("Hello", "Stats", "Bundle", "Job", "Apply")
            for _ in range(8)
        ]
        assert transport.hello()["layers"] == 1
        assert transport.counts().bundles == 0
        codes = {refused(call).code() for call in calls[32:]}
        never.set()
        assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert list(transport.apply("fc", REQUEST))
        assert (server._calls.held, server._memory.held) == (0, 0)


def test_readers_that_stop_are_left(split):
    with served(split, patience=0.5) as (server, channel), RemoteTransport(server.address) as transport:
        calls = [channel.unary_stream(method("Bundle"))(b"", metadata=SAID) for _ in range(8)]
        first = [next(call) for call in calls]
        assert transport.hello()["layers"] == 1
        for _ in range(400):
            if not server._calls.held:
                break
            threading.Event().wait(0.05)
        assert server._calls.held == 0
        assert all(first)
        assert {refused(call).code() for call in calls} == {grpc.StatusCode.CANCELLED}


EVIL = "tiny\x1b[2J\x1b]0;owned\x07\u202e\n"


def test_text_of_a_server_reaches_no_terminal():
    """Neither in what it says of itself, nor in its reasons."""

    def refusing():
        raise RuntimeError(EVIL)
        yield

    hello = json.dumps({**SAYS, "model": EVIL, EVIL: EVIL}).encode()
    counted = {"layer": EVIL, "direction": EVIL, **dataclasses.asdict(LayerCounts())}
    counts = json.dumps({"layers": [counted], "bundles": 0, "refusals": {}, "tenant": EVIL}).encode()
    with answering(Hello=lambda: iter([hello]), Stats=lambda: iter([counts]), Apply=refusing) as transport:
        told = transport.hello()
        shown = [*told, *(value for value in told.values() if isinstance(value, str))]
        shown += [text for names in transport.counts().layers for text in names]
        with pytest.raises(ServiceError) as caught:
            list(transport.apply("fc", REQUEST))
        shown.append(str(caught.value))
    assert told["model"] == "tiny?[2J?]0;owned???"
    assert "tiny?[2J" in shown[-1]
    assert all(text.isprintable() for text in shown)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": -1},
        {"layers": True},
        {"layers": 1e999},
        {"layers": "1"},
        {"bundle_bytes": 1 << 70},
        {"sealed": 1},
        {"model": None},
        {"version": ["1"]},
        {"more": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]},
        {"more": "x" * (1 << 16)},
    ],
)
def test_a_hello_with_another_type_is_none(changes):
    with (
        answering(Hello=lambda: iter([json.dumps({**SAYS, **changes}).encode()])) as transport,
        pytest.raises(ServiceError, match="is no privtuner server"),
    ):
        transport.hello()


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"layers": 1e999}', b'{"layers": {}, "bundles": 0, "refused": 0}'])
def test_counts_that_are_none(data):
    with (
        answering(Hello=lambda: iter([HELLO]), Stats=lambda: iter([data])) as transport,
        pytest.raises(MessageError, match="the server.s counts"),
    ):
        transport.counts()

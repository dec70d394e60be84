"""What carries requests to a server and replies back: inside the process, over gRPC, and one that a user wrote."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import linear_cases as cases
from connections import Connection
from openfhe_cases import ClearOwner
from privtuner import linear, openfhe
from privtuner.cpu import CpuServer
from privtuner.errors import InputError, MessageError, PrivtunerError
from privtuner.nn import EncryptedLinear, GroupSpec, OwnerBundle, Session, Split, traffic_of
from privtuner.schemes import SCHEMES, LocalTransport, Transport, scheme
from privtuner.service import RemoteTransport, Server

LAYERS = {"fc": cases.layer(300, 40), "square": cases.layer(64, 64, seed=3)}


class Mailbox:
    """A transport of a user's own: messages through a list, a thread that answers, no class of the package above it."""

    def __init__(self, host):
        self._host, self.seen = host, []

    def apply(self, layer, request):
        self.seen.append(bytes(request))
        blocks, there = [], threading.Semaphore(0)

        def answer():
            try:
                for block in self._host.answer(layer, bytes(request)):
                    blocks.append(bytes(block))
                    there.release()
            except Exception as error:
                blocks.append(error)
            blocks.append(None)
            there.release(2)

        threading.Thread(target=answer, daemon=True).start()
        for number in range(1 << 30):
            there.acquire()
            if isinstance(blocks[number], Exception):
                raise blocks[number]
            if blocks[number] is None:
                return
            self.seen.append(blocks[number])
            yield blocks[number]


class Recording(LocalTransport):
    """Inside the process, and keeps what passed."""

    def __init__(self, layers, **options):
        super().__init__(layers, **options)
        self.seen = []

    def apply(self, layer, request):
        self.seen.append(bytes(request))
        for block in super().apply(layer, request):
            self.seen.append(bytes(block))
            yield block


@contextmanager
def opened(kind, server=None) -> Iterator[Transport]:
    """A transport of one kind to the layers; its ``seen`` holds all bytes that passed."""
    if kind != "grpc":
        local = Recording(LAYERS, server=server)
        yield local if kind == "local" else Mailbox(local.host)
        local.host.close()
        return
    groups = {name: GroupSpec("linear", {name: layer.spec.d_out}) for name, layer in LAYERS.items()}
    specs = {name: layer.spec for name, layer in LAYERS.items()}
    bundle = OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, specs, {})
    with (
        Server(Split(LAYERS, bundle), server=server) as running,
        Connection(running.address) as line,
        RemoteTransport(line.address) as transport,
    ):
        transport.seen = line.seen
        yield transport


KINDS = ["local", "grpc", "mailbox"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def transport(request):
    with opened(request.param) as transport:
        yield transport


def encrypted(tokens=9, layer="fc", direction="forward", seed=0):
    prepared = LAYERS[layer]
    return linear.encrypt(cases.batch(tokens, cases.features_in(prepared, direction), seed), prepared.spec, direction)


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_a_reply_is_that_of_the_layer_in_order(transport, direction):
    assert isinstance(transport, Transport)
    request, _ = encrypted(direction=direction)
    blocks = [bytes(block) for block in transport.apply("fc", request)]
    assert blocks == list(linear.apply_blocks(LAYERS["fc"], request, 256))
    assert len(blocks) == (2 if direction == "forward" else 1)


def test_a_layer_on_it_computes_counts_and_has_gradients(transport):
    layer = EncryptedLinear.single("fc", LAYERS["fc"].spec, Session(transport, verify_every=0))
    x = torch.from_numpy(cases.batch(9, 40)).requires_grad_()
    g = torch.from_numpy(cases.batch(9, 300))
    y = layer(x)
    y.backward(g)
    cases.check_result(LAYERS["fc"], x.detach().numpy(), y.detach().numpy(), "forward")
    cases.check_result(LAYERS["fc"], g.numpy(), x.grad.numpy(), "backward")
    counted = traffic_of(layer).total()
    sent = [encrypted(direction=direction)[0] for direction in cases.DIRECTIONS]
    assert (counted.requests, counted.tokens, counted.bytes_up) == (2, 18, sum(map(len, sent)))
    replies = [block for one in sent for block in linear.apply_blocks(LAYERS["fc"], one, 256)]
    assert counted.bytes_down == sum(map(len, replies))


@pytest.mark.parametrize("name", SCHEMES)
def test_it_carries_every_scheme(kind, name, monkeypatch):
    monkeypatch.setattr(openfhe, "OpenFheClient", ClearOwner)
    with opened(kind, scheme(name).server()) as transport:
        layer = EncryptedLinear.single("fc", LAYERS["fc"].spec, Session(transport, scheme=name, verify_every=0))
        x = cases.batch(9, 40)
        y = layer(torch.from_numpy(x)).detach().numpy()
        assert np.abs(y - cases.product(LAYERS["fc"], x)).max() < 1e-2
        for other in set(SCHEMES) - {name}:
            layer = EncryptedLinear.single("fc", LAYERS["fc"].spec, Session(transport, scheme=other))
            with pytest.raises(PrivtunerError, match=f"the scheme {name}, the request carries {other}"):
                layer(torch.from_numpy(x))


def test_an_unknown_layer_is_named(transport):
    with pytest.raises(PrivtunerError, match="no layer is called 'nowhere'; fetch the bundle of this server"):
        list(transport.apply("nowhere", encrypted()[0]))


def test_a_malformed_request_is_refused_and_the_next_one_answered(transport):
    request, secret = encrypted()
    damaged = bytearray(request)
    damaged[len(request) // 2] ^= 1
    for bad, name, message in (
        (b"", "fc", "shorter than its head"),
        (request[:1], "fc", "shorter than its head"),
        (request[:63], "fc", "shorter than its head"),
        (request[:200], "fc", "truncated"),
        (request + b"\0", "fc", "1 bytes too many"),
        (bytes(damaged), "fc", "checksum mismatch"),
        (request, "square", "meant for another layer"),
        (linear.apply(LAYERS["fc"], request), "fc", "expected a message of kind request, got reply"),
    ):
        with pytest.raises(PrivtunerError, match=message):
            list(transport.apply(name, bad))
    random = np.random.default_rng(1)
    for _ in range(30):
        mutated = bytearray(request)
        mutated[random.integers(len(mutated))] ^= 1 << random.integers(8)
        with pytest.raises(PrivtunerError):
            list(transport.apply("fc", bytes(mutated[: random.integers(1, len(mutated) + 1)])))
    assert linear.decrypt(transport.apply("fc", request), secret).shape == (9, 300)


def test_mixed_up_replies_are_noticed(transport):
    for other in (encrypted(layer="square"), encrypted(layer="square", direction="backward")):
        _, secret = encrypted(layer="square")
        with pytest.raises(MessageError, match="answers another request"):
            linear.decrypt(transport.apply("square", other[0]), secret)
    request, secret = encrypted()
    blocks = [bytes(block) for block in transport.apply("fc", request)]
    with pytest.raises(MessageError, match="starts at output 256, expected 0"):
        linear.decrypt(blocks[::-1], secret)


class Behaving(CpuServer):
    """Calls ``behave(blocks)`` in place of yielding the right blocks."""

    def __init__(self, behave):
        self.behave = behave

    def answer(self, prepared, request, block_bytes=0):
        return self.behave(linear.apply_blocks(prepared, request, 64))


def test_the_first_block_arrives_before_the_last_is_computed(kind):
    go_on = threading.Event()

    def behave(blocks):
        yield next(blocks)
        assert go_on.wait(20)
        yield from blocks

    with opened(kind, Behaving(behave)) as transport:
        request, secret = encrypted()
        reply = iter(transport.apply("fc", request))
        first = next(reply)
        go_on.set()
        assert linear.decrypt([first, *reply], secret).shape == (9, 300)


def test_a_fault_of_the_server_ends_the_reply(kind):
    def behave(blocks):
        yield next(blocks)
        raise MessageError("the weights are gone")

    with opened(kind, Behaving(behave)) as transport:
        request, secret = encrypted()
        with pytest.raises(PrivtunerError):
            linear.decrypt(transport.apply("fc", request), secret)
        assert secret.used


def test_many_threads_share_it(transport):
    def work(seed):
        x = cases.batch(9, 40, seed)
        request, secret = linear.encrypt(x, LAYERS["fc"].spec)
        cases.check_result(LAYERS["fc"], x, linear.decrypt(transport.apply("fc", request), secret), "forward")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(24)))


def test_nothing_in_clear_is_on_the_wire(kind):
    """No row of the batch, the result or the weight, in any of the forms they have in memory."""
    with opened(kind) as transport:
        layer = EncryptedLinear.single("square", LAYERS["square"].spec, Session(transport, verify_every=0))
        x = torch.from_numpy(cases.batch(9, 64))
        y = layer(x).detach()
        wire = b"".join(transport.seen)
        assert b"square" in wire or kind != "grpc"
    request_bytes = len(encrypted(layer="square")[0])
    assert len(wire) > request_bytes
    weights = LAYERS["square"].quantised()
    for rows in (x.numpy(), x.numpy().T, y.numpy(), y.numpy().T, weights, weights.T):
        for row in rows:
            for form in (row, row.astype(np.float64)):
                assert np.ascontiguousarray(form)[:8].tobytes() not in wire


def test_closing(kind):
    """A transport that is closed says so; layers in this process answer again."""
    with opened(kind) as transport:
        request, _ = encrypted()
        expected = [bytes(block) for block in transport.apply("fc", request)]
        if kind == "grpc":
            transport.close()
            transport.close()
            with pytest.raises(PrivtunerError, match="was closed; open another"):
                list(transport.apply("fc", request))
        else:
            (transport.host if kind == "local" else transport._host).close()
            assert [bytes(block) for block in transport.apply("fc", request)] == expected


def test_block_bytes_are_refused():
    with pytest.raises(InputError, match="block_bytes is 0; give at least 1"):
        LocalTransport(LAYERS, block_bytes=0)
    request, secret = encrypted()
    blocks = list(LocalTransport(LAYERS, block_bytes=1).apply("fc", request))
    assert len(blocks) == 10
    assert linear.decrypt(blocks, secret).shape == (9, 300)

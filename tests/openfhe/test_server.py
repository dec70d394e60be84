"""Servers and data owners of the engine "openfhe" around its messages: none of this needs OpenFHE."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from message_cases import resealed
from nn_cases import tiny_bert, tokens, weight_in_force
from openfhe_cases import BITS, ClearOwner, N, apply_blocks
from privtuner import _core, linear, openfhe
from privtuner.cpu import CpuClient, CpuServer
from privtuner.errors import EngineError, InputError, MessageError, ServiceError
from privtuner.nn import EncryptedLinear, GroupSpec, OwnerBundle, Session, Split, build, split, traffic_of
from privtuner.openfhe import library, messages
from privtuner.openfhe.messages import BLOCK, REQUEST, Head
from privtuner.openfhe.server import OpenFheServer
from privtuner.schemes import SCHEMES, LocalTransport, scheme
from privtuner.service import RemoteTransport, Server
from privtuner.service.counts import LayerCounts

D_OUT, D_IN = 300, 40
PREPARED = linear.prepare(np.random.default_rng(1).standard_normal((D_OUT, D_IN)))
LARGE = (1152921504606830593, 1152921504606791681)
"""The largest primes below 2^60 that are 1 modulo 2,048."""


def batch(rows=9, features=D_IN):
    return np.random.default_rng(0).standard_normal((rows, features)).astype(np.float32)


def request_of(rows=9, direction="forward"):
    return ClearOwner().encrypt(batch(rows, D_IN if direction == "forward" else D_OUT), PREPARED.spec, direction)[0]


@pytest.fixture
def clear_owner(monkeypatch):
    monkeypatch.setattr(openfhe, "OpenFheClient", ClearOwner)


@pytest.fixture
def without_openfhe(monkeypatch):
    monkeypatch.setattr(library, "_module", lambda: "looked for in no place; install it")


# The product


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("preset", linear.PRESETS)
def test_both_presets_at_the_largest_moduli(preset, direction):
    prepared = linear.prepare(np.random.default_rng(2).standard_normal((34, 3)), preset)
    weights = prepared.quantised().astype(object)
    weights = weights if direction == "forward" else weights.T
    head = Head(REQUEST, direction, prepared.spec.id, bytes(16), N, LARGE, N // 2 + 1, weights.shape[1])
    words = np.empty(head.shape, np.uint64)
    for tower, modulus in enumerate(LARGE):
        words[:, tower] = np.random.default_rng(tower).integers(0, modulus, words[:, tower].shape, np.uint64)
        words[0, tower, :, :, ::5] = modulus - 1
    done = 0
    for data in apply_blocks(prepared, messages.write(head, [words]), 32):
        found, received = messages.read(data, BLOCK)
        assert found == replace(head, kind=BLOCK, features=found.features, first=done, total=len(weights))
        rows = weights[done : done + found.features]
        for group in range(2):
            for tower, modulus in enumerate(LARGE):
                want = np.tensordot(rows, words[group, tower].astype(object), 1) % modulus
                assert (received[group, tower].astype(object) == want).all()
        done += found.features
    assert done == len(weights)


def test_requests_at_any_address():
    request = request_of()
    want = list(apply_blocks(PREPARED, request))
    for offset in (1, 4):
        assert list(apply_blocks(PREPARED, memoryview(bytes(offset) + request)[offset:])) == want


def test_residues_are_packed_once_and_multiplied_block_by_block(monkeypatch):
    calls, real = [], _core.ResidueProduct

    class Product:
        def __init__(self, *arguments):
            self.real = real(*arguments)
            calls.append("pack")

        def multiply(self, begin, count):
            calls.append((begin, count))
            return self.real.multiply(begin, count)

    monkeypatch.setattr(_core, "ResidueProduct", Product)
    blocks = apply_blocks(PREPARED, request_of(N // 2 + 1), 100)
    assert calls == ["pack"] * 2  # one for each group
    next(blocks)
    assert calls[2:] == [(0, 128)] * 2
    assert len(list(blocks)) == 2
    assert calls[4:] == [(128, 128)] * 2 + [(256, 44)] * 2


def test_a_fault_is_found_before_any_block():
    damaged = bytearray(request_of())
    damaged[-5] ^= 1
    with pytest.raises(MessageError, match="checksum mismatch"):
        apply_blocks(PREPARED, bytes(damaged))


# Servers and clients by the name of their scheme


def test_servers_by_name():
    assert [scheme(name).server().scheme for name in SCHEMES] == [one.name for one in SCHEMES.values()] == list(SCHEMES)
    assert isinstance(scheme("linear").server(), CpuServer)
    assert isinstance(scheme("openfhe").server(), OpenFheServer)
    with pytest.raises(InputError, match="unknown scheme 'OpenFHE'; choose linear or openfhe"):
        scheme("OpenFHE")
    with pytest.raises(InputError, match="the scheme linear does not run on 'tpu': choose device cpu or cuda$"):
        scheme("linear").server("tpu")


@pytest.mark.usefixtures("clear_owner")
def test_clients_by_name():
    assert isinstance(scheme("linear").client(), CpuClient)
    assert isinstance(scheme("openfhe").client(), ClearOwner)
    assert scheme("linear").client().scheme == "linear"
    with pytest.raises(InputError, match="mask_cache_bytes = -1"):
        scheme("linear").client(mask_cache_bytes=-1)


@pytest.mark.usefixtures("without_openfhe")
def test_servers_do_without_openfhe_and_owners_do_not():
    assert list(scheme("openfhe").server().answer(PREPARED, request_of()))
    for make in (lambda: scheme("openfhe").client(), lambda: Session(LocalTransport({}), scheme="openfhe")):
        with pytest.raises(EngineError, match="not available: looked for in no place; install it"):
            make()


# Layers and models


def close(y, exact):
    """Up to the rounding of a batch to BITS bits, carried through 300 products, and of results to float32."""
    return np.abs(y - exact).max() < (D_OUT * 2.0**-BITS + 2.0**-23) * np.abs(exact).max()


@pytest.mark.usefixtures("clear_owner")
@pytest.mark.parametrize("rows", [1, N // 2, N + 1])
def test_a_layer_forward_and_backward(rows):
    transport = LocalTransport({"fc": PREPARED}, server=OpenFheServer())
    layer = EncryptedLinear.single("fc", PREPARED.spec, Session(transport, scheme="openfhe", verify_every=0))
    x, g = torch.from_numpy(batch(rows)).requires_grad_(), torch.from_numpy(batch(rows, D_OUT))
    y = layer(x)
    y.backward(g)
    weight = weight_in_force(PREPARED)
    assert close(y.detach().numpy(), x.detach().double().numpy() @ weight.T)
    assert close(x.grad.numpy(), g.double().numpy() @ weight)
    counted = traffic_of(layer).total()
    up = len(request_of(rows)) + len(request_of(rows, "backward"))
    assert (counted.requests, counted.tokens, counted.bytes_up) == (2, 2 * rows, up)


@pytest.mark.usefixtures("clear_owner")
def test_the_session_says_which_layer_refused():
    session = Session(LocalTransport({"fc": PREPARED}, server=OpenFheServer()), scheme="openfhe")
    for direction, what in (("forward", "input"), ("backward", "output gradient")):
        with pytest.raises(InputError, match=rf"layer 'fc', {what}: x has shape \(2, 7\)"):
            session.product("fc", PREPARED.spec, batch(2, 7), direction)
    assert session.meter.total().requests == 0


@pytest.mark.usefixtures("clear_owner")
def test_a_whole_model_gives_what_the_linear_scheme_gives():
    parts = split(tiny_bert())
    ids = tokens(2, 5)
    found = {}
    for name in SCHEMES:
        model = build(parts.bundle, Session(LocalTransport(parts.server, server=scheme(name).server()), scheme=name))
        with torch.no_grad():
            found[name] = model(ids).last_hidden_state
    # Values up to 3.3; the noise of the linear scheme makes 2e-5 of the difference, fresh in every run.
    assert torch.allclose(found["openfhe"], found["linear"], rtol=0, atol=2e-4)
    with pytest.raises(InputError, match="unknown scheme 'cuda'"):
        build(parts.bundle, Session(LocalTransport(parts.server), scheme="cuda"))


# Over a connection


@contextmanager
def connected(name):
    groups = {"fc": GroupSpec("linear", {"fc": D_OUT})}
    bundle = OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, {"fc": PREPARED.spec}, {})
    server = Server(Split({"fc": PREPARED}, bundle), server=scheme(name).server())
    with server, RemoteTransport(server.address) as transport:
        yield server, transport


@pytest.mark.parametrize("name", SCHEMES)
def test_hello_names_the_scheme(name):
    with connected(name) as (_, transport):
        assert transport.hello()["scheme"] == name


def test_replies_and_counts_of_a_server():
    with connected("openfhe") as (server, transport):
        want = {}
        for direction, rows in (("forward", 9), ("backward", N // 2 + 1)):
            request = request_of(rows, direction)
            blocks = list(transport.apply("fc", request))
            assert blocks == list(apply_blocks(PREPARED, request, 64 if rows == 9 else 32))
            size = sum(map(len, blocks))
            want["fc", direction] = LayerCounts(1, rows, rows, len(request), size)
        found = server.counts()
    clocks = {"seconds": 0.0, "histogram": LayerCounts().histogram}
    assert {key: replace(counts, **clocks) for key, counts in found.layers.items()} == want
    assert found.refused == 0


@pytest.mark.usefixtures("clear_owner")
def test_a_layer_through_a_server():
    with connected("openfhe") as (_, transport):
        layer = EncryptedLinear.single("fc", PREPARED.spec, Session(transport, scheme="openfhe", verify_every=0))
        x = torch.from_numpy(batch())
        assert close(layer(x).detach().numpy(), x.double().numpy() @ weight_in_force(PREPARED).T)


def test_requests_of_the_other_scheme_are_refused():
    with connected("linear") as (server, transport):
        with pytest.raises(
            ServiceError,
            match="the scheme linear, the request carries openfhe: .* serve --scheme openfhe'",
        ):
            list(transport.apply("fc", request_of()))
        assert server.counts().refused == 1
    with connected("openfhe") as (server, transport):
        with pytest.raises(
            ServiceError,
            match="carries linear: .* serve --scheme linear', or train with --scheme openfhe",
        ):
            list(transport.apply("fc", linear.encrypt(batch(), PREPARED.spec)[0]))
        assert server.counts().refused == 1


def test_a_server_survives_requests_that_are_none():
    request = request_of()
    with connected("openfhe") as (server, transport):
        for wrong, reason in (
            (b"", "shorter than its head"),
            (request[:70], "truncated"),
            (request[:-1], "truncated"),
            (resealed(request, tokens=1 << 24), "bytes where .* are due"),
            (request[:64] + bytes(8) + request[72:], "checksum mismatch"),
            (next(apply_blocks(PREPARED, request)), "expected a message of kind openfhe request, got openfhe reply"),
        ):
            with pytest.raises(ServiceError, match=f"refused layer 'fc': .*{reason}"):
                list(transport.apply("fc", wrong))
        other = linear.prepare(np.ones((D_OUT, D_IN)))
        with pytest.raises(ServiceError, match="meant for another layer, or for other weights"):
            list(transport.apply("fc", ClearOwner().encrypt(batch(), other.spec, "forward")[0]))
        assert list(transport.apply("fc", request))
        assert server.counts().refused == 7

"""Adapters held by the server: gradients are the clear ones, steps learn, malformed requests are refused."""

import struct

import numpy as np
import pytest

from privtuner import ckks
from privtuner.errors import CkksError, InputError, MessageError
from privtuner.held.layer import HeldClient, HeldLora, HeldPublic, LoraAdapter
from privtuner.held.serve import held_server
from privtuner.held.train import ClearDevice, train_held
from privtuner.sealed.exchange import request_shape
from privtuner.service import RemoteTransport

PARAMETERS = ckks.Parameters.INSECURE(depth=2)
D_IN, D_OUT, R = 11, 5, 2


def make(**options):
    weight = 0.3 * np.random.default_rng(0).standard_normal((D_OUT, D_IN))
    return HeldLora(weight, R, 4.0, **{"parameters": PARAMETERS, "lr": 0.05, **options})


def data(rows=40):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, D_IN))
    return x, (x @ rng.standard_normal((D_IN, D_OUT))).argmax(axis=1)


def test_outputs_and_gradients_are_the_clear_ones():
    layer = make()
    device = HeldClient(layer.answer, allow_insecure=True)
    adapter = layer.adapter(device.device)
    adapter.b = np.random.default_rng(2).standard_normal((D_OUT, R))
    x, _ = data()
    g = 1e-3 * np.random.default_rng(3).standard_normal((len(x), D_OUT))
    effective = layer.weight + 2.0 * adapter.b @ adapter.a
    y = x @ effective.T
    rounding = np.abs(effective).max() / 32639 / 2
    assert np.abs(device.forward(x) - y).max() <= rounding * np.abs(x).sum(axis=1).max() + 1e-4
    da, db = device.gradient(x, g)
    for ours, clear in ((da, (g @ adapter.b).T @ x), (db, g.T @ (x @ adapter.a.T))):
        assert ours.shape == clear.shape
        # Noise that drowns the ciphertext's, and rounding of A and B to 16 bits.
        assert np.abs(ours - clear).max() < 3e-3 * np.abs(clear).max()


def test_gradients_carry_fresh_noise():
    device = HeldClient(make().answer, allow_insecure=True)
    x, _ = data(3)
    g = np.ones((3, D_OUT))
    first, second = device.gradient(x, g), device.gradient(x, g)
    assert (first[1] != second[1]).all()


def test_steps_learn_as_in_the_clear():
    layer = make()
    x, labels = data()
    options = {"steps": 12, "batch_size": 32, "seed": 0}
    encrypted = train_held(HeldClient(layer.answer, allow_insecure=True), x, labels, **options)
    clear = train_held(ClearDevice(make()), x, labels, **options)
    assert encrypted == pytest.approx(clear, abs=0.02)
    assert encrypted[-1] < 0.8 * encrypted[0]


def test_batches_without_a_seed_are_drawn_anew():
    x, labels = data()

    def losses(seed):
        np.random.seed(0)  # noqa: NPY002 - the global generator is what must not matter
        return train_held(ClearDevice(make()), x, labels, steps=3, batch_size=8, seed=seed)

    assert losses(1) == losses(1) != losses(2)
    assert losses(None) != losses(None)


def test_devices_have_adapters_of_their_own():
    layer = make(max_devices=2)
    one, two = HeldClient(layer.answer, allow_insecure=True), HeldClient(layer.answer, allow_insecure=True)
    x, _ = data(2)
    before = two.forward(x)
    one.step(np.ones((R, D_IN)), np.ones((D_OUT, R)))
    assert np.abs(two.forward(x) - before).max() < 1e-3
    assert np.abs(one.forward(x) - before).max() > 0.005
    with pytest.raises(MessageError, match="adapters of 2 devices and takes no more"):
        HeldClient(layer.answer, allow_insecure=True).forward(x)


@pytest.mark.parametrize("adam", [False, True])
def test_adapter_steps(adam):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    adapter = LoraAdapter(rng.standard_normal((2, 3)), rng.standard_normal((4, 2)), lr=0.1, adam=adam)
    twins = [torch.tensor(matrix, requires_grad=True) for matrix in (adapter.a, adapter.b)]
    optimiser = torch.optim.Adam(twins, lr=0.1, eps=1e-4) if adam else torch.optim.SGD(twins, lr=0.1)
    for _ in range(4):
        da, db = rng.standard_normal((2, 3)), rng.standard_normal((4, 2))
        adapter.step(da, db)
        for twin, gradient in zip(twins, (da, db), strict=True):
            twin.grad = torch.tensor(gradient)
        optimiser.step()
    for twin, matrix in zip(twins, (adapter.a, adapter.b), strict=True):
        assert np.abs(twin.detach().numpy() - matrix).max() < 1e-12


def test_over_grpc():
    layer = make()
    x, labels = data()
    with held_server(layer) as server, RemoteTransport(server.address) as transport:
        device = HeldClient(lambda request: transport.apply("held", request), allow_insecure=True)
        assert device.public == layer.public
        losses = train_held(device, x, labels, steps=2, batch_size=8, seed=0)
        counts = transport.counts().layers
    assert losses == pytest.approx(train_held(ClearDevice(make()), x, labels, steps=2, batch_size=8, seed=0), abs=0.01)
    assert {key: (entry.requests, entry.tokens) for key, entry in counts.items()} == {
        ("held", "describe"): (1, 0),
        ("held", "forward"): (2, 16),
        ("held", "gradient"): (2, 16),
        ("held", "step"): (2, 0),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones(3)}, r"weight has shape \(3,\)"),
        ({"weight": np.full((3, 3), np.nan)}, "weight has shape"),
        ({"r": 0}, "r is 0; a layer of shape .* takes ranks from 1 to 4"),
        ({"r": 5}, "r is 5"),
        ({"alpha": -1.0}, "alpha is -1.0; give a positive number"),
        ({"lr": np.inf}, "lr is inf"),
        ({"parameters": ckks.Parameters.INSECURE(depth=1)}, "has 1 levels, a held adapter takes 2"),
    ],
)
def test_refuses_to_prepare(change, message):
    with pytest.raises(InputError, match=message):
        HeldLora(**{"weight": np.ones((3, 4)), "r": 2, "parameters": PARAMETERS, **change})


def test_refuses_to_ask():
    device = HeldClient(make().answer, allow_insecure=True)
    with pytest.raises(InputError, match=r"x has shape \(3,\)"):
        device.forward(np.ones(3))
    with pytest.raises(InputError, match="g holds NaN"):
        device.gradient(np.ones((1, D_IN)), np.full((1, D_OUT), np.nan))
    with pytest.raises(InputError, match="x has 1 tokens and g 2"):
        device.gradient(np.ones((1, D_IN)), np.ones((2, D_OUT)))
    with pytest.raises(CkksError, match="above the declared bound 8"):
        device.forward(np.full((1, D_IN), 9.0))


def captured(ask):
    """The request that ``ask`` sends."""
    layer, requests = make(), []

    def send(request):
        requests.append(request)
        return layer.answer(request)

    device = HeldClient(send, layer.public, allow_insecure=True)
    ask(device)
    return layer, requests[0]


@pytest.mark.parametrize(
    ("ask", "direction", "tokens"),
    [
        (lambda device: device.forward(np.ones((3, D_IN))), "forward", 3),
        (lambda device: device.gradient(np.ones((3, D_IN)), np.ones((3, D_OUT))), "gradient", 3),
        (lambda device: device.step(np.ones((R, D_IN)), np.ones((D_OUT, R))), "step", 0),
    ],
)
def test_malformed_requests(ask, direction, tokens):
    layer, request = captured(ask)
    assert request_shape(request) == (direction, tokens)
    assert list(layer.answer(request))
    for at, new in [(0, b"X"), (4, b"\x09"), (7, b"\x01"), (7, b"\x09"), (8, bytes(16)), (44, b"\x01"), (48, b"\x0f")]:
        changed = bytearray(request)
        changed[at : at + len(new)] = new
        with pytest.raises(MessageError):
            list(layer.answer(bytes(changed)))
    for length in (0, 40, 60, len(request) // 2, len(request) - 1):
        with pytest.raises(MessageError):
            list(layer.answer(request[:length]))


def test_steps_that_are_no_gradient():
    layer, request = captured(lambda device: device.step(np.ones((R, D_IN)), np.ones((D_OUT, R))))
    adapter = layer.adapter(request[56:72])
    before = adapter.a.copy()
    with pytest.raises(MessageError, match="the gradient holds NaN or infinity"):
        list(layer.answer(request[:-8] + struct.pack("<d", np.nan)))
    assert (adapter.a == before).all()


def test_public_part_travels():
    public = make().public
    assert HeldPublic.from_bytes(public.to_bytes()) == public
    for at, new in [(0, b"X"), (4, b"\x09"), (24, bytes(4)), (32, bytes(4)), (50, b"\xff")]:
        changed = bytearray(public.to_bytes())
        changed[at : at + len(new)] = new
        with pytest.raises(MessageError):
            HeldPublic.from_bytes(bytes(changed))
    with pytest.raises(MessageError, match="truncated"):
        HeldPublic.from_bytes(public.to_bytes()[:20])


def test_refused_requests_leave_no_adapter():
    _, request = captured(lambda device: device.forward(np.ones((1, D_IN))))
    other = make(max_devices=1)
    for changed in (request[:-1], request[:40] + b"\2" + request[41:]):
        with pytest.raises(MessageError):
            list(other.answer(changed))
    HeldClient(other.answer, allow_insecure=True).forward(np.ones((1, D_IN)))

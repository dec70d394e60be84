"""Adapters held by the server: gradients are the clear ones, steps learn, malformed requests are refused."""

import struct

import numpy as np
import pytest

from message_cases import resealed
from privtuner import ckks, wire
from privtuner.errors import CkksError, InputError, MessageError
from privtuner.held.layer import HeldClient, HeldLora, HeldPublic, LoraAdapter
from privtuner.held.serve import held_server
from privtuner.held.train import ClearDevice, train_held
from privtuner.sealed.exchange import write_request
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
    adapter.b = device.adapter.b = np.random.default_rng(2).standard_normal((D_OUT, R))
    x, _ = data()
    g = 1e-3 * np.random.default_rng(3).standard_normal((len(x), D_OUT))
    effective = layer.weight + 2.0 * adapter.b @ adapter.a
    y = x @ effective.T
    rounding = layer.public.unit(adapter) / 2
    assert (
        layer.public.unit(adapter) <= (np.abs(layer.weight).max() + np.abs(2.0 * adapter.b @ adapter.a).max()) / 32639
    )
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
        ({"input_bound": 0.0}, "input_bound is 0.0; give a positive number"),
        ({"seed": -1}, "seed is -1; give a whole number"),
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
    with pytest.raises(InputError, match=r"gradients of shapes \(2, 11\) and \(2, 5\); pass \(2, 11\) and \(5, 2\)"):
        device.step(np.ones((R, D_IN)), np.ones((R, D_OUT)))


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
    assert wire.peek(request)[:2] == ("sealed_request", direction)
    assert wire.peek(request).tokens == tokens
    assert list(layer.answer(request))
    for change in (
        {"kind": "request"},
        {"direction": "backward"},
        {"direction": {"forward": "gradient"}.get(direction, "forward")},
        {"subject": bytes(16)},
        {"parameters": 1},
        {"features": 1},
        {"cut": 8},
        {"cut": 24},
        *([{"tokens": 0}, {"tokens": 4}, {"tokens": 513}] if tokens else []),
    ):
        with pytest.raises(MessageError):
            list(layer.answer(resealed(request, **change)))
    for at, new in [(0, b"\x0f"), (24, b"\xff" * 8), (len(request) - 72 - 1, b"\xff" * 99)]:
        with pytest.raises(MessageError):
            list(layer.answer(resealed(request, (at, new))))
    for length in (0, 40, 75, len(request) // 2, len(request) - 1):
        with pytest.raises(MessageError):
            list(layer.answer(request[:length]))


def test_steps_that_are_no_gradient():
    layer, request = captured(lambda device: device.step(np.ones((R, D_IN)), np.ones((D_OUT, R))))
    adapter = layer.adapter(request[80:96])
    before = adapter.a.copy()
    with pytest.raises(MessageError, match="the gradient holds NaN or infinity"):
        list(layer.answer(resealed(request, (len(request) - 72 - 8, struct.pack("<d", np.nan)))))
    assert (adapter.a == before).all()


def test_public_part_travels():
    public = make().public
    message = public.to_bytes()
    assert HeldPublic.from_bytes(message) == public
    for at, new in [
        (0, bytes(4)),
        (8, bytes(4)),
        (8, struct.pack("<I", 12)),
        (12, b"\2"),
        *((at, struct.pack("<d", value)) for at in (16, 24, 32, 40) for value in (0.0, -1.0, np.inf, np.nan)),
        (48, struct.pack("<q", -1)),
        (60, b"\xff"),
    ]:
        with pytest.raises(MessageError):
            HeldPublic.from_bytes(resealed(message, (at, new)))
    for field in ({"tokens": 1}, {"parameters": 1}, {"direction": "step"}, {"kind": "sealed_public"}):
        with pytest.raises(MessageError):
            HeldPublic.from_bytes(resealed(message, **field))
    for cut in (message[:20], message[:-1], resealed(message, cut=20), resealed(message, cut=100)):
        with pytest.raises(MessageError, match=r"truncated|shorter than its head"):
            HeldPublic.from_bytes(cut)


def test_refused_requests_leave_no_adapter():
    _, request = captured(lambda device: device.forward(np.ones((1, D_IN))))
    other = make(max_devices=1)
    for changed in (request[:-1], resealed(request, tokens=2)):
        with pytest.raises(MessageError):
            list(other.answer(changed))
    HeldClient(other.answer, allow_insecure=True).forward(np.ones((1, D_IN)))


# A server that deviates


def rewrapped(reply, tensor):
    """The reply with another tensor's message in the place of its own."""
    head = wire.peek(reply)
    fields = {"direction": head.direction, "subject": head.subject, "request": head.request}
    return wire.seal("sealed_reply", [reply[72:80], tensor], **fields)


def test_the_device_drowns_what_it_reveals_by_its_own_prediction(monkeypatch):
    """A reply that declared an error of zero got the secret key's coefficients back without noise on them."""
    layer, errors = make(), []
    decrypt_flooded = ckks.SecretKey.decrypt_flooded

    def noticed(self, tensor, **options):
        errors.append(tensor.budget().error)
        return decrypt_flooded(self, tensor, **options)

    monkeypatch.setattr(ckks.SecretKey, "decrypt_flooded", noticed)
    x, g = np.ones((3, D_IN)), np.ones((3, D_OUT))
    device = HeldClient(layer.answer, allow_insecure=True)
    device.step(np.ones((R, D_IN)), np.ones((D_OUT, R)))
    device.gradient(x, g)
    honest, errors[:] = list(errors), []
    expected = layer.public.expected_gradient(device.adapter, 3)
    assert max(honest) > 0
    assert max(honest) <= expected.budget().error

    def zeros(request):
        """Ciphertexts of nothing, without any error."""
        for reply in layer.answer(request):
            yield rewrapped(reply, resealed(reply[80:], (8, bytes(len(reply) - 80 - 72 - 8))))

    device._send = zeros
    da, db = device.gradient(x, g)
    assert errors == honest
    assert (da != 0).all()
    assert (db != 0).all()


def test_a_secret_key_serves_one_request():
    requests, layer = [], make()

    def send(request):
        requests.append(request)
        return layer.answer(request)

    device = HeldClient(send, layer.public, allow_insecure=True)
    for _ in range(2):
        device.gradient(np.ones((1, D_IN)), np.ones((1, D_OUT)))
    keys = slice(72 + 24 + 8, 72 + 24 + 8 + PARAMETERS.key_bytes(1))
    assert requests[0][keys] != requests[1][keys]
    assert not [name for name, value in vars(device).items() if isinstance(value, ckks.SecretKey)]


def test_replies_that_are_not_what_the_device_foresees():
    layer = make()

    def ask(change, direction):
        device = HeldClient(lambda request: map(change, layer.answer(request)), layer.public, allow_insecure=True)
        if direction == "forward":
            return device.forward(np.ones((3, D_IN)))
        return device.gradient(np.ones((3, D_IN)), np.ones((3, D_OUT)))

    def tampered(*patches, **fields):
        return lambda reply: rewrapped(reply, resealed(reply[80:], *patches, **fields))

    for direction in ("forward", "gradient"):
        ask(lambda reply: reply, direction)
        for level in (0, 2):
            with pytest.raises(MessageError, match=f"at level {level} where .* at level 1 is expected"):
                ask(tampered((0, struct.pack("<I", level))), direction)
        with pytest.raises(MessageError, match=r"reply: encrypted tensor: shape \(2, .* where \(3, .* is expected"):
            ask(tampered(tokens=2), direction)
        with pytest.raises(MessageError, match="reply: encrypted tensor: length does not fit its shape"):
            ask(tampered(features=1), direction)
        with pytest.raises(MessageError, match="answers another request"):
            ask(lambda reply: resealed(reply, request=bytes(16)), direction)


def test_describe_requests_are_messages():
    layer = make()
    request = write_request("describe", bytes(16), bytes(16), 0, [])
    assert list(layer.answer(request)) == [layer.public.to_bytes()]
    with pytest.raises(MessageError, match="checksum mismatch"):
        list(layer.answer(request[:64] + bytes(8)))

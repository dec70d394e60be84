"""Sealed blocks: right in both directions, messages that are refused."""

import struct

import numpy as np
import pytest

from privtuner import ckks
from privtuner.errors import CkksError, InputError, MessageError
from privtuner.schemes import LocalTransport
from privtuner.sealed.blocks import SealedClient, SealedMLP, SealedPublic
from privtuner.sealed.exchange import request_shape
from privtuner.service.counts import request_shape as counted_shape

PARAMETERS = ckks.Parameters.INSECURE(depth=6)
OTHERS = ckks.Parameters.INSECURE(depth=7)
ACTIVATIONS = {
    "gelu": ckks.approximate("gelu", (-6.0, 6.0), 15),
    "one-sided": ckks.approximate("gelu", (-5.0, 9.0), 14),
    "narrow": ckks.approximate("tanh", (-0.5, 0.5), 5),
    "power": ckks.Polynomial((0.25, 0.5, 0.125), "power", (-6.0, 6.0)),
    "identity": ckks.Polynomial((0.0, 1.0), "power", (-6.0, 6.0)),
}
D_IN, HIDDEN, D_OUT = 10, 13, 7


def make(activation=ACTIVATIONS["gelu"], size=0.3, seed=0, **options):
    rng = np.random.default_rng(seed)
    w1, w2 = size * rng.standard_normal((HIDDEN, D_IN)), size * rng.standard_normal((D_OUT, HIDDEN))
    b1, b2 = size * rng.standard_normal(HIDDEN), rng.standard_normal(D_OUT)
    return SealedMLP(w1, b1, w2, b2, activation, **{"parameters": PARAMETERS, **options})


def data(tokens=5, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tokens, D_IN)), 1e-3 * rng.standard_normal((tokens, D_OUT))


@pytest.fixture(scope="module")
def block():
    return make()


@pytest.fixture(scope="module")
def client():
    return SealedClient(PARAMETERS, allow_insecure=True)


def asked(client, block, x, g=None):
    request, pending = client.request(block.public, x, g)
    replies = list(block.answer(request))
    return client.decrypt(replies, pending), error_of(replies, pending)


def error_of(replies, pending):
    """What the predicted error of a reply comes to, for each token."""
    worst = max(ckks.EncryptedTensor.from_bytes(PARAMETERS, reply[56:]).budget().error for reply in replies)
    return worst if pending.factors is None else worst * pending.factors


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_right_in_both_directions(name, client):
    size = 0.02 if name == "narrow" else 0.3
    block = make(ACTIVATIONS[name], size)
    x, g = data()
    y, error = asked(client, block, x)
    assert (np.abs(y - block.exact(x)) <= error).all()
    assert error < 2e-3  # the promise says something: outputs are about 1
    gx, error = asked(client, block, x, g)
    assert (np.abs(gx - block.exact(x, g)) <= error).all()
    assert (error < 5e-5).all()


def test_rounded_weights_are_close():
    rng = np.random.default_rng(0)
    w1, w2 = rng.standard_normal((HIDDEN, D_IN)), rng.standard_normal((D_OUT, HIDDEN))
    block = SealedMLP(w1, None, w2, None, ACTIVATIONS["gelu"], parameters=PARAMETERS)
    assert np.abs(block.w1 - w1).max() <= np.abs(w1).max() / 32639 / 2 * (1 + 1e-9)
    assert np.abs(block.w2 - w2).max() <= np.abs(w2).max() / 32639 / 2 * (1 + 1e-9)
    assert not block.b1.any()
    assert not block.b2.any()


def test_exact_gradient_is_that_of_the_exact_outputs(block):
    x, g = data(1)
    step = 1e-6
    slopes = [
        ((block.exact(x + step * e) - block.exact(x - step * e)) * g).sum() / (2 * step) for e in np.eye(D_IN)[:, None]
    ]
    assert block.exact(x, g)[0] == pytest.approx(slopes, abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_chunks_do_not_matter(chunk, block, client):
    other = make(chunk=chunk)
    assert other.public == block.public
    x, g = data()
    y, error = asked(client, other, x)
    assert (np.abs(y - block.exact(x)) <= error).all()
    gx, error = asked(client, other, x, g)
    assert (np.abs(gx - block.exact(x, g)) <= error).all()


def test_tokens_far_apart_in_size_are_equally_exact(block, client):
    x, g = data(4)
    g *= np.array([[1e-12], [1.0], [0.0], [1e9]])
    gx, error = asked(client, block, x, g)
    exact = block.exact(x, g)
    assert (np.abs(gx - exact) <= error).all()
    assert np.abs(gx[[0, 1, 3]] / exact[[0, 1, 3]] - 1).max() < 0.1
    assert np.abs(gx[2]).max() < 1e-3


def test_all_slots(block, client):
    x, _ = data(PARAMETERS.slots)
    y, error = asked(client, block, x)
    assert (np.abs(y - block.exact(x)) <= error).all()
    with pytest.raises(InputError, match=r"shape \(513, 10\); pass \(tokens, 10\) with 1 to 512 tokens"):
        client.request(block.public, data(PARAMETERS.slots + 1)[0])


def test_secure_parameters_by_default():
    block = make(ckks.approximate("gelu", (-6.0, 6.0), 63), parameters=None)
    assert block.public.parameters == ckks.Parameters.secure(depth=8)
    assert block.public.parameters.ring_dimension == 1 << 14
    assert (block.public.forward_level, block.public.backward_level) == (7, 8)


def test_input_beyond_the_domain_is_noticed(client):
    block = make(ckks.approximate("gelu", (-1.0, 1.0), 15))
    x = np.full((1, D_IN), 40.0) * np.sign(block.w1[0])
    request, pending = client.request(block.public, x)
    with pytest.raises(CkksError, match="left the domain of its activation: the server needs a wider one"):
        client.decrypt(list(block.answer(request)), pending)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": np.ones(3)}, r"w1 has shape \(3,\); pass a matrix"),
        ({"w1": np.full((4, 3), np.nan)}, "w1 holds NaN"),
        ({"w2": np.ones((2, 5))}, "w1 has 4 rows and w2 5 columns"),
        ({"b1": np.ones(3)}, r"b1 has shape \(3,\); pass 4 finite numbers"),
        ({"b2": np.array([1, np.inf])}, r"b2 has shape \(2,\); pass 2 finite numbers"),
        ({"chunk": 0}, "chunk is 0; give at least 1"),
        ({"input_bound": 0.0}, "input_bound is 0.0; give a positive number"),
        ({"parameters": ckks.Parameters.INSECURE(depth=5)}, "has 5 levels, the block takes 6; use more"),
    ],
)
def test_refuses_to_prepare(change, message):
    arguments = {
        "w1": np.ones((4, 3)),
        "b1": None,
        "w2": np.ones((2, 4)),
        "b2": None,
        "activation": ACTIVATIONS["gelu"],
    }
    with pytest.raises(InputError, match=message):
        SealedMLP(**{**arguments, "parameters": PARAMETERS, **change})


@pytest.mark.parametrize(
    ("x", "g", "message"),
    [
        (np.ones((2, 9)), None, r"x has shape \(2, 9\); pass \(tokens, 10\)"),
        (np.full((2, 10), np.nan), None, "x holds NaN"),
        (np.full((2, 10), 65.0), None, r"x\[0, 0\] is above 64 in size, the most that the block takes"),
        (np.ones((2, 10)), np.ones((3, 7)), "x has 2 tokens and g 3"),
        (np.ones((2, 10)), np.full((2, 7), np.inf), "g holds NaN or infinity"),
    ],
)
def test_refuses_to_ask(x, g, message, block, client):
    with pytest.raises(InputError, match=message):
        client.request(block.public, x, g)


def test_client_of_other_parameters(block):
    with pytest.raises(InputError, match="the block uses INSECURE.*depth6.*this client INSECURE.*depth7"):
        SealedClient(OTHERS, allow_insecure=True).request(block.public, np.ones((1, D_IN)))


# Public part


def test_public_part_travels(block):
    assert SealedPublic.from_bytes(block.public.to_bytes()) == block.public


def test_public_part_has_no_weight():
    block = make()
    twin = SealedMLP(
        block.w1[::-1], block.b1[::-1], block.w2[:, ::-1], block.b2, ACTIVATIONS["gelu"], parameters=PARAMETERS
    )
    assert twin.public.to_bytes()[24:] == block.public.to_bytes()[24:]
    assert twin.id != block.id


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"X", "no public part"),
        (4, b"\x09", "version 9, this build reads 1"),
        (24, b"\0\0\0\0", "are impossible"),
        (32, struct.pack("<d", -1.0), "must be positive numbers"),
        (40, struct.pack("<d", float("nan")), "must be positive numbers"),
        (56, struct.pack("<I", 99), "levels 99"),
        (70, b"\xff", "parameters"),
    ],
)
def test_public_part_malformed(at, new, message, block):
    message_bytes = bytearray(block.public.to_bytes())
    message_bytes[at : at + len(new)] = new
    with pytest.raises(MessageError, match=message):
        SealedPublic.from_bytes(bytes(message_bytes))


@pytest.mark.parametrize("length", [0, 10, 63, 70])
def test_public_part_truncated(length, block):
    with pytest.raises(MessageError):
        SealedPublic.from_bytes(block.public.to_bytes()[:length])


# Requests


@pytest.fixture(scope="module")
def requests(block, client):
    x, g = data()
    return {"forward": client.request(block.public, x)[0], "backward": client.request(block.public, x, g)[0]}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_shape_of_a_request(direction, requests):
    assert request_shape(requests[direction]) == counted_shape(requests[direction]) == (direction, 5)
    assert counted_shape(requests[direction][:20]) == ("unknown", 0)


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"X", "not a message of a sealed block"),
        (4, b"\x07", "message version 7, this build speaks version 1"),
        (6, b"\x02", "kind 2 or direction 0 is unknown"),
        (7, b"\x09", "kind 1 or direction 9 is unknown"),
        (7, b"\x01", "a backward request has 3 parts, this one 2"),
        (7, b"\x02", "answers forward and backward requests, not 'gradient'"),
        (8, b"\0", "meant for another block"),
        (40, struct.pack("<I", 4), r"input: shape \(5, 10\) at level 5, the block takes \(4, 10\) at level 5"),
        (44, struct.pack("<I", 1), "parts: truncated, or with bytes left over"),
        (44, struct.pack("<I", 1 << 31), "parts: truncated, or with bytes left over"),
        (48, struct.pack("<Q", 1 << 62), "part 1 of 2 is truncated"),
        (48, struct.pack("<Q", 0), "part 2 of 2 is truncated"),
        (200, b"\xff\xfe\xfd", "checksum mismatch"),
        (-9, b"\xff\xfe\xfd", "checksum mismatch"),
    ],
)
def test_malformed_request(at, new, message, requests, block):
    request = bytearray(requests["forward"])
    at %= len(request)
    if at == 8:
        new = bytes([request[8] ^ 1])
    request[at : at + len(new)] = new
    with pytest.raises(MessageError, match=message):
        list(block.answer(bytes(request)))


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.3, 0.9, 0.99999])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_truncated_request(direction, part, requests, block):
    request = requests[direction]
    with pytest.raises(MessageError):
        list(block.answer(request[: int(part * len(request))]))


def test_bytes_left_over(requests, block):
    with pytest.raises(MessageError, match="parts: truncated, or with bytes left over"):
        list(block.answer(requests["forward"] + b"\0"))


def request_of(block, secret, x, direction="forward", keys=None, g=None):
    """A request by hand, of any tensors."""
    keys = secret.evaluation_keys() if keys is None else keys
    parts = [part.to_bytes() for part in (keys, x, *([] if g is None else [g]))]
    code = ["forward", "backward"].index(direction)
    head = struct.pack("<4sHBB16s16sII", b"PVBK", 1, 1, code, block.id, bytes(16), x.shape[0], len(parts))
    return head + b"".join(struct.pack("<Q", len(part)) + part for part in parts)


def test_tensors_the_block_does_not_take(block):
    secret = ckks.SecretKey(PARAMETERS)
    public = block.public
    x, g = data()
    right = public.encrypt_input(secret, x, "forward")
    level, scale = public.input_layout("forward")
    wrong = [
        (secret.encrypt(x, bound=64.0, level=level, scale=2 * scale), "input: scale .*, the block takes"),
        (secret.encrypt(x, bound=64.0, level=level - 1, scale=scale), "at level 4, the block takes"),
        (secret.encrypt(x, bound=64.0, level=level + 1, scale=scale), "at level 6, the block takes"),
        (secret.encrypt(x[:, :9], bound=64.0, level=level, scale=scale), r"shape \(5, 9\)"),
    ]
    for tensor, message in wrong:
        with pytest.raises(MessageError, match=message):
            list(block.answer(request_of(block, secret, tensor)))
    backward = public.encrypt_input(secret, x, "backward")
    with pytest.raises(MessageError, match=r"output gradient: shape \(5, 10\)"):
        list(block.answer(request_of(block, secret, backward, "backward", g=right)))
    few = public.encrypt_gradient(secret, g[:3] / np.abs(g).max())
    with pytest.raises(MessageError, match=r"output gradient: shape \(3, 7\)"):
        list(block.answer(request_of(block, secret, backward, "backward", g=few)))
    rotation = secret.evaluation_keys(rotations=[1], relinearisation=False)
    with pytest.raises(MessageError, match="lacks the relinearisation key"):
        list(block.answer(request_of(block, secret, right, keys=rotation)))
    more = secret.evaluation_keys(rotations=[1])
    with pytest.raises(MessageError, match="bytes of keys"):
        list(block.answer(request_of(block, secret, right, keys=more)))
    foreign = ckks.SecretKey(OTHERS)
    with pytest.raises(MessageError, match="other parameters"):
        list(block.answer(request_of(block, secret, foreign.encrypt(x, bound=64.0, level=level, scale=scale))))


def test_nothing_is_computed_for_a_refused_request(block, requests, monkeypatch):
    monkeypatch.setattr(SealedMLP, "forward", lambda *_: pytest.fail("computed"))
    request = bytearray(requests["forward"])
    request[40] = 4
    with pytest.raises(MessageError):
        list(block.answer(bytes(request)))


# Replies


def test_reply_comes_in_messages(client, monkeypatch):
    monkeypatch.setattr("privtuner.sealed.exchange._BLOCK_BYTES", 1 << 16)
    block = make()
    x, g = data()
    request, pending = client.request(block.public, x, g)
    replies = list(LocalTransport({"mlp": block}).apply("mlp", request))
    assert len(replies) > 3
    assert np.abs(client.decrypt(iter(replies), pending) - block.exact(x, g)).max() < 1e-5
    for wrong, message in [
        ([], "ends after 0 of 10 features"),
        (replies[:-1], "it ends after"),
        (replies[1:], "where those from 0 of 10 are due"),
        ([*replies, replies[-1]], "where those from 10 of 10 are due"),
        ([replies[0], *replies], "are due"),
        ([replies[0][:40]], "truncated"),
        ([replies[0][:50]], "truncated"),
        ([replies[0][:-5]], "truncated"),
        ([request], "kind 1 or direction 1 is unknown or out of place"),
        ([b"PVTN" + replies[0][4:]], "not a message of a sealed block"),
    ]:
        with pytest.raises(MessageError, match=message):
            client.decrypt(wrong, pending)
    other, later = client.request(block.public, x, g)
    with pytest.raises(MessageError, match="answers another request"):
        client.decrypt(replies, later)
    assert other != request


def test_requests_do_not_repeat(block, client):
    x, _ = data()
    first, second = (client.request(block.public, x)[0] for _ in range(2))
    head = 48 + 8 + PARAMETERS.key_bytes(1)
    assert first[:24] == second[:24]
    assert first[48:head] == second[48:head]  # the keys of the run
    assert first[head + 72 :] != second[head + 72 :]

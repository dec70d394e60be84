"""Sealed blocks: right in both directions, messages that are refused."""

import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from message_cases import resealed
from privtuner import ckks, wire
from privtuner.errors import CkksError, InputError, MessageError, SecretError
from privtuner.schemes import LocalTransport
from privtuner.sealed.blocks import SealedClient, SealedMLP, SealedPublic
from privtuner.sealed.exchange import read_reply, write_request

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
    error = pending.expected.budget().error * (1 if pending.factors is None else pending.factors)
    return client.decrypt(block.answer(request), pending), error


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
    replies = {"forward_reply": block.public.forward_reply, "backward_reply": block.public.backward_reply}
    assert replace(other.public, **replies) == block.public  # small chunks make predictions coarser
    assert other.public.forward_reply.noise_bits <= replies["forward_reply"].noise_bits + 2
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
    assert replace(twin.public, id=block.id) == block.public
    assert twin.id != block.id


def test_replies_are_announced_from_above_by_powers_of_two(block):
    public, engine = block.public, ckks.Evaluator(PARAMETERS)
    y = block.forward(engine, public.expected_input(3, "forward"))
    gx = block.backward(engine, public.expected_input(3, "backward"), public.expected_gradient(3))
    for result, layout in ((y, public.forward_reply), (gx, public.backward_reply)):
        assert (result.level, (result.scale == layout.scale).all()) == (layout.level, True)
        assert result.bound <= 2.0**layout.bound_bits < 2 * result.bound
        assert result.noise.max() <= 2.0**layout.noise_bits < 2 * result.noise.max()


PLACES = {"d_in": 0, "d_out": 4, "bound": 8, "unit": 16, "gradient": 24, "levels": 32}
PLACES |= {"reply level": 40, "reply scale": 44, "reply bound": 52, "reply noise": 56, "parameters": 82}


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        ("d_in", bytes(4), r"shape \(7, 0\) is impossible"),
        ("d_out", struct.pack("<I", 65537), r"shape \(65537, 10\) is impossible"),
        ("bound", struct.pack("<d", -1.0), "must be positive numbers"),
        ("unit", struct.pack("<d", float("nan")), "must be positive numbers"),
        ("gradient", struct.pack("<d", float("inf")), "must be positive numbers"),
        ("levels", struct.pack("<I", 99), "levels 99, 6 are impossible"),
        ("levels", struct.pack("<I", 1), "levels 1, 6 are impossible"),
        ("reply level", struct.pack("<I", 7), "impossible Layout.level=7"),
        ("reply scale", struct.pack("<d", float("nan")), "impossible Layout.level=1, scale=nan"),
        ("reply scale", struct.pack("<d", 0.25), "impossible Layout"),
        ("reply scale", struct.pack("<d", 1e300), "do not fit the modulus of level 1"),
        ("reply bound", struct.pack("<i", 99), "do not fit the modulus of level 1"),
        ("reply bound", struct.pack("<i", 1 << 30), "impossible Layout"),
        ("reply noise", struct.pack("<i", -(1 << 30)), "impossible Layout"),
        ("parameters", b"\xff", "parameters: "),
    ],
)
def test_public_part_malformed(place, new, message, block):
    with pytest.raises(MessageError, match=message):
        SealedPublic.from_bytes(resealed(block.public.to_bytes(), (PLACES[place], new)))


def test_blocks_of_a_bundle_share_few_parameter_sets(block):
    sets = {}
    publics = [SealedPublic.from_bytes(block.public.to_bytes(), sets) for _ in range(20)]
    assert len({id(public.parameters) for public in publics}) == len(sets) == 1
    others = [replace(block.public, parameters=ckks.Parameters.INSECURE(depth=7 + i)) for i in range(4)]
    for other in others[:3]:
        assert SealedPublic.from_bytes(other.to_bytes(), sets) == other
    with pytest.raises(MessageError, match="more than 4 parameter sets"):
        SealedPublic.from_bytes(others[3].to_bytes(), sets)
    assert SealedPublic.from_bytes(block.public.to_bytes(), sets) == block.public


def test_public_part_with_other_heads(block):
    message = block.public.to_bytes()
    for field in ({"tokens": 1}, {"features": 1}, {"parameters": 1}, {"request": b"r" * 16}, {"direction": "step"}):
        with pytest.raises(MessageError, match="a field of the head that it has no use for"):
            SealedPublic.from_bytes(resealed(message, **field))
    with pytest.raises(MessageError, match="expected a message of kind sealed public"):
        SealedPublic.from_bytes(PARAMETERS.to_bytes())


@pytest.mark.parametrize("length", [0, 10, 39, 79, 90])
def test_public_part_truncated(length, block):
    message = block.public.to_bytes()
    for cut in (message[:length], resealed(message, cut=length)):
        with pytest.raises(MessageError, match=r"truncated|shorter than its head"):
            SealedPublic.from_bytes(cut)


# Requests


@pytest.fixture(scope="module")
def requests(block, client):
    x, g = data()
    return {"forward": client.request(block.public, x)[0], "backward": client.request(block.public, x, g)[0]}


def answered(block, request):
    return list(block.answer(request))


KEYS = PARAMETERS.key_bytes(1)
INPUT = 8 + KEYS + 8
"""Where the message of the encrypted input begins in the body of a request."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "request"}, "expected a message of kind sealed request, got request"),
        ({"direction": "backward"}, "a backward request has 3 parts, this one 2"),
        ({"direction": "gradient"}, "answers forward and backward requests, not 'gradient'"),
        ({"subject": bytes(16)}, "meant for another block"),
        ({"parameters": 1}, "a field it does not use is not zero"),
        ({"features": 1}, "a field it does not use is not zero"),
        ({"tokens": 0}, "0 tokens, the block takes 1 to 512 at a time"),
        ({"tokens": 513}, "513 tokens, the block takes 1 to 512 at a time"),
        ({"tokens": 4}, r"input: encrypted tensor: shape \(5, 10\) at level 5 where \(4, 10\) at level 5 is expected"),
    ],
)
def test_requests_with_other_heads(change, message, requests, block):
    with pytest.raises(MessageError, match=message):
        answered(block, resealed(requests["forward"], **change))


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, struct.pack("<Q", 1 << 62), "part 1 is truncated"),
        (0, struct.pack("<Q", (1 << 64) - 1), "part 1 is truncated"),
        (0, struct.pack("<Q", KEYS - 8), "part 2 is truncated"),
        (8 + 80, b"\xff\xfe\xfd", "evaluation keys: checksum mismatch"),
        (-9, b"\xff\xfe\xfd", "input: tensor: checksum mismatch"),
    ],
)
def test_malformed_request(at, new, message, requests, block):
    request = requests["forward"]
    with pytest.raises(MessageError, match=message):
        answered(block, resealed(request, (at % (len(request) - wire.HEAD_BYTES), new)))


def test_parts_without_end(requests, block):
    """No list of a million empty parts is made before somebody notices."""
    many = wire.seal("sealed_request", [bytes(8 * 100_000)], subject=block.id, tokens=5)
    tracemalloc.start()
    with pytest.raises(MessageError, match="bytes are left over after 4 parts"):
        answered(block, many)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    more = wire.seal("sealed_request", [requests["forward"][72:], bytes(3)], subject=block.id, tokens=5)
    with pytest.raises(MessageError, match="bytes are left over after 2 parts"):
        answered(block, more)


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.3, 0.9, 0.99999])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_truncated_request(direction, part, requests, block):
    request = requests[direction]
    length = int(part * len(request))
    for cut in (request[:length], resealed(request, cut=max(0, length - wire.HEAD_BYTES))):
        with pytest.raises(MessageError):
            answered(block, cut)


def test_bytes_left_over(requests, block):
    with pytest.raises(MessageError, match="1 bytes too many"):
        answered(block, requests["forward"] + b"\0")


def request_of(block, secret, x, direction="forward", keys=None, g=None):
    """A request by hand, of any tensors."""
    keys = secret.evaluation_keys() if keys is None else keys
    parts = [part.to_bytes() for part in (keys, x, *([] if g is None else [g]))]
    return write_request(direction, block.id, bytes(16), x.shape[0], parts)


def test_tensors_the_block_does_not_take(block):
    secret = ckks.SecretKey(PARAMETERS)
    public = block.public
    x, g = data()
    right = public.encrypt_input(secret, x, "forward")
    level, scale = public.input_layout("forward")
    wrong = [
        (secret.encrypt(x, bound=64.0, level=level - 1, scale=scale), "at level 4 where .* at level 5 is expected"),
        (secret.encrypt(x, bound=64.0, level=level + 1, scale=scale), "at level 6 where .* at level 5 is expected"),
        (secret.encrypt(x[:, :9], bound=64.0, level=level, scale=scale), r"shape \(5, 9\)"),
    ]
    for tensor, message in wrong:
        with pytest.raises(MessageError, match=message):
            answered(block, request_of(block, secret, tensor))
    backward = public.encrypt_input(secret, x, "backward")
    with pytest.raises(MessageError, match=r"output gradient: encrypted tensor: shape \(5, 10\)"):
        answered(block, request_of(block, secret, backward, "backward", g=right))
    few = public.encrypt_gradient(secret, g[:3] / np.abs(g).max())
    with pytest.raises(MessageError, match=r"output gradient: encrypted tensor: shape \(3, 7\)"):
        answered(block, request_of(block, secret, backward, "backward", g=few))
    rotation = secret.evaluation_keys(rotations=[1], relinearisation=False)
    with pytest.raises(MessageError, match="lacks the relinearisation key"):
        answered(block, request_of(block, secret, right, keys=rotation))
    more = secret.evaluation_keys(rotations=[1])
    with pytest.raises(MessageError, match="bytes of keys"):
        answered(block, request_of(block, secret, right, keys=more))
    foreign = ckks.SecretKey(OTHERS)
    with pytest.raises(MessageError, match="other parameters"):
        answered(block, request_of(block, secret, foreign.encrypt(x, bound=64.0, level=level, scale=scale)))


def test_nothing_is_computed_for_a_refused_request(block, requests, monkeypatch):
    monkeypatch.setattr(SealedMLP, "forward", lambda *_: pytest.fail("computed"))
    with pytest.raises(MessageError):
        answered(block, resealed(requests["forward"], tokens=4))


# What a party declares


def test_what_a_client_declares_does_not_reach_the_server(block, client, monkeypatch):
    """Bound, scale and error of an input at the server are the block's, whatever the client encrypted with."""
    seen = []
    monkeypatch.setattr(SealedMLP, "forward", lambda self, engine, x: seen.append(x) or self_result(engine, x))

    def self_result(engine, x):
        return engine.drop_level(engine.linear(x, np.ones((D_OUT, D_IN))), 1)

    secret, (x, _) = ckks.SecretKey(PARAMETERS), data()
    level, scale = block.public.input_layout("forward")
    for bound, factor in ((64.0, 1.0), (5.0, 1.0), (1e4, 0.5), (64.0, np.linspace(1, 2, D_IN))):
        answered(block, request_of(block, secret, secret.encrypt(x, bound=bound, level=level, scale=scale * factor)))
    expected = block.public.expected_input(5, "forward")
    for tensor in seen:
        assert (tensor.level, tensor.bound) == (level, 64.0)
        assert (tensor.scale == scale).all()
        assert (tensor.noise == expected.noise).all()


def clear_part(message):
    """Everything of a reply's message but its random id and the ciphertexts' words."""
    tensor = 72 + 8
    assert wire.peek(message[tensor:]).kind == "tensor"
    head = wire.peek(message)._replace(request=b"")
    return head, message[72:tensor], wire.peek(message[tensor:]), message[tensor + 72 : tensor + 80]


def test_the_clear_part_of_a_reply_says_nothing_of_the_weights(client):
    """Errors declared to a server were carried through |W1| and |W2| and came back exactly: now nothing comes back.

    Blocks that share what their public part says, and no other weight; requests of values of any size and sign.
    """
    first = make()
    second = SealedMLP(
        *(np.where(np.abs(w) == np.abs(w).max(), w, 0.25 * w[::-1]) for w in (first.w1,)),
        None,
        np.where(np.abs(first.w2) == np.abs(first.w2).max(), first.w2, 0.25 * first.w2[::-1]),
        None,
        ACTIVATIONS["gelu"],
        parameters=PARAMETERS,
    )
    seen = {direction: set() for direction in ("forward", "backward")}
    for block in (first, second):
        for j in range(3):
            x, g = np.zeros((1, D_IN)), np.zeros((1, D_OUT))
            x[0, j], g[0, j] = 4.0**j, -(2.0**-j)
            for direction, gradient in (("forward", None), ("backward", g)):
                request, _ = client.request(block.public, x, gradient)
                replies = [clear_part(message) for message in block.answer(request)]
                seen[direction].add(repr([(head._replace(subject=b""), *rest) for head, *rest in replies]))
    assert [len(parts) for parts in seen.values()] == [1, 1]


def test_all_features_of_a_reply_have_one_error(block, client):
    request, pending = client.request(block.public, data()[0])
    for _, tensor in read_reply(block.answer(request), pending):
        assert set(tensor.noise) == {2.0**block.public.forward_reply.noise_bits}
        assert set(tensor.scale) == {block.public.forward_reply.scale}
        assert tensor.bound == 2.0**block.public.forward_reply.bound_bits


# Replies


def test_a_server_chooses_no_threshold(block, client):
    """The values that a client refuses are those beyond the bound in the block's public part, whatever a reply says.

    A server that chose level, scale, bound and error of a reply chose what the client survives, and asked again under
    the same key: 20 requests read a value.
    """
    x, _ = data()
    for patch, message in [
        ({"tokens": 4}, "reply: encrypted tensor: shape .4, 7. at level 1 where .5, 7. at level 1 is expected"),
        ({"features": 6}, "reply: encrypted tensor: length does not fit|6 features|is expected"),
        ({"features": 8}, "8 features where 1 to 7 are due"),
        ({"features": 0}, "0 features where 1 to 7 are due"),
    ]:
        request, pending = client.request(block.public, x)
        (reply,) = block.answer(request)
        with pytest.raises(MessageError, match=message):
            client.decrypt([rewrapped(reply, resealed(reply[80:], **patch))], pending)
    for level in (0, 2, 6):
        request, pending = client.request(block.public, x)
        (reply,) = block.answer(request)
        with pytest.raises(MessageError, match=f"at level {level} where .* at level 1 is expected"):
            client.decrypt([rewrapped(reply, resealed(reply[80:], (0, struct.pack("<I", level))))], pending)
    # A result of another level, whole: as a server would send that computes something else.
    secret, engine = ckks.SecretKey(PARAMETERS), ckks.Evaluator(PARAMETERS)
    higher = engine.add(secret.encrypt(np.ones((5, D_OUT)), level=2), 0.0)
    request, pending = client.request(block.public, x)
    (reply,) = block.answer(request)
    with pytest.raises(MessageError, match="at level 2 where"):
        client.decrypt([rewrapped(reply, higher.to_bytes())], pending)


def rewrapped(reply, tensor):
    """The reply with another tensor's message in the place of its own."""
    head = wire.peek(reply)
    fields = {"direction": head.direction, "subject": head.subject, "request": head.request}
    return wire.seal("sealed_reply", [reply[72:80], tensor], **fields)


def test_values_beyond_the_public_bound_are_refused(block, client):
    """The one threshold there is: constants of the block, so no request tells more of a key than its own reply does."""
    layout = block.public.forward_reply
    for size, fits in ((0.9, True), (1.5, False)):
        request, pending = client.request(block.public, np.zeros((1, D_IN)))
        (reply,) = block.answer(request)
        value = size * 2.0**layout.bound_bits
        forged = pending.secret.encrypt(
            np.full((1, D_OUT), value), bound=value, level=layout.level, scale=layout.scale
        ).to_bytes()
        if fits:
            assert client.decrypt([rewrapped(reply, forged)], pending) == pytest.approx(value, rel=1e-3)
        else:
            with pytest.raises(CkksError, match="the block's reply is out of bounds"):
                client.decrypt([rewrapped(reply, forged)], pending)


def test_a_secret_key_serves_one_request_and_one_reply(block, client):
    x, _ = data()
    (one, first), (two, second) = (client.request(block.public, x) for _ in range(2))
    keys = slice(wire.HEAD_BYTES + 8, wire.HEAD_BYTES + 8 + KEYS)
    assert one[keys] != two[keys]
    assert first.secret is not second.secret
    assert not [name for name, value in vars(client).items() if isinstance(value, ckks.SecretKey)]
    replies = list(block.answer(one))
    with pytest.raises(MessageError, match="answers another request"):
        client.decrypt(replies, second)
    with pytest.raises(SecretError, match="decrypted already, or refused; send a request anew"):
        client.decrypt(block.answer(two), second)
    client.decrypt(replies, first)
    with pytest.raises(SecretError, match="decrypted already"):
        client.decrypt(replies, first)


def test_reply_comes_in_messages(client, monkeypatch):
    monkeypatch.setattr("privtuner.sealed.exchange._BLOCK_BYTES", 1 << 16)
    block = make()
    x, g = data()

    def asked():
        request, pending = client.request(block.public, x, g)
        return request, pending, list(LocalTransport({"mlp": block}).apply("mlp", request))

    request, pending, replies = asked()
    assert len(replies) > 3
    assert np.abs(client.decrypt(iter(replies), pending) - block.exact(x, g)).max() < 1e-5
    for wrong, message in [
        (lambda _: [], "ends after 0 of 10 features"),
        (lambda replies: replies[:-1], "it ends after"),
        (lambda replies: replies[1:], "where those from 0 of 10 are due"),
        (lambda replies: [*replies, replies[-1]], "where those from 10 of 10 are due"),
        (lambda replies: [replies[0], *replies], "are due"),
        (lambda replies: [replies[0][:40]], "truncated"),
        (lambda replies: [replies[0][:75]], "truncated"),
        (lambda replies: [resealed(replies[0], cut=7)], "truncated"),
        (lambda replies: [resealed(replies[0], cut=60)], "truncated"),
        (lambda replies: [replies[0][:-5]], "truncated"),
        (lambda replies: [resealed(replies[0], tokens=5)], "a field it does not use is not zero"),
        (lambda replies: [resealed(replies[0], direction="forward")], "answers another request"),
        (lambda replies: [resealed(replies[0], subject=bytes(16))], "answers another request"),
        (lambda _: [request], "expected a message of kind sealed reply, got sealed request"),
        (lambda replies: [b"PVBK" + replies[0][4:]], "not a privtuner message"),
    ]:
        _, pending, replies = asked()
        with pytest.raises(MessageError, match=message):
            client.decrypt(wrong(replies), pending)


def test_requests_do_not_repeat(block, client):
    x, _ = data()
    first, second = (client.request(block.public, x)[0] for _ in range(2))
    assert first[:32] == second[:32]
    for part in (slice(32, 48), slice(160, 2000), slice(72 + INPUT + 80, 72 + INPUT + 2000)):
        assert first[part] != second[part]

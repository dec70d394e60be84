"""Training through OpenFHE ciphertexts: one layer, one model, two processes."""

import json
import pickle

import numpy as np
import pytest
import torch

from evaluators import NEEDS_OPENFHE
from openfhe_cases import apply_blocks
from privtuner import linear, openfhe
from privtuner.errors import InputError, MessageError, SecretError, ServiceError
from privtuner.nn import EncryptedLinear, Session, split_pretrained
from privtuner.openfhe.server import OpenFheServer
from privtuner.schemes import LocalTransport, scheme
from privtuner.service import RemoteTransport, Server
from text_cases import command, server_process, training_options

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    NEEDS_OPENFHE,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

RNG = np.random.default_rng(0)
PREPARED = linear.prepare(RNG.standard_normal((70, 33)))
WEIGHT = PREPARED.spec.scale[:, None] * PREPARED.quantised()


@pytest.fixture(scope="module")
def owner():
    return scheme("openfhe").client()


def batch(tokens: int, direction: str = "forward") -> np.ndarray:
    return RNG.standard_normal((tokens, 33 if direction == "forward" else 70)).astype(np.float32)


def test_the_owners_keys(owner):
    context = owner.context
    assert owner.scheme == "openfhe"
    assert context.security_bits == 128
    assert (context.ring_dimension, len(context.moduli), context.special_moduli) == (2048, 1, ())
    assert context.moduli[0].bit_length() == 53
    assert openfhe.OpenFheClient()._secret.tag != owner._secret.tag


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tokens", [1, 3, 1024, 1025, 2500])
def test_products(owner, direction, tokens):
    x = batch(tokens, direction)
    request, secret = owner.encrypt(x, PREPARED.spec, direction)
    y = owner.decrypt(apply_blocks(PREPARED, request, 32), secret)
    exact = x.astype(np.float64) @ (WEIGHT.T if direction == "forward" else WEIGHT)
    assert y.dtype == np.float32
    # float32 results, and noise of 2^-36 of |w| |x| a standard deviation: see the next test.
    assert np.abs(y - exact).max() < 2.0**-20 * np.abs(exact).max()


def test_precision_against_theory(owner):
    """OpenFHE's error of an output is sigma |W_k| a coefficient, and as much again that it adds on decryption."""
    tokens = 1024
    x = batch(tokens)
    request, secret = owner.encrypt(x, PREPARED.spec, "forward")
    # The same in double precision: what decrypt rounds to float32.
    blocks = list(apply_blocks(PREPARED, request))
    slots = []
    for data in blocks:
        _, words = openfhe.client.messages.read(data, openfhe.client.messages.BLOCK)
        slots.append(owner._slots(words[0][0], tokens))
    integers = PREPARED.quantised().astype(np.float64)
    error = np.concatenate(slots).T - (x / secret.unit[:, None]) @ integers.T
    scale = 2.0**30
    lengths = np.linalg.norm(integers, axis=1)
    coefficient = np.hypot(3.19, np.sqrt(1 / 12)) * lengths
    predicted = np.sqrt(2) * coefficient * np.sqrt(2048 / 2) / scale
    ratio = error.std(axis=0) / predicted
    assert 0.8 < np.median(ratio) < 1.2


def test_any_values_stay_inside_the_modulus(owner):
    for x in (
        np.full((2, 33), 3e38, np.float32),
        np.full((2, 33), 1e-38, np.float32),
        np.zeros((2, 33), np.float32),
        np.vstack([np.full((1, 33), 1e30), np.zeros((1, 33)), np.full((1, 33), -1e-30)]).astype(np.float32),
        np.eye(33, dtype=np.float32) * 1e20,
        np.sign(WEIGHT[:5]).astype(np.float32),
    ):
        request, secret = owner.encrypt(x, PREPARED.spec, "forward")
        with np.errstate(over="ignore"):
            y = owner.decrypt(apply_blocks(PREPARED, request), secret)
        exact = x.astype(np.longdouble) @ WEIGHT.T
        limit = 2.0**-20 * np.linalg.norm(x.astype(np.longdouble), axis=1)[:, None] * np.abs(WEIGHT).max() * 6
        finite = np.abs(exact) < 3.4e38
        assert (np.abs(y - exact)[finite] <= limit.repeat(70, 1)[finite]).all()


def test_replies_that_are_refused(owner):
    def exchange():
        request, secret = owner.encrypt(batch(3), PREPARED.spec, "forward")
        return request, secret, list(apply_blocks(PREPARED, request, 32))

    def damaged(block):
        words = bytearray(block)
        words[len(words) // 2] ^= 1
        return bytes(words)

    def rewritten(block, change):
        head, words = openfhe.client.messages.read(block, openfhe.client.messages.BLOCK)
        return [openfhe.client.messages.write(head, [change(words.copy())])]

    def large(words):
        words[0, 0, 0, 0, 0] = owner.context.moduli[0]
        return words

    def noise(words):
        return RNG.integers(0, owner.context.moduli[0], words.shape, np.uint64)

    _, _, others = exchange()
    for wrong, message in (
        (lambda _, blocks: blocks[:-1], "it ends after 64 of 70 features"),
        (lambda _, blocks: blocks[::-1], "features from 64 of 70 where those from 0"),
        (lambda _, blocks: blocks[:1] * 2, "features from 0 of 70 where those from 32"),
        (lambda _, blocks: others, "it answers another request"),
        (lambda _, blocks: [damaged(blocks[0])], "checksum mismatch"),
        (lambda _, blocks: [b""], "truncated"),
        (lambda request, _: [request], "expected a message of kind openfhe reply, got openfhe request"),
        (lambda _, blocks: [], "it ends after 0 of 70 features"),
        (lambda _, blocks: rewritten(blocks[0], large), "reply: a residue .* is not below its modulus"),
        (lambda _, blocks: rewritten(blocks[0], noise), "no products of what was sent"),
    ):
        request, secret, blocks = exchange()
        with pytest.raises(MessageError, match=message):
            owner.decrypt(wrong(request, blocks), secret)
        with pytest.raises(SecretError, match="decrypted already, or refused"):
            owner.decrypt(blocks, secret)
    _, secret, blocks = exchange()
    owner.decrypt(blocks, secret)
    with pytest.raises(SecretError, match="decrypted already"):
        owner.decrypt(blocks, secret)
    with pytest.raises(InputError, match="secret is of type str"):
        owner.decrypt(blocks, "secret")


def test_nothing_secret_travels(owner):
    _, secret = owner.encrypt(batch(3), PREPARED.spec, "forward")
    with pytest.raises(SecretError):
        pickle.dumps(owner)
    assert "unit" not in repr(secret)  # it tells of the values


def test_gradients_are_those_of_the_rounded_weight():
    layer = EncryptedLinear.single(
        "fc", PREPARED.spec, Session(LocalTransport({"fc": PREPARED}, server=OpenFheServer()), scheme="openfhe")
    )
    x = torch.from_numpy(batch(5)).requires_grad_()
    y = layer(x)
    g = torch.from_numpy(batch(5, "backward"))
    y.backward(g)
    exact = torch.from_numpy(WEIGHT)
    assert torch.allclose(y.double(), x.double() @ exact.T, rtol=0, atol=1e-5)
    assert torch.allclose(x.grad.double(), g.double() @ exact, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return training_options(tmp_path_factory.mktemp("data"))


def test_training_in_two_processes(model, options, tmp_path):
    losses = {}
    for name in ("linear", "openfhe"):
        with server_process(model, "--scheme", name) as (_, address):
            line = ["train", "--server", address, "--scheme", name, "--steps", 12, "--out", tmp_path / name]
            done = command(*line, *options)
            assert done.returncode == 0, done.stderr
        numbers = json.loads((tmp_path / name / "metrics.json").read_text())
        assert numbers["scheme"] == name
        assert numbers["server"]["refusals"] == {}
        losses[name] = np.array([step["loss"] for step in numbers["steps"]])
    assert losses["openfhe"][-1] < losses["openfhe"][0]
    # The same rounded weights and batches: encryption noise apart, the same curve.
    assert np.abs(losses["openfhe"] - losses["linear"]).max() < 0.02


def test_schemes_that_do_not_match(model):
    split = split_pretrained(model)
    layer = split.server["pooler.dense"]
    x = np.ones((2, 32), np.float32)
    request = scheme("openfhe").client().encrypt(x, layer.spec, "forward")[0]
    with Server(split) as server, RemoteTransport(server.address) as transport:
        assert transport.hello()["scheme"] == "linear"
        with pytest.raises(ServiceError, match="this server speaks the scheme linear, .*serve --scheme openfhe"):
            list(transport.apply("pooler.dense", request))
    with Server(split, server=OpenFheServer()) as server, RemoteTransport(server.address) as transport:
        assert transport.hello()["scheme"] == "openfhe"
        with pytest.raises(ServiceError, match="this server speaks the scheme openfhe, the request carries linear"):
            list(transport.apply("pooler.dense", linear.encrypt(x, layer.spec)[0]))

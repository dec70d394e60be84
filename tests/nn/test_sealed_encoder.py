"""The sealed encoder as a module of PyTorch: pooled vectors, steps in backward, and what is refused."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from privtuner.errors import InputError, MessageError
from privtuner.nn import LocalTransport
from privtuner.nn.sealed_encoder import SealedEncoder
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.server import SealedService
from sealed_cases import PERIOD, SEQUENCES, TOLERANCE, WIDTH, TinyModel, TinyShape, Twin

VOCABULARY = 11


class Embeddings(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.kinds = torch.nn.Embedding(2, WIDTH)
        torch.nn.init.uniform_(self.words.weight, -0.5, 0.5)
        torch.nn.init.uniform_(self.kinds.weight, -0.5, 0.5)

    def forward(self, input_ids, token_type_ids=None):
        words = self.words(input_ids)
        return words if token_type_ids is None else words + self.kinds(token_type_ids)


def made(model=None, **options):
    model = model or TinyModel()
    transport = LocalTransport({}, sealed=SealedService(model))
    torch.manual_seed(0)
    return SealedEncoder(Embeddings(), SealedOwner(model.public, transport, allow_insecure=True), **options)


def texts(count=3):
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, VOCABULARY, (count, 6)))
    mask = torch.arange(6) < torch.tensor([[2], [4], [1]])[:count]
    return ids, mask


def test_a_training_step_is_that_of_the_clear_model():
    """The loss, the head's gradient, and the adapters after two steps at two rates, against autograd in the clear."""
    encoder, twin = made(rate=4.0, momentum=0.5), Twin(TinyModel())
    head = torch.nn.Linear(WIDTH, 2)
    ids, mask = texts()
    labels = torch.tensor([0, 1, 1])
    x = encoder.embeddings(input_ids=ids).double().numpy()
    for rate in (4.0, 2.0):
        encoder.rate = rate
        clear = torch.from_numpy(twin.model.pooled(x, twin.a)).float().requires_grad_()
        expected = torch.nn.functional.cross_entropy(head(clear), labels) / SEQUENCES
        expected.backward()
        wanted = head.weight.grad.clone()
        head.zero_grad()
        pooled = encoder(ids, mask)
        assert pooled.dtype == torch.float32
        loss = torch.nn.functional.cross_entropy(head(pooled), labels) / SEQUENCES
        loss.backward()
        assert abs(loss - expected) < TOLERANCE
        assert (head.weight.grad - wanted).abs().max() < TOLERANCE
        head.zero_grad()
        twin.step(x, clear.grad.double().numpy(), rate, 0.5)
    encoder.eval()
    assert np.abs(encoder(ids, mask).numpy() - twin.model.pooled(x, twin.a)).max() < TOLERANCE
    assert not np.allclose(twin.a, 1, atol=1e-5)
    counts = encoder.meter.snapshot()
    assert {key: (c.requests, c.tokens) for key, c in counts.items()} == {
        ("sealed", "forward"): (2, 14),
        ("sealed", "backward"): (2, 14),
        ("sealed", "embed"): (1, 7),
    }
    assert encoder.meter.total().bytes_up == encoder.owner.spent.bytes_up
    assert list(encoder.parameters()) == [encoder.embeddings.words.weight, encoder.embeddings.kinds.weight]
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert copy.deepcopy(encoder).owner is encoder.owner
    encoder.owner.close()


def test_without_gradients_nothing_is_kept():
    encoder = made(rate=1.0)
    ids, mask = texts()
    with torch.no_grad():
        assert not encoder(ids, mask).requires_grad
    kinds = torch.ones_like(ids)
    assert not torch.equal(encoder.eval()(ids, mask), encoder(ids, mask, kinds))
    assert {task for _, task in encoder.meter.snapshot()} == {"embed"}
    encoder.owner.close()


def test_backward_is_of_the_last_batch_and_once():
    encoder = made(rate=1.0)
    ids, mask = texts()
    first = encoder(ids, mask).sum() / SEQUENCES
    second = encoder(ids, mask).sum() / SEQUENCES
    with pytest.raises(InputError, match="older batch"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(InputError, match="there is none"):
        second.backward()
    encoder.owner.close()


def test_the_mean_and_the_pooler_are_the_owners():
    encoder = made(rate=1.0).eval()
    ids, mask = texts()
    first = encoder(ids, mask)
    encoder.owner.public = dataclasses.replace(encoder.owner.public, pooling="mean", shape=TinyShape(pooler=True))
    lengths = torch.tensor([[2.0], [4.0], [1.0]])
    assert (encoder(ids, mask) - (first / lengths).tanh()).abs().max() < TOLERANCE
    encoder.owner.close()


@pytest.mark.parametrize(
    ("ids", "mask", "hint"),
    [
        (torch.ones(2, 5).long(), None, f"max_length={PERIOD}"),
        (torch.ones(2, 3).long(), torch.tensor([[0, 1, 1], [1, 1, 1]]), "padding_side"),
        (torch.ones(2, 3).long(), torch.tensor([[1, 0, 1], [1, 1, 1]]), "padding_side"),
        (torch.ones(2, 3).long(), torch.tensor([[0, 0, 0], [1, 1, 1]]), "no tokens"),
        (torch.ones(2, 3).long(), torch.ones(2, 4), r"pass \(2, 3\)"),
        (torch.ones(3).long(), None, r"pass \(n, length\)"),
        (torch.ones(SEQUENCES + 1, 3).long(), None, f"1 to {SEQUENCES} sequences"),
    ],
)
def test_texts_that_are_refused(ids, mask, hint):
    with pytest.raises(InputError, match=hint):
        made(rate=1.0)(ids, mask)


def test_what_the_server_refuses_reaches_the_training_loop():
    encoder = made(rate=-1.0)
    ids, mask = texts()
    loss = encoder(ids, mask).sum() / SEQUENCES
    with pytest.raises(InputError, match="rate -1"):
        loss.backward()
    encoder.owner._run = bytes(16)
    encoder.owner._connection.link.request = bytes(16)
    with pytest.raises(MessageError, match="another run"):
        encoder(ids, mask)
    with pytest.raises(InputError, match="momentum"):
        made(rate=1.0, momentum=1.0)

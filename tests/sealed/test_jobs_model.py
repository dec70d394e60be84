"""A small encoder, sealed: the data owner's embeddings go in, pooled vectors come out, and a step lowers the loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privtuner import ckks
from privtuner.schemes import LocalTransport
from privtuner.sealed import Domains, ExactEncoder, Public, SealedModel, Shape, Weights
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.server import SealedService

SHAPE = Shape(layers=1, width=8, heads=2, hidden=16, period=4, eps=1e-3, rank=2)
SIZES = {
    "attention.self.query": (8, 8),
    "attention.self.key": (8, 8),
    "attention.self.value": (8, 8),
    "attention.output.dense": (8, 8),
    "intermediate.dense": (16, 8),
    "output.dense": (8, 16),
}


@pytest.fixture(scope="module")
def weights():
    draw = np.random.default_rng(3)
    state = {}
    for name, size in SIZES.items():
        state[f"encoder.layer.0.{name}.weight"] = draw.normal(0, 0.3, size)
        state[f"encoder.layer.0.{name}.bias"] = draw.normal(0, 0.3, size[0])
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        state[f"encoder.layer.0.{name}.weight"] = draw.uniform(0.8, 1.2, 8)
        state[f"encoder.layer.0.{name}.bias"] = draw.normal(0, 0.2, 8)
    return Weights.of_state(state, SHAPE)


def adapted(weights, matrices):
    """The weights with adapters in them."""
    layer = weights.layers[0]
    changed = {}
    for (_, target), (a, b) in matrices.items():
        dense = getattr(layer, target)
        changed[target] = replace(dense, weight=dense.weight + SHAPE.alpha / SHAPE.rank * b @ a)
    return replace(weights, layers=(replace(layer, **changed),))


def test_an_encoder_is_trained(weights):
    """Against the exact model before and after, and against the differences of its loss."""
    draw = np.random.default_rng(4)
    x = draw.normal(size=(100, 4, 8))
    x = (x - x.mean(axis=2, keepdims=True)) / x.std(axis=2, keepdims=True)
    lengths = draw.integers(1, 5, 100)
    model = SealedModel(weights, Domains.measure(weights, x, lengths, room=1.5), ckks.Parameters.INSECURE(12))
    public, rate, told = Public.from_bytes(model.public.to_bytes()), 0.02, []
    transport = LocalTransport({}, sealed=SealedService(model, release=True))
    with SealedOwner(public, transport, gradient_bound=1.0, progress=told.append, allow_insecure=True) as owner:
        before = owner.forward(x, lengths)
        g = draw.uniform(-1, 1, before.shape) / len(x)
        first = public.adapter_matrices(owner.release())
        owner.backward(g, rate, 0.9)
        stepped = public.adapter_matrices(owner.release())
        after = owner.embed(x, lengths)
    for pooled, matrices in ((before, first), (after, stepped)):
        exact = ExactEncoder(adapted(weights, matrices)).forward(x, lengths)
        assert (np.linalg.norm(pooled - exact, axis=1) < 5e-3 * np.linalg.norm(exact, axis=1)).all()
    assert np.abs(after - before).max() > 0.1
    for place, (a, b) in stepped.items():
        assert np.abs(a - first[place][0]).max() < 1e-4  # B is zero, so nothing moves A yet
        slope = np.zeros_like(b)
        for i in np.ndindex(b.shape):
            ahead, behind = ({**first, place: (a, sign * 1e-4 * unit(b.shape, i))} for sign in (1, -1))
            losses = [(ExactEncoder(adapted(weights, m)).forward(x, lengths) * g).sum() for m in (ahead, behind)]
            slope[i] = (losses[0] - losses[1]) / 2e-4
        assert -(slope * b).sum() > 0.999 * np.linalg.norm(slope) * np.linalg.norm(b)
        assert np.linalg.norm(b) == pytest.approx(rate * np.linalg.norm(slope), rel=1e-2)
    assert {p.task for p in told} == {"forward", "backward", "embed"}
    assert told[-1].done == told[-1].total == sum(refresh.ciphertexts for refresh in public.schedule("embed"))


def unit(shape, place):
    matrix = np.zeros(shape)
    matrix[place] = 1
    return matrix

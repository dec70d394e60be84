"""The public part of a sealed model, its layouts, shapes and domains."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from encoders import SHAPE, matrices, small
from loops import each
from privtuner import wire
from privtuner.ckks import Parameters, SecretKey
from privtuner.errors import CkksError, InputError, MessageError
from privtuner.sealed import Domains, ExactEncoder, Public, Weights
from privtuner.sealed.owner import usual_gradient_bound


def test_bytes_come_back():
    public = small().model.public
    assert Public.from_bytes(public.to_bytes()) == public


def test_no_message_but_a_whole_one_is_read():
    public = small().model.public
    head, body = wire.open("sealed_public", public.to_bytes())
    for size in (0, 50, len(body) // 2, len(body) - 1):
        with pytest.raises(MessageError):
            Public.from_bytes(wire.seal("sealed_public", [body[:size]], subject=head.subject))


@each(("place", "value"), [(0, 0), (8, 3), (40, 7), (42, 255), (48, 1 << 30), (112, 1 << 31)])
def test_impossible_values_are_refused(place, value):
    """Layers, heads, pooling, targets, rotations and refreshes: before memory is taken for them."""
    public = small().model.public
    head, body = wire.open("sealed_public", public.to_bytes())
    changed = bytearray(body)
    size = 1 if 40 <= place < 44 else 4
    changed[place : place + size] = value.to_bytes(size, "little")
    with pytest.raises(MessageError):
        Public.from_bytes(wire.seal("sealed_public", [changed], subject=head.subject))


def test_more_keys_or_adapters_than_any_model_has_are_refused():
    public = small().model.public
    wide = replace(public.shape, layers=64, width=8192, heads=64, hidden=8192, rank=8192)
    many = replace(public, parameters=Parameters.secure(12, ring_dimension=1 << 15))
    many = replace(many, keys=many.keys._replace(rotations=tuple(range(1, 2000))))
    for hostile in (replace(public, shape=wide), many):
        with pytest.raises(MessageError, match="more than any model has"):
            Public.from_bytes(hostile.to_bytes())


def test_a_changed_weight_changes_names_only():
    """What tells nothing of the weights is the same for others of the same shape and domains."""
    case = small()
    first = case.weights.layers[0]
    moved = replace(first, key=replace(first.key, bias=first.key.bias + 1e-9))
    other = type(case.model)(
        replace(case.weights, layers=(moved, *case.weights.layers[1:])), case.domains, case.model.parameters
    )
    assert other.public.id != case.model.public.id
    assert other.secret != case.model.secret
    assert replace(other.public, id=case.model.public.id) == case.model.public


def test_the_keys_are_those_of_the_plan():
    model = small().model
    assert model.public.key_bytes == model.plan.key_bytes > 0


def test_layouts():
    public = small().model.public
    rng = np.random.default_rng(0)
    x, lengths = rng.uniform(-1, 1, (3, 3, 8)), np.array([3, 1, 2])
    values, mask = public.arrange(x, lengths)
    slots = values.reshape(4, public.batch, 8)
    for sequence, length in enumerate(lengths):
        assert (slots[:length, sequence] == x[sequence, :length]).all()
        assert (slots[length:, sequence] == 0).all()
    assert mask.sum() == lengths.sum()
    assert (slots[:, 3:] == 0).all()
    g = rng.uniform(-1, 1, (3, 8)) * public.gradient_bound
    spread = public.spread(g, lengths)
    assert np.allclose(spread.reshape(4, public.batch, 8).sum(0)[:3], g * lengths[:, None])
    pooled = np.arange(2.0 * public.parameters.slots).reshape(-1, 2)
    read = public.read_pooled(pooled)
    assert read[5, 6] == pooled[2 * public.batch + 5, 1]


def test_layouts_refuse_what_does_not_fit():
    public = small().model.public
    x, lengths = np.zeros((2, 4, 8)), np.array([1, 4])
    for bad in (np.zeros((2, 5, 8)), np.zeros((2, 4, 7)), np.zeros((public.batch + 1, 4, 8)), x + 1e3, x + np.nan):
        with pytest.raises(InputError):
            public.arrange(bad, np.ones(len(bad), int) * 4)
    for wrong in (np.array([0, 1]), np.array([1, 5]), np.array([1.0, 2.0]), np.array([1])):
        with pytest.raises(InputError, match="length"):
            public.arrange(x, wrong)
    for bad in (np.zeros((2, 7)), np.full((2, 8), 2.0), np.full((2, 8), np.nan)):
        with pytest.raises(InputError, match="gradient"):
            public.spread(bad, lengths)
    with pytest.raises(InputError, match="pooled values"):
        public.read_pooled(np.zeros((4, 2)))


def test_adapters_are_encrypted_as_announced():
    public = small().model.public
    secret = SecretKey(public.parameters)
    for tensor, layout in zip(public.initial_adapters(secret), public.adapters, strict=True):
        assert (tensor.shape, tensor.level, tensor.bound) == (layout.shape, layout.level, layout.bound)
    numbers = secret.decrypt_packed(public.initial_adapters(secret)[0], public.adapter_numbers)
    for a, b in public.adapter_matrices(numbers).values():
        assert np.abs(a).max() <= SHAPE.width**-0.5 + 1e-6
        assert np.abs(a).std() > 0.05
        assert np.abs(b).max() < 1e-6


def test_matrices_and_numbers():
    public, chosen = small().model.public, matrices(SHAPE)
    back = public.adapter_matrices(public.adapter_columns(chosen))
    for place, pair in chosen.items():
        for found, exact in zip(back[place], pair, strict=True):
            assert np.allclose(found, exact, rtol=1e-15)
    with pytest.raises(InputError, match="no matrices"):
        public.adapter_columns({})
    with pytest.raises(InputError, match="numbers of shape"):
        public.adapter_matrices(np.zeros((3, 3)))
    a, b = chosen[0, "query"]
    for bad in ((b, a), (a * np.nan, b)):
        with pytest.raises(InputError):
            public.adapter_columns(chosen | {(0, "query"): bad})


@each(
    ("change",),
    [
        ({"layers": 0},),
        ({"heads": 3},),
        ({"period": 12},),
        ({"eps": -1.0},),
        ({"pool": "last"},),
        ({"pooler": True},),
        ({"rank": 9},),
        ({"alpha": 0.0},),
        ({"targets": ("value", "query")},),
        ({"targets": ()},),
    ],
)
def test_impossible_shapes(change):
    with pytest.raises(InputError):
        replace(SHAPE, **change)


def test_weights_that_do_not_fit():
    case = small()
    state = {name: tensor.numpy() for name, tensor in case.bert.state_dict().items()}
    name = "encoder.layer.1.output.dense.weight"
    assert Weights.of_state({f"bert.{k}": v for k, v in state.items()}, SHAPE).shape == SHAPE
    for changed in (None, state[name].T, state[name] * np.nan):
        other = {k: v for k, v in state.items() if k != name} | ({} if changed is None else {name: changed})
        with pytest.raises(InputError, match=name):
            Weights.of_state(other, SHAPE)


def test_domains():
    case = small()
    again = Domains.of_dict(json.loads(json.dumps(case.domains.to_dict())))
    assert again == case.domains
    seen = {}
    ExactEncoder(case.weights, lambda index, name, values: seen.update({(index, name): values})).forward(
        case.embeddings, case.lengths
    )
    for index, layer in enumerate(case.domains.layers):
        assert np.abs(seen[index, "scores"]).max() * 1.5 == pytest.approx(layer.scores)
        assert layer.variance2[0] * 1.5**2 == pytest.approx(seen[index, "variance2"].min())
    for bad in ({}, {"layers": [{}], "inputs": 1, "pooled": 1}, case.domains.to_dict() | {"inputs": -1}):
        with pytest.raises(InputError):
            Domains.of_dict(bad)
    for change in ({"scores": 0.0}, {"up": (1.0, 2.0)}, {"variance1": (0.0, 1.0)}, {"d_up": np.inf}):
        with pytest.raises(InputError, match="domain"):
            replace(case.domains.layers[0], **change)
    with pytest.raises(InputError, match="room"):
        Domains.measure(case.weights, case.embeddings, case.lengths, room=0.9)


def test_exact_encoder_refuses():
    case = small()
    exact = ExactEncoder(case.weights)
    for embeddings, lengths in (
        (np.zeros((2, 5, 8)), np.array([1, 1])),
        (np.zeros((2, 4, 8)), np.array([1, 5])),
        (np.zeros((2, 4, 8)), np.array([1.0, 1.0])),
        (np.full((2, 4, 8), np.nan), np.array([1, 1])),
    ):
        with pytest.raises(InputError):
            exact.forward(embeddings, lengths)


def test_shape_of_a_plan():
    case = small()
    plan = case.model.plan
    text = str(plan)
    assert "0.softmax.exp" in text
    assert "rotations" in text
    assert f"{plan.key_bytes / 1e6:.3g} MB" in text
    with pytest.raises(CkksError):
        type(case.model)(case.weights, case.domains, Parameters.INSECURE(6, ring_dimension=1024))
    with pytest.raises(InputError, match=r"known for a scale of 2\^40"):
        type(case.model)(case.weights, case.domains, Parameters.INSECURE(12, 38, ring_dimension=1024))


def test_the_usual_bound_of_gradients_is_a_power_of_two_of_public_numbers():
    public = small().model.public
    assert usual_gradient_bound(public) == 1 / 8 / public.batch
    assert usual_gradient_bound(replace(public, shape=replace(public.shape, pool="first"))) == 1 / public.batch

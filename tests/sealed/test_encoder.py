"""The encoder on clear numbers with the levels of ciphertexts, against PyTorch's autograd of the exact model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from encoders import (
    SHAPE,
    Counting,
    case_of,
    clear_adapters,
    clear_gradient,
    clear_inputs,
    matrices,
    planned,
    small,
    unpacked,
)
from privtuner.ckks import ClearEvaluator
from privtuner.errors import CkksError, InputError
from privtuner.sealed import EncryptedAdapters, ExactEncoder, SealedModel


def cosine(x, y):
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.fixture(scope="module")
def run():
    """One forward and backward pass with noise, and what an owner would have seen of them."""
    case = small()
    ev = Counting(case.model.parameters, noise=0)
    x, mask = clear_inputs(case, ev)
    adapters = clear_adapters(case, ev, matrices(SHAPE))
    pooled, kept = case.model.forward(ev, x, mask, adapters, keep=True)
    forward = ev.seen()
    gradients = case.model.backward(ev, kept, clear_gradient(case, ev), adapters)
    stepped = case.model.step(ev, adapters, gradients, 2e-3, 0.9)
    return case, pooled, kept, gradients, stepped, forward, ev.seen()


def test_exact_encoder_is_the_model():
    case = small()
    exact = ExactEncoder(case.weights)
    none = {place: (np.zeros((2, 8)), np.zeros((8, 2))) for place in SHAPE.adapted}
    assert np.abs(exact.forward(case.embeddings, case.lengths) - case.exact(none)[0]).max() < 1e-12


def test_pooled_vectors(run):
    """What is lost of the norm: the goal is a hundredth; polynomials, weights of 16 bits and noise stay well below."""
    case, pooled = run[:2]
    got = case.model.public.read_pooled(pooled.values)
    expected = case.exact(matrices(SHAPE))[0]
    n = len(expected)
    assert (np.linalg.norm(got[:n] - expected, axis=1) < 5e-3 * np.linalg.norm(expected, axis=1)).all()
    assert np.abs(got[n:]).max() < 2 * pooled.budget().error  # sequences that are not there show nothing


def test_pooled_is_what_the_owner_expects(run):
    case, pooled = run[:2]
    expected = case.model.public.pooled
    assert (pooled.shape, pooled.level, pooled.bound) == (expected.shape, expected.level, expected.bound)
    assert np.allclose(pooled.scale, expected.scale)
    assert pooled.budget().error == pytest.approx(expected.budget().error, rel=1e-6)


def test_adapter_gradients(run):
    case, gradients = run[0], run[3]
    got = case.model.public.adapter_matrices(unpacked(case, gradients))
    for (layer, target), (a, b) in case.exact(matrices(SHAPE))[1].items():
        # The numbers of B are kept times its strength: their gradient is that of B over it, which divides again.
        strength = SHAPE.strength(target) ** 2
        for found, exact in ((got[layer, target][0], a), (got[layer, target][1] * strength, b)):
            assert cosine(found, exact) > 0.999, (layer, target)
            assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(exact), rel=2e-2)


def test_refreshes_are_those_of_the_plan(run):
    public, forward, backward = run[0].model.public, run[5], run[6]
    assert forward == planned(public.schedule("forward"))
    assert backward == planned(public.schedule("backward"))
    assert public.schedule("embed") == public.schedule("forward")


def test_refreshes_do_not_depend_on_what_is_kept():
    case = small()
    ev = Counting(case.model.parameters)
    _, kept = case.model.forward(ev, *clear_inputs(case, ev), clear_adapters(case, ev, matrices(SHAPE)))
    assert kept is None
    assert ev.seen() == planned(case.model.public.schedule("embed"))


def test_hidden_rows_stay_zero():
    """At every point whose rows are a token's, in sequences that are there and not."""
    case = small()
    ev = ClearEvaluator(case.model.parameters)
    x, mask = clear_inputs(case, ev)
    hidden = mask.values[:, 0] == 0
    seen = {}
    forward = case.model.encoder.forward

    def watched(ev, x, mask, values, stages, levels):
        at = stages.at

        def watch(name, tensor):
            seen[name] = np.abs(tensor.values[hidden]).max() / tensor.bound
            return at(name, tensor)

        stages.at = watch
        return forward(ev, x, mask, values, stages, levels)

    case.model.encoder.forward = watched
    try:
        case.model.forward(ev, x, mask, clear_adapters(case, ev, matrices(SHAPE)))
    finally:
        del case.model.encoder.forward
    states = [name for name in seen if name.endswith(("output", "output1", "divide0", "pooled"))]
    assert len(states) == 6
    assert max(seen[name] for name in states) < 1e-12


def test_step_is_pytorchs(run):
    """Two steps of SGD with momentum on the gradients that were found, in the matrices' own units."""
    case, gradients = run[0], run[3]
    public, rate, momentum = case.model.public, 2e-3, 0.9
    ev = ClearEvaluator(case.model.parameters)
    adapters = clear_adapters(case, ev, matrices(SHAPE))
    raw = unpacked(case, gradients)
    assert np.abs(raw).max() > 1e-2
    packed = ev.packed(raw, bound=512.0, level=gradients.level)
    own = {}  # gradients of A and of B themselves
    for place, (a, b) in public.adapter_matrices(raw).items():
        own[place] = (a, b * SHAPE.strength(place[1]) ** 2)
    velocity = {place: (0 * a, 0 * b) for place, (a, b) in own.items()}
    expected = dict(matrices(SHAPE))
    for _ in range(2):
        adapters = case.model.step(ev, adapters, packed, rate, momentum)
        for place, pair in own.items():
            velocity[place] = tuple(momentum * v + g for v, g in zip(velocity[place], pair, strict=True))
            expected[place] = tuple(m - rate * v for m, v in zip(expected[place], velocity[place], strict=True))
    got = public.adapter_matrices(unpacked(case, adapters.values))
    for place, pair in expected.items():
        for found, exact in zip(got[place], pair, strict=True):
            assert np.abs(found - exact).max() < 1e-6 * np.abs(exact).max()
    for tensor, layout in zip(adapters.tensors, public.adapters, strict=True):
        assert (tensor.shape, tensor.level, tensor.bound) == (layout.shape, layout.level, layout.bound)


@pytest.mark.parametrize(
    "change",
    [
        {"pool": "first"},
        {"pool": "first", "pooler": True},
        {"rank": 0},
        {"targets": ("value",)},
        {"targets": ("query",)},
    ],
)
def test_other_shapes(change):
    case = case_of(replace(SHAPE, layers=1, **change))
    ev = ClearEvaluator(case.model.parameters)
    shape, public = case.shape, case.model.public
    chosen = matrices(shape)
    x, mask = clear_inputs(case, ev)
    adapters = clear_adapters(case, ev, chosen) if shape.rank else None
    pooled, kept = case.model.forward(ev, x, mask, adapters, keep=bool(shape.rank))
    got = public.read_pooled(pooled.values)
    expected, gradients = case.exact(chosen)
    n = len(expected)
    assert (np.linalg.norm(got[:n] - expected, axis=1) < 5e-3 * np.linalg.norm(expected, axis=1)).all()
    assert np.abs(got[n:]).max() < 1e-12
    if shape.rank:
        found = public.adapter_matrices(
            unpacked(case, case.model.backward(ev, kept, clear_gradient(case, ev), adapters))
        )
        for place, pair in gradients.items():
            for ours, exact in zip(found[place], pair, strict=True):
                assert cosine(ours, exact) > 0.999


def test_the_first_block_computes_what_its_adapters_need():
    both, values = small().model.plan.backward, case_of(replace(SHAPE, targets=("value",))).model.plan.backward
    names = [{name for name, *_ in plan.table if name.startswith("0.d_")} for plan in (both, values)]
    assert names[0] - names[1] == {"0.d_probabilities", "0.d_scores", "0.d_query"}
    assert "1.d_scores" in {name for name, *_ in values.table}


def test_sums_of_many_tokens_are_revealed_with_more_room():
    """A bound of 2^9 and more does not fit the first prime."""
    case = small()
    assert case.model.plan.pooled.level == 0
    domains = replace(case.domains, pooled=300.0)
    model = SealedModel(case.weights, domains, case.model.parameters)
    assert (model.plan.pooled.level, model.plan.pooled.bound) == (1, 512.0)
    ev = ClearEvaluator(model.parameters)
    values, mask = model.public.arrange(case.embeddings, case.lengths)
    x = ev.tensor(values, bound=model.public.input_bound, level=model.public.input_level)
    adapters = clear_adapters(case, ev, matrices(SHAPE))
    pooled, _ = model.forward(ev, x, ev.tensor(mask), adapters)
    expected, _ = case.exact(matrices(SHAPE))
    found = model.public.read_pooled(pooled.values)[: len(expected)]
    assert (np.linalg.norm(found - expected, axis=1) < 5e-3 * np.linalg.norm(expected, axis=1)).all()


def test_what_is_refused(run):
    case, kept = run[0], run[2]
    model = case.model
    ev = ClearEvaluator(model.parameters)
    x, mask = clear_inputs(case, ev)
    adapters = clear_adapters(case, ev, matrices(SHAPE))
    with pytest.raises(InputError, match="x of shape"):
        model.forward(ev, ev.drop_level(x, 2), mask, adapters)
    with pytest.raises(InputError, match="mask of shape"):
        model.forward(ev, x, x, adapters)
    with pytest.raises(InputError, match="takes adapters"):
        model.forward(ev, x, mask, None)
    with pytest.raises(InputError, match="values of shape"):
        model.forward(ev, x, mask, EncryptedAdapters(x, x))
    with pytest.raises(InputError, match="gradient of shape"):
        model.backward(ev, kept, x, adapters)
    for rate, momentum in ((-1.0, 0.0), (np.inf, 0.0), (0.1, 1.0), (0.1, -0.1)):
        with pytest.raises(InputError, match="rate"):
            model.step(ev, adapters, adapters.values, rate, momentum)
    with pytest.raises(InputError, match="gradients of shape"):
        model.step(ev, adapters, x, 0.1, 0.9)


def test_an_input_beyond_its_domain_is_noticed():
    case = small()
    ev = ClearEvaluator(case.model.parameters)
    x, mask = clear_inputs(case, ev)
    with pytest.raises(CkksError, match="bound|domain"):
        case.model.forward(
            ev,
            ev.tensor(x.values * 4, bound=x.bound * 4, level=x.level),
            mask,
            clear_adapters(case, ev, matrices(SHAPE)),
        )


def test_models_that_cannot_be(run):
    case = run[0]
    with pytest.raises(InputError, match="domains of 1 layers"):
        SealedModel(case.weights, replace(case.domains, layers=case.domains.layers[:1]), case.model.parameters)
    wide = replace(case.weights, shape=replace(SHAPE, period=1024))
    with pytest.raises(InputError, match="does not divide"):
        SealedModel(wide, case.domains, case.model.parameters)

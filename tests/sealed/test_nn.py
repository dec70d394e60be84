"""The sealed mode in PyTorch: what goes where, and models that compute what their clear twins compute."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from nn_cases import CountingTransport, tiny_bert, tiny_distilbert, tiny_gpt2, tiny_llama, tokens, weight_in_force
from privtuner import ckks
from privtuner.errors import CkksError, InputError, MessageError
from privtuner.linear import QuantisedWeight
from privtuner.nn import (
    LocalTransport,
    OwnerBundle,
    SealedMLP,
    Session,
    Split,
    build,
    polynomial_activations,
    split,
    traffic_of,
    visible_only,
)
from privtuner.nn.sealed import fit_activation
from privtuner.sealed.blocks import SealedMLP as Block

PARAMETERS = ckks.Parameters.INSECURE(depth=6)
OPTIONS: dict[str, Any] = {
    "seal": "mlp",
    "activation_domain": (-6.0, 6.0),
    "activation_degree": 15,
    "seal_parameters": PARAMETERS,
}
MODELS = {"bert": tiny_bert, "distilbert": tiny_distilbert, "gpt2": tiny_gpt2}
BLOCKS = {
    "bert": "encoder.layer.{}.intermediate.dense+dense",
    "distilbert": "transformer.layer.{}.ffn.lin1+lin2",
    "gpt2": "h.{}.mlp.c_fc+c_proj",
}


@pytest.fixture(scope="module", params=list(MODELS))
def family(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, Split]:
    model = MODELS[request.param]()
    return request.param, model, split(model, "linear-w16", **OPTIONS)


def inside(split: Split, wire: str) -> Block:
    block = split.server[wire]
    assert isinstance(block, Block)
    return block


def clear_twin(model: PreTrainedModel, split: Split) -> PreTrainedModel:
    """The clear model of the same rounded weights and polynomial activations, in double precision."""
    twin = copy.deepcopy(model).double()
    twin.config._attn_implementation = "eager"
    prefix = f"{twin.base_model_prefix}." if twin.base_model is not twin else ""
    with torch.no_grad():
        for wire, spec in split.bundle.groups.items():
            prepared = split.server[wire]
            assert isinstance(prepared, QuantisedWeight)
            parts = torch.from_numpy(weight_in_force(prepared)).split(list(spec.members.values()))
            for member, part in zip(spec.members, parts, strict=True):
                module = twin.get_submodule(prefix + member)
                module.weight.copy_(part if spec.kind == "linear" else part.T)
        for wire, sealed in split.bundle.sealed.items():
            block = inside(split, wire)
            for name, weight in ((sealed.first, block.w1), (sealed.second, block.w2)):
                part = torch.from_numpy(weight)
                twin.get_submodule(prefix + name).weight.copy_(part if sealed.kind == "linear" else part.T)
    polynomial_activations(twin, domain=(-6.0, 6.0), degree=15)
    return twin


def test_progress_counts_sealed_blocks_and_layers() -> None:
    calls: list[tuple[int, int, str]] = []
    parts = split(tiny_bert(), progress=lambda *call: calls.append(call), **OPTIONS)
    done, totals, names = zip(*calls, strict=True)
    sealed = [spec.first for spec in parts.bundle.sealed.values()]
    assert list(names) == [*sealed, *(name for name in parts.server if name not in parts.bundle.sealed), ""]
    assert list(done) == sorted(set(done))
    assert (done[0], set(totals)) == (0, {done[-1]})


def test_what_goes_where(family: tuple[str, PreTrainedModel, Split]) -> None:
    name, _, parts = family
    wires = [BLOCKS[name].format(number) for number in range(2)]
    assert list(parts.bundle.sealed) == wires
    assert {type(parts.server[wire]) for wire in wires} == {Block}
    assert not set(wires) & set(parts.bundle.groups)
    for wire in wires:
        spec = parts.bundle.sealed[wire]
        for member in (spec.first, spec.second):
            assert not [key for key in parts.bundle.tensors if key.startswith(f"{member}.")]
            assert member not in {key for group in parts.bundle.groups.values() for key in group.members}
    assert "2 sealed blocks" in repr(parts.bundle)


def test_bundle_holds_no_byte_of_a_sealed_block(family: tuple[str, PreTrainedModel, Split]) -> None:
    _, model, parts = family
    everything = b"".join(parts.bundle.to_files().values())
    for spec in parts.bundle.sealed.values():
        for name in (spec.first, spec.second):
            path = next(path for path, _ in model.named_modules() if path.endswith(name))
            for tensor in model.get_submodule(path).parameters():
                for array in (tensor.detach().numpy(), tensor.detach().numpy().T):
                    for row in np.atleast_2d(array):
                        for kind in (np.float32, np.float64):
                            assert row[:3].astype(kind).tobytes() not in everything
    for wire in parts.bundle.sealed:
        block = inside(parts, wire)
        for chunk in block._chunks:
            for matrix in (chunk.w1, chunk.w2):
                assert all(row[:8].tobytes() not in everything for row in matrix.integers)


def test_travels_and_computes_what_the_clear_twin_does(family: tuple[str, PreTrainedModel, Split]) -> None:
    _, model, parts = family
    bundle = OwnerBundle.from_files(parts.bundle.to_files())
    assert bundle.sealed == parts.bundle.sealed
    transport = CountingTransport(parts.server)
    owner = build(bundle, Session(transport, allow_insecure=True))
    twin = clear_twin(model, parts)
    ids = tokens(2, 5)
    y, exact = owner(input_ids=ids)[0], twin(input_ids=ids)[0]
    # The 16-bit linear layers err by some 1e-4 of a value, the sealed blocks by less than that.
    assert (y - exact).abs().max() < 2e-3 * exact.abs().max()
    assert [wire for wire in transport.calls if wire in bundle.sealed] == list(bundle.sealed)
    traffic = traffic_of(owner).snapshot()
    for wire in bundle.sealed:
        assert traffic[wire, "forward"].requests == 1
        assert traffic[wire, "forward"].tokens == 10
        assert traffic[wire, "forward"].bytes_up > traffic[wire, "forward"].bytes_down > 0


def test_gradients_flow_through_the_server(family: tuple[str, PreTrainedModel, Split]) -> None:
    _, model, parts = family
    transport = CountingTransport(parts.server)
    owner = build(parts.bundle, Session(transport, allow_insecure=True))
    twin = clear_twin(model, parts)
    start = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3))
    slopes = []
    for one, dtype in ((owner, torch.float32), (twin, torch.float64)):
        x = start.to(dtype, copy=True).requires_grad_()
        weight = torch.linspace(-1, 1, 4)[:, None].to(dtype)
        (one(inputs_embeds=x)[0] * weight).sum().backward()
        slopes.append(x.grad)
    ours, exact = slopes
    assert ours is not None
    assert exact is not None
    assert (ours - exact).abs().max() < 5e-3 * exact.abs().max()
    sealed = [wire for wire in transport.calls if wire in parts.bundle.sealed]
    assert sealed == [*parts.bundle.sealed, *reversed(parts.bundle.sealed)]


def layer(activation: ckks.Polynomial | None = None, **options: Any) -> tuple[SealedMLP, Block]:
    rng = np.random.default_rng(5)
    w1, w2 = 0.3 * rng.standard_normal((11, 6)), 0.3 * rng.standard_normal((4, 11))
    polynomial = activation or ckks.approximate("gelu", (-6.0, 6.0), 15)
    block = Block(w1, rng.standard_normal(11), w2, rng.standard_normal(4), polynomial, parameters=PARAMETERS, **options)
    return SealedMLP("mlp", block.public, Session(LocalTransport({"mlp": block}), allow_insecure=True)), block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_alone(dtype: torch.dtype) -> None:
    mlp, block = layer()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, generator=generator).to(dtype).requires_grad_()
    g = torch.randn(2, 3, 4, generator=generator).to(dtype)
    y = mlp(x)
    assert (y.shape, y.dtype) == ((2, 3, 4), dtype)
    y.backward(g)
    assert x.grad is not None
    rounding = torch.finfo(dtype).eps
    clear = block.exact(x.detach().double().numpy())
    assert np.abs(y.detach().double().numpy() - clear).max() < 1e-3 + 4 * rounding
    slope = block.exact(x.detach().double().numpy(), g.double().numpy())
    assert np.abs(x.grad.double().numpy() - slope).max() < 1e-3 + 4 * rounding


def test_more_tokens_than_slots() -> None:
    mlp, block = layer()
    x = torch.randn(PARAMETERS.slots + 3, 6, generator=torch.Generator().manual_seed(0))
    assert np.abs(mlp(x).numpy() - block.exact(x.double().numpy())).max() < 1e-3
    assert mlp.session.meter.total().requests == 2
    assert mlp(x[:0]).shape == (0, 4)


def test_padding_is_not_sent() -> None:
    parts = split(tiny_bert(), **OPTIONS)
    owner = build(parts.bundle, Session(LocalTransport(parts.server), allow_insecure=True))
    ids, mask = tokens(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad(), visible_only():
        y = owner(input_ids=ids, attention_mask=mask)[0]
        alone = owner(input_ids=ids[1:, :2])[0]
    assert (y[1, :2] - alone[0]).abs().max() < 2e-2
    traffic = traffic_of(owner).snapshot()
    assert traffic[next(iter(parts.bundle.sealed)), "forward"].tokens == 7 + 2


def test_a_gradient_at_padding_left_out_is_refused() -> None:
    parts = split(tiny_bert(), **OPTIONS)
    owner = build(parts.bundle, Session(LocalTransport(parts.server), allow_insecure=True), skip_padding=True)
    owner.get_input_embeddings().requires_grad_(True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    loss = owner(input_ids=tokens(2, 5), attention_mask=mask)[0].square().mean()
    with pytest.raises(InputError, match=r"layer 'encoder.layer.1.intermediate.*loss depends on positions"):
        loss.backward()


def test_layer_refuses() -> None:
    mlp, _ = layer()
    with pytest.raises(InputError, match="dtype torch.float64; cast it to float32"):
        mlp(torch.ones(2, 6, dtype=torch.float64))
    with pytest.raises(InputError, match=r"shape \(2, 5\); its last dimension must be 6"):
        mlp(torch.ones(2, 5))
    with pytest.raises(InputError, match="sealed block 'mlp': the activations .* not finite .*lower the learning rate"):
        mlp(torch.full((2, 6), float("nan")))
    with pytest.raises(InputError, match=r"x\[0, 0\] is above 64 in size, the most that the block takes"):
        mlp(torch.full((2, 6), 70.0))
    narrow, _ = layer(ckks.approximate("gelu", (-0.5, 0.5), 15))
    with pytest.raises(CkksError, match="sealed block 'mlp', forward: .* left the domain of its activation"):
        narrow(torch.full((2, 6), 30.0))


def test_copies_and_pickles() -> None:
    mlp, _ = layer()
    x = torch.ones(1, 6)
    assert (copy.deepcopy(mlp)(x) - mlp(x)).abs().max() < 1e-3
    with pytest.raises(InputError, match="cannot be pickled"):
        pickle.dumps(mlp)
    assert not list(mlp.parameters())
    assert "in_features=6, out_features=4, block='mlp'" in repr(mlp)


def test_classifier_keeps_its_head() -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    parts = split(BertForSequenceClassification(config), **OPTIONS)
    owner = build(
        parts.bundle,
        Session(LocalTransport(parts.server), allow_insecure=True),
        task="sequence-classification",
        num_labels=3,
    )
    assert owner(input_ids=tokens(1, 3)).logits.shape == (1, 3)
    assert isinstance(owner.bert.encoder.layer[0].intermediate.dense, SealedMLP)
    assert isinstance(owner.bert.encoder.layer[0].output.dense, torch.nn.Identity)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny_llama, {}, "no feed-forward block of a known form .* LlamaForCausalLM; those of BERT"),
        (tiny_bert, {"seal": "attention"}, "unknown seal 'attention'; choose 'mlp' or None"),
        (tiny_bert, {"keep": ("intermediate.dense",)}, "is to be sealed, and kept or omitted too"),
        (tiny_bert, {"seal_parameters": ckks.Parameters.INSECURE(depth=3)}, "block '.*intermediate.dense'.* 3 levels"),
        (lambda: tiny_bert(hidden_act="quick_gelu"), {}, "no polynomial is known for the activation QuickGELU"),
        (tiny_bert, {"activation_degree": 300}, "degree 300"),
    ],
)
def test_split_refuses(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split(model(), **{**OPTIONS, **options})


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish", "tanh"]
)
def test_activations(name: str) -> None:
    from transformers.activations import ACT2FN

    module = ACT2FN[name]
    polynomial = fit_activation(module, (-4.0, 4.0), 31)
    x = torch.linspace(-4, 4, 201, dtype=torch.float64)
    error = np.abs(polynomial(x.numpy()) - module(x).numpy()).max()
    assert error < (0.03 if name == "relu" else 1e-3)


def test_gelu_of_pytorch_knows_its_form() -> None:
    assert fit_activation(torch.nn.GELU(approximate="tanh"), (-4.0, 4.0), 15).name == "gelu_tanh"
    assert fit_activation(torch.nn.GELU(), (-4.0, 4.0), 15).name == "gelu"


def test_polynomial_activations() -> None:
    polynomial = ckks.approximate("gelu", (-6.0, 6.0), 15)
    model = tiny_bert().double()
    exact = model(input_ids=tokens(1, 4))[0]
    assert polynomial_activations(model, polynomial) is model
    module = model.encoder.layer[0].intermediate.intermediate_act_fn
    assert "gelu" in repr(module)
    x = torch.linspace(-6, 6, 9, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert np.abs(x.grad.numpy() - polynomial.derivative()(x.detach().numpy())).max() < 1e-12
    assert 0 < (model(input_ids=tokens(1, 4))[0] - exact).abs().max() < 0.1
    assert torch.autograd.gradcheck(module, (torch.randn(3, 2, dtype=torch.float64, requires_grad=True),))
    with pytest.raises(InputError, match="no feed-forward block of a known form"):
        polynomial_activations(torch.nn.Linear(2, 2))


def test_malformed_bundle() -> None:
    parts = split(tiny_bert(num_hidden_layers=1), **OPTIONS)
    files = parts.bundle.to_files()
    manifest = files["privtuner.json"]
    for old, new, message in [
        (b'"kind": "linear",\n   "modules"', b'"kind": "cubic",\n   "modules"', "unknown kind 'cubic'"),
        (b"intermediate.intermediate_act_fn", b"intermediate.other", ""),
        (b'"sealed": {', b'"sealed": [], "rest": {', "malformed"),
    ]:
        assert manifest.count(old) == 1
        changed = {**files, "privtuner.json": manifest.replace(old, new)}
        if message:
            with pytest.raises(MessageError, match=message):
                OwnerBundle.from_files(changed)
        else:
            bundle = OwnerBundle.from_files(changed)
            with pytest.raises(InputError, match=r"lacks \['encoder.layer.0.intermediate.other'\] of block"):
                build(bundle, Session(LocalTransport(parts.server), allow_insecure=True))
    bundle = OwnerBundle.from_files(files)
    with pytest.raises(InputError, match="do not change entries"):
        build(bundle, Session(LocalTransport(parts.server), allow_insecure=True), hidden_size=16)

"""Taking a model apart for the sealed mode: which part goes where, and which models are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraModel,
    RobertaConfig,
    RobertaModel,
)

from nn_cases import tiny_bert, tiny_distilbert, tiny_gpt2, tiny_roberta, tokens
from privtuner.errors import InputError
from privtuner.nn import LocalTransport, OwnerBundle, Sealing, Session, build, build_embeddings, split
from privtuner.sealed.exact import ExactEncoder

SEALING = Sealing(period=8, rank=2)


def taken_apart(model: Any, **changes: Any) -> Any:
    return split(model, seal=dataclasses.replace(SEALING, **changes))


def test_weights_stay_and_embeddings_go() -> None:
    model = tiny_bert()
    parts = taken_apart(model)
    assert parts.server == {}
    assert parts.weights.shape.layers == len(parts.weights.layers) == 2
    want = model.encoder.layer[1].output.dense.weight.detach().numpy().astype(np.float64)
    assert np.array_equal(parts.weights.layers[1].down.weight, want)
    bundle = OwnerBundle.from_files(parts.bundle.to_files())
    assert {name.partition(".")[0] for name in bundle.tensors} == {"embeddings"}
    assert (bundle.groups, bundle.specs, bundle.sealed) == ({}, {}, None)


@pytest.mark.parametrize("model", [tiny_bert, tiny_roberta])
def test_embeddings_are_the_models_without_dropout(model: Any) -> None:
    clear = model()
    embeddings = build_embeddings(taken_apart(clear).bundle).train()
    ids = tokens(3, 6)
    assert torch.equal(embeddings(input_ids=ids), clear.embeddings(input_ids=ids))
    assert not any(parameter.requires_grad for parameter in embeddings.parameters())


def test_dropout_is_left_out() -> None:
    embeddings = build_embeddings(taken_apart(tiny_bert(hidden_dropout_prob=0.5)).bundle).train()
    ids = tokens(3, 6)
    assert torch.equal(embeddings(input_ids=ids), embeddings(input_ids=ids))


@pytest.mark.parametrize(("pool", "pooler"), [("mean", False), ("first", True)])
def test_both_parts_make_the_model(pool: str, pooler: bool) -> None:
    clear = tiny_bert()
    parts = taken_apart(clear, pool=pool)
    assert parts.weights.shape.pooler == pooler
    ids = tokens(3, 6)
    with torch.no_grad():
        x = build_embeddings(parts.bundle)(input_ids=ids).numpy()
        want = clear(ids)
    got = ExactEncoder(parts.weights).forward(x, np.full(3, 6))
    expected = want.last_hidden_state.sum(1) if pool == "mean" else torch.atanh(want.pooler_output.double())
    # float32 in the model: some hundred operations of values of order 1.
    assert np.abs(got - expected.numpy()).max() < 1e-4


def test_a_head_is_left_out() -> None:
    config = tiny_bert().config
    model = BertForSequenceClassification(BertConfig(**{**config.to_dict(), "num_labels": 3})).eval()
    parts = taken_apart(model)
    assert parts.bundle.architecture == "BertModel"
    assert not any("classifier" in name for name in parts.bundle.tensors)


def test_a_pooler_that_was_made_up_is_none() -> None:
    parts = split(tiny_bert(), seal=dataclasses.replace(SEALING, pool="first"), omit=["pooler.dense"])
    assert not parts.weights.shape.pooler


@pytest.mark.parametrize(
    ("act", "name"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu", "relu"), ("silu", "silu")]
)
def test_the_activation_is_the_models(act: str, name: str) -> None:
    assert taken_apart(tiny_bert(hidden_act=act)).weights.shape.activation == name


@pytest.mark.parametrize("model", [tiny_distilbert, tiny_gpt2])
def test_other_types_are_refused_by_name(model: Any) -> None:
    with pytest.raises(InputError, match=r"cannot be sealed whole; BERT-like encoders can: bert, .*xlm-roberta"):
        taken_apart(model())


def electra() -> ElectraModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return ElectraModel(ElectraConfig(vocab_size=50, embedding_size=16, **sizes))


def short_roberta() -> RobertaModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return RobertaModel(RobertaConfig(vocab_size=50, max_position_embeddings=9, **sizes))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (electra, "projects its embeddings of 16 features to 32"),
        (short_roberta, "period 8: the model has positions for 7 tokens"),
        (lambda: tiny_bert(is_decoder=True), "configured as a decoder"),
        (lambda: tiny_bert(hidden_act="mish"), "no polynomial is known for the activation Mish"),
    ],
)
def test_forms_that_cannot_be_sealed(model: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        taken_apart(model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"period": 12}, "period 12: must be a power of two"),
        ({"period": 64}, "period 64: the model has positions for 40 tokens"),
        ({"rank": 33}, "rank = 33"),
        ({"pool": "last"}, "pool = 'last'"),
        ({"targets": ("key",)}, "targets = "),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        taken_apart(tiny_bert(), **changes)


def test_what_seal_may_be() -> None:
    assert split(tiny_bert(), seal="model").weights is not None
    with pytest.raises(InputError, match="seal is 'mlp'; give 'model', or privtuner.nn.Sealing"):
        split(tiny_bert(), seal="mlp")  # type: ignore[arg-type]


def test_a_sealed_bundle_has_no_layers_to_build() -> None:
    bundle = dataclasses.replace(taken_apart(tiny_bert()).bundle, sealed=object())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="of a sealed model, which has no layers to place"):
        build(bundle, Session(LocalTransport({})))

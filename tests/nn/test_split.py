"""Splitting: what goes where, for every family, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.pytorch_utils import Conv1D

from family_cases import tiny_model
from nn_cases import MODELS, CountingTransport, clear_twin, probing, tiny_bert, tiny_gpt2, tiny_llama, tokens
from privtuner import linear
from privtuner.errors import InputError
from privtuner.nn import LocalTransport, OwnerBundle, Session, Split, build, split, split_pretrained, traffic_of
from privtuner.nn.families import KEPT_HEADS

LAYER_NAMES = {
    "bert": ["attention.self.query+key+value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "distilbert": ["attention.q_lin+k_lin+v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "llama": ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"],
}
WIRE_NAMES = {
    "bert": ("encoder.layer.{}.", "bert", ["pooler.dense"]),
    "roberta": ("encoder.layer.{}.", "bert", ["pooler.dense"]),
    "distilbert": ("transformer.layer.{}.", "distilbert", []),
    "gpt2": ("h.{}.", "gpt2", []),
    "llama": ("layers.{}.", "llama", ["lm_head"]),
    "llama-tied": ("layers.{}.", "llama", []),
}


def served_weights(model: PreTrainedModel, kept: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and not any(module.weight is e for e in embeddings)
        and not name.endswith(kept or ("\n",))
    }


@pytest.mark.parametrize("family", list(MODELS))
def test_wire_names(family: str) -> None:
    parts = split(MODELS[family]())
    block, names, rest = WIRE_NAMES[family]
    expected = [block.format(index) + name for index in range(2) for name in LAYER_NAMES[names]] + rest
    assert sorted(parts.server) == sorted(expected)
    assert set(parts.server) == set(parts.bundle.specs) == set(parts.bundle.groups)


def bundle_views(bundle: OwnerBundle) -> Iterator[tuple[str, np.ndarray]]:
    """Everything of a bundle that could hold a number, as arrays."""
    for name, tensor in bundle.tensors.items():
        yield name, tensor.double().numpy()
    for name, spec in bundle.specs.items():
        yield name, spec.scale


@pytest.mark.parametrize("family", list(MODELS))
def test_no_frozen_linear_weight_is_in_the_bundle(family: str) -> None:
    model = MODELS[family]()
    parts = split(model)
    bundle = OwnerBundle.from_files(parts.bundle.to_files())
    weights = served_weights(model)
    assert len(weights) >= 8
    serialised = b"".join(bundle.to_files().values())
    owned = dict(bundle_views(bundle))
    for name, weight in weights.items():
        stored = weight.numpy()
        for form in (stored, stored.T):
            # A row of a weight appears in no file, neither as floats nor quantised.
            row = np.ascontiguousarray(form[len(form) // 2])
            assert row.tobytes() not in serialised, name
            assert row.astype(np.float16).tobytes() not in serialised, name
            delta = np.abs(row).max() / 127
            assert np.rint(row / delta).astype(np.int8).tobytes() not in serialised, name
        for key, values in owned.items():
            assert weight.numel() != values.size or not np.allclose(np.sort(stored, None), np.sort(values, None)), (
                f"{key} holds the weight of {name}"
            )
    for wire, prepared in parts.server.items():
        assert prepared.quantised().tobytes() not in serialised, wire
    # All that is left with two dimensions is an embedding or an index.
    tables = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, tensor in bundle.tensors.items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            assert any(table.endswith(name.removesuffix(".weight")) for table in tables), name
    for name, spec in bundle.specs.items():
        # Scales and a header, 8 bytes an output: the weights would take d_in bytes an output more.
        assert len(spec.to_bytes()) < 8 * spec.d_out + min(256, spec.d_out * spec.d_in), name


@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize("preset", linear.PRESETS)
def test_the_two_parts_make_the_model(family: str, preset: str) -> None:
    """The owner's model is the clear model of the quantised weights, up to the propagated error bound."""
    parts = split(MODELS[family](), preset)
    session = Session(CountingTransport(parts.server), verify_every=0)
    model = build(OwnerBundle.from_files(parts.bundle.to_files()), session)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    twin = clear_twin(model, parts)
    ids = tokens(2, 7)
    with torch.no_grad():
        got = model(ids)[0].double()
        rounded = clear_twin(model, parts, dtype=torch.float32)(ids)[0].double()
        unquantised = MODELS[family]().double()(ids)[0]
    along = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with probing(twin, parts) as probe:
        want = twin(ids)[0]
        bound = probe.bound((want * along).sum())
    want = want.detach()
    assert abs(((got - want) * along).sum().item()) <= bound
    # That is a worst case. Noise is about 2^-14 of a product where int8 rounding is 2^-8, so a 64th of its effect.
    loss, quantisation = (got - want).abs().max(), (unquantised - want).abs().max()
    assert loss <= quantisation / 64 + 2 * (rounded - want).abs().max()


def test_encrypted_forward_counts_one_request_a_group() -> None:
    parts = split(tiny_llama())
    transport = CountingTransport(parts.server)
    model = build(parts.bundle, Session(transport, verify_every=0))
    model(tokens(2, 5))
    assert sorted(transport.calls) == sorted(parts.server)


def test_progress_counts_every_weight_that_is_prepared() -> None:
    calls: list[tuple[int, int, str]] = []
    parts = split(tiny_llama(), progress=lambda *call: calls.append(call))
    assert [name for *_, name in calls] == [*parts.server, ""]
    weights = [layer.spec.d_out * layer.spec.d_in for layer in parts.server.values()]  # type: ignore[union-attr]
    assert [done for done, *_ in calls] == [0, *itertools.accumulate(weights)]
    assert {total for _, total, _ in calls} == {sum(weights)}


def test_kept_modules_stay_clear_and_trainable() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50, num_labels=3
    )
    clear = BertForSequenceClassification(config).eval()
    parts = split(clear, keep=("classifier", "pooler"))
    assert "pooler.dense" not in parts.server
    assert parts.bundle.kept == {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    assert torch.equal(model.classifier.weight, clear.classifier.weight)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert model.classifier.weight is not parts.bundle.tensors["classifier.weight"]


def test_tied_heads_stay_with_their_embedding() -> None:
    for clear, head in ((tiny_gpt2(), "lm_head"), (tiny_llama(tied=True), "lm_head")):
        parts = split(clear)
        assert head not in parts.server
        assert f"{head}.weight" not in parts.bundle.tensors
        model = build(parts.bundle, Session(LocalTransport(parts.server)))
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_an_untied_head_goes_to_the_server() -> None:
    parts = split(tiny_llama())
    assert parts.server["lm_head"].spec.d_out == 50
    assert "lm_head.weight" not in parts.bundle.tensors


def test_masked_language_model() -> None:
    torch.manual_seed(1)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    parts = split(BertForMaskedLM(config).eval())
    assert "cls.predictions.transform.dense" in parts.server
    assert "cls.predictions.decoder" not in parts.server
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model(tokens(2, 5)).logits.shape == (2, 5, 50)


@pytest.mark.parametrize("model_type", ["camembert", "xlm-roberta"])
def test_tied_head_that_is_defined_before_the_base_model(model_type: str) -> None:
    model = tiny_model(model_type, "AutoModelForMaskedLM")
    parts = split(model)
    owner = build(parts.bundle, Session(LocalTransport(parts.server)))
    assert owner.get_output_embeddings().weight is owner.get_input_embeddings().weight
    assert torch.equal(owner.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_weight_that_a_model_reads_itself() -> None:
    model = tiny_model("mobilebert", "AutoModelForMaskedLM", embedding_size=16)
    with pytest.raises(InputError, match=r"'cls\.predictions\.dense' cannot be served: .* keep="):
        split(model)
    parts = split(model, keep=(*KEPT_HEADS, "cls.predictions.dense"))
    owner = build(parts.bundle, Session(LocalTransport(parts.server)))
    with torch.no_grad():
        assert owner(input_ids=tokens(1, 4)).logits.shape == (1, 4, 50)
    split(tiny_model("mobilebert"))


def test_names_do_not_depend_on_the_head() -> None:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    headed = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    whole, base = split(headed), split(headed.bert)
    assert list(whole.server) == list(base.server)
    assert set(whole.bundle.tensors) - set(base.bundle.tensors) == {"classifier.weight", "classifier.bias"}
    for name, prepared in base.server.items():
        assert prepared.spec.id == whole.server[name].spec.id


def test_split_leaves_the_model_alone_and_shares_nothing() -> None:
    clear = tiny_bert()
    before = {name: tensor.clone() for name, tensor in clear.state_dict().items()}
    parts = split(clear)
    parts.bundle.tensors["embeddings.LayerNorm.bias"].add_(1.0)
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    with torch.no_grad():
        model.embeddings.LayerNorm.weight.add_(1.0)
    for name, tensor in clear.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_configuration_says_nothing_about_the_server() -> None:
    clear = tiny_bert()
    clear.config._name_or_path = "/home/secret/path"
    clear.config.auto_map = {"AutoModel": "evil--code"}
    config = split(clear).bundle.config
    assert not any(key.startswith("_") for key in config)
    assert "auto_map" not in config
    assert not any("implementation" in key for key in config)
    assert "secret" not in str(config)


def test_half_precision_models() -> None:
    parts = split(tiny_bert().to(torch.bfloat16))
    model = build(
        OwnerBundle.from_files(parts.bundle.to_files()),
        Session(LocalTransport(parts.server), verify_every=0),
        num_labels=2,
    )
    assert model.dtype is torch.bfloat16
    assert model.bert.encoder.layer[0].output.dense.weight.dtype is torch.bfloat16
    assert model.classifier.weight.dtype is torch.bfloat16
    assert model(tokens(2, 5)).logits.dtype is torch.bfloat16


def test_refuses_what_is_no_plain_model() -> None:
    with pytest.raises(InputError, match="takes a model of transformers; this is a Linear"):
        split(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    parts = split(tiny_bert())
    adapted = tiny_bert()
    adapted.pooler.dense.base_layer = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="has adapters"):
        split(adapted)
    quantised = tiny_bert()
    quantised.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="quantised"):
        split(quantised)
    with pytest.raises(InputError, match="unknown preset 'linear-w4'"):
        split(tiny_bert(), "linear-w4")
    with pytest.raises(InputError, match=r"keep is the string 'classifier'; give a collection .*\('classifier',\)"):
        split(tiny_bert(), keep="classifier")
    with pytest.raises(InputError, match="takes a model of transformers"):
        split(parts.bundle)  # type: ignore[arg-type]


def test_refuses_weights_that_are_not_finite() -> None:
    clear = tiny_bert()
    clear.pooler.dense.weight.data[1, 2] = float("nan")
    with pytest.raises(InputError, match=r"layer 'pooler.dense': "):
        split(clear)


def test_refuses_to_give_away_a_matrix_of_unknown_kind() -> None:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4
    )
    with pytest.raises(InputError, match=r"'embeddings\..*' of shape .* is neither a linear weight nor an embedding"):
        split(ViTModel(config), allow_data_dependent_requests=True)
    parts = split(ViTModel(config), keep=("embeddings",), allow_data_dependent_requests=True)
    assert "embeddings.patch_embeddings.projection.weight" in parts.bundle.kept
    clear = tiny_bert()
    clear.pooler.register_buffer("packed", torch.zeros(4, 4, dtype=torch.int8))
    with pytest.raises(InputError, match=r"'pooler.packed' of shape \(4, 4\)"):
        split(clear)

    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    clear = tiny_bert()
    clear.pooler.dense = Scaled(32, 32)
    with pytest.raises(InputError, match=r"'pooler.dense.weight' of shape \(32, 32\) in a Scaled"):
        split(clear)


def test_encoder_decoders_keep_cross_attention_apart() -> None:
    torch.manual_seed(4)
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    clear = T5ForConditionalGeneration(config).eval()
    parts = split(clear)
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert {f"{cross}.q", f"{cross}.k+v", "decoder.block.0.layer.0.SelfAttention.q+k+v"} <= set(parts.server)
    transport = CountingTransport(parts.server)
    model = build(parts.bundle, Session(transport, verify_every=0))
    twin = clear_twin(model, parts)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    batch = {"input_ids": tokens(2, 5), "attention_mask": mask, "labels": tokens(2, 5, seed=1)}
    with torch.no_grad():
        got = model(**batch).loss
    with probing(twin, parts) as probe:
        want = twin(**batch).loss
        bound = probe.bound(want)
    assert abs(got.item() - want.item()) <= bound
    assert sorted(transport.calls) == sorted(parts.server)
    counts = traffic_of(model).snapshot().values()
    assert {count.tokens for count in counts} == {10}, "padding is not skipped where two sequences meet"


def test_mixtures_of_experts_are_refused() -> None:
    config = MixtralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.gate.weight' of shape \(2, 32\) in a MixtralTopKRouter"):
        split(MixtralForCausalLM(config), allow_data_dependent_requests=True)
    with pytest.raises(InputError, match="a MixtralForCausalLM is not known to send requests"):
        split(MixtralForCausalLM(config))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_bert().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    (tmp_path / "notes.txt").write_text("not for the owner")
    return tmp_path


def test_split_a_directory(saved: Path) -> None:
    parts = split_pretrained(saved)
    direct = split(tiny_bert())
    assert {n: p.spec.id for n, p in parts.server.items()} == {n: p.spec.id for n, p in direct.server.items()}
    assert list(parts.bundle.files) == ["vocab.txt"]
    assert str(saved) not in str(parts.bundle.config)
    halved = split_pretrained(saved, dtype=torch.bfloat16)
    assert halved.bundle.dtype == "bfloat16"


def test_directory_task_chooses_the_head(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    assert "lm_head" in split_pretrained(tmp_path).server
    assert "lm_head" not in split_pretrained(tmp_path, task="feature-extraction").server
    with pytest.raises(InputError, match="unknown task 'sing'"):
        split_pretrained(tmp_path, task="sing")


def test_layers_made_up_on_loading_are_not_served(tmp_path: Path) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    parts = split_pretrained(tmp_path)
    assert parts.bundle.architecture == "BertModel"
    assert "pooler.dense" not in parts.server
    assert not any(name.startswith("pooler") for name in parts.bundle.tensors)
    with pytest.warns(UserWarning, match="'bert.pooler.dense' is not in the bundle and was newly initialised"):
        model = build(parts.bundle, Session(LocalTransport(parts.server), verify_every=0), num_labels=2)
    assert model.bert.pooler.dense.weight.requires_grad
    assert model(tokens(2, 5)).logits.shape == (2, 2)
    assert traffic_of(model).total().requests == len(parts.server)


def test_refuses_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model in .*: config.json is missing"):
        split_pretrained(tmp_path)


def test_parts_are_what_they_say() -> None:
    parts = split(tiny_bert())
    assert isinstance(parts, Split)
    assert repr(parts) == f"Split(server=9 prepared layers, bundle={parts.bundle!r})"
    assert repr(parts.bundle) == "OwnerBundle(BertModel, 9 served layers, 0.0 MB of tensors)"
    for wire, spec in parts.bundle.groups.items():
        quantised = parts.server[wire].quantised()
        assert quantised.shape == (sum(spec.members.values()), parts.bundle.specs[wire].d_in)
        assert quantised.dtype == np.int8

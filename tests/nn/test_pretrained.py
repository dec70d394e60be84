"""Model directories that are not whole: each fault is named in one line, with its file and the way out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from nn_cases import tiny_bert, tiny_gpt2, tiny_llama, tokens
from privtuner.errors import InputError
from privtuner.nn import LocalTransport, Session, build, split, split_pretrained
from privtuner.nn.pretrained import load_model, load_tokenizer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n"
WORDS = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_bert().save_pretrained(folder)
    (folder / "vocab.txt").write_text(WORDS)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(*ends: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        gone = [name for name in tensors if name.endswith(ends)]
        assert len(gone) >= len(ends)
        for name in gone:
            del tensors[name]

    return change


def index(folder: Path) -> None:
    """Weights in two parts, of which the second is missing."""
    names = list(load_file(folder / "model.safetensors"))
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def cut(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: shutil.rmtree(f), "there is no such directory; give one"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing; give a directory"),
    (lambda f: cut(f, "config.json", 0), "config.json is empty; fetch it again"),
    (lambda f: cut(f, "config.json", 40), "config.json is not JSON .*; fetch it again"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list instead of an object"),
    (lambda f: (f / "config.json").write_bytes(LFS), "config.json is a pointer of Git LFS.*git lfs pull"),
    (lambda f: (f / "config.json").write_text("{}"), "config.json has no model_type.*fetch the file again"),
    (lambda f: edit_config(f, model_type="unheard-of"), "model type 'unheard-of' is unknown; use a model"),
    (
        lambda f: edit_config(f, model_type="own", auto_map={"AutoModel": "code.Model"}),
        r"model type 'own' needs code of its own \(auto_map\), which is not run",
    ),
    (lambda f: edit_config(f, architectures=["BertForSinging"]), "holds a BertForSinging, which transformers .* lacks"),
    (lambda f: edit_config(f, hidden_size="wide"), "config.json: .*hidden_size"),
    (lambda f: (f / "model.safetensors").unlink(), "no weights in .*: model.safetensors is missing; fetch it"),
    (lambda f: cut(f, "model.safetensors", 0), "model.safetensors is empty; fetch it again"),
    (lambda f: cut(f, "model.safetensors", 5), "model.safetensors is damaged or cut short .*; fetch it again"),
    (lambda f: cut(f, "model.safetensors", 9000), "model.safetensors is damaged or cut short .*; fetch it again"),
    (lambda f: (f / "model.safetensors").write_bytes(LFS), "model.safetensors is a pointer of Git LFS"),
    (index, "model-00002-of-00002.safetensors is missing, and model.safetensors.index.json names it; fetch it"),
    (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "cannot load a bert model from .*model: ",
    ),
    (
        lambda f: (index(f), (f / "model.safetensors.index.json").write_text("{}")),
        "index.json has no weight_map.*fetch it again",
    ),
    (lambda f: (f / "tokenizer.json").write_text('{"version"'), "tokenizer.json is not JSON .*; fetch it again"),
    (lambda f: (f / "tokenizer.json").write_bytes(LFS), "tokenizer.json is a pointer of Git LFS"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot load the tokenizer in .*; fetch its files again"),
    (lambda f: cut(f, "vocab.txt", 0), "vocab.txt is empty; fetch it again"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_directories_are_named_in_one_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        split_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_files_that_may_not_be_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(
        InputError, match=r"model.safetensors cannot be read \(Permission denied\); check its permission"
    ):
        split_pretrained(folder)


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        (("0.intermediate.dense.weight", "0.intermediate.dense.bias"), "layer.0.intermediate.dense.bias"),
        (("word_embeddings.weight",), "embeddings.word_embeddings.weight"),
        (("1.output.LayerNorm.bias",), "encoder.layer.1.output.LayerNorm.bias"),
        (("pooler.dense.bias",), "pooler.dense.bias"),
    ],
)
def test_missing_tensors_are_refused_by_name(folder: Path, ends: tuple[str, ...], named: str) -> None:
    edit_weights(folder, without(*ends))
    with pytest.raises(InputError, match=rf"the weights lack '.*{named}'.* which would be random; fetch"):
        split_pretrained(folder)
    with pytest.raises(InputError, match=rf"the weights lack '.*{named}'"):
        load_model(folder, AutoModelForSequenceClassification, relabelled=True, num_labels=2)


def test_shapes_that_disagree_are_refused_by_name(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    with pytest.raises(
        InputError, match=r"'.*intermediate.dense.bias' has shape \(48,\) in the weights and \(64,\) by"
    ):
        split_pretrained(folder)


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_that_disagree_are_refused_by_name(folder: Path, layers: int) -> None:
    edit_config(folder, num_hidden_layers=layers)
    message = {
        1: r"has no 'encoder.layer.1.* and 13 more, which the weights hold",
        3: r"lack 'encoder.layer.2.* and 13",
    }
    with pytest.raises(InputError, match=message[layers]):
        split_pretrained(folder)


def test_a_bias_that_the_configuration_switches_off_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with pytest.raises(InputError, match=r"has no '.*layers.0.self_attn.q_proj.bias', which the weights hold"):
        split_pretrained(tmp_path)


def test_output_embeddings_are_no_head_to_be_made_anew(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    edit_weights(tmp_path, without("lm_head.weight"))
    with pytest.raises(InputError, match=r"the weights lack 'lm_head.weight'"):
        split_pretrained(tmp_path)
    assert "lm_head" not in split_pretrained(tmp_path, task="feature-extraction").server


def test_heads_may_be_missing_or_left_over_but_not_half(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    parts = split_pretrained(tmp_path, task="sequence-classification")
    assert parts.bundle.omitted == {"pooler.dense", "classifier"}
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    assert split_pretrained(tmp_path, task="feature-extraction").bundle.omitted == frozenset()
    assert split_pretrained(tmp_path, task="token-classification").bundle.omitted == frozenset()
    edit_weights(tmp_path, without("classifier.bias"))
    with pytest.raises(InputError, match=r"the weights lack 'classifier.bias'"):
        split_pretrained(tmp_path)


def test_another_number_of_labels_is_a_new_head_where_asked_for(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, AutoModelForSequenceClassification, relabelled=True, num_labels=7)
    assert model(tokens(1, 3)).logits.shape == (1, 7)
    with pytest.raises(InputError, match=r"'classifier.bias' has shape \(2,\) in the weights and \(7,\)"):
        load_model(tmp_path, AutoModelForSequenceClassification, num_labels=7)


def test_buffers_of_old_checkpoints_are_no_fault(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}))
    assert "h.0.attn.c_attn" in split_pretrained(tmp_path).server


def test_a_tokenizer_is_asked_for_where_texts_are_encoded(folder: Path) -> None:
    assert load_tokenizer(folder).convert_tokens_to_ids("a") == 5
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    assert split_pretrained(folder).bundle.files == {}
    with pytest.raises(InputError, match="no tokenizer in .*: fetch the model's tokenizer.json"):
        load_tokenizer(folder)


def test_models_that_are_not_in_memory_are_refused(folder: Path, tmp_path: Path) -> None:
    config = tiny_bert().config
    with torch.device("meta"):
        empty = BertModel(config)
    with pytest.raises(InputError, match=r"'embeddings.word_embeddings.weight' is not in memory .*no device_map"):
        split(empty)
    offloaded, _ = load_model(folder, BertModel, device_map={"": "disk"}, offload_folder=str(tmp_path / "away"))
    with pytest.raises(InputError, match=r"is not in memory \(offloaded to disk"):
        split(offloaded)


def test_the_owner_refuses_a_bundle_with_holes() -> None:
    parts = split(tiny_bert())
    bundle, transport = parts.bundle, LocalTransport(parts.server)
    for name in (
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.output.LayerNorm.bias",
        "embeddings.position_ids",
    ):
        holed = dataclasses.replace(bundle, tensors={k: v for k, v in bundle.tensors.items() if k != name})
        with pytest.raises(InputError, match=f"the bundle lacks '{name}'"):
            build(holed, Session(transport), num_labels=2)
    for name in (
        "encoder.layer.0.intermediate.dense",
        "embeddings.word_embeddings",
        "encoder.layer.1.output.LayerNorm",
    ):
        with pytest.raises(InputError, match=f"leaves out '{name}' of its BertModel, which is no head"):
            build(dataclasses.replace(bundle, omitted=frozenset({name})), Session(transport), num_labels=2)


def test_the_owner_names_a_tokenizer_that_does_not_load() -> None:
    bundle = dataclasses.replace(split(tiny_bert()).bundle, files={"tokenizer.json": b"{"})
    with pytest.raises(InputError, match="the bundle's tokenizer does not load: .*; split the model again"):
        bundle.tokenizer()

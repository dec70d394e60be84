"""The bundle: written and read without pickle, checked on arrival, built into models with new heads."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from transformers import AutoConfig, BertForSequenceClassification

from nn_cases import CountingTransport, tiny_bert, tiny_distilbert, tiny_gpt2, tiny_llama, tiny_roberta, tokens
from privtuner import linear, wire
from privtuner.errors import InputError, MessageError, PrivtunerError
from privtuner.nn import (
    EncryptedLayer,
    GroupSpec,
    LocalTransport,
    OwnerBundle,
    Session,
    Split,
    build,
    split,
    traffic_of,
)
from privtuner.nn.bundle import bundle_digest

VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]).encode()


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(tiny_bert(), files={"vocab.txt": VOCABULARY})


@pytest.fixture
def files(parts: Split) -> dict[str, bytes]:
    return parts.bundle.to_files()


def edited(files: dict[str, bytes], name: str, **changes: object) -> dict[str, bytes]:
    return {**files, name: json.dumps({**json.loads(files[name]), **changes}).encode()}


def assert_same(left: OwnerBundle, right: OwnerBundle) -> None:
    assert left.to_files().keys() == right.to_files().keys()
    assert (left.config, left.architecture, left.dtype) == (right.config, right.architecture, right.dtype)
    assert (left.groups, left.specs, left.kept) == (right.groups, right.specs, right.kept)
    assert [list(spec.members) for spec in left.groups.values()] == [list(s.members) for s in right.groups.values()]
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert tensor.dtype is right.tensors[name].dtype
        assert torch.equal(tensor, right.tensors[name])
    assert left.files == right.files


def test_files_round_trip(parts: Split, files: dict[str, bytes]) -> None:
    assert set(files) == {"config.json", "privtuner.json", "owner.safetensors", "layers.safetensors", "vocab.txt"}
    assert_same(OwnerBundle.from_files(files), parts.bundle)
    assert not any(content.startswith(b"\x80") for content in files.values()), "no pickle"


def test_directory_round_trip(parts: Split, tmp_path: Path) -> None:
    parts.bundle.save(tmp_path / "new" / "folder")
    (tmp_path / "new" / "folder" / "README.md").write_text("left alone")
    assert_same(OwnerBundle.load(tmp_path / "new" / "folder"), parts.bundle)
    assert AutoConfig.from_pretrained(tmp_path / "new" / "folder").model_type == "bert"
    with pytest.raises(InputError, match="no bundle in"):
        OwnerBundle.load(tmp_path)


def test_digest_is_of_names_and_contents_and_of_nothing_else(parts: Split, files: dict[str, bytes]) -> None:
    digest = parts.bundle.digest()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert bundle_digest(dict(reversed(files.items()))) == OwnerBundle.from_files(files).digest() == digest
    assert split(tiny_bert(), files={"vocab.txt": VOCABULARY}).bundle.digest() == digest
    assert split(tiny_bert(), "linear-w16", files={"vocab.txt": VOCABULARY}).bundle.digest() != digest
    variants = [{"ab": b"c"}, {"a": b"bc"}, {"a": b"", "bc": b""}, {"a": b"b", "c": b""}, {"abc": b""}, {}]
    assert len({bundle_digest(variant) for variant in variants}) == len(variants)


def test_tokenizer_travels(parts: Split) -> None:
    tokenizer = parts.bundle.tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello world")["input_ids"])[1:3] == ["hello", "world"]
    with pytest.raises(InputError, match="carries no tokenizer"):
        split(tiny_bert()).bundle.tokenizer()


@pytest.mark.parametrize("name", ["config.json", "privtuner.json", "owner.safetensors", "layers.safetensors"])
def test_missing_and_truncated_files_are_refused(files: dict[str, bytes], name: str) -> None:
    with pytest.raises(MessageError, match=f"{name} missing"):
        OwnerBundle.from_files({key: value for key, value in files.items() if key != name})
    for cut in (b"", files[name][: len(files[name]) // 2]):
        with pytest.raises(MessageError, match="malformed"):
            OwnerBundle.from_files({**files, name: cut})


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/passwd", "pytorch_model.bin", "modeling.py", "vocab.txt/../x"])
def test_unexpected_files_are_refused(files: dict[str, bytes], name: str) -> None:
    with pytest.raises(MessageError, match="unexpected files"):
        OwnerBundle.from_files({**files, name: b"x"})


def test_the_servers_configuration_runs_nothing_at_the_owner(parts: Split, files: dict[str, bytes]) -> None:
    """Entries that make transformers fetch code or kernels do not get through."""
    hostile = edited(
        files,
        "config.json",
        attn_implementation="someone/kernels",
        _attn_implementation="someone/kernels",
        experts_implementation="someone/kernels",
        auto_map={"AutoConfig": "code.Config", "AutoModel": "code.Model"},
        quantization_config={"quant_method": "gptq"},
        task_specific_params={"deep": {"_name_or_path": "/somewhere", "kept": 1}},
    )
    bundle = OwnerBundle.from_files(hostile)
    assert bundle.config == {**parts.bundle.config, "task_specific_params": {"deep": {"kept": 1}}}
    model = build(bundle, Session(LocalTransport(parts.server)), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_contradictions_are_refused(files: dict[str, bytes]) -> None:
    manifest = json.loads(files["privtuner.json"])
    groups = manifest["groups"]
    for changes, message in [
        ({"format": 1}, "format 1, this version reads 4; install the same version"),
        ({"dtype": "nn"}, "unknown dtype 'nn'"),
        ({"dtype": "load"}, "unknown dtype 'load'"),
        ({"groups": {k: v for k, v in groups.items() if k != "pooler.dense"}}, "groups and layers differ in"),
        ({"groups": {**groups, "pooler.dense": {"kind": "conv9", "members": []}}}, "unknown kind 'conv9'"),
        (
            {"groups": {**groups, "pooler.dense": {"kind": "linear", "members": [["pooler.dense", 31]]}}},
            "members of 'pooler.dense' have 31 output features and its description 32",
        ),
        ({"groups": 5}, "malformed"),
        ({"groups": {"a": 1}}, "malformed"),
    ]:
        with pytest.raises(MessageError, match=message):
            OwnerBundle.from_files(edited(files, "privtuner.json", **changes))
    with pytest.raises(MessageError, match="holds a list instead of an object"):
        OwnerBundle.from_files({**files, "config.json": b"[]"})


def test_an_entry_of_another_kind_is_refused(parts: Split, files: dict[str, bytes]) -> None:
    entries = {name: spec.to_bytes() for name, spec in parts.bundle.specs.items()}
    assert {wire.peek(data).kind for data in entries.values()} == {"layer"}
    spec = parts.bundle.specs["pooler.dense"]
    request, _ = linear.encrypt(np.ones((1, spec.d_in), np.float32), spec)
    for entry, message in [
        (request, "expected a message of kind layer, got request"),
        (entries["pooler.dense"] + b"0", "layer: 1 bytes too many"),
        (entries["pooler.dense"][:-1], "truncated"),
    ]:
        changed = {**entries, "pooler.dense": entry}
        specs = save({name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in changed.items()})
        with pytest.raises(MessageError, match=message):
            OwnerBundle.from_files({**files, "layers.safetensors": specs})


def test_damaged_bundles_raise_and_never_crash(parts: Split, files: dict[str, bytes]) -> None:
    """Any single damaged byte is refused, or leaves a bundle that builds or is refused later, with our errors only."""
    rng = random.Random(5)
    small = {key: value for key, value in files.items() if key != "owner.safetensors"}
    for _ in range(300):
        name = rng.choice([*small])
        content = bytearray(files[name])
        content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            bundle = OwnerBundle.from_files({**files, name: bytes(content)})
            build(bundle, Session(LocalTransport(parts.server)))
        except PrivtunerError:
            pass


def test_new_heads_follow_the_generator_as_in_the_clear(parts: Split, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    torch.manual_seed(7)
    model = build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=5)
    torch.manual_seed(7)
    clear = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert torch.equal(model.classifier.weight, clear.classifier.weight)
    assert torch.equal(model.classifier.bias, clear.classifier.bias)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    assert model.config.num_labels == 5
    assert not model.training


@pytest.mark.parametrize(
    ("task", "cls"),
    [
        (None, "BertModel"),
        ("feature-extraction", "BertModel"),
        ("sequence-classification", "BertForSequenceClassification"),
        ("token-classification", "BertForTokenClassification"),
        ("question-answering", "BertForQuestionAnswering"),
    ],
)
def test_tasks(parts: Split, task: str | None, cls: str) -> None:
    model = build(parts.bundle, Session(LocalTransport(parts.server)), task=task)
    assert type(model).__name__ == cls
    encrypted = [name for name, module in model.named_modules() if isinstance(module, EncryptedLayer)]
    assert len(encrypted) == 2 * 6 + any("pooler" in name for name, _ in model.named_modules())
    model(tokens(1, 4))


def test_causal_models_take_classifier_heads_and_back() -> None:
    for clear, head in ((tiny_gpt2(), "score"), (tiny_llama(), "score")):
        parts = split(clear)
        model = build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=3, pad_token_id=0)
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{head}.weight"]
        assert model(tokens(2, 4)).logits.shape == (2, 3)
        again = build(parts.bundle, Session(LocalTransport(parts.server)), task="causal-lm")
        assert again(tokens(2, 4)).logits.shape == (2, 4, 50)


def test_labels_by_name(parts: Split) -> None:
    names = {0: "no", 1: "yes", 2: "maybe"}
    model = build(
        parts.bundle, Session(LocalTransport(parts.server)), id2label=names, label2id={v: k for k, v in names.items()}
    )
    assert type(model) is BertForSequenceClassification
    assert model.config.num_labels == 3
    assert model.config.id2label == names
    with pytest.raises(InputError, match="num_labels is 2 and id2label names 3 labels"):
        build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=2, id2label=names)


def test_a_head_of_another_size_is_made_anew() -> None:
    clear = tiny_roberta()
    parts = split(clear)
    headed = build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=2)
    head = {name: p.detach() for name, p in headed.named_parameters() if p.requires_grad}
    bundle = dataclasses.replace(
        parts.bundle,
        config=json.loads(headed.config.to_json_string(use_diff=False)),
        architecture="RobertaForSequenceClassification",
        tensors={**parts.bundle.tensors, **head},
        kept=frozenset(head),
    )
    same = build(bundle, Session(LocalTransport(parts.server)))
    assert torch.equal(same.classifier.out_proj.weight, headed.classifier.out_proj.weight)
    other = build(bundle, Session(LocalTransport(parts.server)), num_labels=4)
    assert other.classifier.out_proj.weight.shape == (4, 32)
    assert other.classifier.out_proj.weight.requires_grad
    assert torch.equal(other.classifier.dense.weight, headed.classifier.dense.weight)


def test_builds_do_not_share_tensors(parts: Split) -> None:
    first, second = (build(parts.bundle, Session(LocalTransport(parts.server))) for _ in range(2))
    with torch.no_grad():
        first.embeddings.LayerNorm.weight.zero_()
    assert not torch.equal(first.embeddings.LayerNorm.weight, second.embeddings.LayerNorm.weight)
    assert not torch.equal(first.embeddings.LayerNorm.weight, parts.bundle.tensors["embeddings.LayerNorm.weight"])


def test_building_makes_no_linear_weight(parts: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing the size of a weight is allocated, not even for a moment."""
    real: list[tuple[int, ...]] = []
    empty = torch.empty

    def watched(*size: object, **options: object) -> torch.Tensor:
        made = empty(*size, **options)  # type: ignore[arg-type]
        if not made.is_meta:
            real.append(tuple(made.shape))
        return made

    monkeypatch.setattr(torch, "empty", watched)
    model = build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=2)
    assert all(len(shape) < 2 or shape[0] == 2 for shape in real), real
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) < 50 * 32 + 42 * 32 + 2 * 300 + 10 * 32 + 100


def test_buffers_outside_the_state_are_right() -> None:
    clear = tiny_llama()
    parts = split(clear)
    model = build(OwnerBundle.from_files(parts.bundle.to_files()), Session(LocalTransport(parts.server)))
    assert torch.equal(model.model.rotary_emb.inv_freq, clear.model.rotary_emb.inv_freq)
    assert not any("inv_freq" in name for name in model.state_dict())
    bert = split(tiny_bert())
    positions = build(bert.bundle, Session(LocalTransport(bert.server))).embeddings.position_ids
    assert torch.equal(positions, torch.arange(40)[None])


@pytest.mark.parametrize(("skip", "prompt"), [(None, 8), (True, 7)])
def test_generation_with_a_cache(skip: bool | None, prompt: int) -> None:
    parts = split(tiny_llama(tied=True))
    transport = CountingTransport(parts.server)
    model = build(parts.bundle, Session(transport, verify_every=0), skip_padding=skip)
    ids = tokens(2, 4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    made = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 7)
    assert len(transport.calls) == 3 * len(parts.server)
    assert traffic_of(model).snapshot()["layers.0.mlp.down_proj", "forward"].tokens == prompt + 2 + 2


def test_wrong_options_are_refused(parts: Split) -> None:
    transport = LocalTransport(parts.server)
    with pytest.raises(InputError, match="unknown task 'sing'; known: causal-lm, "):
        build(parts.bundle, Session(transport, verify_every=0), task="sing")
    with pytest.raises(InputError, match=r"\['num_lables'\] are no entries of a BertConfig"):
        build(parts.bundle, Session(transport, verify_every=0), num_lables=3)
    with pytest.raises(InputError, match="do not change entries of the configuration that set sizes"):
        build(parts.bundle, Session(transport, verify_every=0), intermediate_size=64)
    with pytest.raises(InputError, match="do not change entries of the configuration that set sizes"):
        build(parts.bundle, Session(transport, verify_every=0), vocab_size=60)
    with pytest.raises(InputError, match=r"the bundle lacks 'encoder.layer.2.attention.self.query.weight'"):
        build(parts.bundle, Session(transport, verify_every=0), num_hidden_layers=3)


def with_pooler_group(parts: Split, members: dict[str, int], **changes: Any) -> OwnerBundle:
    spec = linear.prepare(np.ones((sum(members.values()), 32))).spec
    return dataclasses.replace(
        parts.bundle,
        groups={**parts.bundle.groups, "pooler.dense": GroupSpec("linear", members)},
        specs={**parts.bundle.specs, "pooler.dense": spec},
        **changes,
    )


def test_server_and_owner_of_different_kinds_are_refused(parts: Split) -> None:
    files = parts.bundle.to_files()
    manifest = json.loads(files["privtuner.json"])
    manifest["groups"]["pooler.dense"]["kind"] = "conv1d"
    wrong = OwnerBundle.from_files({**files, "privtuner.json": json.dumps(manifest).encode()})
    with pytest.raises(InputError, match=r"'pooler.dense' is a Linear here and was split as conv1d"):
        build(wrong, Session(LocalTransport(parts.server)))
    other = OwnerBundle.from_files(edited(files, "config.json", model_type="no-such-model"))
    with pytest.raises(InputError, match="makes no configuration of model type 'no-such-model'"):
        build(other, Session(LocalTransport(parts.server)))
    for architecture in ("NoSuchModel", "AutoConfig", "__doc__"):
        unknown = OwnerBundle.from_files(edited(files, "privtuner.json", architecture=architecture))
        with pytest.raises(InputError, match=f"has no model '{architecture}' of type bert; use the server's"):
            build(unknown, Session(LocalTransport(parts.server)))
    distil = split(tiny_distilbert())
    with pytest.raises(InputError, match="cannot build causal-lm of distilbert"):
        build(distil.bundle, Session(LocalTransport(distil.server)), task="causal-lm")
    odd = OwnerBundle.from_files(edited(files, "config.json", hidden_act="no such function"))
    with pytest.raises(InputError, match="cannot build BertModel of bert"):
        build(odd, Session(LocalTransport(parts.server)))

"""What is saved of a data owner's model loads back right or not at all; resizing is whole or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_model
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedModel,
)

from nn_cases import CountingTransport, clear_twin, tiny_bert, tiny_gpt2, tiny_llama, tokens
from privtuner.errors import InputError, WeightWithheldError
from privtuner.nn import LocalTransport, Session, Split, build, split

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

OWNERS_ALONE = "holds the data owner's tensors.*no frozen weight.*load_model"
IDS = tokens(2, 5)


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(tiny_bert())


def classifier(parts: Split, **options: object) -> PreTrainedModel:
    model = build(parts.bundle, Session(CountingTransport(parts.server), verify_every=0), num_labels=3, **options)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    with pytest.warns(UserWarning, match=OWNERS_ALONE):
        model.save_pretrained(folder)
    return folder / "model.safetensors"


def test_a_saved_head_loads_back_and_never_as_a_model(parts: Split, tmp_path: Path) -> None:
    model = classifier(parts)
    file = save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    # Even where the right configuration comes from elsewhere, no weight is made up.
    clear = clear_twin(model, parts, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="mismatched"):
        BertForSequenceClassification.from_pretrained(tmp_path, config=clear.config)
    again = classifier(parts)
    load_model(again, file)
    assert {name: t.tolist() for name, t in again.state_dict().items()} == {
        name: t.tolist() for name, t in model.state_dict().items()
    }
    torch.nn.init.zeros_(clear.classifier.weight)
    clear.load_state_dict(
        {name: tensor for name, tensor in load_file(file).items() if name.startswith("classifier.")}, strict=False
    )
    assert torch.equal(clear.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("make", [tiny_gpt2, lambda: tiny_llama(tied=True), tiny_llama])
def test_tied_tensors_are_saved_once(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    parts = split(make())
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    file = save(model, tmp_path)
    again = build(parts.bundle, Session(LocalTransport(parts.server)))
    load_model(again, file)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    saved = load_file(file)
    assert sum(tensor.shape == (50, 32) for tensor in saved.values()) == 1


def test_nothing_that_is_saved_fits_a_clear_model(parts: Split, tmp_path: Path) -> None:
    model = classifier(parts)
    clear = clear_twin(model, parts, dtype=torch.float32)
    saved = load_file(save(model, tmp_path))
    with pytest.raises(RuntimeError, match=r"size mismatch for bert.encoder.layer.0.attention.self.query.weight"):
        clear.load_state_dict(saved, strict=False)
    model.load_state_dict(saved)


def test_a_state_has_the_owner_s_tensors_alone(parts: Split, tmp_path: Path) -> None:
    """As of any module: what is missing shows, unless the caller says that it may be."""
    model = classifier(parts)
    clear = clear_twin(model, parts, dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save_model(model, str(tmp_path / "saved.safetensors"))
    for state in (torch.load(tmp_path / "state.pt"), load_file(tmp_path / "saved.safetensors")):
        with pytest.raises(RuntimeError, match=r"Missing key.*bert.encoder.layer.0.attention.self.query.weight"):
            clear.load_state_dict(state)
        model.load_state_dict(state)
        clear.load_state_dict(state, strict=False)
        assert torch.equal(clear.classifier.weight, model.classifier.weight)


def test_a_model_in_the_way_is_not_overwritten(parts: Split, tmp_path: Path) -> None:
    model = classifier(parts)
    clear = tiny_bert()
    clear.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"holds a model \(config.json\).*give another directory"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # What an earlier run of the Trainer left there is replaced, configuration and all.
    (tmp_path / "training_args.bin").write_bytes(b"")
    save(model, tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(InputError, match="is a file; give a directory"):
        model.save_pretrained(tmp_path / "model.safetensors")


def test_options_of_saving(parts: Split, tmp_path: Path) -> None:
    model = classifier(parts)
    for publish in (
        lambda: model.push_to_hub("somebody/model"),
        lambda: model.save_pretrained(tmp_path, push_to_hub=True),
    ):
        with pytest.raises(WeightWithheldError, match="no whole model.*push a PEFT adapter"):
            publish()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=OWNERS_ALONE):
        model.save_pretrained(tmp_path, state_dict={"only": torch.ones(2)}, max_shard_size="1GB")
    assert [name for name, t in load_file(tmp_path / "model.safetensors").items() if t.shape != (1,)] == ["only"]
    with pytest.warns(UserWarning, match=OWNERS_ALONE):
        model.bert.save_pretrained(tmp_path / "base")
    assert "pooler.dense.bias" in load_file(tmp_path / "base" / "model.safetensors")


@pytest.mark.filterwarnings("ignore:`torch.jit.trace(_method)?` is deprecated:DeprecationWarning")
def test_nothing_is_initialised_anew_or_traced(parts: Split) -> None:
    model = classifier(parts)
    before = model.state_dict()
    for initialise in (model.init_weights, model.bert.post_init):
        with pytest.raises(WeightWithheldError, match="are pretrained.*cannot be initialised anew"):
            initialise()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(InputError, match="cannot be traced or exported"):
        torch.jit.trace(model, (IDS,), strict=False)


def test_copies_save_themselves(parts: Split, tmp_path: Path) -> None:
    model = classifier(parts)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.classifier.weight)
    assert not load_file(save(twin, tmp_path))["classifier.weight"].any()


def test_adapters_are_saved_as_ever(parts: Split, tmp_path: Path) -> None:
    native = classifier(parts)
    native.add_adapter(LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    native.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_adapters_name_the_base_model_they_are_given(parts: Split, tmp_path: Path) -> None:
    tiny_bert().config.save_pretrained(tmp_path / "clear")
    for name in (None, str(tmp_path / "clear")):
        adapted = get_peft_model(classifier(parts, base_model=name), LoraConfig(task_type="SEQ_CLS"))
        adapted.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == name


def test_resizing_is_refused_whole_where_the_server_has_the_head() -> None:
    parts = split(tiny_llama())
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    with pytest.raises(
        WeightWithheldError, match="output embeddings are with the server.*clear model and split it again"
    ):
        model.resize_token_embeddings(60)
    assert model.get_input_embeddings().weight.shape == (50, 32)
    assert model.config.vocab_size == 50
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model(IDS).logits.shape == (2, 5, 50)


def test_resizing_before_the_split() -> None:
    clear = tiny_llama()
    clear.resize_token_embeddings(60)
    parts = split(clear)
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    assert model(torch.tensor([[55, 59]])).logits.shape == (1, 2, 60)


def test_resized_embeddings_go_with_the_adapter(parts: Split, tmp_path: Path) -> None:
    """With the clear model named, PEFT sees that rows were added and saves them; reloading gives the same model."""
    tiny_bert().save_pretrained(tmp_path / "clear")
    model = classifier(parts, base_model=str(tmp_path / "clear"))
    with pytest.warns(UserWarning, match="from 50 to 60 rows after the split.*save_embedding_layers=True"):
        table = model.resize_token_embeddings(60, mean_resizing=False)
    assert not table.weight.requires_grad
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        adapted.save_pretrained(tmp_path / "adapter")
    other = classifier(parts)
    with pytest.warns(UserWarning, match="from 50 to 60"):
        other.resize_token_embeddings(60, mean_resizing=False)
    again = PeftModel.from_pretrained(other, str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[55, 59, 4]])
    with torch.no_grad():
        # Fresh noise alone, below 2^-12 here.
        assert torch.allclose(again(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=2**-12)

"""``transformers.Trainer`` and plain loops, unchanged, on the owner's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

from minilm import find_minilm
from nn_cases import CountingTransport, RecordingTransport, clear_twin, tiny_bert, tiny_llama, tokens
from privtuner import linear
from privtuner.nn import EncryptedLayer, LocalTransport, Session, Split, build, split, split_pretrained, traffic_of
from privtuner.train import add_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(tiny_bert())


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of mixed lengths whose label is whether the first token is small."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = tokens(1, 3 + index % 4, seed=index)[0]
        return {"input_ids": row, "labels": (row[0] > 25).long()}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad to the longest of the batch, so that shapes differ between steps."""
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


def adapted(parts: Split, *, clear: str | None = None, seed: int = 0) -> PeftModel:
    """An owner's model with adapters, or one of its twins in the clear: "quantised" or "float"."""
    torch.manual_seed(seed)
    model: PreTrainedModel = build(parts.bundle, Session(CountingTransport(parts.server), verify_every=0), num_labels=2)
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    if clear is not None:
        model = clear_twin(model, parts, dtype=torch.float32, attention="sdpa")
        if clear == "float":
            model.bert.load_state_dict(tiny_bert().state_dict())
    torch.manual_seed(seed + 1)
    return add_lora(model, r=4, targets=["query", "value"], modules_to_save=["classifier"])


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.3,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**options, **changes})


def train(model: PeftModel, folder: Path, **changes: Any) -> Trainer:
    trainer = Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        data_collator=collate,
    )
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64)


def test_trainer_goes_on_from_its_checkpoint(parts: Split, tmp_path: Path) -> None:
    """Weights, optimiser, schedule, order of the data and step: as the run that was never cut, but for fresh noise."""
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "linear"}
    start, whole, again = adapted(parts), adapted(parts), adapted(parts, seed=7)
    expected = train(whole, tmp_path, save_strategy="steps", save_steps=4, **options)
    asked = len(traffic_calls(whole))
    trainer = Trainer(
        model=again, args=arguments(tmp_path, **options), train_dataset=Sentences(), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == expected.state.global_step == 6
    assert len(traffic_calls(again)) == asked / 3
    assert_same_run(whole, again, start)


def traffic_calls(model: PeftModel) -> list[str]:
    """Layers that were asked for, in order."""
    transport = next(m.group.session.transport for m in model.modules() if isinstance(m, EncryptedLayer))
    return transport.calls


def test_trainer_follows_the_clear_quantised_model(parts: Split, tmp_path: Path) -> None:
    """Every logged loss: nearer to the clear quantised run than a 32nd of what the int8 rounding itself changes."""
    runs = {kind: train(adapted(parts, clear=kind), tmp_path) for kind in (None, "quantised", "float")}
    encrypted, quantised, unquantised = (losses(runs[kind]) for kind in (None, "quantised", "float"))
    assert len(encrypted) == 6
    rounding = (unquantised - quantised).abs().max()
    # 2^-14 against 2^-8 is a 64th; losses are logged with four or more digits.
    assert float((encrypted - quantised).abs().max()) <= float(rounding) / 32
    assert runs[None].evaluate()["eval_loss"] < float(encrypted[0]), "it learns"
    predictions = runs[None].predict(Sentences())
    assert predictions.predictions.shape == (24, 2)


def end_of(model: PeftModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def assert_same_run(left: PeftModel, right: PeftModel, start: PeftModel) -> None:
    """Two runs went the same way, to a part in 256 of the way: fresh noise of 2^-14 a product, over a few steps."""
    way = end_of(left) - end_of(start)
    assert float((end_of(left) - end_of(right)).norm()) < float(way.norm()) / 256


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"max_grad_norm": 0.1, "weight_decay": 0.01},
    ],
)
def test_options_of_the_trainer_do_what_they_do_in_the_clear(
    parts: Split, tmp_path: Path, options: dict[str, Any]
) -> None:
    models = [adapted(parts), adapted(parts, clear="quantised")]
    for model in models:
        train(model, tmp_path, max_steps=2, **options)
    assert_same_run(*models, adapted(parts))


def test_checkpoints_resume(parts: Split, tmp_path: Path) -> None:
    """Three steps, stop, three more: where six steps in a row end, to the noise."""
    straight = adapted(parts)
    train(straight, tmp_path / "straight")
    first = adapted(parts)
    train(first, tmp_path / "broken", max_steps=3, save_strategy="steps", save_steps=3)
    resumed = adapted(parts, seed=5)
    trainer = Trainer(
        model=resumed, args=arguments(tmp_path / "broken"), train_dataset=Sentences(), data_collator=collate
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert trainer.state.global_step == 6
    assert_same_run(straight, resumed, adapted(parts))


def test_trainer_saves_an_adapter_alone(parts: Split, tmp_path: Path) -> None:
    model = adapted(parts)
    trainer = train(model, tmp_path, max_steps=1)
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    torch.manual_seed(0)
    clear = clear_twin(
        build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=2), parts, dtype=torch.float32
    )
    stock = PeftModel.from_pretrained(clear, str(tmp_path / "adapter")).eval()
    batch = collate([Sentences()[k] for k in range(6)])
    with torch.no_grad():
        got, want = model.eval()(**batch).logits, stock(**batch).logits
    # The propagated noise is below 2^-14 here, the adapter's effect above 2^-4.
    assert torch.allclose(got, want, atol=2**-10)


@pytest.mark.filterwarnings("ignore:.*holds the data owner's tensors:UserWarning")
def test_a_head_alone_is_checkpointed_resumed_and_chosen(parts: Split, tmp_path: Path) -> None:
    """Without adapters a checkpoint holds the owner's tensors: training goes on from it, and the best comes back."""

    def headed(seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        return build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=2)

    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    first = headed(0)
    train(first, tmp_path, max_steps=2, **options)
    resumed = headed(5)
    trainer = Trainer(
        model=resumed,
        args=arguments(tmp_path, max_steps=4, load_best_model_at_end=True, **options),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    straight = headed(0)
    train(straight, tmp_path / "straight", max_steps=4)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name in ("checkpoint-2", "checkpoint-4")
    assert torch.equal(load_file(best / "model.safetensors")["classifier.weight"], resumed.classifier.weight)
    assert not (best / "config.json").exists()
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")["classifier.weight"]
    end = straight.classifier.weight.detach()
    assert float((last - end).norm()) < float((headed(0).classifier.weight.detach() - end).norm()) / 256


def test_mixed_precision(parts: Split, tmp_path: Path) -> None:
    trainer = train(adapted(parts), tmp_path, max_steps=2, bf16=True)
    assert torch.isfinite(losses(trainer)).all()


class Lines(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Four lines of 3 to 6 tokens, padded on the right to 6, with labels of -100 there."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(6) < 3 + index).long()
        row = tokens(1, 6, seed=index)[0] * mask
        return {"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_a_language_model_trains_without_its_padding(tmp_path: Path, options: dict[str, Any]) -> None:
    """The trainer reads a training step's loss alone, and everything that it evaluates."""
    parts = split(tiny_llama())
    transport = RecordingTransport(parts.server)
    models = [build(parts.bundle, Session(transport, verify_every=0))]
    models.append(clear_twin(models[0], parts, dtype=torch.float32, attention="sdpa"))
    runs = []
    for model in models:
        torch.manual_seed(1)
        trainer = Trainer(
            model=get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")),
            args=arguments(tmp_path, max_steps=2, per_device_eval_batch_size=4, **options),
            train_dataset=Lines(),
            eval_dataset=Lines(),
        )
        trainer.train()
        if model is models[0]:
            assert {count for _, _, count in transport.seen} == {18}, "3 + 4 + 5 + 6 tokens of 24"
            transport.seen = []
        runs.append((losses(trainer), trainer.predict(Lines()).predictions))
    assert {count for _, _, count in transport.seen} == {24}
    # Noise of 2^-14 a product on losses and logits of order one, 2^-8 and less where bfloat16 rounds.
    near = 2**-4 if "bf16" in options else 2**-8
    assert float((runs[0][0] - runs[1][0]).abs().max()) < near
    assert float(abs(runs[0][1] - runs[1][1]).max()) < 4 * near


def test_plain_loop_with_traffic(parts: Split) -> None:
    model = adapted(parts)
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    meter = traffic_of(model)
    model.train()
    before, seen = meter.total(), []
    for index in range(3):
        batch = collate([Sentences()[k] for k in range(index, 20, 5)])
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        now = meter.total()
        seen.append(now - before)
        before = now
    assert {step.requests for step in seen} == {2 * len(parts.server) - 1}
    assert seen[0].bytes_down > seen[1].bytes_down, "the first step also fetched the mask products"
    assert all(step.bytes_up > 4 * 32 * step.tokens for step in seen)


def test_minilm_forward_and_one_step() -> None:
    """The real model: the clear model's sentence classifier up to int8 rounding, and a loss that falls."""
    parts = split_pretrained(find_minilm())
    assert parts.bundle.architecture == "BertModel"
    frozen = sum(p.quantised().size for p in parts.server.values())
    assert frozen == 6 * 12 * 384 * 384 + 384 * 384
    tokenizer = parts.bundle.tokenizer()
    batch = tokenizer(["transfer money to my card", "where is my parcel?"], padding=True, return_tensors="pt")
    labels = torch.tensor([0, 1])
    torch.manual_seed(0)
    model = build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=2)
    twin = clear_twin(model, parts, dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        got, want = model(**batch).logits, twin(**batch).logits
    # Logits are of order 2^-4 with a fresh head (std 0.02); noise of 2^-14 a product averages out over 384 features.
    assert float((got - want).abs().max()) < 2**-12
    trained = add_lora(model, r=8, targets=["query", "value"])
    optimiser = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.5)
    trained.train()
    start = trained(**batch, labels=labels).loss
    start.backward()
    optimiser.step()
    trained.eval()
    with torch.no_grad():
        assert trained(**batch, labels=labels).loss < start
    for wire, count in traffic_of(trained).snapshot().items():
        assert count.bytes_up <= 4.1 * count.tokens * _width(parts, wire) + 128 * count.requests


def _width(parts: Split, key: tuple[str, str]) -> int:
    spec: linear.LayerSpec = parts.server[key[0]].spec
    return spec.d_in if key[1] == "forward" else spec.d_out

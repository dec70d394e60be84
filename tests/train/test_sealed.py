"""Training a head on a sealed encoder, here in the clear: what is asked of the server, in which order and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nn_cases import tiny_bert
from privtuner.errors import InputError
from privtuner.nn import TrafficMeter
from privtuner.train import load_classifier
from privtuner.train.classifier import clear_classifier
from privtuner.train.dataset import Encoded, ShuffledBatches
from privtuner.train.limits import fit, positions
from privtuner.train.peft_adapter import add_lora, save_released
from privtuner.train.report import load_labels, save_head
from privtuner.train.sealed import SealedClassifier, evaluate_sealed, train_sealed
from privtuner.train.training import TrainConfig


class ClearEncoder(torch.nn.Module):
    """A sealed encoder's face on a model in the clear, with an adapter that it steps as the server does."""

    width, period, sequences = 32, 8, 16

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_bert().requires_grad_(False)
        self.embeddings = self.model.embeddings
        self.meter = TrafficMeter()
        self.rate, self.calls = 0.0, []
        self.adapter = torch.nn.Parameter(torch.zeros(32))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        keeps = self.training and torch.is_grad_enabled()
        self.calls.append(("forward" if keeps else "embed", len(ids)))
        states = self.model(ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)
        pooled = states.sum(1) / mask.sum(1, keepdim=True)
        if not keeps:
            return pooled
        pooled = pooled + self.adapter
        pooled.register_hook(lambda g: self.calls.append(("backward", self.rate)))
        return pooled


def texts(count: int, seed: int = 0) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    rows, targets = [], torch.arange(count) % 2
    for target in targets.tolist():
        length = int(torch.randint(3, 8, (1,), generator=draw))
        rows.append(tuple((torch.randint(5, 25, (length,), generator=draw) + 20 * target).tolist()))
    return Encoded(tuple(rows), targets, 0)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "batch_size": 8, "warmup": 0.0, "seed": 0, "lr": 0.1, "head_lr": 0.1, **changes})


def test_each_step_is_a_pass_each_way_at_a_rate_that_falls() -> None:
    encoder = ClearEncoder()
    seen: list[int] = []
    result = train_sealed(
        SealedClassifier(encoder, 2, 0),
        texts(24),
        texts(20, 1),
        config(),
        after_step=lambda r: seen.append(len(r.steps)),
    )
    evaluation = [("embed", 16), ("embed", 4)]
    steps = [call for step in range(4) for call in (("forward", 8), ("backward", pytest.approx(0.1 * (1 - step / 4))))]
    assert encoder.calls == [*evaluation, *steps, *evaluation]
    assert seen == [1, 2, 3, 4]
    assert [step.lr for step in result.steps] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert result.mode == "sealed"
    assert result.to_dict()["accuracy_after"] == result.after.accuracy


def test_it_learns() -> None:
    model = SealedClassifier(ClearEncoder(), 2, 0)
    result = train_sealed(model, texts(64), texts(40, 1), config(steps=30, batch_size=16))
    assert result.steps[-1].loss < result.steps[0].loss / 2
    # Three standard deviations above chance, on 40 texts of two classes.
    assert result.after.accuracy > 0.74
    assert evaluate_sealed(model, texts(40, 1)).accuracy == result.after.accuracy


def test_a_rank_of_zero_trains_the_head_alone() -> None:
    encoder = ClearEncoder()
    train_sealed(SealedClassifier(encoder, 2, 0), texts(24), None, config(lora_r=0))
    assert encoder.calls == [("embed", 8)] * 4


def test_more_texts_than_a_pass_takes_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size is 17, and a pass of this server's model takes 16 texts"):
        train_sealed(SealedClassifier(ClearEncoder(), 2), texts(24), None, config(batch_size=17))


def test_a_loss_that_is_no_number() -> None:
    model = SealedClassifier(ClearEncoder(), 2, 0)
    torch.nn.init.constant_(model.classifier.weight, torch.inf)
    with pytest.raises(InputError, match="the loss is (nan|inf) at step 1 of 4; use lower learning rates"):
        train_sealed(model, texts(24), None, config())


def test_limits_are_those_of_the_embeddings() -> None:
    model = SealedClassifier(ClearEncoder(), 2)
    assert positions(model) == 40
    with pytest.raises(InputError, match="the tokenizer makes token 50 and the model has embeddings for 0 to 49"):
        fit(model, [Encoded(((3, 50),), torch.zeros(1, dtype=torch.int64), 0)])


def test_the_head_is_saved_with_its_labels(tmp_path: Path) -> None:
    model = SealedClassifier(ClearEncoder(), 2, 0)
    save_head(model.classifier, ("no", "yes"), "mean", tmp_path / "new")
    saved = load_file(tmp_path / "new" / "head.safetensors")
    assert torch.equal(saved["weight"], model.classifier.weight)
    assert load_labels(tmp_path / "new") == ("no", "yes")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(("pool", "inside"), [("mean", "encoder"), ("first", "bert")])
def test_released_adapters_work_on_the_clear_model(model: Path, tmp_path: Path, pool: str, inside: str) -> None:
    """They are what PEFT would have saved of the same matrices and head."""
    draw = np.random.default_rng(0)
    matrices = {
        (layer, target): (draw.normal(size=(2, 32)), draw.normal(size=(32, 2)))
        for layer in range(2)
        for target in ("query", "value")
    }
    head = torch.nn.Linear(32, 3)
    save_head(head, ("a", "b", "c"), pool, tmp_path)
    save_released(tmp_path, matrices, head, alpha=4.0, inside=inside)
    loaded = load_classifier(model, tmp_path)
    twin = add_lora(clear_classifier(model, ("a", "b", "c"), pool), r=2, alpha=4, targets=("query", "value"))
    for name, parameter in twin.named_parameters():
        if ".lora_" in name:
            layer, target = name.partition("encoder.layer.")[2][0], "query" if ".query." in name else "value"
            parameter.data = torch.tensor(matrices[int(layer), target]["lora_B" in name]).float()
    saved, wanted = loaded.state_dict(), twin.state_dict()
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if ".lora_" in name:
            assert torch.equal(saved[name], tensor), name
        elif "modules_to_save" in name:
            assert torch.equal(saved[name], head.state_dict()[name.rpartition(".")[2]])


def test_the_head_takes_its_first_steps_on_the_vectors_of_one_pass() -> None:
    encoder, data = ClearEncoder(), texts(16)
    model = SealedClassifier(encoder, 2, 0)
    wanted = SealedClassifier(ClearEncoder(), 2, 0).classifier
    result = train_sealed(model, data, None, config(steps=1, batch_size=16, head_first=5))
    assert [name for name, _ in encoder.calls] == ["forward", "backward"]
    batch = next(ShuffledBatches(data, 16, 0))
    with torch.no_grad():
        pooled = ClearEncoder().eval()(batch.input_ids, batch.attention_mask)
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=0.1, weight_decay=config().weight_decay)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(wanted(pooled), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted.parameters(), config().clip)
        optimizer.step()
        losses.append(loss.item())
    assert result.steps[0].loss == pytest.approx(losses[5])
    torch.testing.assert_close(model.classifier.weight, wanted.weight)

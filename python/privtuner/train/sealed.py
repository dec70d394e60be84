"""Fine-tunes a classifier on a sealed encoder: the head here, in the clear, the adapters at the server, encrypted.

The server steps its adapters by SGD with momentum on ciphertexts; the head is trained by AdamW on the pooled vectors,
the only values of the model that are decrypted.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError
from privtuner.nn import SealedEncoder
from privtuner.train.checkpoints import Checkpoint
from privtuner.train.dataset import Encoded, ShuffledBatches, ordered_batches
from privtuner.train.learning import LearningCheck
from privtuner.train.state import TrainingState
from privtuner.train.training import (
    PEAK,
    Evaluation,
    Step,
    TrainConfig,
    TrainResult,
    rate_at,
    recorded,
    resumed,
    set_rates,
)

if TYPE_CHECKING:
    from privtuner.sealed.owner import SealedOwner

__all__ = ["SealedClassifier", "evaluate_sealed", "train_sealed"]

_DEVIATION = 0.02  # of the head's first weights, as transformers starts them


class SealedClassifier(torch.nn.Module):
    """A linear head on the pooled vectors of a sealed encoder.

    Args:
        encoder: the sealed encoder.
        labels: classes.
        seed: of the head's first weights; None draws it from the operating system's randomness.
    """

    def __init__(self, encoder: SealedEncoder, labels: int, seed: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = torch.nn.Linear(encoder.width, labels)
        generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        torch.nn.init.normal_(self.classifier.weight, std=_DEVIATION, generator=generator)
        torch.nn.init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The table of token vectors."""
        return self.encoder.embeddings.get_submodule("word_embeddings")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits (n, labels) of texts; arguments and errors as of `privtuner.nn.SealedEncoder`."""
        logits: torch.Tensor = self.classifier(self.encoder(input_ids, attention_mask).float())
        return logits


def train_sealed(
    model: SealedClassifier,
    train: Encoded,
    test: Encoded | None,
    config: TrainConfig,
    *,
    after_step: Callable[[TrainResult], object] | None = None,
    run: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train ``model`` in place, evaluating before and after. Each step is one forward and one backward job.

    Args:
        model: a head on a sealed encoder.
        train: texts to learn from.
        test: texts to evaluate on; None leaves evaluation out.
        config: how to train; ``lr`` is the adapters' peak rate of SGD, ``head_lr`` the head's of AdamW, and
            ``lora_r`` 0 trains the head alone. Rank, strength and targets of the adapters are the server's.
        after_step: called after each step with the run so far; and before the first step with a run that goes on.
        run: what the run is, see `privtuner.train.checkpoints.Checkpoint`: the file of the encoder's owner then holds
            head, optimiser, order and generators beside the adapters, and a run that it holds goes on.

    Raises:
        privtuner.errors.InputError: more texts a step than the server takes; or the loss is no number: a lower rate may
            help.
        privtuner.errors.CkksError: a text is unlike those that the server calibrated its model on.
        privtuner.errors.PrivtunerError: the server failed, or the run diverged.
    """
    if config.batch_size > model.encoder.sequences:
        raise InputError(
            f"batch_size is {config.batch_size}, and a pass of this server's model takes {model.encoder.sequences} "
            "texts; take fewer a step"
        )
    state = _state(model, train, config)
    saved = None if run is None else _load(model.encoder.owner, run)
    if saved is not None:
        state.restore(saved)
        result = resumed("sealed", config, saved)
        if after_step is not None:
            after_step(result)
    else:
        result = TrainResult("sealed", config, [], evaluate_sealed(model, test) if test is not None else None)

    def keep(step: Step) -> None:
        if run is not None:
            owner = model.encoder.owner
            kept = replace(result, steps=[*result.steps, step])
            companion = Checkpoint(state.step, run, *recorded(kept, state)).to_bytes()
            owner.attach(owner.step + (1 if config.lora_r else 0), companion)

    for step in _steps(model, state, config, keep):
        result.steps.append(step)
        if after_step is not None:
            after_step(result)
    return result if test is None else replace(result, after=evaluate_sealed(model, test))


def _state(model: SealedClassifier, train: Encoded, config: TrainConfig) -> TrainingState:
    """Return what steps change on this side."""
    parameters = dict(model.classifier.named_parameters())
    groups = [{"params": list(parameters.values()), PEAK: config.head_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return TrainingState(parameters, [optimizer], ShuffledBatches(train, config.batch_size, config.seed))


def _load(owner: SealedOwner, run: Mapping[str, Any]) -> Checkpoint | None:
    """Return the run that the owner's file holds beside the adapters.

    Raises:
        InputError: it is another run.
    """
    if not owner.companion:
        if owner.step:
            raise InputError("the state of the sealed run holds adapters without a head; begin anew with --overwrite")
        return None
    checkpoint = Checkpoint.from_bytes(owner.companion)
    checkpoint.check(run)
    return checkpoint


@torch.no_grad()
def evaluate_sealed(model: SealedClassifier, data: Encoded) -> Evaluation:
    """Return the part of ``data`` that ``model`` classifies rightly. Every pass is full, so none tells a length."""
    model.eval()
    start, sent = time.perf_counter(), model.encoder.meter.total()
    right = tokens = 0
    for batch in ordered_batches(data, model.encoder.sequences):
        right += int((model(batch.input_ids, batch.attention_mask).argmax(-1) == batch.targets).sum())
        tokens += batch.tokens
    moved = model.encoder.meter.total() - sent
    seconds = time.perf_counter() - start
    return Evaluation(right / len(data), len(data), tokens, seconds, moved.bytes_up, moved.bytes_down)


def _steps(
    model: SealedClassifier, state: TrainingState, config: TrainConfig, keep: Callable[[Step], object]
) -> Iterator[Step]:
    """Take the steps that are left; ``keep`` is told of each before the server takes its part."""
    head: Any = model.classifier
    parameters, (optimizer,) = list(state.parameters.values()), state.optimizers
    learning = LearningCheck([])  # the adapters are the server's
    for number in range(state.step, config.steps):
        start, sent = time.perf_counter(), model.encoder.meter.total()
        batch = next(state.batches)
        model.train()
        if not config.lora_r:
            model.encoder.eval()
        rate = config.lr * rate_at(number, config)
        model.encoder.rate = rate
        set_rates(optimizer, number, config)
        pooled = model.encoder(batch.input_ids, batch.attention_mask).float()
        vectors = pooled.detach().requires_grad_()
        for first in range(config.head_first if number == 0 else 0, -1, -1):  # on the same vectors: no pass is needed
            loss = torch.nn.functional.cross_entropy(head(vectors), batch.targets)
            if not first and not bool(loss.isfinite()):
                raise InputError(
                    f"the loss is {loss.item()} at step {number + 1} of {config.steps}; use lower learning rates"
                )
            vectors.grad = None
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
        state.step = number + 1

        def measured(loss: torch.Tensor = loss, rate: float = rate, tokens: int = batch.tokens) -> Step:
            moved = model.encoder.meter.total() - sent  # noqa: B023 - called within the turn
            return Step(loss.item(), rate, time.perf_counter() - start, tokens, moved.bytes_up, moved.bytes_down)  # noqa: B023

        keep(measured())  # a run that goes on from it knows the forward pass's share of this step alone
        if pooled.requires_grad:
            pooled.backward(vectors.grad)  # the server steps its adapters
        yield measured()
        learning.check(loss.item(), head.out_features, 1.0)

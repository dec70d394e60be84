"""Fine-tunes a classifier on a sealed encoder: the head here, in the clear, the adapters at the server, encrypted.

The server steps its adapters by SGD with momentum on ciphertexts; the head is trained by AdamW on the pooled vectors,
the only values of the model that are decrypted.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from privtuner.errors import InputError
from privtuner.nn import SealedEncoder
from privtuner.train.dataset import Encoded, ShuffledBatches, ordered_batches
from privtuner.train.learning import LearningCheck
from privtuner.train.training import Evaluation, Step, TrainConfig, TrainResult, rate_at

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
) -> TrainResult:
    """Train ``model`` in place, evaluating before and after. Each step is one forward and one backward job.

    Args:
        model: a head on a sealed encoder.
        train: texts to learn from.
        test: texts to evaluate on; None leaves evaluation out.
        config: how to train; ``lr`` is the adapters' peak rate of SGD, ``head_lr`` the head's of AdamW, and
            ``lora_r`` 0 trains the head alone. Rank, strength and targets of the adapters are the server's.
        after_step: called after each step with the run so far.

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
    before = evaluate_sealed(model, test) if test is not None else None
    result = TrainResult("sealed", config, [], before)
    for step in _steps(model, train, config):
        result.steps.append(step)
        if after_step is not None:
            after_step(result)
    return result if test is None else replace(result, after=evaluate_sealed(model, test))


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


def _steps(model: SealedClassifier, train: Encoded, config: TrainConfig) -> Iterator[Step]:
    head: Any = model.classifier
    parameters = list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.head_lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, config))
    batches = ShuffledBatches(train, config.batch_size, config.seed)
    learning = LearningCheck([])  # the adapters are the server's
    for number in range(config.steps):
        start, sent = time.perf_counter(), model.encoder.meter.total()
        batch = next(batches)
        model.train()
        if not config.lora_r:
            model.encoder.eval()
        rate = config.lr * rate_at(number, config)
        model.encoder.rate = rate
        pooled = model.encoder(batch.input_ids, batch.attention_mask).float()

        def cross_entropy(vectors: torch.Tensor, targets: torch.Tensor = batch.targets) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(head(vectors), targets)

        for _ in range(0 if number else config.head_first):  # on the same vectors: no pass is needed
            optimizer.zero_grad()
            cross_entropy(pooled.detach()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
        loss = cross_entropy(pooled)
        if not bool(loss.isfinite()):
            raise InputError(
                f"the loss is {loss.item()} at step {number + 1} of {config.steps}; use lower learning rates"
            )
        optimizer.zero_grad()
        loss.backward()  # the server steps its adapters
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        schedule.step()
        moved = model.encoder.meter.total() - sent
        seconds = time.perf_counter() - start
        yield Step(loss.item(), rate, seconds, batch.tokens, moved.bytes_up, moved.bytes_down)
        learning.check(loss.item(), head.out_features, 1.0)

"""Fine-tunes a sequence classifier with LoRA. The same loop trains in the clear and through encrypted layers.

With the same seed both see the same batches and start from the same adapters and head, so that the difference between
two runs is that of the arithmetic: 8-bit frozen weights and the noise of the encryption.
"""

from __future__ import annotations

import math
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import CkksError, InputError, PrivtunerError
from privtuner.nn import EncryptedLayer, Traffic, TrafficMeter, traffic_of
from privtuner.nn.layers import session_of
from privtuner.train.checkpoints import Checkpoint, Checkpoints
from privtuner.train.dataset import Batch, Encoded, ShuffledBatches, length_batches, ordered_batches
from privtuner.train.learning import LearningCheck
from privtuner.train.peft_adapter import add_lora, trainable_heads
from privtuner.train.state import TrainingState

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from privtuner.train.mean_head import MeanForSequenceClassification

__all__ = [
    "PEAK",
    "Evaluation",
    "Step",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "iterate_steps",
    "prepare_model",
    "rate_at",
    "recorded",
    "resumed",
    "set_rates",
    "train_classifier",
    "training_state",
]

PEAK = "peak"
"""Entry of an optimiser's group: its peak learning rate, see `set_rates`."""

EVAL_TOKENS = 2048
"""Tokens in a batch of evaluation: one full group of the encryption, whose cost does not depend on how full it is."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimiser steps, 1 to 10**9.
        batch_size: texts a step, 1 to 2**20.
        lr: peak learning rate of the adapters, positive, up to 1e30.
        head_lr: peak learning rate of the head, positive, up to 1e30. Larger, because the head starts from nothing and
            the frozen pooler before it may scale its features down a lot.
        warmup: part of the steps over which the rates rise linearly from zero, in [0, 1); they fall linearly after.
        weight_decay: the weight decay of AdamW.
        clip: largest norm of the gradient, positive, up to 1e30.
        momentum: in [0, 1), of the adapters, which are then trained by SGD without clipping, as a sealed model's are;
            None trains them by AdamW, like the head.
        head_first: steps of the head alone on the first batch, before any of ``steps``, 0 to 2**20: adapters learn
            little from a head that knows nothing.
        lora_r: rank of the adapters, up to 2**16; 0 trains the head alone.
        lora_alpha: the adapters' update is scaled by ``lora_alpha / lora_r``.
        targets: ends of the names of the layers that get adapters.
        seed: seed of batches, adapters and head, which it makes repeatable. Whoever knows it knows the order of the
            batches and can tell the length of every text from what a server sees; None draws all three from the
            operating system's randomness.
        max_length: tokens at which texts are cut, 3 to 2**20.
        constant_size: all requests hold ``batch_size * max_length`` tokens, up to 2**24, and an evaluation takes
            ``batch_size`` texts at a time, so that their sizes and number tell nothing of the texts.

    Raises:
        privtuner.errors.InputError: a value outside its range.
    """

    steps: int = 150
    batch_size: int = 64
    lr: float = 5e-3
    head_lr: float = 3e-2
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    momentum: float | None = None
    head_first: int = 0
    lora_r: int = 8
    lora_alpha: int = 16
    targets: tuple[str, ...] = ("query", "value")
    seed: int | None = None
    max_length: int = 64
    constant_size: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("steps", 1, 10**9),
            ("batch_size", 1, 1 << 20),
            ("head_first", 0, 1 << 20),
            ("lora_r", 0, 1 << 16),
            ("lora_alpha", 1, 1 << 20),
            ("max_length", 3, 1 << 20),
        ):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}; give a number from {least} to {most}")
        for name in ("lr", "head_lr", "clip"):
            # Far beyond any use; above, float32 overflows in the optimiser.
            if not 0 < getattr(self, name) <= 1e30:
                raise InputError(f"{name} is {getattr(self, name)}; give a positive number up to 1e30")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup is {self.warmup}; give a part of the steps in [0, 1)")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum:g}; give a number in [0, 1)")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed is {self.seed}; give 0 or a positive number below 2**63")
        if not self.targets or not all(self.targets):
            raise InputError(f"targets are {list(self.targets)}; name the layers that get adapters")


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Attributes:
        loss: mean cross-entropy of the batch in nats, before the step.
        lr: learning rate of the adapters.
        seconds: wall time.
        tokens: tokens of the batch without padding.
        bytes_up: bytes sent to the server, 0 in the clear.
        bytes_down: bytes received from it.
    """

    loss: float
    lr: float
    seconds: float
    tokens: int
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Accuracy (0..1) on a labelled set, and what finding it took."""

    accuracy: float
    texts: int
    tokens: int
    seconds: float
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        mode: "encrypted", "plain" or "sealed".
        config: how it trained.
        steps: one entry a step.
        before: evaluation of the untrained head, None when there was no test set.
        after: evaluation at the end.
    """

    mode: str
    config: TrainConfig
    steps: list[Step] = field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None

    @property
    def seconds_per_step(self) -> float:
        """Median wall time of a step."""
        return statistics.median(step.seconds for step in self.steps)

    @property
    def bytes_up_per_token(self) -> float:
        """Bytes sent for one token's forward and backward pass, over all steps."""
        return sum(step.bytes_up for step in self.steps) / sum(step.tokens for step in self.steps)

    @property
    def bytes_down_per_token(self) -> float:
        """Bytes received for one token's forward and backward pass, over all steps."""
        return sum(step.bytes_down for step in self.steps) / sum(step.tokens for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form: everything above, the summary first."""
        return {
            "mode": self.mode,
            "accuracy_before": self.before.accuracy if self.before else None,
            "accuracy_after": self.after.accuracy if self.after else None,
            "final_loss": self.steps[-1].loss,
            "seconds_per_step": self.seconds_per_step,
            "bytes_up_per_token": self.bytes_up_per_token,
            "bytes_down_per_token": self.bytes_down_per_token,
            "config": asdict(self.config),
            "before": asdict(self.before) if self.before else None,
            "after": asdict(self.after) if self.after else None,
            "steps": [asdict(step) for step in self.steps],
        }


def prepare_model(model: PreTrainedModel | MeanForSequenceClassification, config: TrainConfig) -> PeftModel:
    """Freeze all but the head, start the head anew and add adapters.

    Args:
        model: a sequence classifier, in the clear or from `privtuner.nn.build`.
        config: adapters, seed, and whether requests are of constant size.

    Raises:
        privtuner.errors.InputError: the model has no head outside its base model, a target names no layer, or the
            constant size is asked for in the clear, or too large.
    """
    if config.constant_size:
        session_of(model).pad_tokens_to = config.batch_size * config.max_length
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    heads = trainable_heads(model)
    if not heads:
        raise InputError(f"this {type(model).__name__} has no classification head to train; serve another model")
    seed = secrets.randbits(63) if config.seed is None else config.seed
    generator = torch.Generator().manual_seed(seed)
    for head in heads:
        for module in model.get_submodule(head).modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=model.config.initializer_range, generator=generator)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = add_lora(
            model, r=config.lora_r, alpha=config.lora_alpha, targets=config.targets, modules_to_save=heads
        )
    # No dropout: training in eval mode makes both runs compute the same function.
    return adapted.eval()


def train_classifier(
    model: PeftModel,
    train: Encoded,
    test: Encoded | None,
    config: TrainConfig,
    *,
    progress: bool = True,
    after_step: Callable[[TrainResult], object] | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainResult:
    """Train ``model`` in place, evaluating before and after.

    Whatever ends it, ``model`` holds whole steps: an exception between them, or in the middle of one, undoes no step
    and leaves none half done. What was measured is lost with the exception unless ``after_step`` or a checkpoint
    kept it.

    Args:
        model: from `prepare_model`.
        train: texts to learn from.
        test: texts to evaluate on; None leaves evaluation out.
        config: how to train.
        progress: show a bar on standard error.
        after_step: called after each step with the run so far, e.g. `privtuner.train.report.AdapterKeeper`; and before
            the first step with a run that goes on.
        checkpoints: written after steps. If there is one of this run, the run goes on after its step, with the global
            generators as they were then.

    Raises:
        privtuner.errors.InputError: the checkpoints are of another run, or all damaged.
        privtuner.errors.PrivtunerError: the run diverged, see `iterate_steps`, or the server failed.
    """
    texts = config.batch_size if config.constant_size else None
    state = training_state(model, train, config)
    saved = None if checkpoints is None else checkpoints.load()
    if saved is not None:
        state.restore(saved)
        result = resumed(_mode(model), config, saved)
        if after_step is not None:
            after_step(result)
    else:
        before = evaluate(model, test, texts, progress=progress, title="before") if test is not None else None
        result = TrainResult(_mode(model), config, [], before)
    for step in iterate_steps(model, train, config, progress=progress, state=state):
        result.steps.append(step)
        if checkpoints is not None and (state.step % checkpoints.every == 0 or state.step == config.steps):
            checkpoints.save(state.step, *recorded(result, state))
        if after_step is not None:
            after_step(result)
    if test is None:
        return result
    with _explain_divergence(f"after step {config.steps}", config):
        return replace(result, after=evaluate(model, test, texts, progress=progress, title="after"))


def training_state(model: PeftModel, train: Encoded, config: TrainConfig) -> TrainingState:
    """Return what steps of ``model`` change, as it is before the first one."""
    adapters, head = _find_trained(model)
    optimizers = _optimizers(list(adapters.values()), list(head.values()), config)
    return TrainingState({**adapters, **head}, optimizers, ShuffledBatches(train, config.batch_size, config.seed))


def recorded(result: TrainResult, state: TrainingState) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the run so far and its state as a checkpoint's facts and tensors."""
    facts, tensors = state.capture()
    facts["before"] = asdict(result.before) if result.before else None
    tensors["steps"] = torch.tensor([astuple(step) for step in result.steps], dtype=torch.float64)
    return facts, tensors


def resumed(mode: str, config: TrainConfig, checkpoint: Checkpoint) -> TrainResult:
    """Return the run so far of a checkpoint that `recorded` made."""
    steps = [
        Step(loss, lr, seconds, int(tokens), int(up), int(down))
        for loss, lr, seconds, tokens, up, down in checkpoint.tensors["steps"].tolist()
    ]
    before = checkpoint.facts["before"]
    return TrainResult(mode, config, steps, Evaluation(**before) if before else None)


def iterate_steps(
    model: PeftModel, train: Encoded, config: TrainConfig, *, progress: bool = True, state: TrainingState | None = None
) -> Iterator[Step]:
    """Train ``model`` in place, one step for each entry asked for; see `train_classifier`.

    Args:
        model: from `prepare_model`.
        train: texts to learn from.
        config: how to train.
        progress: show a bar on standard error.
        state: from `training_state`, and restored where the run goes on; None begins anew.

    Raises:
        privtuner.errors.InputError: activations, loss or gradient are not finite before anything was trained.
        privtuner.errors.PrivtunerError: the run diverged: they are not after some steps, or too large for the
            encryption. ``model`` then holds what gave the last finite loss. Or the run learns nothing, see
            `privtuner.train.learning`.
    """
    mode, meter = _mode(model), _meter(model)
    state = training_state(model, train, config) if state is None else state
    optimizers, parameters = state.optimizers, list(state.parameters.values())
    adapters, head = (list(part.values()) for part in _find_trained(model))
    learning = LearningCheck(adapters)
    good = [parameter.detach().clone() for parameter in parameters]
    with _bar(progress, total=config.steps, initial=state.step, desc=mode, unit="step") as bar:
        for number in range(state.step + 1, config.steps + 1):
            start, sent = time.perf_counter(), meter.total()
            batch = next(state.batches).to(model.device)
            for optimizer in optimizers:
                set_rates(optimizer, number - 1, config)
            if number == 1:
                _head_first(model, batch, optimizers[0], head, config)
            try:
                with _explain_divergence(f"at step {number} of {config.steps}", config, possible=number > 1):
                    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
                    loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets)
                    _check_finite("the loss", loss)
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    loss.backward()
                    limit = config.clip if config.momentum is None else math.inf
                    gradient = torch.nn.utils.clip_grad_norm_(parameters, limit)
                    _check_finite("the gradient", gradient)
                    torch.nn.utils.clip_grad_norm_(head, config.clip)
            except _DivergedError:
                _restore(parameters, good)
                raise
            good = [parameter.detach().clone() for parameter in parameters]
            try:
                for optimizer in optimizers:
                    optimizer.step()
            except BaseException:
                _restore(parameters, good)
                raise
            state.step = number
            rate = config.lr * rate_at(number - 1, config)
            moved: Traffic = meter.total() - sent
            step = Step(loss.item(), rate, time.perf_counter() - start, batch.tokens, moved.bytes_up, moved.bytes_down)
            bar.set_postfix_str(_postfix(step), refresh=False)
            bar.update()
            if number == 1:
                bar.refresh()  # a log, where it is drawn rarely, tells at once that it trains and how fast
            yield step
            learning.check(step.loss, logits.shape[-1], gradient.item())


def _head_first(
    model: PeftModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    head: list[torch.nn.Parameter],
    config: TrainConfig,
) -> None:
    """Let the head alone take its first steps: ``optimizer`` passes over what has no gradient."""
    for _ in range(config.head_first):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets)
        optimizer.zero_grad()
        for parameter, gradient in zip(head, torch.autograd.grad(loss, head), strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(head, config.clip)
        optimizer.step()


def _optimizers(
    adapters: list[torch.nn.Parameter], head: list[torch.nn.Parameter], config: TrainConfig
) -> list[torch.optim.Optimizer]:
    if config.momentum is None or not adapters:
        groups = [{"params": adapters, PEAK: config.lr}, {"params": head, PEAK: config.head_lr}]
        return [torch.optim.AdamW(groups, weight_decay=config.weight_decay)]
    return [
        torch.optim.AdamW([{"params": head, PEAK: config.head_lr}], weight_decay=config.weight_decay),
        torch.optim.SGD([{"params": adapters, PEAK: config.lr}], lr=config.lr, momentum=config.momentum),
    ]


def set_rates(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> None:
    """Set each group's learning rate for ``step``, counted from 0, from its entry "peak": no scheduler has a state."""
    for group in optimizer.param_groups:
        group["lr"] = group[PEAK] * rate_at(step, config)


class _DivergedError(PrivtunerError):
    """The learning rate was too high."""


@contextmanager
def _explain_divergence(when: str, config: TrainConfig, *, possible: bool = True) -> Iterator[None]:
    """Turn a refusal of values that fitted before into advice: only training steps have changed anything since."""
    try:
        yield
    except (InputError, CkksError) as error:
        if not possible:
            raise InputError(f"{error} before anything was trained: look at the model's weights") from error
        raise _DivergedError(
            f"{error} {when}, though the steps before went well: the run diverged; use a lower learning rate "
            f"(the peaks were {config.lr:g} for the adapters and {config.head_lr:g} for the head)"
        ) from error


@torch.no_grad()
def _restore(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _check_finite(what: str, value: torch.Tensor) -> None:
    if not math.isfinite(value.item()):
        raise InputError(f"{what} is {value.item()}")


def _find_trained(model: PeftModel) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
    """Return the trained parameters of the adapters and those of the head, by name."""
    adapters: dict[str, torch.nn.Parameter] = {}
    head: dict[str, torch.nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (adapters if ".lora_" in name else head)[name] = parameter
    return adapters, head


@torch.no_grad()
def evaluate(
    model: PeftModel,
    data: Encoded,
    batch_size: int | None = None,
    *,
    progress: bool = False,
    title: str = "evaluation",
) -> Evaluation:
    """Return the part of ``data`` that ``model`` classifies rightly.

    Args:
        model: a classifier.
        data: texts with their labels.
        batch_size: texts a batch; None sorts them by length, and takes as many as have `EVAL_TOKENS` tokens.
        progress: show a bar on standard error.
        title: what the bar says.
    """
    meter = _meter(model)
    start, sent = time.perf_counter(), meter.total()
    right = tokens = 0
    with _bar(progress, total=len(data), desc=f"accuracy {title}", unit="text", leave=False) as bar:
        batches = length_batches(data, EVAL_TOKENS) if batch_size is None else ordered_batches(data, batch_size)
        for batch in (batch.to(model.device) for batch in batches):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            right += int((logits.argmax(-1) == batch.targets).sum())
            tokens += batch.tokens
            bar.update(len(batch.targets))
    moved = meter.total() - sent
    seconds = time.perf_counter() - start
    return Evaluation(right / len(data), len(data), tokens, seconds, moved.bytes_up, moved.bytes_down)


def _bar(shown: bool, **options: Any) -> Any:
    """A bar on standard error: drawn all the time on a terminal, every ten seconds where each drawing stays."""
    from tqdm import tqdm

    return tqdm(disable=not shown, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10.0, **options)


def _mode(model: PeftModel) -> str:
    return "encrypted" if any(isinstance(module, EncryptedLayer) for module in model.modules()) else "plain"


def _meter(model: PeftModel) -> TrafficMeter:
    """Return the counters of an encrypted model; those of a plain one stay at zero."""
    return traffic_of(model) if _mode(model) == "encrypted" else TrafficMeter()


def rate_at(step: int, config: TrainConfig) -> float:
    """Return the part of the peak learning rate for ``step``, counted from 0: up to 1 over the warm-up, then down."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    return max(0.0, (config.steps - step) / (config.steps - warm + 1))


def _postfix(step: Step) -> str:
    text = f"loss {step.loss:.3f}, {step.seconds:.2f} s/step"
    if step.bytes_up:
        text += f", up {step.bytes_up / 1e6:.0f} MB/step, down {step.bytes_down / 1e6:.0f} MB/step"
    return text

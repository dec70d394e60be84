"""A run of fine-tuning whose results are on disk whatever ends it: from a model and texts to files."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import PrivtunerError
from privtuner.train import limits, report
from privtuner.train.checkpoints import Checkpoints
from privtuner.train.dataset import Encoded, TextTable, encode
from privtuner.train.training import TrainConfig, TrainResult, prepare_model, train_classifier

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from privtuner.train.mean_head import MeanForSequenceClassification

__all__ = ["describe_run", "digest_of_frozen", "end_well", "fine_tune", "prepare", "write_results"]


def prepare(
    model: PreTrainedModel | MeanForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    train: TextTable,
    test: TextTable | None,
    labels: Sequence[str],
    config: TrainConfig,
    say: Callable[[str], object] = lambda _: None,
) -> tuple[PeftModel, Encoded, Encoded | None]:
    """Return ``model`` with adapters, and the texts as it takes them: cut, tokenised, and padded with a token it knows.

    Args:
        model: from `privtuner.train.owner_classifier` or `privtuner.train.clear_classifier`.
        tokenizer: the tokenizer of the model.
        train: texts to learn from.
        test: texts to evaluate on, or None.
        labels: names of the classes, in the order of the head's outputs.
        config: how to train.
        say: told in a line that texts are cut shorter than asked for.

    Raises:
        InputError: the model cannot take the texts or the adapters.
    """
    longest = config.max_length
    if (positions := limits.positions(model)) is not None and positions < longest:
        say(f"texts are cut at the {positions} tokens that the model has positions for, not at {longest}")
        longest = positions
    tables = [encode(table, tokenizer, labels, longest) for table in (train, test) if table]
    encoded, *encoded_test = limits.fit(model, tables)
    model.config.pad_token_id = encoded.pad_id
    return prepare_model(model, config), encoded, encoded_test[0] if encoded_test else None


def describe_run(
    config: TrainConfig, train: Encoded, test: Encoded | None, labels: Sequence[str], others: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return what a run is, see `privtuner.train.checkpoints.Checkpoint`: digests in place of texts and labels.

    Args:
        config: how to train.
        train: texts to learn from.
        test: texts to evaluate on.
        labels: names of the classes.
        others: what else makes another run of it: the model's digest, the scheme, ...
    """
    return {
        **asdict(config),
        **others,
        "training texts": _digest_of_texts(train),
        "test texts": None if test is None else _digest_of_texts(test),
        "labels": hashlib.sha256("\0".join(labels).encode()).hexdigest(),
    }


def digest_of_frozen(model: PeftModel) -> str:
    """Return a digest of what is not trained of a model in the clear, but for what PEFT keeps of untrained heads."""
    digest = hashlib.sha256()
    frozen = {
        name: value
        for name, value in model.named_parameters()
        if not value.requires_grad and ".original_module." not in name
    }
    for name, tensor in {**frozen, **dict(model.named_buffers())}.items():
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_texts(data: Encoded) -> str:
    digest = hashlib.sha256(f"{data.pad_id}|".encode())
    for row in data.tokens:
        digest.update((",".join(map(str, row)) + ";").encode())
    digest.update(data.targets.numpy().tobytes())
    return digest.hexdigest()


def fine_tune(
    model: PeftModel,
    train: Encoded,
    test: Encoded | None,
    config: TrainConfig,
    keeper: report.AdapterKeeper,
    say: Callable[[str], object] = lambda _: None,
    checkpoints: Checkpoints | None = None,
) -> tuple[TrainResult, BaseException | None]:
    """Train ``model``; return what training did, and what went wrong after its last step.

    What ends it before is raised. ``keeper`` has the adapter on disk either way, and ``say`` is told where it is if the
    run did not end well. ``checkpoints`` are what another process goes on with.
    """
    try:
        return train_classifier(model, train, test, config, after_step=keeper, checkpoints=checkpoints), None
    except BaseException as error:
        if keeper.place is None:
            _rescue(keeper, say)
        if keeper.complete and keeper.result:
            return keeper.result, error
        if checkpoints is not None and checkpoints.last:
            with suppress(OSError):  # the terminal may be gone
                say(f"the same command goes on after step {checkpoints.last} of {config.steps}")
        raise


def end_well(checkpoints: Checkpoints, directory: Path) -> None:
    """Take away what only a run that goes on needs: its checkpoints, and the adapter of where it stopped once."""
    checkpoints.clear()
    if checkpoints.resumed:
        shutil.rmtree(directory / report.INTERRUPTED, ignore_errors=True)


def _rescue(keeper: report.AdapterKeeper, say: Callable[[str], object]) -> None:
    with suppress(OSError):  # as above
        try:
            place = keeper.rescue()
        except Exception as failure:
            say(f"the adapter as it stood could not be saved: {failure}")
        else:
            say(f"the adapter as it stood is in {place}")


def write_results(
    result: TrainResult, numbers: Mapping[str, Any], directory: Path, copy: str | None = None
) -> tuple[list[Path], PrivtunerError | None]:
    """Write ``metrics.json`` and ``loss.png``; return what was written, and the first failure.

    Args:
        result: what training did.
        numbers: the run's numbers.
        directory: where the files go.
        copy: another file for the numbers.
    """
    curve = {result.mode: [step.loss for step in result.steps]}
    title = f"{result.mode} fine-tuning, {result.config.steps} steps of {result.config.batch_size} texts"
    work: dict[Path, Callable[[Path], None]] = {
        directory / "metrics.json": lambda path: report.save_json(numbers, path),
        directory / "loss.png": lambda path: report.save_loss_curve(curve, path, title),
    }
    if copy:
        work[Path(copy)] = work[directory / "metrics.json"]
    written: list[Path] = []
    failure: PrivtunerError | None = None
    for path, write in work.items():
        try:
            write(path)
            written.append(path)
        except PrivtunerError as error:
            failure = failure or error
    return written, failure

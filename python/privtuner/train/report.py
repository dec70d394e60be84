"""What a training run leaves on disk, each file whole or as it was before: adapter, labels, numbers, loss curve."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.errors import InputError, PrivtunerError
from privtuner.paths import put, replacing

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from privtuner.train.training import TrainResult

__all__ = [
    "AdapterKeeper",
    "check_folder",
    "load_labels",
    "load_pool",
    "save_adapter",
    "save_head",
    "save_json",
    "save_loss_curve",
]

LABELS_FILE = "labels.json"
HEAD_FILE = "head.safetensors"
INTERRUPTED = "interrupted"
"""Folder below the results' with the adapter of a run that did not end well."""

_RESULTS = ("adapter_config.json", "adapter_model.safetensors", LABELS_FILE, "metrics.json", "loss.png")


class AdapterKeeper:
    """Has a run's adapter on disk whatever ends the run. Give it to `train_classifier` as ``after_step``.

    After the last step the adapter goes to ``directory``; `rescue` saves it before that, to a folder "interrupted" in
    there. Where the disk does not take it, a new folder among the system's temporary files is tried.

    Args:
        model: what is trained.
        labels: written beside the adapter.
        directory: where the adapter goes.
        say: told in a line what went wrong and where the adapter is instead.
    """

    def __init__(self, model: PeftModel, labels: Sequence[str], directory: Path, say: Callable[[str], object]) -> None:
        self._model, self._labels, self._directory, self._say = model, labels, directory, say
        self.result: TrainResult | None = None
        """The run so far, None before its first step."""
        self.place: Path | None = None
        """Where the adapter is after the last step."""
        self.failure: PrivtunerError | None = None
        """Why it is not in the directory asked for."""

    @property
    def complete(self) -> bool:
        """Whether the last step was done."""
        return self.result is not None and len(self.result.steps) == self.result.config.steps

    def __call__(self, result: TrainResult) -> None:
        """Note a step of ``result``, the last of its steps."""
        self.result = result
        if self.complete:
            self.place = self._save(self._directory)

    def rescue(self) -> Path:
        """Save the adapter as it is and return where.

        Raises:
            privtuner.errors.PrivtunerError: no place takes it.
        """
        return self._save(self._directory / INTERRUPTED)

    def _save(self, directory: Path) -> Path:
        try:
            save_adapter(self._model, self._labels, directory)
            return directory
        except PrivtunerError as error:
            self.failure = error
            try:
                elsewhere = Path(tempfile.mkdtemp(prefix="privtuner-adapter-"))
                save_adapter(self._model, self._labels, elsewhere)
            except (PrivtunerError, OSError):
                raise error from None
            self._say(f"warning: {error}; IT IS IN {elsewhere} INSTEAD")
            return elsewhere


def check_folder(model: PeftModel, labels: Sequence[str], directory: Path) -> None:
    """Save the adapter to ``directory`` as after training, and take it away again.

    Raises:
        privtuner.errors.InputError: it cannot be saved, or something in ``directory`` is in the way of the results.
    """
    for name in _RESULTS:
        if (path := directory / name).exists() and not path.is_file():
            raise InputError(f"{path} is in the way of a result: move it, or choose another directory")
    if (path := directory / INTERRUPTED).exists() and not path.is_dir():
        raise InputError(f"{path} is in the way of an interrupted run's adapter: move it, or choose another directory")
    try:
        with _stage(model, labels, directory):
            pass
    except _failures() as error:
        raise InputError(
            f"cannot save an adapter in {directory}: {_reason(error)}; choose another directory"
        ) from error


def save_adapter(model: PeftModel, labels: Sequence[str], directory: Path) -> None:
    """Write the adapter as ``save_pretrained`` of PEFT does, and beside it the labels and what the head reads.

    Raises:
        privtuner.errors.PrivtunerError: the disk is full or the directory went away.
    """
    with _report_failure("the trained adapter is", directory), _stage(model, labels, directory) as staged:
        for file in sorted(path for path in staged.rglob("*") if path.is_file()):
            target = directory / file.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            put(file, target)


@contextmanager
def _stage(model: PeftModel, labels: Sequence[str], directory: Path) -> Iterator[Path]:
    """Yield a folder inside ``directory`` with all that is to go there."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model.save_pretrained(name)
        head = {"pool": getattr(model, "pool", "first"), "labels": list(labels)}
        (folder / LABELS_FILE).write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        yield folder


def save_head(head: torch.nn.Linear, labels: Sequence[str], pool: str, directory: Path) -> None:
    """Write ``head.safetensors`` with weight and bias, and beside it the labels and what the head reads.

    Raises:
        privtuner.errors.PrivtunerError: the disk is full or the directory went away.
    """
    from safetensors.torch import save_file

    path = directory / HEAD_FILE
    with _report_failure("the trained head is", path):
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            save_file({name: tensor.detach().contiguous() for name, tensor in head.named_parameters()}, new)
        with replacing(directory / LABELS_FILE) as new:
            new.write_text(json.dumps({"pool": pool, "labels": list(labels)}, indent=1) + "\n", encoding="utf-8")


def load_labels(directory: str | Path) -> tuple[str, ...]:
    """Return the labels beside a saved adapter, in the order of the head's outputs.

    Raises:
        privtuner.errors.InputError: the file is missing or malformed.
    """
    labels = _head(directory, "labels", list)
    if not all(isinstance(label, str) for label in labels):
        raise InputError(f"{Path(directory) / LABELS_FILE} holds labels that are no strings")
    return tuple(labels)


def load_pool(directory: str | Path) -> str:
    """Return what the head of a saved adapter reads, "mean" or "first".

    Raises:
        privtuner.errors.InputError: the file is missing or malformed.
    """
    return str(_head(directory, "pool", str))


def _head(directory: str | Path, entry: str, kind: type) -> Any:
    """Return an entry of the file that describes the head."""
    path = Path(directory) / LABELS_FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[entry]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} does not describe a head ({entry}): {error!r}") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} does not describe a head: {entry} is a {type(value).__name__}")
    return value


def save_json(values: Mapping[str, Any], path: Path) -> None:
    """Write ``values`` to ``path``.

    Raises:
        privtuner.errors.PrivtunerError: the disk is full or the path cannot be written.
    """
    with _report_failure("the run's numbers are", path), replacing(path) as new:
        new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def save_loss_curve(curves: Mapping[str, Sequence[float]], path: Path, title: str) -> None:
    """Draw the loss of one or more runs over their steps as a PNG.

    Args:
        curves: name of a run -> loss of each step, in nats.
        path: where to write.
        title: above the picture.

    Raises:
        privtuner.errors.PrivtunerError: the disk is full or the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, losses) in enumerate(curves.items()):
        # Dashes over a wider line keep curves apart that lie on each other.
        width, dashes = (3.5, "-") if place == 0 and len(curves) > 1 else (1.5, "--" if place else "-")
        axes.plot(range(1, len(losses) + 1), losses, dashes, linewidth=width, color=f"C{place}", label=name)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss: cross-entropy of the batch (nats)")
    axes.set_ylim(0, 1.05 * max(max(losses) for losses in curves.values()))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    with _report_failure("the picture of the loss curve is", path), replacing(path) as new:
        figure.savefig(new, dpi=150)


@contextmanager
def _report_failure(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except _failures() as error:
        raise PrivtunerError(f"{what} lost: cannot write {path}: {_reason(error)}") from error


def _failures() -> tuple[type[Exception], ...]:
    """Return the exceptions that writing raises."""
    from safetensors import SafetensorError

    return OSError, SafetensorError


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)

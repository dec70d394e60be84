"""What a training run leaves on disk: adapter, labels, numbers, loss curve."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.errors import InputError, PrivtunerError

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["load_labels", "save_adapter", "save_json", "save_loss_curve"]

LABELS_FILE = "labels.json"


def save_adapter(model: PeftModel, labels: Sequence[str], directory: Path) -> None:
    """Write the adapter as ``save_pretrained`` of PEFT does, and the labels beside it.

    Raises:
        privtuner.errors.PrivtunerError: the disk is full or the directory went away.
    """
    with _lost("the trained adapter is", directory):
        directory.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(directory))
        (directory / LABELS_FILE).write_text(json.dumps({"labels": list(labels)}, indent=1) + "\n", encoding="utf-8")


def load_labels(directory: str | Path) -> tuple[str, ...]:
    """Return the labels beside a saved adapter, in the order of the head's outputs.

    Raises:
        privtuner.errors.InputError: the file is missing or malformed.
    """
    path = Path(directory) / LABELS_FILE
    try:
        return tuple(str(label) for label in json.loads(path.read_text(encoding="utf-8"))["labels"])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no list of labels: {error}") from error


def save_json(values: Mapping[str, Any], path: Path) -> None:
    """Write ``values`` to ``path``.

    Raises:
        privtuner.errors.PrivtunerError: the disk is full or the path cannot be written.
    """
    with _lost("the run's numbers are", path):
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


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
    with _lost("the picture of the loss curve is", path):
        figure.savefig(path, dpi=150)


@contextmanager
def _lost(what: str, path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PrivtunerError(f"{what} lost: cannot write {path}: {reason}") from error

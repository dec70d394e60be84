"""Fine-tunes a classifier whose weight and LoRA matrices a server holds; the device has texts and labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from privtuner.held.layer import HeldLora, LoraAdapter

__all__ = ["ClearDevice", "Device", "embed_texts", "train_held"]

Array = npt.NDArray[np.float64]


class Device(Protocol):
    """What training needs of an adapter: `privtuner.held.layer.HeldClient`, or its clear twin."""

    def forward(self, x: npt.ArrayLike) -> Array:
        """Outputs (rows, d_out) of inputs (rows, d_in)."""
        ...

    def gradient(self, x: npt.ArrayLike, g: npt.ArrayLike) -> tuple[Array, Array]:
        """Gradients of A and B, but for the factor alpha / r, summed over rows."""
        ...

    def step(self, da: npt.ArrayLike, db: npt.ArrayLike) -> None:
        """Step the adapter."""
        ...


class ClearDevice:
    """The same layer and adapter in the clear, for comparison."""

    def __init__(self, layer: HeldLora) -> None:
        self._weight, self._factor = layer.weight, layer.factor
        self.adapter: LoraAdapter = layer.adapter(b"in the clear....")

    def forward(self, x: npt.ArrayLike) -> Array:
        """See `Device`."""
        y: Array = np.asarray(x) @ (self._weight + self._factor * self.adapter.b @ self.adapter.a).T
        return y

    def gradient(self, x: npt.ArrayLike, g: npt.ArrayLike) -> tuple[Array, Array]:
        """See `Device`."""
        inputs, outputs = np.asarray(x), np.asarray(g)
        return (outputs @ self.adapter.b).T @ inputs, outputs.T @ (inputs @ self.adapter.a.T)

    def step(self, da: npt.ArrayLike, db: npt.ArrayLike) -> None:
        """See `Device`."""
        self.adapter.step(self._factor * np.asarray(da), self._factor * np.asarray(db))


def train_held(
    device: Device,
    x: Array,
    labels: npt.NDArray[np.int64],
    *,
    steps: int,
    batch_size: int,
    clip: float | None = 1.0,
    seed: int | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Train on random batches with cross-entropy.

    Args:
        device: the adapter.
        x: (rows, d_in).
        labels: (rows,), each below d_out.
        steps: gradient steps.
        batch_size: rows a step, at most the slots of the encryption.
        clip: largest norm of the gradient that goes back to the server; None does not clip.
        seed: of the batches, which it makes repeatable and known to whoever knows it; None draws from the operating
            system's randomness.
        progress: called with each step's number and loss.

    Returns:
        The mean loss of every step's batch, in nats, before the step.
    """
    rng, losses = np.random.default_rng(seed), []
    for number in range(1, steps + 1):
        rows = rng.choice(len(x), min(batch_size, len(x)), replace=False)
        loss, g = _cross_entropy(device.forward(x[rows]), labels[rows])
        da, db = device.gradient(x[rows], g)
        norm = float(np.sqrt((da**2).sum() + (db**2).sum()))
        shrink = 1.0 if clip is None or norm <= clip else clip / norm
        device.step(shrink * da, shrink * db)
        losses.append(loss)
        if progress is not None:
            progress(number, loss)
    return losses


def embed_texts(model: str, data: str, label_column: str, count: int) -> tuple[Array, npt.NDArray[np.int64]]:
    """Embed the texts of a CSV file that bear one of its first labels.

    Args:
        model: directory of a sentence model such as MiniLM.
        data: file with a column "text".
        label_column: of the labels.
        count: how many labels.

    Returns:
        Mean token vectors, scaled to mean square 1, and the number of each one's label.

    Raises:
        privtuner.errors.InputError: ``model`` or ``data`` cannot be read.
    """
    import torch
    from transformers import AutoModel

    from privtuner.nn.pretrained import load_model, load_tokenizer
    from privtuner.train import dataset

    texts = dataset.read_csv(data, "text", label_column)
    names = dataset.label_names(texts)[:count]
    rows = [place for place, label in enumerate(texts.labels) if label in names]
    (encoder, _), tokenizer = load_model(model, AutoModel), load_tokenizer(model)
    vectors = []
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            part = [texts.texts[place] for place in rows[start : start + 64]]
            batch = tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(mean, dim=1))
    x = torch.cat(vectors).double().numpy()
    return x * np.sqrt(x.shape[1]), np.array([names.index(texts.labels[place]) for place in rows])


def _cross_entropy(logits: Array, labels: npt.NDArray[np.int64]) -> tuple[float, Array]:
    """Return the mean loss and its gradient by the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    g = np.exp(logs)
    g[rows, labels] -= 1
    return float(-logs[rows, labels].mean()), g / len(labels)

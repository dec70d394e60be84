"""Text classifiers to fine-tune: the clear model, or the data owner's with its frozen layers at a server.

``pool`` says what the head reads. "mean": the mean of the last hidden states of a text's tokens, with one linear layer
on top, which suits sentence encoders. "first": what the model's own ``ForSequenceClassification`` reads, the first
token (BERT-like, through a pooler if it has one) or the last one (GPT-like).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError
from privtuner.nn import OwnerBundle, Session, build
from privtuner.nn.families import canonical_names
from privtuner.nn.pretrained import load_model, load_tokenizer, tokenizer_files
from privtuner.train.mean_head import MeanForSequenceClassification
from privtuner.train.peft_adapter import load_adapter
from privtuner.train.report import load_labels, load_pool

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["POOLS", "clear_classifier", "load_classifier", "owner_classifier"]

POOLS = ("mean", "first")


def clear_classifier(
    directory: str | Path, labels: Sequence[str], pool: str = "mean"
) -> PreTrainedModel | MeanForSequenceClassification:
    """Return a classifier with the weights of a model directory and a new head, in float32 and eval mode.

    Args:
        directory: as ``save_pretrained`` of ``transformers`` writes it. Nothing is downloaded and no code in it run.
        labels: names of the classes, in the order of the head's outputs.
        pool: what the head reads, "mean" or "first".

    Raises:
        privtuner.errors.InputError: ``directory`` holds no whole model, or ``pool`` is unknown or does not suit it:
            "first" with a pooler that the weights lack.
    """
    import transformers

    _check_pool(pool)
    loader = transformers.AutoModel if pool == "mean" else transformers.AutoModelForSequenceClassification
    model, made_up = load_model(directory, loader, relabelled=True, dtype=torch.float32, **_entries(labels))
    return _with_head(model, pool, made_up)


def owner_classifier(
    bundle: OwnerBundle, session: Session, labels: Sequence[str], pool: str = "mean", **options: Any
) -> PreTrainedModel | MeanForSequenceClassification:
    """Return the data owner's classifier with a new head, its frozen layers computed by a server.

    Args:
        bundle: the data owner's part of the model.
        session: what encrypts, and the way to the server.
        labels: names of the classes, in the order of the head's outputs.
        pool: what the head reads, "mean" or "first".
        **options: of `privtuner.nn.build`.

    Raises:
        privtuner.errors.InputError: ``pool`` is unknown or does not suit the model, or see `privtuner.nn.build`.
    """
    _check_pool(pool)
    task = "feature-extraction" if pool == "mean" else "sequence-classification"
    with warnings.catch_warnings():
        # The warning is of a pooler: "mean" does without it, and "first" refuses it below.
        warnings.filterwarnings("ignore", ".* is not in the bundle and was newly initialised", UserWarning)
        model = build(bundle, session, task=task, **_entries(labels), **options)
    return _with_head(model, pool, bundle.omitted)


def load_classifier(directory: str | Path, adapter: str | Path) -> PeftModel:
    """Return the clear model with an adapter that ``privtuner train`` saved, to classify texts with.

    ``model.config.id2label`` names the classes::

        model = load_classifier("MODEL", "ADAPTER")
        batch = AutoTokenizer.from_pretrained("MODEL")(texts, padding=True, return_tensors="pt")
        names = [model.config.id2label[place] for place in model(**batch).logits.argmax(-1).tolist()]

    Args:
        directory: the model directory that was served.
        adapter: directory of the adapter, with its ``labels.json``.

    Raises:
        privtuner.errors.InputError: a directory lacks what it should hold, or the adapter is of another model.
    """
    model = clear_classifier(directory, load_labels(adapter), load_pool(adapter))
    # Heads that read the last token look for the padding's number here, and the tokenizer may pad with another one.
    if tokenizer_files(directory) and (pad := load_tokenizer(directory).pad_token_id) is not None:
        model.config.pad_token_id = pad
    return load_adapter(model, adapter)


def _with_head(
    model: PreTrainedModel, pool: str, made_up: Collection[str]
) -> PreTrainedModel | MeanForSequenceClassification:
    """Return the classifier; ``made_up`` are the modules that the weights lack."""
    frozen = dict(model.base_model.named_modules())
    lacking = sorted(name for name in map(canonical_names(model), made_up) if name in frozen)
    if lacking and pool == "first":
        # It would be random, would not be trained, and would be another one wherever the adapter is loaded.
        raise InputError(f"the weights lack '{lacking[0]}', which the pool first reads through; use the pool mean")
    return (MeanForSequenceClassification(model) if pool == "mean" else model).eval()


def _entries(labels: Sequence[str]) -> dict[str, Any]:
    """Return the entries of the configuration that name the classes."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: place for place, label in enumerate(labels)}}
    return {"num_labels": len(labels), **names}


def _check_pool(pool: str) -> None:
    if pool not in POOLS:
        raise InputError(f"pool is {pool!r}; give one of {', '.join(POOLS)}")

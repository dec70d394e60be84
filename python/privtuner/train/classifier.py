"""Text classifiers to fine-tune: the clear model, or the owner's with its frozen layers at a server.

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
from privtuner.nn import OwnerBundle, Transport, visible_only
from privtuner.nn.pretrained import load_model, load_tokenizer, tokenizer_files
from privtuner.nn.split import canonical_names
from privtuner.train.peft_adapter import load_adapter
from privtuner.train.report import load_labels, load_pool

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["POOLS", "MeanForSequenceClassification", "clear_classifier", "load_classifier", "owner_classifier"]

POOLS = ("mean", "first")


class MeanForSequenceClassification(torch.nn.Module):
    """A linear head on the mean of an encoder's last hidden states.

    Args:
        encoder: from ``AutoModel``, or :meth:`privtuner.nn.OwnerBundle.build` with ``task="feature-extraction"``. A
            pooler of its own, which would be computed for nothing, is taken out.

    Raises:
        privtuner.errors.InputError: the encoder also has a decoder.
    """

    pool = "mean"

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.config = encoder.config
        if self.config.is_encoder_decoder:
            raise InputError(f"a {self.config.model_type} has a decoder, whose states have no mean; use the pool first")
        if isinstance(getattr(encoder, "pooler", None), torch.nn.Module):
            encoder.register_module("pooler", None)
        self.encoder = encoder
        sizes: Any = encoder.config
        self.classifier = torch.nn.Linear(sizes.hidden_size, sizes.num_labels, dtype=encoder.dtype)

    @property
    def base_model(self) -> PreTrainedModel:
        """The encoder, as models of ``transformers`` call it."""
        return self.encoder

    def get_input_embeddings(self) -> torch.nn.Module:
        """The encoder's table of token vectors."""
        return self.encoder.get_input_embeddings()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether segments are recomputed.

        Where this is missing, PEFT has gradients go down to the embeddings, through layers below every adapter.
        """
        return any(getattr(module, "gradient_checkpointing", False) for module in self.encoder.modules())

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.classifier.weight.device

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Classify texts.

        Args:
            input_ids: (batch, seq) int64.
            attention_mask: (batch, seq), 0 for padding; None where there is none. A text has at least one token.
            labels: (batch,) int64, for the loss.
            **options: further arguments of the encoder.

        Returns:
            ``logits`` (batch, labels), and with ``labels`` the mean cross-entropy in nats as ``loss``.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        with visible_only():
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **options)[0]
        if attention_mask is None:
            mean = states.mean(1)
        else:
            mask = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1)
        logits = self.classifier(mean)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


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
    bundle: OwnerBundle, transport: Transport, labels: Sequence[str], pool: str = "mean", **options: Any
) -> PreTrainedModel | MeanForSequenceClassification:
    """Return the data owner's classifier with a new head, its frozen layers computed through ``transport``.

    Args:
        bundle: the owner's part of the model.
        transport: carries requests to the server.
        labels: names of the classes, in the order of the head's outputs.
        pool: what the head reads, "mean" or "first".
        **options: of :meth:`privtuner.nn.OwnerBundle.build`.

    Raises:
        privtuner.errors.InputError: ``pool`` is unknown or does not suit the model, or see the method above.
        privtuner.errors.EngineError: see the method above.
    """
    _check_pool(pool)
    task = "feature-extraction" if pool == "mean" else "sequence-classification"
    with warnings.catch_warnings():
        # Of a pooler: the mean does without, and the pool first refuses it below.
        warnings.filterwarnings("ignore", ".* is not in the bundle and was newly initialised", UserWarning)
        model = bundle.build(transport, task=task, **_entries(labels), **options)
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

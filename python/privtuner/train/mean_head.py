"""A classifier whose head reads the mean of an encoder's states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError
from privtuner.nn import visible_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["MeanForSequenceClassification"]


class MeanForSequenceClassification(torch.nn.Module):
    """A linear head on the mean of an encoder's last hidden states.

    Args:
        encoder: from ``AutoModel``, or `privtuner.nn.build` with ``task="feature-extraction"``. A
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
        """The device of the head."""
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

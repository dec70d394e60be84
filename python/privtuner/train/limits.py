"""Limits of a model on its texts: how many tokens, which ones, and which token may pad a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError
from privtuner.train.dataset import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from privtuner.train.mean_head import MeanForSequenceClassification
    from privtuner.train.sealed import SealedClassifier

    Classifier = PreTrainedModel | MeanForSequenceClassification | SealedClassifier

__all__ = ["fit", "positions"]


def positions(model: Classifier) -> int | None:
    """Return the most tokens a text of ``model`` may have, None where nothing sets a limit."""
    stated: Any = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    limits = [stated] if isinstance(stated, int) and stated > 0 else []
    for name, module in model.named_modules():
        # RoBERTa and its like number positions from behind the padding's.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(limits, default=None)


def fit(model: Classifier, tables: Sequence[Encoded]) -> tuple[Encoded, ...]:
    """Return ``tables`` as ``model`` can take them: all padded with one token that has an embedding and is in no text.

    That is the tokenizer's if it can be. Padding is masked, so that which one it is changes nothing but where heads
    look for the last token: they tell padding by its number, and would pass over a text's own last token.

    Raises:
        privtuner.errors.InputError: a token has no embedding, a text has no token or more than the model has positions,
            or every token occurs in the texts and none is left for padding.
    """
    embeddings: Any = model.get_input_embeddings()
    known = int(embeddings.num_embeddings)
    longest = positions(model)
    used = {token for table in tables for row in table.tokens for token in row}
    if strange := [token for token in used if not 0 <= token < known]:
        raise InputError(
            f"the tokenizer makes token {max(strange)} and the model has embeddings for 0 to {known - 1}: they are not "
            "of one model, or tokens were added without resizing the embeddings; put the right tokenizer beside it"
        )
    for table in tables:
        for number, row in enumerate(table.tokens, start=1):
            if not row or (longest is not None and len(row) > longest):
                raise InputError(
                    f"text {number} has {len(row)} tokens, and the model takes 1 to {longest or 'any number'}; "
                    "drop it, or cut it with --max-length"
                )
    pad = tables[0].pad_id
    if pad in used or not 0 <= pad < known:
        free = next((token for token in range(known) if token not in used), None)
        if free is None:
            raise InputError(
                f"the padding token {pad} occurs in the texts or has no embedding, and every one of the model's "
                f"{known} tokens occurs in the texts; set another pad_token in the tokenizer"
            )
        pad = free
    return tuple(replace(table, pad_id=pad) for table in tables)

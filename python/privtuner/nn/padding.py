"""Which rows of a batch need not be sent: those that ``attention_mask`` hides, where nothing reads what stands there.

A position whose mask is 0 cannot change a visible one while the backbone computes (`families.PADDING_SAFE`). What the
model gives back may well hold it: the hidden states of a bare backbone, the logits of a language model, a pooled
position that the mask hides. So a saving is taken only if the forward pass at hand provably reads visible positions
alone, or if the caller says so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from privtuner.errors import InputError
from privtuner.nn.families import PADDING_SAFE, type_of

__all__ = ["Omission", "Rows", "hidden_positions", "omission", "visible_only"]

# Implementations of attention that give hidden keys a weight of exactly zero.
_MASKED_ATTENTION = frozenset({"eager", "sdpa", "flash_attention_2"})
# Arguments that add no output, no loss and no attention beyond what the rules below look at.
_PLAIN = frozenset(
    {
        "attention_mask",
        "input_ids",
        "inputs_embeds",
        "labels",
        "num_items_in_batch",
        "position_ids",
        "return_dict",
        "token_type_ids",
    }
)
_IGNORED_LABEL = -100

_said = threading.local()


@contextmanager
def visible_only() -> Iterator[None]:
    """Give the caller's word that of the forward passes inside no output at a hidden position is read.

    For heads that pool the hidden states of a base model themselves and honour the mask, which this library cannot
    see. Positions whose ``attention_mask`` is 0 are then left out of requests, as for the heads of ``transformers``,
    and what the outputs hold there is meaningless, though finite::

        with visible_only():
            states = base(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    Applies to the calling thread. Changes nothing for models in the clear, with ``skip_padding=False``, or for model
    types that are not known to honour a mask. A gradient that reaches a hidden position raises
    `privtuner.errors.InputError` in the backward pass.
    """
    before = getattr(_said, "visible_only", False)
    _said.visible_only = True
    try:
        yield
    finally:
        _said.visible_only = before


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a flattened batch that are sent, and those left out.

    Attributes:
        shape: (batch, seq), what was flattened.
        visible: int64 indices, ascending, of the rows that are sent.
        hidden: int64 indices of the others.
    """

    shape: torch.Size
    visible: torch.Tensor
    hidden: torch.Tensor

    @classmethod
    def of(cls, visible: torch.Tensor) -> Rows:
        """Return the rows of a bool (batch, seq), true at the positions that are sent."""
        flat = visible.reshape(-1)
        return cls(visible.shape, flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1))

    def select(self, flat: torch.Tensor) -> torch.Tensor:
        """Return those of the rows (batch * seq, features) of ``flat`` that are sent."""
        return flat.index_select(0, self.visible.to(flat.device))

    def check_hidden(self, layer: str, gradient: torch.Tensor) -> bool:
        """Check that no gradient (batch, seq, features) reaches a row that was left out.

        Returns:
            Whether the rows left out hold a NaN or an infinity, as the overflow of a scaled loss leaves everywhere.

        Raises:
            privtuner.errors.InputError: one of them has a gradient: the loss read a hidden position.
        """
        flat = gradient.reshape(-1, gradient.shape[-1])
        # A NaN or an infinity shows in the extremes, and these are several times as fast as a test of every number.
        low, high = torch.aminmax(flat.index_select(0, self.hidden.to(flat.device)))
        if bool((low == 0) & (high == 0)):
            return False
        if bool(low.isfinite() & high.isfinite()):
            raise InputError(
                f"layer '{layer}': the loss depends on positions that attention_mask hides, and they were left out of "
                "the request; read visible positions only, or build the model with skip_padding=False"
            )
        return True


@dataclass(frozen=True, eq=False)
class Omission:
    """Rows to leave out of the requests of one forward pass.

    Attributes:
        rows: which.
        by_word: the caller says that nothing reads them; otherwise it is proven.
        withholds: logits at hidden positions would leave the model, so none may be read.
    """

    rows: Rows
    by_word: bool = False
    withholds: bool = False


def hidden_positions(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """Return where the ``attention_mask`` among ``arguments`` hides a position, bool (batch, seq); None for nowhere."""
    mask = arguments.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    hidden = mask.detach() == 0
    return hidden if bool(hidden.any()) else None


def omission(model: Any, arguments: Mapping[str, Any], skip: bool | None) -> Omission | None:
    """Return what a forward pass may leave out; None if all rows have to be sent.

    Args:
        model: the watched model, a ``PreTrainedModel``.
        arguments: the arguments of its forward pass, by name.
        skip: True leaves out what the mask hides on the caller's word, False nothing, None what is proven.
    """
    hidden = None if skip is False else hidden_positions(arguments)
    if hidden is None:
        return None
    visible = ~hidden
    if skip:
        return Omission(Rows.of(visible), by_word=True)
    if not _honours_masks(model) or _leading(arguments) != hidden.shape:
        return None
    if getattr(_said, "visible_only", False):
        return Omission(Rows.of(visible), by_word=True)
    if not _is_plain(model, arguments):
        return None
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        pooled = _find_pooled(model, arguments)
        return Omission(Rows.of(visible)) if bool(visible.gather(1, pooled.to(visible.device)).all()) else None
    for ending, (loss, shift) in _LABELLED.items():
        if name.endswith(ending) and _loss_reads_visible(model, arguments, visible, loss, shift):
            return Omission(Rows.of(visible), withholds=True)
    return None


def _honours_masks(model: Any) -> bool:
    crossed = ("is_encoder_decoder", "add_cross_attention", "is_decoder")
    return (
        type_of(model) in PADDING_SAFE
        and not any(getattr(model.config, name, False) for name in crossed)
        and model.config._attn_implementation in _MASKED_ATTENTION
    )


def _is_plain(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether nothing but loss and logits was asked for, of a class and with arguments that the rules know."""
    extra = [value for name, value in arguments.items() if name not in _PLAIN]
    asked = [getattr(model.config, name, False) for name in ("output_hidden_states", "output_attentions")]
    known = type(model).__module__.startswith("transformers.models.") and "_loss_function" not in vars(model)
    return known and not any(map(_is_given, [*extra, *asked]))


def _is_given(value: Any) -> bool:
    # An empty cache is false, and is filled.
    return not (value is None or value is False or (type(value) is int and value == 0))


def _leading(arguments: Mapping[str, Any]) -> torch.Size | None:
    """Return (batch, seq) of what goes into the model."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(arguments.get(name), torch.Tensor):
            return torch.Size(arguments[name].shape[:2])
    return None


def _find_pooled(model: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Return the position (batch, 1) that a sequence classifier of ``transformers`` pools.

    GPT-2 and the generic classifiers take the last that is no padding, and tell padding by the token number of the
    configuration, not by the mask.
    """
    batch, length = arguments["attention_mask"].shape
    if PADDING_SAFE[type_of(model)] == "first":
        return torch.zeros(batch, 1, dtype=torch.int64)
    ids, pad = arguments.get("input_ids"), model.config.get_text_config().pad_token_id
    if ids is None or pad is None:
        return torch.full((batch, 1), length - 1)
    places = torch.arange(length, device=ids.device, dtype=torch.int32)
    last: torch.Tensor = (places * (ids != pad).to(torch.int32)).argmax(-1, keepdim=True)
    return last


# End of a class's name -> its loss in `transformers`, and how many positions before a label stands the output it reads.
_LABELLED: Mapping[str, tuple[str, int]] = {
    "ForTokenClassification": ("ForTokenClassification", 0),
    "ForMaskedLM": ("ForMaskedLM", 0),
    "ForCausalLM": ("ForCausalLM", 1),
    "LMHeadModel": ("ForCausalLM", 1),
}


def _loss_reads_visible(model: Any, arguments: Mapping[str, Any], visible: torch.Tensor, loss: str, shift: int) -> bool:
    """Whether this is a training pass whose loss reads no hidden position.

    In evaluation logits are what the caller is after, so nothing is withheld then.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING

    labels = arguments.get("labels")
    if not (model.training and torch.is_grad_enabled() and isinstance(labels, torch.Tensor)):
        return False
    if labels.shape != visible.shape or model.loss_function is not LOSS_MAPPING[loss]:
        return False
    read = (labels != _IGNORED_LABEL).to(visible.device)[:, shift:]
    return not bool((read & ~visible[:, : read.shape[1]]).any())

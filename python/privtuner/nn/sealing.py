"""Takes a BERT-like encoder apart for the sealed model: weights for the server, embeddings for the data owner."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from privtuner.ckks.functions import FUNCTIONS
from privtuner.errors import InputError
from privtuner.nn.bundle import OwnerBundle, describing_entries
from privtuner.nn.families import SEALABLE, type_of
from privtuner.sealed.shape import Placement, Pooling, Shape, Target
from privtuner.sealed.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Sealing", "take_apart"]

_ACTIVATIONS = {module: name for name, row in FUNCTIONS.items() for module in row.modules}


@dataclass(frozen=True)
class Sealing:
    """How a model is sealed: what the server decides, and everybody may know.

    Attributes:
        period: tokens of a text with its padding, a power of two; longer texts are cut. A text costs a part of a pass
            in proportion to it.
        rank: of the adapters; 0 for none. alpha: they are scaled by ``alpha / rank``.
        targets: the matrices that have one.
        placement: how the server has the adapters: "owner-encrypted", or "server": in the clear, for data owners who
            trust it to follow the protocol.
        pool: what is revealed of a text: the "mean" of its last states, or the "first" one, through the model's own
            pooler where its weights have one.
    """

    period: int = 32
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[Target, ...] = ("query", "value")
    pool: Pooling = "mean"
    placement: Placement = "owner-encrypted"


def take_apart(
    model: PreTrainedModel, sealing: Sealing, files: Mapping[str, bytes], omit: Collection[str]
) -> tuple[Weights, OwnerBundle]:
    """Return the server's weights, and the data owner's bundle, which holds the embeddings and no weight of a block.

    Args:
        model: an encoder, or a model around one, whose head is left out: data owners make their own.
        sealing: how it is sealed.
        files: tokenizer files of the bundle.
        omit: names of modules (as in ``model``) that were made up on loading.

    Raises:
        privtuner.errors.InputError: the model is of another type than those that can be sealed, or of another form; its
            positions do not suffice for the period; or an option is out of range.
    """
    base: Any = model.base_model
    _check_form(model, base)
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    made_up = {name.removeprefix(prefix) for name in omit}
    config = base.config
    shape = Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        hidden=config.intermediate_size,
        period=sealing.period,
        eps=config.layer_norm_eps,
        activation=_activation(base),
        pool=sealing.pool,
        pooler=sealing.pool == "first" and _has_pooler(base, made_up),
        rank=sealing.rank,
        alpha=sealing.alpha,
        targets=sealing.targets,
        placement=sealing.placement,
    )
    _check_positions(base.embeddings, shape.period)
    state = {
        name: tensor.detach().to("cpu", torch.float64).numpy()
        for name, tensor in base.named_parameters()
        if not name.startswith("embeddings.")
    }
    weights = Weights.of_state(state, shape)
    embeddings: torch.nn.Module = base.embeddings
    own = [*embeddings.named_parameters(), *embeddings.named_buffers()]
    bundle = OwnerBundle(
        config=describing_entries(json.loads(model.config.to_json_string(use_diff=False))),
        architecture=type(base).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        groups={},
        specs={},
        tensors={f"embeddings.{name}": tensor.detach().cpu().clone() for name, tensor in own},
        files=dict(files),
    )
    return weights, bundle


def _check_form(model: PreTrainedModel, base: Any) -> None:
    if type_of(model) not in SEALABLE:
        raise InputError(
            f"a {type(model).__name__} cannot be sealed whole; BERT-like encoders can: {', '.join(sorted(SEALABLE))}. "
            "Take one of them, or serve the model without --seal"
        )
    config = base.config
    if config.is_decoder or getattr(config, "add_cross_attention", False):
        raise InputError(f"this {type(model).__name__} is configured as a decoder; encoders alone can be sealed")
    kind = getattr(config, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        raise InputError(
            f"positions are embedded as {kind} in this model, within its blocks; only absolute ones can be"
        )
    if hasattr(base, "embeddings_project"):
        raise InputError(
            f"this {type(model).__name__} projects its embeddings of {config.embedding_size} features to "
            f"{config.hidden_size}, by a matrix that would be its owners'; take a model of equal sizes"
        )


def _activation(base: Any) -> str:
    """Return the name of the blocks' activation in `FUNCTIONS`."""
    module = base.encoder.layer[0].intermediate.intermediate_act_fn
    kind = type(module).__name__
    if kind not in _ACTIVATIONS:
        raise InputError(f"no polynomial is known for the activation {kind}; known: {', '.join(sorted(_ACTIVATIONS))}")
    return "gelu_tanh" if kind == "GELU" and module.approximate == "tanh" else _ACTIVATIONS[kind]


def _has_pooler(base: Any, made_up: Collection[str]) -> bool:
    return getattr(base, "pooler", None) is not None and "pooler.dense" not in made_up


def _check_positions(embeddings: torch.nn.Module, period: int) -> None:
    table: Any = embeddings.position_embeddings
    # RoBERTa and its like number positions from behind the padding's.
    positions = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    if period > positions:
        raise InputError(f"period {period}: the model has positions for {positions} tokens; take a shorter period")

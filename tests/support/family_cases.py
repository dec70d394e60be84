"""Tiny random models of every type that can be split, by the names that configurations give to sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "sliding_window": 16,
    "intra_bottleneck_size": 16,
    "true_hidden_size": 16,
    "head_dim": 8,
    "rotary_dim": 4,
    "d_kv": 8,
    "attention_types": [[["global", "local"], 1]],
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 40),
    **dict.fromkeys(
        ("hidden_size", "embedding_size", "d_model", "dim", "n_embd", "emb_dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    "num_decoder_layers": 2,
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
}


# Not in every default, but read.
_EVERYWHERE = ("num_hidden_layers", "decoder_start_token_id")


def tiny_model(model_type: str, auto: str = "AutoModel", **changes: Any) -> PreTrainedModel:
    """Return a model of ``model_type`` as the class ``auto`` builds it, every tensor random, in eval mode."""
    default = AutoConfig.for_model(model_type).to_dict()
    sizes = {name: size for name, size in _SIZES.items() if name in {*default, *_EVERYWHERE}}
    dropouts = {name: 0.0 for name in default if "drop" in name and isinstance(default[name], float)}
    config = AutoConfig.for_model(model_type, **{**sizes, **dropouts, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240817)
        model: PreTrainedModel = getattr(transformers, auto).from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean().round()), std=0.15)
    return model.eval()

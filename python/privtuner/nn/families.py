"""All that is known of model families, in one place: names of layers, heads and blocks, masks, sizes of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from privtuner.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "COMPUTED_POSITIONS",
    "KEPT_HEADS",
    "NEW_HEADS",
    "PADDING_SAFE",
    "PEFT_TASKS",
    "PRETRAINING_HEADS",
    "READ_WEIGHTS",
    "REGULAR",
    "SEALABLE",
    "TASKS",
    "canonical_names",
    "check_regular",
    "constant_sizes",
    "group_siblings",
    "irregular",
    "type_of",
    "wire_name",
]

KEPT_HEADS = ("classifier", "pre_classifier", "score", "qa_outputs")
"""Names of heads that are trained, hence stay in the clear with the data owner."""

NEW_HEADS = ("pooler",)
"""Parts of base models that a checkpoint may lack: pretraining on masked words leaves no pooler."""

PRETRAINING_HEADS = ("ForMaskedLM", "ForPreTraining")
"""Ends of the names of classes whose head fine-tuning throws away: the base model is what their directory is for."""

PADDING_SAFE: Mapping[str, Literal["first", "last"]] = {
    "albert": "first",
    "bert": "first",
    "camembert": "first",
    "distilbert": "first",
    "electra": "first",
    "gpt2": "last",
    "llama": "last",
    "mistral": "last",
    "qwen2": "last",
    "roberta": "first",
    "xlm-roberta": "first",
}
"""Model types whose tokens meet in masked attention alone, so that padding never reaches a real token; and which token
their sequence classifiers pool, the first or the last that is not ``pad_token_id``."""

READ_WEIGHTS: Mapping[str, str] = {"mobilebert": "cls.predictions.dense"}
"""Model type -> a linear layer whose weight the model reads itself, past the layer, so that nobody can serve it."""

_ENCODERS = """
albert bert bert-generation camembert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert fnet
layoutlm megatron-bert mobilebert modernbert mpnet nomic_bert rembert roberta roberta-prelayernorm roformer
xlm xlm-roberta xlm-roberta-xl
"""
_DECODERS = """
apertus arcee biogpt bitnet bloom codegen cohere cohere2 diffllama ernie4_5 exaone4 gemma gemma2 gemma3_text glm glm4
gpt2 gpt_bigcode gpt_neo gpt_neox gptj granite helium hunyuan_v1_dense llama ministral mistral modernbert-decoder mpt
nanochat nemotron olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2
"""
_ENCODERS_WITH_DECODERS = """
bart blenderbot blenderbot-small m2m_100 marian mbart mt5 pegasus plbart t5 umt5
"""
REGULAR = frozenset((_ENCODERS + _DECODERS + _ENCODERS_WITH_DECODERS).split())
"""Model types that ask every layer for the same tokens whatever the texts say: which layers are asked, in which order
and for how many tokens follows from the shapes of the inputs alone. Left out are those that route tokens to experts,
gather some of them, pad to sizes of their own, or stop early. Layers dropped in training (BART, OPT) are drawn from
PyTorch's generator."""

COMPUTED_POSITIONS = frozenset({"distilbert", "marian", "pegasus", "roformer", "xlm"})
"""Model types that compute a table of positions in Python, number by number."""

SEALABLE = frozenset({"bert", "camembert", "data2vec-text", "electra", "roberta", "xlm-roberta"})
"""Model types whose base model is embeddings with a norm of their own, then blocks as BERT has them and names them."""

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "feature-extraction": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
"""Task name -> the class of ``transformers`` that builds its head."""

PEFT_TASKS: Mapping[str, str] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
"""End of a class's name -> task type of PEFT, which decides what a saved adapter can be loaded as."""


def type_of(model: Any) -> str:
    """Return the model type that the class of ``model`` implements, whatever its configuration claims."""
    implemented: str = getattr(type(model).config_class, "model_type", "")
    return implemented


def canonical_names(model: PreTrainedModel) -> Callable[[str], str]:
    """Return the function that takes the prefix of the base model off a name of ``model``."""
    inside = model.base_model is not model
    prefix = f"{model.base_model_prefix}." if inside else ""
    return lambda name: name.removeprefix(prefix)


def check_regular(model: Any) -> None:
    """Refuse a model whose requests may depend on more than the shapes of its inputs.

    Raises:
        privtuner.errors.InputError: its type is not in `REGULAR`, or it is configured to predict labelled tokens alone.
    """
    if type_of(model) not in REGULAR:
        raise InputError(irregular(type(model).__name__))
    if getattr(model.config, "sparse_prediction", False):
        raise InputError(
            f"sparse_prediction of this {type(model).__name__} sends labelled tokens alone, so that sizes of requests "
            f"depend on the data, {_WAY_OUT}"
        )


_WAY_OUT = "which the server sees; take another model, or say allow_data_dependent_requests=True"


def irregular(what: str) -> str:
    """Return why a model, or a type of models, is refused."""
    return (
        f"a {what} is not known to send requests whose number and sizes are the same for all texts of one length (in a "
        f"mixture of experts they depend on the words), {_WAY_OUT}"
    )


def constant_sizes(config: Any, lengths: Iterable[int]) -> frozenset[torch.Size]:
    """Return leading dimensions of layers that take no token of the batch: DeBERTa's relative positions.

    Args:
        config: the configuration of the model.
        lengths: the lengths of the sequences of a forward pass.
    """
    if config.model_type not in ("deberta", "deberta-v2"):
        return frozenset()
    span = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    if config.model_type == "deberta":
        return frozenset(torch.Size([1, 2 * min(length, span)]) for length in lengths)
    buckets = getattr(config, "position_buckets", -1)
    return frozenset({torch.Size([1, 2 * (buckets if buckets > 0 else span)])})


# Children of one parent module that its forward pass calls with the same tensor.
_SIBLINGS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
)
# In cross-attention the query comes from another sequence than key and value.
_CROSS_ATTENTION = ("crossattention", "cross_attn", "encoder_attn", "EncDecAttention")


def group_siblings(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Partition module names into groups fed by the same tensor.

    A layer that no rule covers is a group of its own. A rule that is wrong for some model costs speed, never
    correctness: layers share a product only when they are called with the same tensor.

    Args:
        names: dotted module names, without duplicates.

    Returns:
        The groups in the order of their first member; members in the order of the rule.
    """
    ordered = list(names)
    present = set(ordered)
    groups: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for name in ordered:
        if name in seen:
            continue
        group = _group_of(name, present)
        seen.update(group)
        groups.append(group)
    return groups


def _group_of(name: str, present: set[str]) -> tuple[str, ...]:
    parent, _, leaf = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    cross = any(part in _CROSS_ATTENTION for part in parent.split("."))
    for rule in _SIBLINGS:
        siblings = rule[1:] if cross and len(rule) == 3 else rule
        if leaf in siblings:
            return tuple(prefix + sibling for sibling in siblings if prefix + sibling in present)
    return (name,)


def wire_name(members: tuple[str, ...]) -> str:
    """Return the name of a group on the wire: ``a.b.q``, ``a.b.k`` -> ``a.b.q+k``."""
    parent, _, first = members[0].rpartition(".")
    leaves = "+".join([first, *(member.rpartition(".")[2] for member in members[1:])])
    return f"{parent}.{leaves}" if parent else leaves

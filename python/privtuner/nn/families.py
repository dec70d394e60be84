"""What is known about model families: layers that share their input, and attention that honours its mask."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["KEPT_HEADS", "NEW_HEADS", "PADDING_SAFE", "TASKS", "group_siblings", "wire_name"]

KEPT_HEADS = ("classifier", "pre_classifier", "score", "qa_outputs")
"""Names of heads that are trained, hence stay in the clear with the data owner."""

NEW_HEADS = ("pooler",)
"""Parts of base models that a checkpoint may lack: pretraining on masked words leaves no pooler."""

PADDING_SAFE = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "distilbert",
        "electra",
        "gpt2",
        "llama",
        "mistral",
        "qwen2",
        "roberta",
        "xlm-roberta",
    }
)
"""Model types whose tokens meet in masked attention alone, so that padding never reaches a real token."""

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "feature-extraction": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}
"""Task name -> the class of ``transformers`` that builds its head."""

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

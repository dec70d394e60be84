"""Makes a small encoder that gives sentence vectors like a large one's: something to seal where time is short.

One block of a BERT on the teacher's own word vectors, projected, is trained in the clear so that the mean of its last
states comes near the teacher's mean, projected on its principal directions. Token vectors are a linear map of the
teacher's, so that words that no text held stand where their neighbours do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from privtuner.errors import InputError

__all__ = ["distil"]

_BATCH = 64
_RATE = 4e-3
_DECAY = 0.01
_DROP = 0.15  # of the words of a text that a variant of it leaves out
_SPREAD = 0.5  # standard deviation of what the student is to give


def distil(
    source: str | Path,
    target: str | Path,
    texts: Sequence[str],
    *,
    width: int = 64,
    heads: int = 2,
    hidden: int = 128,
    period: int = 16,
    variants: int = 6,
    steps: int = 400,
    seed: int = 0,
    progress: Callable[[int, int, str], object] = lambda *_: None,
) -> float:
    """Write a model folder as ``save_pretrained`` does, with the tokenizer of the teacher.

    Args:
        source: folder of the teacher, a BERT.
        target: where the small model goes.
        texts: what it learns on.
        width: of the small model, at most the teacher's.
        heads: of its one block.
        hidden: features inside it.
        period: tokens at which texts are cut.
        variants: texts made of each one by leaving words out and joining two.
        steps: of AdamW.
        seed: of weights, variants and batches.
        progress: called with steps done and all, and the stage.

    Returns:
        The part of the variance of the teacher's projected vectors that is missed, on the texts themselves.

    Raises:
        InputError: no model is there, or too few texts.
    """
    from transformers import AutoModel, BertConfig, BertModel

    from privtuner.nn.pretrained import load_model, load_tokenizer, tokenizer_files

    if len(texts) < 2 * width:
        raise InputError(f"{len(texts)} texts; a model of width {width} needs {2 * width} to learn from")
    random = torch.Generator().manual_seed(seed)
    teacher: Any = load_model(source, AutoModel)[0].eval()
    tokenizer: Any = load_tokenizer(source)
    rows = tokenizer(list(texts), truncation=True, max_length=period)["input_ids"]
    ids, mask = _padded([*rows, *_variants(rows, variants, random)], period)
    vectors = _teach(teacher, ids, mask, lambda done: progress(done, len(ids), "the teacher's vectors"))
    wanted = _principal(vectors, width)

    words, places = (getattr(teacher.embeddings, f"{name}_embeddings").weight.detach() for name in ("word", "position"))
    kind = teacher.embeddings.token_type_embeddings.weight.detach()[0]
    used = words[torch.unique(ids)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=heads,
            intermediate_size=hidden,
            max_position_embeddings=len(places),
            type_vocab_size=1,
            pad_token_id=teacher.config.pad_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        student = BertModel(config, add_pooling_layer=False)
        directions = torch.pca_lowrank(used, q=width)[2]
    projection = torch.nn.Parameter(directions / (used @ directions).std())
    norm, encoder = student.embeddings.LayerNorm, student.encoder

    def pooled(rows: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        states = norm((words[rows] + places[:period] + kind) @ projection)
        hidden_pairs = (1.0 - shown[:, None, None, :]) * torch.finfo(torch.float32).min
        return _mean(encoder(states, attention_mask=hidden_pairs)[0], shown)

    parameters = [projection, *norm.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for number in range(steps):
        progress(number, steps, "the small model")
        some = torch.randint(len(ids), (_BATCH,), generator=random)
        loss = (pooled(ids[some], mask[some]) - wanted[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        student.embeddings.word_embeddings.weight.copy_(words @ projection)
        student.embeddings.position_embeddings.weight.copy_((places + kind) @ projection)
        student.embeddings.token_type_embeddings.weight.zero_()
        own = slice(0, len(rows))
        missed = (pooled(ids[own], mask[own]) - wanted[own]).square().mean() / wanted[own].var()
    student.save_pretrained(target)
    for name in tokenizer_files(source):
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return float(missed)


def _variants(rows: Sequence[Sequence[int]], count: int, random: torch.Generator) -> list[list[int]]:
    """``count`` variants of every text, between its own first and last token."""

    def below(limit: int) -> int:
        return int(torch.randint(max(limit, 1), (), generator=random))

    made = []
    for row in [row for row in rows for _ in range(count)]:
        kept = torch.rand(len(row) - 2, generator=random) > _DROP
        words = [token for token, keep in zip(row[1:-1], kept.tolist(), strict=True) if keep]
        if below(2):
            other = rows[below(len(rows))][1:-1]
            words = words[: 1 + below(len(words))] + list(other[below(len(other)) :])
        made.append([row[0], *words, row[-1]])
    return made


def _padded(rows: Sequence[Sequence[int]], period: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and mask (n, period); the last token of a text that is too long takes the place of what is cut."""
    ids, mask = torch.zeros(len(rows), period, dtype=torch.int64), torch.zeros(len(rows), period)
    for place, row in enumerate(rows):
        cut = [*row[: period - 1], row[-1]] if len(row) > period else list(row)
        ids[place, : len(cut)], mask[place, : len(cut)] = torch.tensor(cut), 1.0
    return ids, mask


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def _teach(teacher: Any, ids: torch.Tensor, mask: torch.Tensor, progress: Callable[[int], object]) -> torch.Tensor:
    """The teacher's mean vectors (n, its width)."""
    parts = []
    for begin in range(0, len(ids), _BATCH):
        progress(begin)
        some = slice(begin, begin + _BATCH)
        parts.append(_mean(teacher(input_ids=ids[some], attention_mask=mask[some]).last_hidden_state, mask[some]))
    return torch.cat(parts)


def _principal(vectors: torch.Tensor, width: int) -> torch.Tensor:
    """Vectors less their mean on their first ``width`` principal directions, at a common scale."""
    centred = vectors - vectors.mean(0)
    kept = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:width].T
    scaled: torch.Tensor = kept / kept.std() * _SPREAD
    return scaled

"""A small encoder that learns sentence vectors from a larger one, and is an ordinary model folder."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from privtuner.errors import InputError
from privtuner.train.distil import distil
from text_cases import rows

TEXTS = [text for text, _ in rows(0, 40)]
SHAPE = {"width": 8, "heads": 2, "hidden": 16, "period": 8}


def test_the_small_model(model, tmp_path):
    told = []
    options = {**SHAPE, "variants": 2, "steps": 60}
    missed = distil(model, tmp_path / "a", TEXTS, **options, progress=lambda *place: told.append(place))
    assert 0 < missed < distil(model, tmp_path / "b", TEXTS, **{**options, "steps": 5})
    assert {stage for *_, stage in told} == {"the teacher's vectors", "the small model"}
    small = AutoModel.from_pretrained(tmp_path / "a").eval()
    config = small.config
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (8, 2, 16)
    assert config.num_hidden_layers == 1
    # The same tokens, and token vectors that are one linear map of the teacher's.
    ours, theirs = (AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"] for folder in (tmp_path / "a", model))
    assert ours == theirs
    large = AutoModel.from_pretrained(model).embeddings.word_embeddings.weight.detach()
    vectors = small.embeddings.word_embeddings.weight.detach()
    found = torch.linalg.lstsq(large, vectors).solution
    torch.testing.assert_close(large @ found, vectors, rtol=0, atol=1e-4)


def test_the_saved_model_gives_what_was_trained(model, tmp_path):
    """What is missed is worked out once more, from the folder."""
    missed = distil(model, tmp_path, TEXTS, **SHAPE, variants=0, steps=30)

    def pooled(folder):
        batch = AutoTokenizer.from_pretrained(folder)(
            TEXTS, truncation=True, max_length=8, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            states = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        shown = batch["attention_mask"].unsqueeze(-1)
        return (states * shown).sum(1) / shown.sum(1)

    wanted = pooled(model)
    wanted = wanted - wanted.mean(0)
    wanted = wanted @ torch.linalg.svd(wanted, full_matrices=False)[2][:8].T
    wanted *= 0.5 / wanted.std()
    again = (pooled(tmp_path) - wanted).square().mean() / wanted.var()
    assert missed == pytest.approx(again.item(), rel=1e-3)


def test_too_few_texts(model, tmp_path):
    with pytest.raises(InputError, match="15 texts; a model of width 8 needs 16"):
        distil(model, tmp_path, TEXTS[:15], **SHAPE)

"""What a model takes of a text: positions, tokens with an embedding, and a token for padding."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from privtuner.errors import InputError
from privtuner.train.dataset import Encoded
from privtuner.train.limits import fit, positions

SIZES = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture(scope="module")
def model():
    return BertModel(BertConfig(max_position_embeddings=16, **SIZES))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: BertModel(BertConfig(max_position_embeddings=16, **SIZES)), 16),
        # Its positions are numbered from padding_idx + 1.
        (lambda: RobertaModel(RobertaConfig(max_position_embeddings=16, pad_token_id=1, **SIZES)), 14),
        (lambda: LlamaModel(LlamaConfig(max_position_embeddings=16, **SIZES)), 16),
        (lambda: GPT2Model(GPT2Config(vocab_size=12, n_positions=16, n_embd=8, n_layer=1, n_head=2)), 16),
        (lambda: T5EncoderModel(T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)), None),
    ],
)
def test_positions(build, expected):
    model = build()
    assert positions(model) == expected
    if expected is not None:
        row = torch.full((1, expected), 5)
        with torch.no_grad():
            assert model(input_ids=row, attention_mask=torch.ones_like(row))[0].shape[1] == expected


def table(*rows, pad=0):
    return Encoded(tuple(rows), torch.zeros(len(rows), dtype=torch.int64), pad)


def test_texts_that_fit_stay_as_they_are(model):
    tables = table((1, 2), (11,) * 16), table((3,))
    found = fit(model, tables)
    assert [entry.tokens for entry in found] == [entry.tokens for entry in tables]
    assert [entry.pad_id for entry in found] == [0, 0]


@pytest.mark.parametrize("pad", [12, -1, 1 << 40, 0, 4])
def test_padding_that_a_text_uses_or_that_has_no_embedding_becomes_another(model, pad):
    # A head that looks for the last token takes every token of this number for padding.
    tables = table((0, 1, 2), (4,), pad=pad), table((3, 5), pad=pad)
    assert [entry.pad_id for entry in fit(model, tables)] == [6, 6]


@pytest.mark.parametrize("pad", [12, 0])
def test_padding_where_every_token_is_in_use(model, pad):
    with pytest.raises(InputError, match=f"padding token {pad} occurs .* and every one of the model's 12 tokens"):
        fit(model, [table(tuple(range(12)), pad=pad)])


@pytest.mark.parametrize("token", [12, -1])
def test_token_without_an_embedding(model, token):
    with pytest.raises(InputError, match=f"makes token {token} and the model has embeddings for 0 to 11"):
        fit(model, [table((1,)), table((1, token))])


@pytest.mark.parametrize("length", [0, 17])
def test_text_of_a_length_that_cannot_be(model, length):
    with pytest.raises(InputError, match=f"text 2 has {length} tokens, and the model takes 1 to 16"):
        fit(model, [table((1,), (1,) * length)])

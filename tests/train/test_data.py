"""Labelled texts: batches and their order, and the sets that ship."""

import collections
import csv
import os
import random
import re
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privtuner.errors import InputError
from privtuner.train.dataset import (
    Encoded,
    ShuffledBatches,
    TextTable,
    collate,
    encode,
    label_names,
    length_batches,
    read_csv,
)
from text_cases import rows, tiny_tokenizer


def encoded(lengths, pad_id=0):
    tokens = tuple(tuple(range(10 * row + 1, 10 * row + 1 + length)) for row, length in enumerate(lengths))
    return Encoded(tokens, torch.arange(len(lengths)), pad_id)


def test_texts_are_cut_and_numbered():
    data = encode(TextTable("", ("apple pear plum", "saw"), ("f", "t")), tiny_tokenizer(), ("f", "t"), 4)
    vocabulary = tiny_tokenizer().get_vocab()
    words = [["[CLS]", "apple", "pear", "[SEP]"], ["[CLS]", "saw", "[SEP]"]]
    assert data.tokens == tuple(tuple(vocabulary[word] for word in text) for text in words)
    assert data.targets.tolist() == [0, 1]
    assert data.pad_id == vocabulary["[PAD]"]
    assert len(data) == 2


def test_tokenizer_without_padding_pads_with_its_end():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    data = encode(TextTable("", ("a", "b"), ("a", "b")), tokenizer, ("a", "b"))
    assert data.pad_id == tokenizer.eos_token_id


def test_length_without_room():
    with pytest.raises(InputError, match="max_length is 2"):
        encode(TextTable("", ("a", "b"), ("a", "b")), tiny_tokenizer(), ("a", "b"), 2)


def test_batch_is_padded_to_its_longest():
    batch = collate(encoded([1, 3, 2], pad_id=99), [2, 0])
    assert batch.input_ids.tolist() == [[21, 22], [1, 99]]
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.targets.tolist() == [2, 0]
    assert batch.tokens == 3


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
def test_every_text_comes_once_an_epoch(texts, batch_size, seed):
    batches = ShuffledBatches(encoded([2] * texts), batch_size, seed)
    epochs = 3
    seen = []
    while len(seen) < epochs * texts:
        batch = next(batches)
        assert len(batch.targets) == batch_size
        seen += batch.targets.tolist()
    for epoch in range(epochs):
        assert sorted(seen[epoch * texts : (epoch + 1) * texts]) == list(range(texts))


def order(seed):
    batches = ShuffledBatches(encoded([2] * 50), 50, seed)
    return [next(batches).targets.tolist() for _ in range(3)]


def test_order_depends_on_the_seed_alone():
    first = order(1)
    torch.rand(3)
    random.random()
    assert order(1) == first != order(2)
    assert len(set(map(tuple, first))) == 3


def test_order_without_a_seed_is_no_generator_s():
    """Neither PyTorch's generator nor Python's, whose states a program may set or give away, decides it."""
    orders = []
    for _ in range(2):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global generator is what must not matter
        before = torch.get_rng_state(), random.getstate()
        orders.append(order(None))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()
    assert orders[0] != orders[1]  # equal once in 50! ** 3 runs


def test_order_without_a_seed_takes_the_operating_system_s_randomness(monkeypatch):
    drawn = []
    monkeypatch.setattr(random, "_urandom", lambda count: drawn.append(count) or os.urandom(count))
    order(3)
    assert not drawn
    order(None)
    assert len(drawn) >= 3 * 49  # one draw a swap


@pytest.mark.parametrize("seed", [None, 0])
def test_lengths_of_single_texts_follow_from_a_known_order_only(seed):
    """What a curious server can do: solve the totals of the batches for the length of each text."""
    lengths = np.random.default_rng(1).integers(3, 40, 60)
    mine, guess = ShuffledBatches(encoded(lengths), 16, seed), ShuffledBatches(encoded([1] * 60), 16, 0)
    totals, rows_ = [], []
    for _ in range(100):
        totals.append(next(mine).tokens)
        rows_.append(np.bincount(next(guess).targets, minlength=60))
    solved = np.linalg.lstsq(np.array(rows_, float), np.array(totals, float), rcond=None)[0].round()
    assert (solved == lengths).all() == (seed is not None)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 100))
def test_evaluation_sees_every_text_once(lengths, budget):
    batches = list(length_batches(encoded(lengths), budget))
    assert sorted(row for batch in batches for row in batch.targets.tolist()) == list(range(len(lengths)))
    assert all(batch.tokens <= budget or len(batch.targets) == 1 for batch in batches)
    longest = [batch.input_ids.shape[1] for batch in batches]
    assert longest == sorted(longest)


def test_batches_of_an_evaluation_are_full():
    batches = list(length_batches(encoded([10] * 30), 100))
    assert [batch.tokens for batch in batches] == [100, 100, 100]


def shipped(name, label):
    tables = []
    for part in ("train", "test"):
        with resources.as_file(resources.files("privtuner") / "data" / f"{name}_{part}.csv") as path:
            tables.append(read_csv(path, "text", label))
    return tables


@pytest.fixture(scope="module")
def clinic():
    return shipped("clinic", "category")


@pytest.fixture(scope="module")
def reschedule():
    return shipped("reschedule", "day")


def test_shipped_set_is_balanced(clinic):
    assert len(label_names(*clinic)) == 10
    for part, count in zip(clinic, (37, 12), strict=True):
        assert set(collections.Counter(part.labels).values()) == {count}


def plain(text):
    return re.sub(r"[^a-z0-9 ]", "", text.lower())


def test_shipped_set_repeats_nothing(clinic):
    texts = [plain(text) for part in clinic for text in part.texts]
    assert len(set(texts)) == len(texts) == 490
    # No sentence shares most of its words with another, in order or not.
    words = [frozenset(text.split()) for text in texts]
    for place, one in enumerate(words):
        for other in words[place + 1 :]:
            assert len(one & other) < 0.8 * len(one | other), (one, other)


DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def test_each_message_names_the_day_it_asks_for_and_another(reschedule):
    assert set(label_names(*reschedule)) == set(DAYS)
    for part, texts in zip(reschedule, (360, 120), strict=True):
        assert len(set(part.texts)) == len(part.texts) == texts
        counts = collections.Counter(part.labels).values()
        assert max(counts) - min(counts) <= 1
        named = [re.findall("|".join(DAYS), text) for text in part.texts]
        messages = list(zip(named, part.labels, strict=True))
        assert all(len(days) == 2 == len(set(days)) and label in days for days, label in messages)
        # Neither the order nor the pair gives the answer away.
        first = sum(days[0] == label for days, label in messages)
        assert 0.4 < first / texts < 0.6
        answers = collections.defaultdict(set)
        for days, label in messages:
            answers[frozenset(days)].add(label)
        assert all(len(labels) == 2 for labels in answers.values())


def test_sentences_of_the_test_are_not_those_of_the_training(reschedule):
    words = [{frozenset(plain(re.sub("|".join(DAYS), "", text)).split()) for text in part.texts} for part in reschedule]
    assert len(words[0]) >= 80  # some sentences differ in the order of their words alone, within one part
    assert all(len(one & other) < 0.8 * len(one | other) for one in words[0] for other in words[1])


@pytest.mark.parametrize(("name", "label"), [("clinic", "category"), ("reschedule", "day")])
def test_shipped_files_are_plain_csv(name, label):
    for part in ("train", "test"):
        content = (resources.files("privtuner") / "data" / f"{name}_{part}.csv").read_bytes()
        assert b"\r" not in content
        assert content.isascii()
        assert next(csv.reader(content.decode().splitlines())) == ["text", label]


def test_generated_rows_of_tests_differ():
    assert not set(rows(0, 60)) & set(rows(60, 60))

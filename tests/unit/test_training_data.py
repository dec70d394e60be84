"""Labelled texts: files that can be used and files that cannot, batches, and the set that ships."""

import collections
import csv
import re
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from privtuner.errors import InputError
from privtuner.lora.dataset import (
    Encoded,
    TextTable,
    collate,
    encode,
    label_names,
    length_batches,
    read_csv,
    shuffled,
)
from text_cases import rows, tiny_tokenizer, write_csv


def encoded(lengths, pad_id=0):
    tokens = tuple(tuple(range(10 * row + 1, 10 * row + 1 + length)) for row, length in enumerate(lengths))
    return Encoded(tokens, torch.arange(len(lengths)), pad_id)


def test_file_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufefflabel,text,other\r\n x ,"a, ""b""\nc",1\r\ny,ä,2\r\n'.encode())
    table = read_csv(path)
    assert table == TextTable(str(path), ('a, "b"\nc', "ä"), ("x", "y"))


def test_columns_can_be_named(tmp_path):
    table = read_csv(write_csv(tmp_path / "a.csv", [("p", "q")], "one,two"), "two", "one")
    assert (table.texts, table.labels) == (("q",), ("p",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no column 'text'; its columns are: none"),
        (b"txt,label\na,b\n", "no column 'text'; its columns are: txt, label"),
        (b"text,lab\na,b\n", "no column 'label'; its columns are: text, lab"),
        (b"text,label\n", "has no rows below its header"),
        (b"text,label\na,x\n ,y\n", "line 3: text or label is empty"),
        (b"text,label\na,\n", "line 2: text or label is empty"),
        (b"text,label\na\n", "line 2: text or label is empty"),
        (b'text,label\n"a,b\n', "no CSV file"),
        (b"text,label\n\xff,a\n", "no CSV file in UTF-8"),
    ],
)
def test_file_that_cannot_be_used(tmp_path, content, reason):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_csv(path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot read .*nowhere.csv: No such file"):
        read_csv(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="cannot read .*: Is a directory"):
        read_csv(tmp_path)


def table(*labels):
    return TextTable("file.csv", labels, labels)


def test_labels_are_sorted():
    assert label_names(table("b", "a", "b"), table("a")) == ("a", "b")


def test_one_label_is_not_enough():
    with pytest.raises(InputError, match="single label 'a'"):
        label_names(table("a", "a"))


def test_label_that_was_never_trained():
    with pytest.raises(InputError, match="lacks: c, d, e, f, g and 1 more"):
        label_names(table("a", "b"), table("a", *"cdefgh"))


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
    data = encode(table("a", "b"), tokenizer, ("a", "b"))
    assert data.pad_id == tokenizer.eos_token_id


def test_length_without_room():
    with pytest.raises(InputError, match="max_length is 2"):
        encode(table("a", "b"), tiny_tokenizer(), ("a", "b"), 2)


def test_batch_is_padded_to_its_longest():
    batch = collate(encoded([1, 3, 2], pad_id=99), [2, 0])
    assert batch.input_ids.tolist() == [[21, 22], [1, 99]]
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.targets.tolist() == [2, 0]
    assert batch.tokens == 3


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
def test_every_text_comes_once_an_epoch(texts, batch_size, seed):
    batches = shuffled(encoded([2] * texts), batch_size, seed)
    epochs = 3
    seen = []
    while len(seen) < epochs * texts:
        batch = next(batches)
        assert len(batch.targets) == batch_size
        seen += batch.targets.tolist()
    for epoch in range(epochs):
        assert sorted(seen[epoch * texts : (epoch + 1) * texts]) == list(range(texts))


def test_order_depends_on_the_seed_alone():
    data = encoded([2] * 50)

    def order(seed):
        torch.rand(3)
        return next(shuffled(data, 50, seed)).targets.tolist()

    assert order(1) == order(1) != order(2)


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


@pytest.fixture(scope="module")
def clinic():
    folder = resources.files("privtuner") / "data"
    tables = {}
    for part in ("train", "test"):
        with resources.as_file(folder / f"clinic_{part}.csv") as path:
            tables[part] = read_csv(path, "text", "category")
    return tables


def test_shipped_set_is_balanced(clinic):
    assert len(label_names(clinic["train"], clinic["test"])) == 10
    for part, count in (("train", 37), ("test", 12)):
        assert set(collections.Counter(clinic[part].labels).values()) == {count}


def test_shipped_set_repeats_nothing(clinic):
    texts = [*clinic["train"].texts, *clinic["test"].texts]
    plain = [re.sub(r"[^a-z0-9 ]", "", text.lower()) for text in texts]
    assert len(set(plain)) == len(plain) == 490
    # No sentence shares most of its words with another, in order or not.
    words = [frozenset(text.split()) for text in plain]
    for place, one in enumerate(words):
        for other in words[place + 1 :]:
            assert len(one & other) < 0.8 * len(one | other), (one, other)


def test_shipped_files_are_plain_csv():
    for part in ("train", "test"):
        content = (resources.files("privtuner") / "data" / f"clinic_{part}.csv").read_bytes()
        assert b"\r" not in content
        assert content.isascii()
        assert next(csv.reader(content.decode().splitlines())) == ["text", "category"]


def test_generated_rows_of_tests_differ():
    assert not set(rows(0, 60)) & set(rows(60, 60))

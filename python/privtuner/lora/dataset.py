"""Labelled texts: from a CSV file to batches of token numbers."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from privtuner.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Encoded",
    "TextTable",
    "collate",
    "encode",
    "label_names",
    "length_batches",
    "read_csv",
    "shuffled",
]


@dataclass(frozen=True)
class TextTable:
    """Texts and their labels, row by row.

    Attributes:
        source: where they are from, for messages.
        texts: one string a row.
        labels: one label a row, as many as ``texts``.
    """

    source: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts.

    Attributes:
        tokens: token numbers of each text, at least one.
        targets: index of each text's label, (texts,) int64.
        pad_id: token number that fills shorter rows of a batch.
    """

    tokens: tuple[tuple[int, ...], ...]
    targets: torch.Tensor
    pad_id: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    Attributes:
        input_ids: (batch, seq) int64.
        attention_mask: (batch, seq) int64, 1 for tokens and 0 for padding.
        targets: (batch,) int64.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    targets: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same rows on ``device``."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device))


def read_csv(path: str | Path, text_column: str = "text", label_column: str = "label") -> TextTable:
    """Read a CSV file in UTF-8 with a header line.

    Raises:
        privtuner.errors.InputError: the file cannot be read, lacks a column, has no rows, or a row without a text or
            a label; the line is named.
    """
    texts: list[str] = []
    labels: list[str] = []
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            columns = rows.fieldnames or []
            for wanted in (text_column, label_column):
                if wanted not in columns:
                    raise InputError(
                        f"{path} has no column '{wanted}'; its columns are: {', '.join(columns) or 'none'}"
                    )
            for row in rows:
                text, label = row[text_column], row[label_column]
                if not (text and text.strip()) or not (label and label.strip()):
                    raise InputError(
                        f"{path}, line {rows.line_num}: text or label is empty; fill it in or drop the row"
                    )
                texts.append(text)
                labels.append(label.strip())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no CSV file in UTF-8: {error}") from error
    if not texts:
        raise InputError(f"{path} has no rows below its header")
    return TextTable(str(path), tuple(texts), tuple(labels))


def label_names(train: TextTable, test: TextTable | None = None) -> tuple[str, ...]:
    """Return the labels of ``train``, sorted; a label's index is its place.

    Raises:
        privtuner.errors.InputError: fewer than two labels, or ``test`` has one that ``train`` lacks.
    """
    names = tuple(sorted(set(train.labels)))
    if len(names) < 2:
        raise InputError(f"{train.source} has the single label '{names[0]}'; a classifier needs two or more")
    unknown = sorted(set(test.labels) - set(names)) if test is not None else []
    if test is not None and unknown:
        raise InputError(
            f"{test.source} has labels that {train.source} lacks: {', '.join(unknown[:5])}"
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            + "; no text of them could be classified rightly"
        )
    return names


def encode(
    table: TextTable, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int = 64
) -> Encoded:
    """Tokenise ``table``; texts longer than ``max_length`` tokens are cut.

    Raises:
        privtuner.errors.InputError: ``max_length`` leaves no room for a token.
    """
    if max_length < 3:
        raise InputError(f"max_length is {max_length}; give at least 3 tokens")
    rows = tokenizer(list(table.texts), truncation=True, max_length=max_length)["input_ids"]
    index = {name: place for place, name in enumerate(labels)}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Encoded(
        tuple(tuple(int(token) for token in row) for row in rows),
        torch.tensor([index[label] for label in table.labels], dtype=torch.int64),
        int(pad) if pad is not None else 0,
    )


def collate(data: Encoded, rows: Sequence[int]) -> Batch:
    """Return ``rows`` of ``data`` padded on the right to the longest of them."""
    length = max(len(data.tokens[row]) for row in rows)
    input_ids = torch.full((len(rows), length), data.pad_id, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens = data.tokens[row]
        input_ids[place, : len(tokens)] = torch.tensor(tokens)
        mask[place, : len(tokens)] = 1
    return Batch(input_ids, mask, data.targets[list(rows)])


def shuffled(data: Encoded, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches without end: one shuffle an epoch, an epoch's remainder filled up from the next.

    The order depends on ``seed`` and the number of texts alone.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            waiting += torch.randperm(len(data), generator=generator).tolist()
        yield collate(data, waiting[:batch_size])
        waiting = waiting[batch_size:]


def length_batches(data: Encoded, tokens: int) -> Iterator[Batch]:
    """Yield every text once, texts of like length together, up to ``tokens`` tokens a batch (at least one text)."""
    rows: list[int] = []
    used = 0
    for row in sorted(range(len(data)), key=lambda row: len(data.tokens[row])):
        length = len(data.tokens[row])
        if rows and used + length > tokens:
            yield collate(data, rows)
            rows, used = [], 0
        rows.append(row)
        used += length
    if rows:
        yield collate(data, rows)

"""Labelled texts: read from a CSV file (`privtuner.train.table`), as batches of token numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError
from privtuner.train.table import TextTable, label_names, read_csv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Encoded",
    "ShuffledBatches",
    "TextTable",
    "collate",
    "encode",
    "label_names",
    "length_batches",
    "ordered_batches",
    "read_csv",
]


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
        """Number of tokens without the padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same rows on ``device``."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device))


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


class ShuffledBatches(Iterator[Batch]):
    """Batches without end: one shuffle an epoch, an epoch's remainder filled up from the next.

    A server sees the tokens of every batch in total. Whoever knows the order can solve the totals of enough batches for
    the length of every single text, so without a seed the order is drawn from the operating system's randomness.

    Args:
        data: what to draw from.
        batch_size: texts a batch.
        seed: makes the order repeatable, and gives it away to whoever knows or guesses the seed.
    """

    def __init__(self, data: Encoded, batch_size: int, seed: int | None = None) -> None:
        self._data, self._batch_size = data, batch_size
        self._generator = random.SystemRandom() if seed is None else random.Random(seed)  # noqa: S311 - asked for
        self._waiting: list[int] = []

    def __next__(self) -> Batch:
        while len(self._waiting) < self._batch_size:
            epoch = list(range(len(self._data)))
            self._generator.shuffle(epoch)
            self._waiting += epoch
        rows, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
        return collate(self._data, rows)

    def place(self) -> tuple[list[int], Any]:
        """Return the rows that were drawn and not yet used, and the generator's state (None: the operating system's).

        Whoever reads it knows the order of these rows: keep it as the texts themselves.
        """
        system = isinstance(self._generator, random.SystemRandom)
        return list(self._waiting), None if system else self._generator.getstate()

    def go_to(self, waiting: Sequence[int], state: Any) -> None:
        """Go on where `place` was asked.

        Raises:
            privtuner.errors.InputError: a row that there is not, or a generator where there was none.
        """
        seeded = not isinstance(self._generator, random.SystemRandom)
        if seeded != (state is not None) or not all(0 <= row < len(self._data) for row in waiting):
            raise InputError("the order of the batches is of other texts or of another seed; begin a new run")
        if seeded:
            version, words, gauss = state
            self._generator.setstate((version, tuple(words), gauss))
        self._waiting = list(waiting)


def length_batches(data: Encoded, tokens: int) -> Iterator[Batch]:
    """Yield every text once, texts of like length together, up to ``tokens`` tokens a batch (at least one text).

    The order is that of the lengths, so a server learns roughly how many of the texts have which length, and not which
    text has which. In an order of chance it would not, and batches would be padded to several times their tokens.
    """
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


def ordered_batches(data: Encoded, batch_size: int) -> Iterator[Batch]:
    """Yield every text once, as they come, ``batch_size`` texts a batch: neither order nor number tells a length."""
    for begin in range(0, len(data), batch_size):
        yield collate(data, range(begin, min(begin + batch_size, len(data))))

"""A tiny classifier with its tokenizer on disk, and a tiny data set it can learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from privtuner import system
from warm import Command

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry", "melon"],
    "tool": ["hammer", "saw", "drill", "wrench", "chisel"],
    "river": ["rhine", "nile", "danube", "volga", "thames"],
}
FILLERS = ["i", "like", "the", "a", "new", "see", "my", "old", "and", "now"]


def rows(start: int, count: int) -> list[tuple[str, str]]:
    """Sentences of fillers around words of one class, numbered so that disjoint ranges differ."""
    table = []
    for number in range(start, start + count):
        label = list(WORDS)[number % 3]
        first, second = WORDS[label][number % 5], WORDS[label][(number // 5) % 5]
        filler = FILLERS[number % 10], FILLERS[(number // 10) % 10]
        table.append((f"{filler[0]} {first} {filler[1]} {second}" + " now" * (number % 4), label))
    return table


def write_csv(path: Path, table: Sequence[tuple[str, str]], header: str = "text,category") -> Path:
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in table)]) + "\n", encoding="utf-8")
    return path


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *FILLERS, *(word for group in WORDS.values() for word in group)]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def telling_tokenizer(word: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a server that wants to know which texts hold ``word``: it spells that out in many tokens."""
    tokenizer = tiny_tokenizer()
    spelled = normalizers.Replace(word, f"{word} now now now")
    inner = tokenizer.backend_tokenizer
    inner.normalizer = normalizers.Sequence([inner.normalizer, spelled])
    return tokenizer


def tiny_model_directory(folder: Path, **other: int) -> Path:
    """Write a random two-layer BERT (of ``other`` sizes) and a tokenizer of its thirty words to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        sizes |= other
        config = BertConfig(vocab_size=len(SPECIAL) + 25, max_position_embeddings=32, initializer_range=0.2, **sizes)
        BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: layers this small gain nothing from more, and lose a lot on a busy machine."""
    before = torch.get_num_threads(), system.get_num_threads()
    torch.set_num_threads(1)
    system.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        system.set_num_threads(before[1])


def environment() -> dict[str, str]:
    """The environment for a child process: this interpreter's import path, no downloads, one thread."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {
        **os.environ,
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PRIVTUNER_NUM_THREADS": "1",
    }


@contextmanager
def started(*arguments: str | Path) -> Iterator[Command]:
    """Run ``privtuner`` with these arguments in a process that does not outlive the test."""
    process = Command(list(map(str, arguments)), environment())
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def command(*arguments: str | Path, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    with started(*arguments) as process:
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(list(arguments), process.wait(), out, err)


@contextmanager
def server_process(model: Path, *options: str) -> Iterator[tuple[Command, str]]:
    """Run ``privtuner serve`` on a free port; yields the process and its address."""
    with started("serve", "--model", model, "--port", "0", *options) as process:
        line = process.stdout.readline()
        found = re.fullmatch(r"privtuner: serving \S+, \d+ layers, at (127\.0\.0\.1:\d+); Ctrl-C stops\n", line)
        assert found, (line, process.poll(), process.stderr.read())
        yield process, found[1]


def training_options(folder: Path) -> list[str]:
    """Options of a short `privtuner train` on texts that are written to ``folder``."""
    train = write_csv(folder / "train.csv", rows(0, 90))
    test = write_csv(folder / "test.csv", rows(90, 30))
    files = ["--data", str(train), "--eval", str(test), "--label-column", "category"]
    return [*files, "--batch-size", "16", "--lora-r", "4", "--lr", "0.02", "--head-lr", "0.05", "--seed", "3"]

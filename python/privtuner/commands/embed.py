"""``privtuner embed``: has a sealed model turn texts into vectors."""

from __future__ import annotations

import argparse
from pathlib import Path

from privtuner.commands.common import add_threads, quiet_transformers, say, set_threads
from privtuner.commands.line import add_bundle, add_line, check_line
from privtuner.commands.sealed import connected, sealed_encoder
from privtuner.commands.stop import Stop
from privtuner.errors import InputError
from privtuner.paths import ensure_writable_file, replacing, writing

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Have a sealed model turn texts into vectors: the server sees neither texts nor vectors, and you see no weight "
        "and no state but the vectors. Passes of a fixed number of texts, each minutes long."
    )
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="a running 'privtuner serve --seal model'")
    parser.add_argument("--data", required=True, metavar="CSV", help="texts: a header and a column of texts")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of the texts (default %(default)s)")
    parser.add_argument(
        "--delimiter", default=",", metavar="C", help="of fields: a character, tab or semicolon (default ,)"
    )
    parser.add_argument(
        "--encoding", metavar="NAME", help="of the texts (default: as a byte-order mark says, or utf-8)"
    )
    parser.add_argument("--out", required=True, metavar="NPY", help="where the vectors go: float32 (texts, width)")
    parser.add_argument(
        "--state",
        metavar="FILE",
        help="run.state in the --out of a run of 'train --seal model': its key and adapters, whose vectors these are; "
        "without it those of the model as it is",
    )
    add_threads(parser)
    add_line(parser)
    add_bundle(parser)


def run(arguments: argparse.Namespace) -> int:
    """Embed, and write the vectors."""
    from privtuner.train.table import read_texts

    check_line(arguments, arguments.server)
    out = Path(arguments.out)
    if out.suffix != ".npy":
        raise InputError(f"--out {out}: the name must end in .npy")
    ensure_writable_file(out)
    set_threads(arguments.threads)
    if arguments.state and not Path(arguments.state).is_file():
        raise InputError(f"--state {arguments.state}: there is no such file; give that of a training run")
    texts = read_texts(
        arguments.data, arguments.text_column, delimiter=arguments.delimiter, encoding=arguments.encoding
    )

    import numpy as np
    import torch

    quiet_transformers()
    stop: Stop = arguments.stop
    with stop.defer(), connected(arguments, stop) as transport:
        encoder, _, tokenizer = sealed_encoder(transport, arguments, state=arguments.state)
        encoder.eval()
        rows = tokenizer(list(texts), truncation=True, max_length=encoder.period)["input_ids"]
        if not all(rows):
            raise InputError(f"{arguments.data}: text {rows.index([]) + 1} has no tokens; drop its row")
        vectors = []
        with encoder.owner:
            for begin in range(0, len(rows), encoder.sequences):
                stop.check()
                some = rows[begin : begin + encoder.sequences]
                say(f"texts {begin + 1:,} to {begin + len(some):,} of {len(rows):,}")
                ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.int64)
                for place, row in enumerate(some):
                    ids[place, : len(row)] = torch.tensor(row)
                lengths = torch.tensor([len(row) for row in some])
                vectors.append(encoder(ids, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()).float())
        result = torch.cat(vectors).numpy()
    with writing(out), replacing(out) as new:
        np.save(new, result)
    spent = encoder.owner.spent
    print(f"{len(result):,} vectors of {result.shape[1]} features written to {out}")
    print(
        f"{spent.seconds:,.0f} s, {spent.bytes_up / 1e6:,.0f} MB to the server, {spent.bytes_down / 1e6:,.0f} MB back, "
        f"{spent.refreshes:,} ciphertexts refreshed"
    )
    return 0

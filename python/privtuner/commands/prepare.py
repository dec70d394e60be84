"""``privtuner prepare``: seals a model, before anybody connects."""

from __future__ import annotations

import argparse

from privtuner.commands.common import add_threads, quiet_transformers, set_threads
from privtuner.commands.sealing import add_sealing, prepared_model
from privtuner.errors import InputError
from privtuner.paths import ensure_writable

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Seal a BERT-like encoder for 'privtuner serve --seal model': measure how large its values get on texts like "
        "the data owners', choose the encryption's parameters, plan levels and refreshes, and print what they take."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory, as save_pretrained writes it")
    parser.add_argument("--seal", required=True, choices=["model"], help="what is sealed: the whole encoder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the prepared model goes, weights included")
    add_sealing(parser, required=True)
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prepare, save, and print domains and plan."""
    from privtuner.nn import Prepared

    if Prepared.is_saved(arguments.model):
        raise InputError(f"{arguments.model} holds a prepared model; give the directory of the model itself")
    out = ensure_writable(arguments.out)
    set_threads(arguments.threads)
    quiet_transformers()
    prepared = prepared_model(arguments.model, arguments)
    prepared.save(out)
    print(prepared.table())
    print()
    print(prepared.model.plan)
    print(f"bundle {prepared.bundle.digest()}; data owners pin it with --expect")
    print(f"written to {out}; it holds the weights: keep it where the model is")
    return 0

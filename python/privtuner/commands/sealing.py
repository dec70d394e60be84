"""What the commands of a sealed model's server share: how a model is sealed, and reading one that is prepared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from privtuner.commands.common import Progress, say
from privtuner.errors import InputError
from privtuner.sealed.shape import Placement

if TYPE_CHECKING:
    from privtuner.nn import Prepared

__all__ = ["add_sealing", "given_sealing", "option", "prepared_model"]

_TEXTS = 2000
_OPTIONS = (
    *("calibrate", "text_column", "delimiter", "encoding", "texts"),
    *("room", "period", "rank", "targets", "pool", "adapters"),
)


def add_sealing(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Declare the options that say how a model is sealed; ``required`` of the texts to calibrate it on."""
    group = parser.add_argument_group("sealing", "How a model is sealed; of a prepared one it is settled.")
    group.add_argument(
        "--calibrate",
        required=required,
        metavar="CSV",
        help="texts like the data owners' that domains are measured on: a header and a column of texts. What goes "
        "beyond them gives no results",
    )
    group.add_argument("--text-column", metavar="NAME", help="of the texts (default text)")
    group.add_argument("--delimiter", metavar="C", help="of fields: a character, tab or semicolon (default ,)")
    group.add_argument("--encoding", metavar="NAME", help="of the texts (default: as a byte-order mark says, or utf-8)")
    group.add_argument("--texts", type=int, metavar="N", help=f"most texts to measure on (default {_TEXTS})")
    group.add_argument("--room", type=float, metavar="X", help="by which domains are widened (default 1.25)")
    group.add_argument("--period", type=int, metavar="N", help="tokens of a text, a power of two (default 32)")
    group.add_argument("--rank", type=int, metavar="R", help="of the adapters (default 8); 0: none, embeddings alone")
    group.add_argument("--targets", metavar="A,B", help="matrices that get adapters (default query,value)")
    group.add_argument(
        "--adapters",
        choices=get_args(Placement),
        help="encrypted under the data owner's key (default), or at the server in the clear: cheaper, for owners who "
        "trust the server to read one clipped, noisy gradient a step and nothing else",
    )
    group.add_argument(
        "--pool",
        choices=["mean", "first"],
        help="what is revealed of a text: the mean of its last states (default), or the first one, through the model's "
        "own pooler if it has one",
    )


def given_sealing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_sealing` that were given, by their names."""
    return {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}


def option(name: str) -> str:
    """Return an option as the user writes it."""
    return f"--{name.replace('_', '-')}"


def prepared_model(directory: str, arguments: argparse.Namespace) -> Prepared:
    """Return the prepared model in ``directory``, or prepare the model there as the options say.

    Raises:
        InputError: neither is there, an option is out of range, or options are given for what is prepared.
    """
    from privtuner.nn import Prepared, Sealing, split_pretrained
    from privtuner.train.table import read_texts

    given = given_sealing(arguments)
    if Prepared.is_saved(directory):
        if given:
            names = ", ".join(map(option, given))
            raise InputError(
                f"{names}: the model in {directory} is prepared already; leave that out, or prepare it anew"
            )
        say(f"reading {directory}, and planning")
        with Progress("planning", "steps") as planning:
            return Prepared.load(directory, planning=planning)
    if arguments.calibrate is None:
        raise InputError(
            f"{directory} holds no prepared model; give --calibrate texts.csv to prepare one here, or make one with "
            "'privtuner prepare'"
        )
    form = {name: given[name] for name in ("text_column", "delimiter", "encoding") if name in given}
    texts, most = read_texts(arguments.calibrate, **form), given.get("texts", _TEXTS)
    if most < 1:
        raise InputError(f"--texts is {most}; give at least 1")
    options: dict[str, Any] = {name: given[name] for name in ("period", "rank", "pool") if name in given}
    if "adapters" in given:
        options["placement"] = given["adapters"]
    if "targets" in given:
        options["targets"] = tuple(target.strip() for target in given["targets"].split(","))
    say(f"preparing {Path(directory).resolve().name}")
    parts = split_pretrained(directory, seal=Sealing(**options))
    step = -(-len(texts) // most)
    with Progress("embedding", "texts") as progress, Progress("planning", "steps") as planning:
        room = given.get("room", 1.25)
        return Prepared.calibrate(parts, texts[::step], room=room, progress=progress, planning=planning)

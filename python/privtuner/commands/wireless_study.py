"""``privtuner wireless-study``: the methods of allocation compared on random cells."""

from __future__ import annotations

import argparse

from privtuner.commands.allocate import STATUS, UNCERTIFIED, doubts
from privtuner.commands.common import Progress

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        f"Compare the methods of 'privtuner allocate' on random cells, along every parameter of a cell. {STATUS}"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the tables and figures go")
    parser.add_argument("--tiers", metavar="FILE", help="calibrated table (default: the package's)")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="random cells (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print the files written."""
    from privtuner.wireless import load_tiers
    from privtuner.wireless.study import run_study

    tiers = load_tiers(arguments.tiers) if arguments.tiers else None
    with doubts() as said, Progress("study", "allocations") as progress:
        written = run_study(arguments.out, tiers=tiers, seeds=arguments.seeds, progress=progress)
    for path in written:
        print(path)
    return UNCERTIFIED if said else 0

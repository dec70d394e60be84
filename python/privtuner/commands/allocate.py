"""``privtuner allocate``: shares of a cell for its devices."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privtuner.commands.common import say
from privtuner.paths import ensure_writable_file, writing

__all__ = ["STATUS", "UNCERTIFIED", "add", "doubts", "run"]

UNCERTIFIED = 3
"""Exit status of a command that could not certify what it found."""
STATUS = f"Exit status {UNCERTIFIED}: done, but a search ended at its last node, short of the tolerance."


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Share a wireless cell's bandwidth, power and processors among the devices that train in it, with "
        f"the least energy. README.md shows a SYSTEM file. {STATUS}"
    )
    parser.add_argument("system", metavar="SYSTEM", help="devices, server and channel, a .toml or .json file")
    parser.add_argument(
        "--method",
        default="global",
        metavar="M",
        help="global (default), alternating, equal, random, "
        "communication, computation, largest, smallest or brute-force",
    )
    parser.add_argument("--tiers", metavar="FILE", help="table of parameter sets in place of the system's own")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        metavar="X",
        help="gap to certify, as a part of the energy (default %(default)s)",
    )
    parser.add_argument(
        "--max-nodes", type=int, default=10_000, metavar="N", help="where the search ends at last (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the method random (default %(default)s)")
    parser.add_argument("--plan", action="store_true", help="print seconds, joules, MB and security of each device")
    parser.add_argument("--json", metavar="FILE", help="write the allocation to this file")
    parser.add_argument("--plot", metavar="FILE", help="draw the allocation: .png, .pdf or .svg")


def run(arguments: argparse.Namespace) -> int:
    """Allocate, and print the shares."""
    from privtuner.wireless import allocate, load_system, load_tiers
    from privtuner.wireless.report import plan, summary, table

    for path in filter(None, (arguments.json, arguments.plot)):
        ensure_writable_file(path)
    system = load_system(arguments.system, tiers=load_tiers(arguments.tiers) if arguments.tiers else None)
    with doubts() as said:
        found = allocate(
            system,
            arguments.method,
            tolerance=arguments.tolerance,
            max_nodes=arguments.max_nodes,
            seed=arguments.seed,
            progress=_node_progress if sys.stderr.isatty() else None,
        )
    if arguments.json:
        path = Path(arguments.json)
        with writing(path):
            path.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        from privtuner.wireless.figures import draw_allocation

        draw_allocation(found, Path(arguments.plot))
    print(plan(found) if arguments.plan else table(found))
    print()
    print(summary(found))
    return UNCERTIFIED if said else 0


@contextmanager
def doubts() -> Iterator[list[str]]:
    """Say what could not be certified, each in a line; the list holds what was said."""
    from privtuner.wireless import UncertifiedWarning

    said: list[str] = []

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, UncertifiedWarning):
            others(message, category, *place, **more)
            return
        said.append(str(message))
        say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UncertifiedWarning)
        others, warnings.showwarning = warnings.showwarning, show
        yield said


def _node_progress(objective: float, bound: float, nodes: int) -> None:
    end = "\r" if nodes % 10 else "\n"
    print(f"privtuner: {nodes} nodes, objective {objective:.9g} J, bound {bound:.9g} J", end=end, file=sys.stderr)

"""``privtuner allocate`` and ``privtuner wireless-study``: shares of a cell for its devices."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privtuner.commands.common import Progress, say
from privtuner.paths import ensure_writable_file, writing

__all__ = ["add"]

_UNCERTIFIED = 3
_STATUS = f"Exit status {_UNCERTIFIED}: done, but a search ended at its last node, short of the tolerance."


def add(commands: Any) -> None:
    """Declare both commands."""
    allocate = commands.add_parser(
        "allocate",
        help="share bandwidth, power and processors among devices",
        description="Share a wireless cell's bandwidth, power and processors among the devices that train in it, with "
        f"the least energy. README.md shows a SYSTEM file. {_STATUS}",
    )
    allocate.add_argument("system", metavar="SYSTEM", help="devices, server and channel, a .toml or .json file")
    allocate.add_argument(
        "--method",
        default="global",
        metavar="M",
        help="global (default), alternating, equal, random, "
        "communication, computation, largest, smallest or brute-force",
    )
    allocate.add_argument("--tiers", metavar="FILE", help="table of parameter sets in place of the system's own")
    allocate.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        metavar="X",
        help="gap to certify, as a part of the energy (default %(default)s)",
    )
    allocate.add_argument(
        "--max-nodes", type=int, default=10_000, metavar="N", help="where the search ends at last (default %(default)s)"
    )
    allocate.add_argument("--seed", type=int, default=0, metavar="N", help="of the method random (default %(default)s)")
    allocate.add_argument("--plan", action="store_true", help="print seconds, joules, MB and security of each device")
    allocate.add_argument("--json", metavar="FILE", help="write the allocation to this file")
    allocate.add_argument("--plot", metavar="FILE", help="draw the allocation: .png, .pdf or .svg")
    allocate.set_defaults(run=_allocate)

    study = commands.add_parser(
        "wireless-study",
        help="compare the methods of allocation along every parameter",
        description="Compare the methods of 'privtuner allocate' on random cells, along every parameter of a cell. "
        f"{_STATUS}",
    )
    study.add_argument("--out", required=True, metavar="DIR", help="where the tables and figures go")
    study.add_argument("--tiers", metavar="FILE", help="calibrated table (default: the package's)")
    study.add_argument("--seeds", type=int, default=20, metavar="N", help="random cells (default %(default)s)")
    study.set_defaults(run=_wireless_study)


def _allocate(arguments: argparse.Namespace) -> int:
    from privtuner.wireless import allocate, load_system, load_tiers
    from privtuner.wireless.report import plan, summary, table

    for path in filter(None, (arguments.json, arguments.plot)):
        ensure_writable_file(path)
    system = load_system(arguments.system, tiers=load_tiers(arguments.tiers) if arguments.tiers else None)
    with _doubts() as doubts:
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
    return _UNCERTIFIED if doubts else 0


@contextmanager
def _doubts() -> Iterator[list[str]]:
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


def _wireless_study(arguments: argparse.Namespace) -> int:
    from privtuner.wireless import load_tiers
    from privtuner.wireless.study import run_study

    tiers = load_tiers(arguments.tiers) if arguments.tiers else None
    with _doubts() as doubts, Progress("study", "allocations") as progress:
        written = run_study(arguments.out, tiers=tiers, seeds=arguments.seeds, progress=progress)
    for path in written:
        print(path)
    return _UNCERTIFIED if doubts else 0

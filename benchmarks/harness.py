"""What every benchmark shares: paired timing, records with hardware, a table, a JSON file, a plot."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from privtuner.commands import info


@dataclasses.dataclass(frozen=True)
class Record:
    """One measured figure.

    ``ratio`` is value / reference value, both from the same run; below 1 is faster (or smaller) than the reference.
    ``target`` is the ratio (or value, where there is no reference) to reach; None where the figure is only reported.
    ``value`` is None where it could not be measured; ``note`` says why. ``of_roof`` is the time that ``bytes`` and
    ``operations`` take at the ceilings of the hardware, as a part of the time that was measured.
    """

    name: str
    value: float | None
    unit: str
    reference: str | None = None
    ratio: float | None = None
    target: float | None = None
    d_in: int | None = None
    d_out: int | None = None
    tokens: int | None = None
    threads: int | None = None
    isa: str | None = None
    device: str | None = None
    bytes: float | None = None
    operations: float | None = None
    of_roof: float | None = None
    note: str = ""


@functools.cache
def hardware() -> dict[str, Any]:
    """Processor, threads, paths and versions, for the JSON file."""
    facts = info.collect()
    keys = ("version", "python", "numpy", "compiler", "machine", "processor", "packages")
    return {key: facts[key] for key in keys} | {
        "cores": os.cpu_count(),
        "isa_usable": [path["name"] for path in facts["isa"]["paths"] if path["usable"]],
    }


def paired(candidates: dict[str, Callable[[], object]], runs: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each candidate over ``runs`` rounds, the candidates in turn within a round, after ``warmup`` rounds.

    Taking turns makes ratios hold on a machine whose speed drifts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + runs):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_number >= warmup:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(values: list[float], reference: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(v / r for v, r in zip(values, reference, strict=True))


def progress(text: str) -> None:
    """A line for whoever waits, on stderr."""
    print(text, file=sys.stderr, flush=True)


def parser_of(description: str) -> argparse.ArgumentParser:
    """``--json FILE``, ``--plot FILE``, ``--quick``, ``--threads N``; a benchmark may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the records and the hardware to this file")
    parser.add_argument("--plot", type=Path, help="write a bar chart of the ratios to this PNG file")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller peers")
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides (default: 2)")
    return parser


def arguments(description: str) -> argparse.Namespace:
    """The options of a benchmark that has none of its own."""
    return parser_of(description).parse_args()


def table(records: list[Record]) -> str:
    """The records as aligned text."""
    header = ("what", "value", "ratio", "to reach", "of roof", "reference", "isa", "note")
    rows = [header]
    for record in records:
        target = "" if record.target is None else f"<= {record.target:g}"
        ratio = "" if record.ratio is None else f"{record.ratio:.3g}"
        roof = "" if record.of_roof is None else f"{record.of_roof:.0%}"
        rows.append(
            (
                record.name,
                "not measured" if record.value is None else f"{record.value:.4g} {record.unit}",
                ratio,
                target,
                roof,
                record.reference or "",
                record.isa or "",
                record.note,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def finish(records: list[Record], options: argparse.Namespace, title: str) -> None:
    """Print the table; write the JSON file and the plot that were asked for."""
    machine = hardware()
    print(f"{title}: {machine['processor']}, {machine['cores']} cores, {options.threads} threads")
    print(table(records))
    if options.json:
        write(records, options.json)
    if options.plot:
        plot(records, options.plot, f"{title}, {machine['processor']}, {options.threads} threads")


def write(records: list[Record], path: Path) -> None:
    """Write the records with the hardware as JSON, in place of what the file held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(record) | {"hardware": hardware()} for record in records]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def plot(records: list[Record], path: Path, title: str) -> None:
    """Horizontal bars of every ratio on a logarithmic axis; the mark is the ratio to reach."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [record for record in records if record.ratio is not None][::-1]
    if not shown:
        progress("no ratios to plot")
        return
    figure, axes = pyplot.subplots(figsize=(10, 0.8 + 0.36 * len(shown)), layout="constrained")
    ratios = [record.ratio or 0.0 for record in shown]
    axes.barh(range(len(shown)), ratios, color="#4c78a8", height=0.6)
    for place, record in enumerate(shown):
        if record.target is not None:
            axes.plot([record.target] * 2, [place - 0.4, place + 0.4], color="#e45756", linewidth=2)
        axes.annotate(f" {record.ratio:.3g}", (record.ratio or 0.0, place), va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(
        range(len(shown)),
        [f"{record.name}{f' [{record.isa}]' if record.isa else ''} / {record.reference}" for record in shown],
        fontsize=8,
    )
    axes.set_xlabel("ratio to the reference, same run (red: to reach)", fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

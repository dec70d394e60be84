"""Figures of allocations and studies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from privtuner.errors import InputError
from privtuner.paths import writing
from privtuner.wireless.allocation import Allocation
from privtuner.wireless.sweeps import Sweep

__all__ = ["draw_allocation", "draw_convergence", "draw_sets", "draw_sweep"]

_DPI = 200
_SMALLEST_ABOVE = 1e-3  # J
_MOST_NAMES = 30  # of devices below an axis
# Okabe and Ito's colours, which colour-blind readers tell apart, and markers for print. Methods often coincide: later
# ones are drawn over earlier ones and are narrower, the last three in dashes that leave each other's gaps.
_STYLES: dict[str, dict[str, Any]] = {
    "alternating": {"color": "#0072B2", "marker": "s", "linewidth": 4.4, "markersize": 7},
    "equal": {"color": "#D55E00", "marker": "^", "linewidth": 3, "markersize": 6},
    "global": {"color": "#000000", "marker": "o", "linewidth": 1.8, "markersize": 4},
    "random": {"color": "#999999", "marker": "x", "linewidth": 1, "markersize": 4},
    "largest": {"color": "#CC79A7", "marker": "P", "linewidth": 1, "markersize": 4},
    "smallest": {"color": "#009E73", "marker": "D", "linewidth": 1, "markersize": 4},
    "communication": {"color": "#56B4E9", "marker": "v", "linewidth": 1, "markersize": 3, "linestyle": (0, (3, 6))},
    "computation": {"color": "#F0E442", "marker": "<", "linewidth": 1, "markersize": 2.5, "linestyle": (3, (3, 6))},
    "brute-force": {"color": "#E69F00", "marker": "*", "linewidth": 1, "markersize": 3, "linestyle": (6, (3, 6))},
}
_PARTS = (
    ("encrypt", "encryption", "#0072B2"),
    ("upload", "upload", "#E69F00"),
    ("server", "server", "#009E73"),
    ("download", "download", "#999999"),
)
_MEASURES = (
    ("energy_j", "energy, J"),
    ("above_j", "objective above global's, J"),
    ("security_bits", "mean security, bits"),
)


def draw_sweep(sweep: Sweep, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Energy, objective and security along one parameter: means over the seeds, bands of one standard error."""
    seeds = {row["seed"] for row in rows}
    best = {
        (row[sweep.field], row["seed"]): row.get("objective_j", math.nan) for row in rows if row["method"] == "global"
    }
    rows = [
        row | {"above_j": row["objective_j"] - best[row[sweep.field], row["seed"]]} if row["feasible"] else row
        for row in rows
    ]
    figure, axes = _figure(7.2, 2.9, len(_MEASURES))
    for method, style in _STYLES.items():
        own = [row for row in rows if row["method"] == method]
        groups = {value: [row for row in own if row[sweep.field] == value] for value in sweep.values}
        drawn = [
            value
            for value, group in groups.items()
            if len(group) == len(seeds) and all(row["feasible"] for row in group)
        ]
        for axis, (measure, _) in zip(axes, _MEASURES, strict=True):
            if not drawn or (measure == "above_j" and method in ("global", "brute-force")):
                continue
            points = np.array([[row[measure] for row in groups[value]] for value in drawn])
            x = np.array(drawn) * sweep.scale
            mean = points.mean(axis=1)
            spread = points.std(axis=1, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else 0.0
            axis.plot(x, mean, label=method, **style)
            axis.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
    for axis, (_, label) in zip(axes, _MEASURES, strict=True):
        axis.set(xlabel=sweep.label, ylabel=label)
        if sweep.log:
            _log_x(axis)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[1].set_ylim(bottom=max(axes[1].get_ylim()[0], _SMALLEST_ABOVE))
    _finish(figure, axes[0], f"Methods of allocation by {sweep.label.split(',')[0]}: {_means(rows)}", path)


def draw_convergence(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """How far from the optimum after each step."""
    figure, (axis,) = _figure(3.6, 3.0, 1)
    smallest = 1e-9
    for method in ("alternating", "global"):
        own = [row for row in rows if row["method"] == method]
        style = _STYLES[method]
        x = [row["step"] for row in own]
        above = [max(row["objective_j"] - row["optimum_j"], smallest) for row in own]
        axis.plot(x, above, label=f"{method}: objective", **style)
        if method == "global":
            below = [max(row["optimum_j"] - row["bound_j"], smallest) for row in own]
            axis.plot(x, below, label="global: bound", **_STYLES["brute-force"])
    axis.set(xlabel="step (node, or half a round)", ylabel="distance from the optimum, J", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    cell = f"in the cell\nof seed {rows[0]['seed']}"
    what = f"Distance from the optimum, step by step, {cell}; at most 1e-9 J is drawn as that"
    _finish(figure, axis, what, path)


def draw_sets(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Energy with every device in one parameter set, by part."""
    seeds = {row["seed"] for row in rows}
    names = list(dict.fromkeys(row["set"] for row in rows))
    figure, (axis,) = _figure(4.2, 3.0, 1)
    for side, (part, label, colour) in enumerate(_PARTS[:3], start=-1):
        for place, name in enumerate(names):
            values = [row[f"{part}_j"] for row in rows if row["set"] == name and row["feasible"]]
            if len(values) == len(seeds):
                axis.bar(
                    place + 0.26 * side,
                    statistics.fmean(values),
                    color=colour,
                    width=0.24,
                    label="" if place else label,
                )
            elif side == 0:
                axis.text(place, 0.5, "not in time", transform=axis.get_xaxis_transform(), ha="center", fontsize=7)
    axis.set(ylabel="energy of a round, J", yscale="log")
    axis.set_xticks(range(len(names)), names, rotation=20)
    what = f"deadline {rows[0]['deadline']:g} s: {_means(rows, bands=False)}"
    what = f"All devices in one parameter set, all else optimal,\n{what}"
    _finish(figure, axis, what, path)


def draw_allocation(found: Allocation, path: Path) -> None:
    """Energy, time and bandwidth of every device.

    Raises:
        InputError: the suffix names no format that can be drawn, or the file cannot be written.
    """
    rows = found.rows()
    names = [row["device"] for row in rows]
    places = range(len(rows))
    figure, axes = _figure(7.2, 3.0, 3)
    for axis, unit, parts in ((axes[0], "j", _PARTS[:3]), (axes[1], "s", _PARTS)):
        bottom = [0.0] * len(rows)
        for part, label, colour in parts:
            heights = [row[f"{part}_{unit}"] for row in rows]
            if any(heights):
                axis.bar(places, heights, bottom=bottom, color=colour, label=label, width=0.8)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    deadlines = [row["deadline_s"] for row in rows]
    axes[1].plot(places, deadlines, "k_", markersize=6, label="deadline")
    axes[2].bar(places, [row["bandwidth_hz"] / 1e6 for row in rows], color="#56B4E9", width=0.8)
    for axis, label in zip(axes, ("energy, J", "time, s", "bandwidth, MHz"), strict=True):
        axis.set(ylabel=label)
        if len(rows) <= _MOST_NAMES:
            axis.set_xticks(list(places), names, rotation=90, fontsize=6)
        else:
            axis.set_xlabel("device")
    what = f"Allocation by the method {found.method}: energy {found.energy:.4g} J, objective {found.objective:.4g} J"
    _finish(figure, axes[1], what if found.complete else f"{what}; not certified", path)


def _means(rows: Sequence[dict[str, Any]], *, bands: bool = True) -> str:
    """What the numbers of a study are, and how many of them are not certified."""
    seeds = len({row["seed"] for row in rows})
    cut = sum(row.get("certified") == 0 for row in rows)
    means = f"means of {seeds} cells" if seeds > 1 else "one cell"
    spread = ", bands of one standard error" if bands and seeds > 1 else ""
    return means + spread + (f"; {cut} allocations not certified" if cut else "")


def _log_x(axis: Any) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float, panels: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=7)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, list(axes)


def _finish(figure: Figure, legend_of: Any, title: str, path: Path) -> None:
    handles, labels = legend_of.get_legend_handles_labels()
    figure.suptitle(title, fontsize=8)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), round(1.5 * figure.get_figwidth()) // 2),
        fontsize=7,
        frameon=False,
    )
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise InputError(f"{path}: figures can be drawn as {', '.join('.' + name for name in sorted(formats))}")
    with writing(path):
        figure.savefig(path)

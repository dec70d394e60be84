"""The experiments of the paper's kind: energy, objective and security along one parameter at a time, method by method.

Every point is drawn from the same cells. A method's mean at a value is over all of them, and missing where it could not
meet every deadline in each.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InfeasibleError
from ..paths import ensure_writable, writing
from .allocation import allocate
from .cells import Cell, rings
from .files import default_tiers
from .methods import METHODS
from .model import System, Tier, check_integer

__all__ = ["SWEEPS", "Sweep", "run_study"]

_MOST_SEEDS = 10_000
_SETS_DEADLINE = 300.0  # s, in which every set can be had
_MOST_COMBINATIONS = 100  # that brute force may try in a study


@dataclass(frozen=True)
class Sweep:
    """One experiment.

    Attributes:
        name: of the files. label: of the axis, with its unit.
        field: of `Cell` that takes the ``values``. scale: values times this are what the axis shows.
        log: whether the axis is logarithmic.
    """

    name: str
    label: str
    field: str
    values: tuple[Any, ...]
    scale: float = 1.0
    log: bool = False


SWEEPS = (
    Sweep("bandwidth", "total bandwidth, MHz", "bandwidth", tuple(b * 1e6 for b in (12, 16, 20, 25, 30, 40, 50)), 1e-6),
    Sweep("power", "power cap, W", "power_max", (0.05, 0.1, 0.2, 0.4, 0.8, 1.6), log=True),
    Sweep("server", "server, 10$^9$ cycles/s", "server_frequency", (5e8, 1e9, 2e9, 5e9, 1e10, 4e10), 1e-9, log=True),
    Sweep("devices", "devices", "devices", (2, 4, 6, 8, 10, 12, 14, 16)),
    Sweep("privacy", "price of privacy, J/bit", "privacy_price", (0.0, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2)),
    Sweep("deadline", "deadline, s", "deadline", (70.0, 85.0, 100.0, 130.0, 160.0, 200.0, 300.0)),
)


def run_study(
    folder: str | Path,
    *,
    tiers: Sequence[Tier] | None = None,
    seeds: int = 20,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Run every experiment; write a CSV file and a figure (PNG and PDF) of each.

    Args:
        folder: where to; made if need be.
        tiers: a calibrated table; default the package's.
        seeds: cells, in [1, 10000].
        progress: called with a line now and then.

    Returns:
        The files written.

    Raises:
        InputError: ``seeds`` out of range, or ``folder`` cannot be written.
        InfeasibleError: too few cells that every method can serve.
    """
    from . import figures  # matplotlib is wanted here alone

    check_integer("seeds", seeds, 1, _MOST_SEEDS)
    say = progress or (lambda _: None)
    folder = ensure_writable(folder)
    table = tuple(default_tiers() if tiers is None else tiers)
    cell = Cell(tiers=rings(table))
    say(f"choosing {seeds} cells that every method can serve")
    chosen = _seeds(cell, seeds)
    written: list[Path] = []

    def write(name: str, rows: list[dict[str, Any]], draw: Callable[[Path], None]) -> None:
        path = folder / f"{name}.csv"
        _write_csv(path, rows)
        pictures = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
        for picture in pictures:
            draw(picture)
        written.extend([path, *pictures])

    for sweep in SWEEPS:
        rows = []
        for value in sweep.values:
            say(f"{sweep.name}: {value * sweep.scale:g}")
            rows += list(_point(sweep, dataclasses.replace(cell, **{sweep.field: value}), value, chosen))
        write(sweep.name, rows, lambda path, s=sweep, r=rows: figures.draw_sweep(s, r, path))  # type: ignore[misc]
    say("convergence")
    rows = _convergence(cell, max(chosen, key=lambda seed: allocate(cell.draw(seed), tolerance=1e-9).iterations))
    write("convergence", rows, lambda path: figures.draw_convergence(rows, path))
    say("parameter sets")
    sets = _sets(table, chosen)
    write("sets", sets, lambda path: figures.draw_sets(sets, path))
    return written


def _methods(system_tiers: int, devices: int) -> list[str]:
    small = system_tiers**devices <= _MOST_COMBINATIONS
    return [name for name in METHODS if name != "brute-force" or small]


def _seeds(cell: Cell, count: int) -> list[int]:
    found: list[int] = []
    for seed in range(20 * count + 20):
        try:
            for method in _methods(len(cell.tiers), cell.devices):
                allocate(cell.draw(seed), method, seed=seed)
        except InfeasibleError as error:
            last = error
            continue
        found.append(seed)
        if len(found) == count:
            return found
    raise last


def _point(sweep: Sweep, cell: Cell, value: Any, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    for seed in seeds:
        system = cell.draw(seed)
        for method in _methods(len(system.tiers), len(system.devices)):
            row = {"sweep": sweep.name, sweep.field: value, "seed": seed, "method": method}
            yield row | _outcome(system, method, seed=seed)


def _outcome(system: System, method: str = "global", **options: Any) -> dict[str, Any]:
    """The end of a row: whether there is an allocation, and its numbers."""
    try:
        found = allocate(system, method, **options)
    except InfeasibleError:
        return {"feasible": 0}
    return {
        "feasible": 1,
        "objective_j": found.objective,
        "energy_j": found.energy,
        "encrypt_j": float(found.encrypt_energy.sum()),
        "upload_j": float(found.upload_energy.sum()),
        "server_j": float(found.server_energy.sum()),
        "security_bits": float(found.security.mean()),
        "bound_j": found.bound if found.method == "global" else "",
        "seconds": found.seconds,
    }


def _convergence(cell: Cell, seed: int) -> list[dict[str, Any]]:
    """Objective, and bound where there is one, after each step; less the optimum."""
    system = cell.draw(seed)
    optimum = allocate(system, tolerance=1e-10)
    rows = []
    for method in ("global", "alternating"):
        found = allocate(system, method, tolerance=1e-9)
        for step, (objective, bound) in enumerate(found.history):
            row = {
                "method": method,
                "seed": seed,
                "step": step,
                "objective_j": objective,
                "optimum_j": optimum.objective,
            }
            rows.append(row | {"bound_j": bound if method == "global" else ""})
    return rows


def _sets(table: Sequence[Tier], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every device in one and the same set, all else optimal."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        system = Cell(tiers=tuple(table), privacy_price=0.0, deadline=_SETS_DEADLINE).draw(seed)
        for tier in table:
            row = {"set": tier.name, "deadline": _SETS_DEADLINE, "seed": seed}
            rows.append(row | _outcome(system, tiers=tier.name))
    return rows


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)

"""The experiments of the paper's kind: energy, objective and security along one parameter at a time, method by method.

Every point is drawn from the same cells. A method's mean at a value is over all of them, and missing where it could not
meet every deadline in each.
"""

from __future__ import annotations

import csv
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from privtuner.errors import InfeasibleError
from privtuner.paths import ensure_writable, writing
from privtuner.wireless.allocation import Allocation, UncertifiedWarning, allocate
from privtuner.wireless.cells import Cell, rings
from privtuner.wireless.files import default_tiers
from privtuner.wireless.methods import METHODS
from privtuner.wireless.model import System, Tier, check_integer
from privtuner.wireless.sweeps import SWEEPS, Sweep

__all__ = ["run_study"]

_MOST_SEEDS = 10_000
_SETS_DEADLINE = 300.0  # s, in which every set can be had
_MOST_COMBINATIONS = 100  # that brute force may try in a study


def run_study(
    folder: str | Path,
    *,
    tiers: Sequence[Tier] | None = None,
    seeds: int = 20,
    progress: Callable[[float, float, str], object] | None = None,
) -> list[Path]:
    """Run every experiment; write a CSV file and a figure (PNG and PDF) of each.

    Args:
        folder: where to; made if need be.
        tiers: a calibrated table; default the package's.
        seeds: cells, in [1, 10000].
        progress: called with the number of allocations done, about how many there will be, and what comes next.

    Returns:
        The files written. Where a search ended short of its tolerance, the row says ``certified`` 0, and an
        `UncertifiedWarning` how many did.

    Raises:
        InputError: ``seeds`` out of range, or ``folder`` cannot be written.
        InfeasibleError: too few cells that every method can serve.
    """
    from privtuner.wireless import figures  # matplotlib is wanted here alone

    check_integer("seeds", seeds, 1, _MOST_SEEDS)
    folder = ensure_writable(folder)
    table = tuple(default_tiers() if tiers is None else tiers)
    work = _Work(Cell(tiers=rings(table)), table, seeds, progress or (lambda *_: None))
    chosen = work.choose()
    written: list[Path] = []

    def write(name: str, rows: list[dict[str, Any]], draw: Callable[[Path], None]) -> None:
        path = folder / f"{name}.csv"
        _write_csv(path, rows)
        pictures = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
        for picture in pictures:
            draw(picture)
        written.extend([path, *pictures])

    for sweep in SWEEPS:
        rows = [row for value in sweep.values for row in work.point(sweep, value, chosen)]
        write(sweep.name, rows, lambda path, s=sweep, r=rows: figures.draw_sweep(s, r, path))  # type: ignore[misc]
    rows = work.convergence(max(chosen, key=chosen.__getitem__))
    write("convergence", rows, lambda path: figures.draw_convergence(rows, path))
    sets = work.sets(chosen)
    write("sets", sets, lambda path: figures.draw_sets(sets, path))
    if work.cut:
        warnings.warn(f"{work.cut} of {work.done} allocations are not certified", UncertifiedWarning, stacklevel=2)
    return written


def _methods(system_tiers: int, devices: int) -> list[str]:
    small = system_tiers**devices <= _MOST_COMBINATIONS
    return [name for name in METHODS if name != "brute-force" or small]


class _Work:
    """The allocations of a study, counted."""

    def __init__(
        self, cell: Cell, table: Sequence[Tier], seeds: int, progress: Callable[[float, float, str], object]
    ) -> None:
        self.cell, self.table, self.seeds, self.progress = cell, table, seeds, progress
        self.done = self.cut = 0
        points = [self._of(sweep, value) for sweep in SWEEPS for value in sweep.values]
        several = [len(_methods(len(point.tiers), point.devices)) for point in (cell, *points)]
        self.total = seeds * (sum(several) + 1 + len(table)) + 3

    def _of(self, sweep: Sweep, value: Any) -> Cell:
        return dataclasses.replace(self.cell, **{sweep.field: value})

    def allocate(self, system: System, what: str, method: str = "global", **options: Any) -> Allocation:
        """Call `allocate` and count it; a search that was cut short is counted too, and warned of once at the end."""
        self.progress(self.done, max(self.total, self.done + 1), what)
        self.done += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UncertifiedWarning)
            found = allocate(system, method, **options)
        self.cut += not found.complete
        return found

    def choose(self) -> dict[int, int]:
        """Seeds of cells that every method can serve; and how many nodes the search of each takes, closely."""
        found: dict[int, int] = {}
        for seed in range(20 * self.seeds + 20):
            what = f"cell {len(found) + 1} that every method can serve"
            system = self.cell.draw(seed)
            try:
                for method in _methods(len(self.cell.tiers), self.cell.devices):
                    self.allocate(system, what, method, seed=seed)
                found[seed] = self.allocate(system, what, tolerance=1e-9).iterations
            except InfeasibleError as error:
                last = error
                continue
            if len(found) == self.seeds:
                return found
        raise last

    def point(self, sweep: Sweep, value: Any, seeds: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Rows of every method at one value."""
        cell, what = self._of(sweep, value), f"{sweep.name} {value * sweep.scale:g}"
        for seed in seeds:
            system = cell.draw(seed)
            for method in _methods(len(system.tiers), len(system.devices)):
                row = {"sweep": sweep.name, sweep.field: value, "seed": seed, "method": method}
                yield row | self._outcome(system, what, method, seed=seed)

    def _outcome(self, system: System, what: str, method: str = "global", **options: Any) -> dict[str, Any]:
        """The end of a row: whether there is an allocation, and its numbers."""
        try:
            found = self.allocate(system, what, method, **options)
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
            "certified": int(found.certified) if found.method == "global" else "",
            "seconds": found.seconds,
        }

    def convergence(self, seed: int) -> list[dict[str, Any]]:
        """Objective, and bound where there is one, after each step; less the optimum."""
        system, what = self.cell.draw(seed), "convergence"
        optimum = self.allocate(system, what, tolerance=1e-10)
        rows = []
        for method in ("global", "alternating"):
            found = self.allocate(system, what, method, tolerance=1e-9)
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

    def sets(self, seeds: Iterable[int]) -> list[dict[str, Any]]:
        """Every device in one and the same set, all else optimal."""
        rows: list[dict[str, Any]] = []
        for seed in seeds:
            system = Cell(tiers=tuple(self.table), privacy_price=0.0, deadline=_SETS_DEADLINE).draw(seed)
            for tier in self.table:
                row = {"set": tier.name, "deadline": _SETS_DEADLINE, "seed": seed}
                rows.append(row | self._outcome(system, "parameter sets", tiers=tier.name))
        return rows


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)

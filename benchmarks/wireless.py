"""How fast is the allocator, and what does it save? Against CVXPY with Clarabel in the same run.

    python benchmarks/wireless.py [--quick] [--json F] [--plot F.png]

The peer solves the same convex problem (tiers fixed), as ``tests/support/wireless_oracles.py`` states it, to 1e-10.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import harness
from harness import Record, median_ratio, paired, progress
from privtuner.errors import InfeasibleError
from privtuner.wireless import Allocation, Cell, System, UncertifiedWarning, allocate

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
_ALONE = "--hundred-thousand"  # runs that system in a process of its own, for its memory


def cells(count: int, cell: Cell) -> Iterator[tuple[int, System]]:
    """The first ``count`` seeds whose cell an equal split can serve."""
    found = seed = 0
    while found < count:
        system = cell.draw(seed)
        try:
            allocate(system, "equal")
            yield seed, system
            found += 1
        except InfeasibleError:
            pass
        seed += 1


def scaled(devices: int) -> Cell:
    """The default cell with bandwidth and server in proportion to the devices."""
    part = devices / Cell().devices
    return Cell(devices=devices, bandwidth=Cell().bandwidth * part, server_frequency=Cell().server_frequency * part)


def certified(devices: int, tolerance: float, target: float, seeds: int, runs: int, unit: str) -> Record:
    """Time to a certified gap: the median and the worst over seeds."""
    progress(f"{devices} devices")
    factor = 1e3 if unit == "ms" else 1.0
    times, gaps, nodes = [], [], []
    for seed in range(100 * seeds):
        system = scaled(devices).draw(seed)
        try:
            found = allocate(system, tolerance=tolerance)
        except InfeasibleError:
            continue  # a device beyond reach
        seconds = paired({"global": lambda system=system: allocate(system, tolerance=tolerance)}, runs)["global"]
        times.append(statistics.median(seconds) * factor)
        gaps.append(found.relative_gap)
        nodes.append(found.iterations)
        if len(times) == seeds:
            break
    return Record(
        f"global, {devices} devices, 3 tiers, to a gap of {tolerance:g}",
        statistics.median(times),
        unit,
        target=target,
        threads=1,
        note=f"worst of {len(times)} cells {max(times):.3g} {unit}; gap at most {max(gaps):.1e}; "
        f"{min(nodes)} to {max(nodes)} nodes",
    )


def hundred_thousand() -> Iterator[Record]:
    """Time and memory of 100,000 devices, in a fresh process."""
    progress("100,000 devices")
    result = subprocess.run([sys.executable, __file__, _ALONE], capture_output=True, text=True, check=True)
    seconds, gap, megabytes, nodes, dropped = (float(word) for word in result.stdout.split())
    name = "global, 100000 devices, 3 tiers, to a gap of 0.0001"
    note = f"gap {gap:.1e}; {nodes:g} nodes; {dropped:g} devices beyond reach left out"
    yield Record(name, seconds, "s", target=30.0, threads=1, note=note)
    yield Record(f"{name}, memory of the process", megabytes / 1e3, "GB", target=2.0, threads=1)


def alone() -> None:
    """Print seconds, gap, megabytes, nodes and devices left out."""
    import dataclasses

    from privtuner.wireless.problem import Problem

    cell = scaled(100_000)
    system = cell.draw(0)
    reachable = Problem.of(system).possible().any(axis=1)
    devices = tuple(device for device, can in zip(system.devices, reachable, strict=True) if can)
    system = dataclasses.replace(system, devices=devices)
    start = time.perf_counter()
    found = allocate(system, tolerance=1e-4)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(seconds, found.relative_gap, peak, found.iterations, int((~reachable).sum()))


def against_cvxpy(seeds: int, runs: int) -> Iterator[Record]:
    """Fixed tiers, ten devices: the whole call on either side, and the peer's second call with everything compiled."""
    from wireless_oracles import Conic

    progress("10 devices, fixed tiers, against CVXPY and Clarabel")
    ours, whole, again, inner, worse, failed = [], [], [], [], [], 0
    for _, system in cells(seeds, Cell()):
        tiers = [int(tier) for tier in allocate(system).tier]
        names = [system.tiers[tier].name for tier in tiers]
        try:
            warm, peer = Conic.solvable(system, tiers)
        except RuntimeError:
            failed += 1
            continue

        def mine(system: System = system, names: list[str] = names) -> Allocation:
            return allocate(system, tiers=names)

        def fresh(system: System = system, tiers: list[int] = tiers, order: int = warm.order) -> float | None:
            return Conic(system, tiers, order).solve()

        mine()
        times = paired({"mine": mine, "whole": fresh, "again": warm.solve}, runs)
        ours.append(statistics.median(times["mine"]) * 1e3)
        whole.append(median_ratio(times["whole"], times["mine"]))
        again.append(median_ratio(times["again"], times["mine"]))
        inner.append(warm.problem.solver_stats.solve_time * 1e3 / ours[-1])
        found = mine()
        worse.append((found.objective - peer) / found.energy)
    what = f"global, 10 devices, fixed tiers, {len(ours)} cells"
    yield Record(what, statistics.median(ours), "ms", threads=1)
    for name, ratios, target in (
        ("CVXPY + Clarabel, stating and solving", whole, 20.0),
        ("CVXPY + Clarabel, solving again", again, None),
        ("Clarabel alone, by its own clock", inner, None),
    ):
        yield Record(
            f"{what}, times as fast as",
            statistics.median(ratios),
            "x (20 to reach)" if target else "x",
            reference=name,
            threads=1,
            note=f"{min(ratios):.3g} to {max(ratios):.3g}",
        )
    yield Record(
        f"{what}, objective above the peer's, as a part of the energy",
        max(worse),
        "at most",
        reference="CVXPY + Clarabel",
        note=f"{min(worse):.1e} to {max(worse):.1e}; Clarabel fails on {failed} more cells",
    )


def saved(seeds: int) -> Iterator[Record]:
    """Energy for energy's sake (no price on privacy), and the objective at the default price."""
    progress(f"savings over {seeds} cells")
    for price, what, measure in ((0.0, "energy", "energy"), (Cell().privacy_price, "objective", "objective")):
        chosen = [system for _, system in cells(seeds, Cell(privacy_price=price))]
        least = np.array([getattr(allocate(system), measure) for system in chosen])
        for method in ("equal", "alternating"):
            other = np.array([getattr(allocate(system, method), measure) for system in chosen])
            part = 100 * (other - least) / (other if measure == "energy" else np.abs(other))
            yield Record(
                f"{what} saved against {method}, 10-device default cell, price {price:g} J/bit",
                float(part.mean()),
                "%",
                note=f"mean of {seeds} cells; standard deviation {part.std(ddof=1):.3g}, {part.min():.3g} to "
                f"{part.max():.3g}; {other.mean():.4g} J to {least.mean():.4g} J",
            )


def main() -> None:
    """Measure everything and write what was asked for."""
    warnings.simplefilter("error", UncertifiedWarning)  # no time of a search that was cut short
    if _ALONE in sys.argv:
        alone()
        return
    options = harness.arguments(__doc__.splitlines()[0] if __doc__ else "")
    runs, seeds = (3, 5) if options.quick else (7, 20)
    records = [certified(10, 1e-6, 50.0, seeds, runs, "ms"), certified(1000, 1e-4, 1.0, max(3, seeds // 4), 3, "s")]
    if not options.quick:
        records += hundred_thousand()
    records += against_cvxpy(max(3, seeds // 2), runs)
    records += saved(20 if options.quick else 100)
    harness.finish(records, options, "Wireless allocator")


if __name__ == "__main__":
    main()

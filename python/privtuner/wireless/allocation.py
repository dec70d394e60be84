"""One call: `allocate(system)`."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from privtuner.errors import InputError
from privtuner.wireless.arrays import BoolArray, FloatArray, IntArray
from privtuner.wireless.methods import METHODS, Found, Options
from privtuner.wireless.model import System, check_integer
from privtuner.wireless.problem import Problem

__all__ = ["Allocation", "UncertifiedWarning", "allocate"]


class UncertifiedWarning(UserWarning):
    """A search ended at its last node, farther from its bound than was asked for: a better allocation may exist."""


@dataclass(frozen=True)
class Allocation:
    """Who gets what, what it costs, and how far it may be from the best.

    Attributes:
        method: as asked for.
        system: that was allocated.
        tier: int (devices,), index of each device's tier.
        bandwidth, power, frequency, server_frequency: float64 (devices,); Hz, W, cycles/s, cycles/s.
        encrypt_time, upload_time, server_time, download_time: float64 (devices,), s a round.
        encrypt_energy, upload_energy, server_energy: float64 (devices,), J a round.
        security: float64 (devices,), bits.
        energy: J, of all devices and the server.
        privacy: bits, sum of omega s.
        objective: J, energy - alpha privacy.
        bound: J; no allocation has a smaller objective. -inf where the method certifies nothing.
        gap: J, objective - bound. relative_gap: gap / energy; the objective itself has an arbitrary zero.
        tolerance: that was asked for, a part of the energy. certified: relative_gap <= tolerance.
        complete: no search on the way ended at ``max_nodes``, short of its tolerance. Of methods that certify nothing
            this still says that they did all they do; otherwise see `doubt`.
        bandwidth_price, server_price: J/Hz and J s/cycle that a little more of either would save; nan where the method
            does not know.
        iterations: nodes, rounds or combinations. evaluations: of the dual.
        history: (objective, bound) after each step, J.
        seconds: that the call took.
    """

    method: str
    system: System = field(repr=False)
    tier: IntArray = field(repr=False)
    bandwidth: FloatArray = field(repr=False)
    power: FloatArray = field(repr=False)
    frequency: FloatArray = field(repr=False)
    server_frequency: FloatArray = field(repr=False)
    encrypt_time: FloatArray = field(repr=False)
    upload_time: FloatArray = field(repr=False)
    server_time: FloatArray = field(repr=False)
    download_time: FloatArray = field(repr=False)
    encrypt_energy: FloatArray = field(repr=False)
    upload_energy: FloatArray = field(repr=False)
    server_energy: FloatArray = field(repr=False)
    security: FloatArray = field(repr=False)
    energy: float
    privacy: float
    objective: float
    bound: float
    tolerance: float
    complete: bool
    bandwidth_price: float
    server_price: float
    iterations: int
    evaluations: int
    history: tuple[tuple[float, float], ...] = field(repr=False)
    seconds: float

    @property
    def gap(self) -> float:
        """Objective less bound, J."""
        return self.objective - self.bound

    @property
    def relative_gap(self) -> float:
        """Gap as a part of the energy."""
        return self.gap / self.energy

    @property
    def certified(self) -> bool:
        """Whether no allocation is better by more than the tolerance."""
        return self.relative_gap <= self.tolerance

    @property
    def doubt(self) -> str | None:
        """What is missing and how to mend it, in a line; None where the allocation is `complete`."""
        if self.complete:
            return None
        mend = "raise max_nodes or the tolerance"
        if math.isinf(self.bound):
            return f"a search of the method {self.method!r} ended at max_nodes, short of its tolerance: {mend}"
        return (
            f"not certified: the gap is {self.relative_gap:.1e} of the energy, {self.tolerance:g} was asked for, and "
            f"the search ended after {self.iterations} node{'s' * (self.iterations != 1)}: {mend}"
        )

    @property
    def time(self) -> FloatArray:
        """Duration of a whole round, s, (devices,)."""
        return self.encrypt_time + self.upload_time + self.server_time + self.download_time

    @property
    def tier_names(self) -> list[str]:
        """Name of each device's tier."""
        return [self.system.tiers[tier].name for tier in self.tier]

    def rows(self) -> list[dict[str, Any]]:
        """One record a device, units in the keys; MB are 10^6 bytes."""
        system, chosen = self.system, [self.system.tiers[tier] for tier in self.tier]
        energy = self.encrypt_energy + self.upload_energy + self.server_energy
        columns = {
            "bandwidth_hz": self.bandwidth,
            "power_w": self.power,
            "frequency_hz": self.frequency,
            "server_frequency_hz": self.server_frequency,
            "encrypt_s": self.encrypt_time,
            "upload_s": self.upload_time,
            "server_s": self.server_time,
            "download_s": self.download_time,
            "total_s": self.time,
            "encrypt_j": self.encrypt_energy,
            "upload_j": self.upload_energy,
            "server_j": self.server_energy,
            "total_j": energy,
        }
        return [
            {"device": device.name, "tier": tier.name, "security_bits": tier.security, "deadline_s": device.deadline}
            | {name: float(column[place]) for name, column in columns.items()}
            | {
                "upload_mb": device.samples * tier.upload_bits / 8e6,
                "download_mb": device.samples * tier.download_bits / 8e6,
            }
            for place, (device, tier) in enumerate(zip(system.devices, chosen, strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-serialisable: what a method does not know is None."""
        names = ("energy", "privacy", "objective", "bound", "gap", "relative_gap", "bandwidth_price", "server_price")
        units = {"privacy": "bits", "relative_gap": "", "bandwidth_price": "j_per_hz", "server_price": "j_s_per_cycle"}
        summary: dict[str, Any] = {"method": self.method}
        for name in names:
            value = getattr(self, name)
            key = f"{name}_{units.get(name, 'j')}".rstrip("_")
            summary[key] = float(value) if math.isfinite(value) else None
        summary |= {"tolerance": self.tolerance, "certified": self.certified, "complete": self.complete}
        summary |= {"iterations": self.iterations, "evaluations": self.evaluations, "seconds": self.seconds}
        history = [[value, bound if math.isfinite(bound) else None] for value, bound in self.history]
        return summary | {"history_j": history, "devices": self.rows()}


def allocate(
    system: System,
    method: str = "global",
    *,
    tiers: str | Sequence[str] | None = None,
    tolerance: float = 1e-6,
    max_nodes: int = 10_000,
    seed: int = 0,
    progress: Callable[[float, float, int], None] | None = None,
) -> Allocation:
    """Choose bandwidth, transmit power, processor speed, server share and tier of every device.

    Minimises the energy of a round less alpha sum omega s under the deadlines (`System`). Deadlines are met to 1e-9 of
    their length; all other constraints hold exactly.

    Args:
        system: devices, tiers and what they share.
        method: one of `METHODS`; ``"global"`` finds the optimum and certifies it.
        tiers: fixes them: one name for all devices, or one a device. Default: they are chosen.
        tolerance: gap at which the search ends, as a part of the energy, in [1e-10, 1].
        max_nodes: most nodes of branch and bound, at least 1; if they are used up the gap stays what it is, with an
            `UncertifiedWarning`.
        seed: the seed of ``"random"``.
        progress: called with objective, bound (J) and the number of nodes as the search goes on, and at its end.

    Raises:
        InfeasibleError: no allocation (of that method) meets every deadline; says which device or shared resource is
            short, and by how much.
        InputError: an argument is out of range, or too many combinations for ``"brute-force"``.
    """
    start = time.perf_counter()
    if method not in METHODS:
        raise InputError(f"method = {method!r}: choose one of {', '.join(METHODS)}")
    if not 1e-10 <= tolerance <= 1:
        raise InputError(f"tolerance = {tolerance!r}: must be in [1e-10, 1], a part of the energy")
    if max_nodes < 1:
        raise InputError(f"max_nodes = {max_nodes!r}: must be at least 1")
    check_integer("seed", seed, 0)
    problem = Problem.of(system)
    allowed = _find_allowed(system, tiers)
    found = METHODS[method](system, problem, Options(allowed, tolerance, max_nodes, seed, progress))
    allocation = _tabulate(system, problem, method, found, tolerance, start)
    if allocation.doubt is not None:
        warnings.warn(allocation.doubt, UncertifiedWarning, stacklevel=2)
    return allocation


def _find_allowed(system: System, tiers: str | Sequence[str] | None) -> BoolArray:
    shape = len(system.devices), len(system.tiers)
    if tiers is None:
        return np.ones(shape, dtype=bool)
    names = [tiers] * shape[0] if isinstance(tiers, str) else list(tiers)
    if len(names) != shape[0]:
        raise InputError(f"tiers has {len(names)} names for {shape[0]} devices: give one name for all, or one a device")
    places = {tier.name: place for place, tier in enumerate(system.tiers)}
    for name in names:
        if name not in places:
            raise InputError(f"tiers names {name!r}: the system has {', '.join(map(repr, places))}")
    allowed = np.zeros(shape, dtype=bool)
    allowed[np.arange(shape[0]), [places[name] for name in names]] = True
    return allowed


def _tabulate(
    system: System, problem: Problem, method: str, found: Found, tolerance: float, start: float
) -> Allocation:
    one, choices = problem.take(found.tiers), found.choices
    parts = one.energies(choices.server, choices.frequency, choices.power, choices.upload_time)
    energy = float(sum(part.sum() for part in parts))
    security = np.array([tier.security for tier in system.tiers])[found.tiers]
    weights = np.array([device.privacy_weight for device in system.devices])
    deadlines = np.array([device.deadline for device in system.devices])
    bandwidth_price, server_price = found.prices or (math.nan, math.nan)
    objective = energy - float(one.reward.sum())
    return Allocation(
        method=method,
        system=system,
        tier=found.tiers,
        bandwidth=choices.bandwidth[:, 0],
        power=choices.power[:, 0],
        frequency=choices.frequency[:, 0],
        server_frequency=choices.server[:, 0],
        encrypt_time=(one.encrypt / choices.frequency)[:, 0],
        upload_time=choices.upload_time[:, 0],
        server_time=(one.evaluate / choices.server)[:, 0],
        download_time=deadlines - one.time[:, 0],
        encrypt_energy=parts[0][:, 0],
        upload_energy=parts[1][:, 0],
        server_energy=parts[2][:, 0],
        security=security,
        energy=energy,
        privacy=float(weights @ security),
        objective=objective,
        bound=min(found.bound, objective),
        tolerance=tolerance,
        complete=found.complete and (math.isinf(found.bound) or objective - found.bound <= tolerance * energy),
        bandwidth_price=bandwidth_price,
        server_price=server_price,
        iterations=found.iterations,
        evaluations=found.evaluations,
        history=tuple(found.history),
        seconds=time.perf_counter() - start,
    )

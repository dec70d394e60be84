"""The experiments of a study, each along one parameter of its cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["SWEEPS", "Sweep"]


@dataclass(frozen=True)
class Sweep:
    """One experiment.

    Attributes:
        name: name of the files. label: label of the axis, with its unit.
        field: the field of `Cell` that takes the ``values``. scale: values times this are what the axis shows.
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
    Sweep("devices", "number of devices", "devices", (2, 4, 6, 8, 10, 12, 14, 16)),
    Sweep("privacy", "price of privacy, J/bit", "privacy_price", (0.0, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2)),
    Sweep("deadline", "deadline, s", "deadline", (70.0, 85.0, 100.0, 130.0, 160.0, 200.0, 300.0)),
)

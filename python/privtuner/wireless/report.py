"""Allocations as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from privtuner.wireless.allocation import Allocation

__all__ = ["plan", "summary", "table"]

_TABLE = (
    ("device", "device", 1.0, ""),
    ("tier", "tier", 1.0, ""),
    ("bandwidth", "bandwidth_hz", 1e-6, "MHz"),
    ("power", "power_w", 1e3, "mW"),
    ("processor", "frequency_hz", 1e-9, "GHz"),
    ("server", "server_frequency_hz", 1e-9, "GHz"),
    ("encrypt", "encrypt_s", 1.0, "s"),
    ("upload", "upload_s", 1.0, "s"),
    ("evaluate", "server_s", 1.0, "s"),
    ("energy", "total_j", 1.0, "J"),
)
_PLAN = (
    ("device", "device", 1.0, ""),
    ("tier", "tier", 1.0, ""),
    ("time", "total_s", 1.0, "s"),
    ("deadline", "deadline_s", 1.0, "s"),
    ("energy", "total_j", 1.0, "J"),
    ("up", "upload_mb", 1.0, "MB"),
    ("down", "download_mb", 1.0, "MB"),
    ("security", "security_bits", 1.0, "bits"),
)


def table(found: Allocation) -> str:
    """What each device gets, and what it costs."""
    return _align(found, _TABLE)


def plan(found: Allocation) -> str:
    """What a round takes of each device: seconds, joules, MB (10^6 bytes), and the bits of security it has."""
    return _align(found, _PLAN)


def summary(found: Allocation) -> str:
    """Energies by part, privacy, objective and certificate."""
    parts = (
        f"encryption {found.encrypt_energy.sum():.4g} J, upload {found.upload_energy.sum():.4g} J, "
        f"server {found.server_energy.sum():.4g} J"
    )
    steps = f"{found.iterations} iteration{'s' * (found.iterations != 1)}"
    weights = sum(device.privacy_weight for device in found.system.devices)
    lines = [
        ("method", f"{found.method}: {steps}, {1e3 * found.seconds:.3g} ms"),
        ("energy", f"{found.energy:.6g} J a round: {parts}"),
        ("privacy", f"{found.privacy:.6g} bits, weighted: {found.privacy / weights if weights else 0:.4g} a device"),
        ("objective", f"{found.objective:.6g} J: energy less {found.system.privacy_price:g} J a bit of privacy"),
    ]
    if math.isfinite(found.bound):
        gap = f"a gap of {found.relative_gap:.1e} of the energy"
        lines.append(
            ("certified" if found.certified else "bound", f"no allocation is below {found.bound:.9g} J: {gap}")
        )
    return "\n".join(f"{name:10}{text}" for name, text in lines)


def _align(found: Allocation, columns: Sequence[tuple[str, str, float, str]]) -> str:
    head = [f"{title}, {unit}" if unit else title for title, _, _, unit in columns]
    body = [[_cell(row[key], scale) for _, key, scale, _ in columns] for row in found.rows()]
    widths = [max(len(line[place]) for line in [head, *body]) for place in range(len(columns))]
    numeric = [bool(unit) for *_, unit in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in [head, *body]
    )


def _cell(value: Any, scale: float) -> str:
    return value if isinstance(value, str) else f"{value * scale:.4g}"

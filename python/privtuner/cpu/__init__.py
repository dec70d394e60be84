"""The linear scheme on the processor."""

from __future__ import annotations

from privtuner.cpu.client import CpuClient
from privtuner.cpu.server import CpuServer

__all__ = ["CpuClient", "CpuServer"]

"""The GPU engine: the same schemes and the same bytes on the wire, by CUDA kernels through CuPy."""

from __future__ import annotations

from .device import available, devices, status

__all__ = ["available", "devices", "status"]

"""The GPU engine: the same schemes and the same bytes on the wire, by CUDA kernels through CuPy."""

from __future__ import annotations

from .device import Device, available, devices, status

__all__ = ["Device", "available", "devices", "status"]

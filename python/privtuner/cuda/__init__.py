"""GPUs as devices: the same schemes and the same bytes on the wire, by CUDA kernels through CuPy."""

from __future__ import annotations

from privtuner.cuda.client import CudaClient
from privtuner.cuda.device import Device, Status, available, devices, status
from privtuner.cuda.evaluator import CudaEvaluator
from privtuner.cuda.server import CudaServer

__all__ = ["CudaClient", "CudaEvaluator", "CudaServer", "Device", "Status", "available", "devices", "status"]

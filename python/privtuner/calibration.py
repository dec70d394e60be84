"""What the parameter sets of this package cost on the machine at hand: the tiers that the allocator chooses from.

A sample is a text of some tokens that goes through frozen square layers, forward and backward. One layer is run in
both directions on a batch, by one thread, through the same calls and bytes as training; a sample's cost is its part of
that, times the number of layers. Cycles are seconds times the processor's frequency.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import ckks, linear
from .errors import InputError
from .system import active_isa, get_num_threads, set_num_threads
from .wireless import Tier

__all__ = ["Workload", "measure", "processor_frequency", "processor_name"]

_CPUINFO = Path("/proc/cpuinfo")
_SIGMA = math.sqrt(21 / 2)
"""Of the centred binomial error that both engines draw."""
_LINEAR = {"linear-w8": math.log2(4293918721), "linear-w16": 50.0}
"""Preset -> log2 q; the ring dimension of both is 2048."""
_CKKS_RINGS = (8192, 16384, 32768)
_DEPTH = 2  # the same in every ring, so that a larger one buys security alone
_SCALE_BITS = 40


@dataclass(frozen=True)
class Workload:
    """What a sample is and how it is measured.

    Attributes:
        width: features of the layer, both ways.
        layers: of that width which a sample passes.
        tokens: of a sample.
        batch: samples in one request, at most 4096 / tokens.
        runs: of each direction; medians are taken.

    Raises:
        InputError: a value out of range.
    """

    width: int = 384
    layers: int = 1
    tokens: int = 16
    batch: int = 128
    runs: int = 3

    def __post_init__(self) -> None:
        for name, most in (("width", 8192), ("layers", 10_000), ("tokens", 4096), ("batch", 4096), ("runs", 1000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise InputError(f"{name} = {value!r}: must be an integer in [1, {most}]")
        if self.tokens * self.batch > _CKKS_RINGS[0] // 2:
            raise InputError(
                f"tokens * batch = {self.tokens * self.batch}: one ciphertext of the smallest ring holds "
                f"{_CKKS_RINGS[0] // 2}; take a smaller batch"
            )


@dataclass(frozen=True)
class _Costs:
    """Of one batch, both directions: seconds of owner and server, bytes up and down."""

    owner: float
    server: float
    up: int
    down: int


def processor_name() -> str:
    """Model name of the first processor, or "unknown"."""
    return _cpuinfo("model name") or "unknown"


def processor_frequency() -> float:
    """Cycles a second of the fastest processor right now, as the operating system tells.

    Raises:
        InputError: it does not tell.
    """
    found = re.findall(r"^cpu MHz\s*:\s*([0-9.]+)$", _read_cpuinfo(), re.MULTILINE)
    if not found or max(map(float, found)) <= 0:
        raise InputError(f"{_CPUINFO} does not tell the processor's frequency: give it, in Hz (--frequency 2.6e9)")
    return max(map(float, found)) * 1e6


def measure(
    workload: Workload | None = None,
    *,
    frequency: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Tier, ...]:
    """Measure every set by one thread: linear-w8, linear-w16, and CKKS of one depth in three rings.

    Args:
        workload: what a sample is; the default is one layer of width 384 and 16 tokens.
        frequency: of the processor, cycles/s; default as the operating system tells.
        progress: called with a line before each set.

    Raises:
        InputError: no frequency is known, or it is not positive.
    """
    workload = workload or Workload()
    hertz = processor_frequency() if frequency is None else frequency
    if not 0 < hertz < math.inf:
        raise InputError(f"frequency = {hertz!r}: must be a number in (0, inf), in Hz")
    threads = get_num_threads()
    set_num_threads(1)
    try:
        return tuple(_tiers(workload, hertz, progress or (lambda _: None)))
    finally:
        set_num_threads(threads)


def describe(workload: Workload, frequency: float) -> str:
    """Where a table of tiers comes from, for its head."""
    layers = f"{workload.layers} frozen layer{'s' * (workload.layers != 1)}"
    return (
        f"Measured on {processor_name()} at {frequency / 1e9:.3g} GHz, one thread, {active_isa()} kernels.\n"
        f"A sample is {workload.tokens} tokens through {layers} of {workload.width} x {workload.width}, forward and "
        f"backward;\nbatches of {workload.batch} samples, medians of {workload.runs} runs."
    )


def _tiers(workload: Workload, hertz: float, progress: Callable[[str], None]) -> Any:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(workload.width, workload.width)) / math.sqrt(workload.width)
    batch = np.clip(rng.normal(size=(workload.tokens * workload.batch, workload.width)), -4, 4).astype(np.float32)

    def tier(name: str, ring: int, log2_modulus: float, costs: _Costs) -> Tier:
        share = workload.layers / workload.batch
        return Tier(
            name=name,
            ring_dimension=ring,
            log2_modulus=round(log2_modulus, 2),
            encrypt_cycles=round(costs.owner * hertz * share),
            evaluate_cycles=round(costs.server * hertz * share),
            upload_bits=round(8 * costs.up * share),
            download_bits=round(8 * costs.down * share),
            error_sigma=_SIGMA,
        )

    for preset, log2_q in _LINEAR.items():
        progress(f"{preset}, N = 2048")
        yield tier(preset, 2048, log2_q, _linear_costs(preset, weight, batch, workload.runs))
    for ring in _CKKS_RINGS:
        parameters = ckks.parameters(_DEPTH, _SCALE_BITS, ring_dimension=ring)
        progress(f"CKKS, N = {ring}, depth {_DEPTH}")
        costs = _ckks_costs(parameters, weight, batch, workload.runs)
        yield tier(f"ckks-{ring}", ring, parameters.log_qp, costs)


def _linear_costs(preset: str, weight: Any, batch: Any, runs: int) -> _Costs:
    prepared = linear.prepare(weight, preset)
    masks = linear.MaskCache()

    def once() -> _Costs:
        total = _Costs(0.0, 0.0, 0, 0)
        for direction in ("forward", "backward"):
            start = time.perf_counter()
            request, secret = linear.encrypt(batch, prepared.public, direction, masks)
            sent = time.perf_counter()
            reply = linear.apply(prepared, request)
            answered = time.perf_counter()
            linear.decrypt(reply, secret)
            total = _add(total, start, sent, answered, len(request), len(reply))
        return total

    return _median(once, runs)


def _ckks_costs(parameters: ckks.Parameters, weight: Any, batch: Any, runs: int) -> _Costs:
    secret, engine, matrix = ckks.SecretKey(parameters), ckks.Evaluator(parameters), ckks.Matrix(weight, per_row=False)

    def once() -> _Costs:
        total = _Costs(0.0, 0.0, 0, 0)
        for transpose in (False, True):
            start = time.perf_counter()
            request = secret.encrypt(batch, bound=4.0).to_bytes()
            sent = time.perf_counter()
            x = ckks.EncryptedTensor.from_bytes(parameters, request)
            reply = engine.linear(x, matrix, transpose=transpose).to_bytes()
            answered = time.perf_counter()
            secret.decrypt(ckks.EncryptedTensor.from_bytes(parameters, reply))
            total = _add(total, start, sent, answered, len(request), len(reply))
        return total

    return _median(once, runs)


def _add(costs: _Costs, start: float, sent: float, answered: float, up: int, down: int) -> _Costs:
    owner = sent - start + time.perf_counter() - answered
    return _Costs(costs.owner + owner, costs.server + answered - sent, costs.up + up, costs.down + down)


def _median(once: Callable[[], _Costs], runs: int) -> _Costs:
    once()
    all_runs = [once() for _ in range(runs)]
    last = all_runs[-1]
    owner, server = (statistics.median(getattr(run, name) for run in all_runs) for name in ("owner", "server"))
    return _Costs(owner, server, last.up, last.down)


def _read_cpuinfo() -> str:
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo(key: str) -> str | None:
    found = re.search(rf"^{key}\s*:\s*(.+)$", _read_cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else None

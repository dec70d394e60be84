"""What the parameter sets of this package cost on the machine at hand: the tiers that the allocator chooses from.

A sample is a text of some tokens that goes through frozen square layers, forward and backward. One layer is run in
both directions on a batch, by one thread, through the same calls and bytes as training; a sample's cost is its part of
that, times the number of layers. Cycles are seconds times the processor's frequency.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from privtuner import ckks, linear
from privtuner.errors import InputError
from privtuner.system import active_isa, cpuinfo, get_num_threads, processor_name, set_num_threads
from privtuner.wireless import Tier
from privtuner.wireless.model import check_integer

__all__ = ["Round", "Workload", "describe", "measure", "processor_frequency", "tier_of_round"]

_SIGMA = math.sqrt(21 / 2)
"""Standard deviation of the centred binomial error that both schemes draw."""
_CKKS_RINGS = (8192, 16384, 32768)
_DEPTH = 2  # the same in every ring, so that a larger one buys security alone
_SCALE_BITS = 40
_DIRECTIONS: tuple[linear.Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Workload:
    """What a sample is and how it is measured.

    Attributes:
        width: features of the layer, both ways.
        layers: how many layers of that width a sample passes.
        tokens: tokens in a sample.
        batch: samples in one request, at most 4096 / tokens.
        runs: runs of each direction; medians are taken.

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
            check_integer(name, getattr(self, name), 1, most)
        if self.tokens * self.batch > _CKKS_RINGS[0] // 2:
            raise InputError(
                f"tokens * batch = {self.tokens * self.batch}: one ciphertext of the smallest ring holds "
                f"{_CKKS_RINGS[0] // 2}; take a smaller batch"
            )


@dataclass(frozen=True)
class Round:
    """What one training step of a device took, measured.

    Attributes:
        samples: texts in it.
        owner_seconds, server_seconds: that either side computed.
        bytes_up, bytes_down: that the device sent and received.
    """

    samples: int
    owner_seconds: float
    server_seconds: float
    bytes_up: int
    bytes_down: int


def tier_of_round(name: str, ring_dimension: int, log2_modulus: float, measured: Round, frequency: float) -> Tier:
    """Return what one step of some scheme costs as a tier of the allocator.

    Args:
        name: of the tier.
        ring_dimension: N.
        log2_modulus: log2 of the largest modulus, special primes included.
        measured: what the step took.
        frequency: of the processor that it was measured on times the cores that were at work, cycles/s.

    Raises:
        InputError: a value out of range.
    """
    check_integer("samples", measured.samples, 1)
    return Tier(
        name=name,
        ring_dimension=ring_dimension,
        log2_modulus=round(log2_modulus, 2),
        encrypt_cycles=measured.owner_seconds * frequency / measured.samples,
        evaluate_cycles=measured.server_seconds * frequency / measured.samples,
        upload_bits=8 * measured.bytes_up / measured.samples,
        download_bits=8 * measured.bytes_down / measured.samples,
        error_sigma=_SIGMA,
    )


@dataclass(frozen=True)
class _Costs:
    """What one batch costs in both directions: seconds of data owner and server, bytes up and down."""

    owner: float
    server: float
    up: int
    down: int


def processor_frequency() -> float:
    """Cycles a second of the fastest processor right now, as the operating system tells.

    Raises:
        InputError: it does not tell.
    """
    megahertz = max(map(float, cpuinfo("cpu MHz")), default=0.0)
    if megahertz <= 0:
        raise InputError("/proc/cpuinfo does not tell the processor's frequency: give it, in Hz (--frequency 2.6e9)")
    return megahertz * 1e6


def measure(
    workload: Workload | None = None,
    *,
    frequency: float | None = None,
    progress: Callable[[float, float, str], object] | None = None,
) -> tuple[Tier, ...]:
    """Measure every set by one thread: linear-w8, linear-w16, and CKKS of one depth in three rings.

    Args:
        workload: what a sample is; the default is one layer of width 384 and 16 tokens.
        frequency: the frequency of the processor, cycles/s; default as the operating system tells.
        progress: called before each run with the part of the work that is done, in per cent, 100, and the name of the
            set that is being measured.

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
        return tuple(_tiers(workload, hertz, progress or (lambda *_: None)))
    finally:
        set_num_threads(threads)


def describe(workload: Workload, frequency: float) -> str:
    """Say where a table of tiers comes from, for its head."""
    layers = f"{workload.layers} frozen layer{'s' * (workload.layers != 1)}"
    return (
        f"Measured on {processor_name()} at {frequency / 1e9:.3g} GHz, one thread, {active_isa()} kernels.\n"
        f"A sample is {workload.tokens} tokens through {layers} of {workload.width} x {workload.width}, forward and "
        f"backward;\nbatches of {workload.batch} samples, medians of {workload.runs} runs."
    )


def _tiers(workload: Workload, hertz: float, progress: Callable[[float, float, str], object]) -> Any:
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

    # Both schemes multiply every weight by every slot; the linear one takes about an eighth of the time for it.
    shares = [len(batch) / 8] * len(linear.PRESETS) + [float(ring) for ring in _CKKS_RINGS]
    done = 0.0

    def runs(name: str) -> Iterator[None]:
        """Yield once for each run of the next set."""
        nonlocal done
        share = 100 * shares.pop(0) / total / (1 + workload.runs)
        for _ in range(1 + workload.runs):
            progress(done, 100, name)
            yield
            done += share

    total = sum(shares)
    for preset in linear.PRESETS:
        ring, modulus = linear.ring(preset)
        costs = _linear_costs(preset, weight, batch, runs(f"{preset}, N = {ring}"))
        yield tier(preset, ring, math.log2(modulus), costs)
    for ring in _CKKS_RINGS:
        parameters = ckks.Parameters.secure(_DEPTH, _SCALE_BITS, ring_dimension=ring)
        costs = _ckks_costs(parameters, weight, batch, runs(f"CKKS, N = {ring}, depth {_DEPTH}"))
        yield tier(f"ckks-{ring}", ring, parameters.log_qp, costs)
    progress(100, 100, "")


def _linear_costs(preset: str, weight: Any, batch: Any, runs: Iterable[None]) -> _Costs:
    prepared, masks = linear.prepare(weight, preset), linear.MaskCache()

    def encrypt(direction: linear.Direction) -> tuple[bytes, Callable[[bytes], Any]]:
        request, secret = linear.encrypt(batch, prepared.spec, direction, masks)
        return request, lambda reply: linear.decrypt(reply, secret)

    return _costs(encrypt, lambda request, _: linear.apply(prepared, request), runs)


def _ckks_costs(parameters: ckks.Parameters, weight: Any, batch: Any, runs: Iterable[None]) -> _Costs:
    secret, evaluator = ckks.SecretKey(parameters), ckks.Evaluator(parameters)
    matrix = ckks.Matrix(weight, per_row=False)
    fresh, read = evaluator.planned(*batch.shape, bound=4.0), ckks.EncryptedTensor.from_bytes
    results = {way: evaluator.linear(fresh, matrix, transpose=way == "backward") for way in ("forward", "backward")}

    def encrypt(direction: linear.Direction) -> tuple[bytes, Callable[[bytes], Any]]:
        request = secret.encrypt(batch, bound=4.0).to_bytes()
        return request, lambda reply: secret.decrypt(read(parameters, reply, results[direction]))

    def answer(request: bytes, direction: linear.Direction) -> bytes:
        x = read(parameters, request, fresh)
        return evaluator.linear(x, matrix, transpose=direction == "backward").to_bytes()

    return _costs(encrypt, answer, runs)


def _costs(
    encrypt: Callable[[linear.Direction], tuple[bytes, Callable[[bytes], Any]]],
    answer: Callable[[bytes, linear.Direction], bytes],
    runs: Iterable[None],
) -> _Costs:
    """Medians of both directions, the first run left out; ``encrypt`` gives a request and what decrypts its reply."""
    all_runs = []
    for _ in runs:
        owner = server = 0.0
        up = down = 0
        for direction in _DIRECTIONS:
            start = time.perf_counter()
            request, decrypt = encrypt(direction)
            sent = time.perf_counter()
            reply = answer(request, direction)
            answered = time.perf_counter()
            decrypt(reply)
            owner += sent - start + time.perf_counter() - answered
            server += answered - sent
            up, down = up + len(request), down + len(reply)
        all_runs.append(_Costs(owner, server, up, down))
    owner, server = (statistics.median(getattr(run, name) for run in all_runs[1:]) for name in ("owner", "server"))
    return _Costs(owner, server, all_runs[-1].up, all_runs[-1].down)

"""Seconds that the units of work of a circuit take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from privtuner import _core, system
from privtuner.ckks.evaluator import Evaluator, Matrix
from privtuner.ckks.keys import SecretKey
from privtuner.ckks.parameters import Parameters
from privtuner.ckks.refresher import REFRESH_LEVEL
from privtuner.errors import InputError

__all__ = ["Timings", "measure_timings"]


@dataclass(frozen=True)
class Timings:
    """Seconds of each unit of work on this machine, a feature, at several numbers of limbs.

    Made by `measure_timings`; belongs to one set of parameters and one number of threads.
    """

    parameters: str
    threads: int
    seconds: dict[str, tuple[tuple[int, ...], tuple[float, ...]]]

    def seconds_of(self, work: str, limbs: int, amount: float) -> float:
        """Seconds of ``amount`` units of ``work`` at ``limbs`` limbs, between the measured ones by interpolation."""
        at, seconds = self.seconds[work]
        return amount * float(np.interp(limbs, at, seconds))


def measure_timings(parameters: Parameters, *, repeats: int = 3) -> Timings:
    """Measure the units of work on this machine, with the threads in force. Takes seconds, and a key's memory.

    Args:
        parameters: the set that plans are made for.
        repeats: runs of each operation, of which the fastest counts.
    """
    threads = system.get_num_threads()
    width = max(2, threads)  # features at a time: as many as threads
    secret = SecretKey(parameters)
    evaluator = Evaluator(parameters, secret.evaluation_keys(rotations=(1, 2, 3, 4)))
    rng = np.random.default_rng(0)
    tokens = parameters.slots
    values = rng.uniform(-1, 1, (tokens, width))
    levels = sorted({max(1, round(parameters.depth * part)) for part in (0.0, 0.34, 0.67, 1.0)})
    if parameters.depth < 1:
        raise InputError("a set of depth 0 has no products to measure; take a depth from 1 on")
    # Deep enough to run as fast as real ones do, within 256 MB.
    depth = max(width, min(128, (1 << 28) // (2 * (parameters.depth + 1) * parameters.ring_dimension * 8)))
    copies = depth // width
    matrix = Matrix(rng.normal(size=(64, copies * width)))

    def best(run: Callable[[], Any], features: int = width) -> float:
        run()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds) / features

    rows: dict[str, list[float]] = {}
    for level in levels:
        x = secret.encrypt(values, level=level)
        wide = evaluator.concatenate([x] * 4)
        deep = evaluator.concatenate([x] * copies)
        megamacs = 64 * copies * width * 2 * (level + 1) * parameters.ring_dimension / 1e6
        add = best(partial(evaluator.add, x, x))
        scaled = best(partial(evaluator.multiply, x, 0.5))
        product = best(partial(evaluator.multiply, x, x))
        dots = best(partial(evaluator.dot, wide, wide), 1)
        one = best(partial(evaluator.rotate, x, (1,)))
        four = best(partial(evaluator.rotate, x, (1, 2, 3, 4)))
        plain = best(partial(evaluator.multiply_plain, x, values))
        linear = best(partial(evaluator.linear, deep, matrix), 1)
        rotate = max((four - one) / 3, 0.0)
        term = add
        rescale = max(scaled - term, 0.0)
        pair = max((dots - product) / (4 * width - 1), 0.0)
        for kind, seconds in {
            "term": term,
            "rescale": rescale,
            "product": pair,
            "relinearise": max(product - pair, 0.0),
            "rotate": rotate,
            "decompose": max(one - rotate, 0.0),
            "plain": max(plain - rescale, 0.0),
            "matrix": linear / megamacs,
        }.items():
            rows.setdefault(kind, []).append(seconds)
    limbs = tuple(level + 1 for level in levels)
    measured = {kind: (limbs, tuple(times)) for kind, times in rows.items()}
    if parameters.depth >= REFRESH_LEVEL:
        measured |= _refresh_timings(evaluator, secret, repeats)
    return Timings(parameters.name, threads, measured)


def _refresh_timings(
    evaluator: Evaluator, secret: SecretKey, repeats: int
) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Measure the server's and the owner's parts of a refresh, a ciphertext."""
    parameters = evaluator.parameters
    key = secret.public_key()._core
    levels = sorted({REFRESH_LEVEL, (REFRESH_LEVEL + parameters.depth) // 2, parameters.depth})
    rows = []
    for level in levels:
        count = parameters.refresh_batch(level)
        x = secret.encrypt(np.zeros((1, count)), level=REFRESH_LEVEL)._core
        fresh = evaluator._core.refreshed(x, level, False)
        runs = []
        for _ in range(repeats + 1):  # the first one finds everything cold
            masked = _core.CkksMaskedRefresh(key, x, fresh, bytes(16), 0)
            times = [time.perf_counter()]
            message = masked.mask(0)
            times.append(time.perf_counter())
            answer = secret._core.refresh(message, count, level)
            times.append(time.perf_counter())
            masked.unmask(0, answer)
            times.append(time.perf_counter())
            runs.append(np.diff(times) / count)
        rows.append(np.min(runs, axis=0))
    mask, refresh, unmask = np.transpose(rows).tolist()
    limbs = tuple(level + 1 for level in levels)
    return {
        "mask": ((REFRESH_LEVEL + 1,), (min(mask),)),
        "refresh": (limbs, tuple(refresh)),
        "unmask": (limbs, tuple(unmask)),
    }

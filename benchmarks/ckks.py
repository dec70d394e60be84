"""How fast is CKKS? ``benchmarks/schemes.py`` has it beside OpenFHE.

    python benchmarks/ckks.py [--quick] [--json F] [--plot F.png] [--threads N]

The figures to reach are absolute times of one thread on the processor it was designed on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

import harness
from harness import Record, progress
from privtuner import ckks, system

RING_LIMBS = ((8192, 3), (16384, 8), (32768, 16))
TARGETS = {
    (16384, 8, "multiply, relinearise, rescale"): 7.0,
    (16384, 8, "rotate"): 5.5,
    (16384, 8, "Chebyshev, degree 27"): 70.0,
    (16384, 8, "encode, encrypt"): 3.0,
    (16384, 8, "decrypt, decode"): 3.0,
    (32768, 16, "multiply, relinearise, rescale"): 40.0,
}


def milliseconds(run: Callable[[], object], runs: int) -> float:
    """Median of ``runs`` after a warm-up."""
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def primitives(ring: int, limbs: int, runs: int) -> dict[str, float]:
    """Milliseconds of the operations on one ciphertext with the threads in force."""
    parameters = ckks.Parameters.secure(depth=limbs - 1, ring_dimension=ring)
    secret = ckks.SecretKey(parameters)
    evaluator = ckks.Evaluator(parameters, secret.evaluation_keys(rotations=(1,)))
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (parameters.slots, 1))
    x, y = secret.encrypt(values), secret.encrypt(values)
    times = {
        "encode, encrypt": milliseconds(lambda: secret.encrypt(values), runs),
        "decrypt, decode": milliseconds(lambda: secret.decrypt(x), runs),
        "add": milliseconds(lambda: evaluator.add(x, y), runs),
        "multiply by a number, rescale": milliseconds(lambda: evaluator.multiply(x, 0.3), runs),
        "multiply by clear values, rescale": milliseconds(lambda: evaluator.multiply_plain(x, values), runs),
        "multiply, relinearise, rescale": milliseconds(lambda: evaluator.multiply(x, y), runs),
        "rotate": milliseconds(lambda: evaluator.rotate(x, 1), runs),
        "rescale": milliseconds(lambda: evaluator.rescale(x), runs),
    }
    if parameters.depth >= 6:
        chebyshev = ckks.Polynomial(tuple(rng.normal(size=28)))
        times["Chebyshev, degree 27"] = milliseconds(lambda: evaluator.polynomial(x, chebyshev), max(3, runs // 3))
    return times


def one_ciphertext(threads: int, runs: int) -> Iterator[Record]:
    """Every primitive, each beside the figure to reach."""
    system.set_num_threads(threads)
    for ring, limbs in RING_LIMBS:
        progress(f"N = {ring}, {limbs} limbs, {threads} threads")
        for name, value in primitives(ring, limbs, runs).items():
            what = f"{name}, N = {ring}, {limbs} limbs"
            target = TARGETS.get((ring, limbs, name)) if threads == 1 else None
            yield Record(what, value, "ms", target=target, threads=threads, isa=system.active_isa())


def transform(runs: int) -> Record:
    """The forward transform of one limb."""
    parameters = ckks.Parameters.secure(depth=7)
    words = np.random.default_rng(0).integers(0, parameters.primes[0], parameters.ring_dimension, np.uint64)
    # Transforming in place again and again is as good as fresh words.
    value = milliseconds(lambda: parameters._core.transform(0, words, 100), runs) / 100 * 1e3
    return Record("forward NTT, N = 16384, one limb", value, "us", target=35.0, threads=1, isa=system.active_isa())


def matrix(threads: int, runs: int) -> Iterator[Record]:
    """A clear 768 x 768 matrix times 8,192 tokens of 768 features."""
    progress(f"768 x 768 matrix, {threads} threads")
    system.set_num_threads(threads)
    parameters = ckks.Parameters.secure(depth=7)
    secret = ckks.SecretKey(parameters)
    evaluator = ckks.Evaluator(parameters)
    rng = np.random.default_rng(0)
    x = secret.encrypt(rng.uniform(-1, 1, (parameters.slots, 768)))
    weight = rng.normal(size=(768, 768))
    for bits in (8, 16):
        prepared = ckks.Matrix(weight, bits=bits)
        seconds = milliseconds(lambda prepared=prepared: evaluator.linear(x, prepared), runs) / 1e3
        rate = 768 * 768 * parameters.slots / seconds
        name = f"768 x 768 matrix of {bits}-bit weights times tensor, 8192 tokens, 8 limbs"
        yield Record(name, seconds, "s", threads=threads, isa=system.active_isa(), note=f"{rate / 1e9:.3g} G MAC/s")


def main() -> None:
    """Measure everything and write what was asked for."""
    options = harness.arguments((__doc__ or "").splitlines()[0])
    runs = 5 if options.quick else 15
    records: list[Record] = []
    for threads in sorted({1, options.threads}):
        records += one_ciphertext(threads, runs)
        records += matrix(threads, 3)
    system.set_num_threads(1)
    records.append(transform(runs))
    harness.finish(records, options, "CKKS")


if __name__ == "__main__":
    main()

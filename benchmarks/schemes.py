"""OpenFHE beside this package: matrix products, primitives, binding, training, all in one run.

    python benchmarks/schemes.py [--quick] [--json F] [--plot F.png] [--threads N]

Measures nothing where privtuner was built without OpenFHE. ``--quick`` measures the textbook product on a few rows and
scales it up, and leaves out the training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import harness
import privtuner
from harness import Record, median_ratio, paired, progress
from privtuner import ckks, linear, openfhe, system

WIDTH = 512
ROWS = 16  # of the textbook product with --quick
PRIMITIVES = ((13, 3), (14, 8), (15, 16))  # log2 N, limbs
NATIVE, OPENFHE = "native", f"OpenFHE {openfhe.status().version}"


def set_threads(threads: int) -> None:
    """Limit the threads of both."""
    system.set_num_threads(threads)
    openfhe.set_num_threads(threads)


def seconds(run: Callable[[], object]) -> float:
    """Of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def product(threads: int, quick: bool, runs: int) -> Iterator[Record]:
    """A 512 x 512 matrix times 512 ciphertexts, by residues and by the textbook, compared bit for bit."""
    progress(f"matrix product, {threads} threads")
    set_threads(threads)
    context = openfhe.Context.from_settings(
        2,
        ring_dim=8192,
        first_mod_size=60,
        scaling_mod_size=40,
        num_large_digits=3,
        scaling_technique="FLEXIBLEAUTO",
    )
    evaluator = openfhe.Evaluator(context)
    rng = np.random.default_rng(0)
    x = openfhe.SecretKey(context).encrypt(rng.uniform(-1, 1, (context.slots, WIDTH)))
    matrix = ckks.Matrix(rng.standard_normal((WIDTH, WIDTH)))
    rows = ROWS if quick else WIDTH
    some = ckks.Matrix.of_integers(matrix.integers[:rows], 1.0)
    fast = paired({"residues": lambda: evaluator.linear(x, matrix)}, runs)["residues"]
    ours = statistics.median(fast)
    result = evaluator.linear(x, matrix)
    textbook: dict[str, float] = {}
    lib = openfhe.library.library()
    start = time.perf_counter()
    theirs = evaluator.textbook_linear(x, some)
    textbook["MultByInteger, EvalAdd"] = time.perf_counter() - start
    for tower in range(len(x.moduli)):
        if not (result.residues(tower)[:rows] == theirs.residues(tower)).all():
            raise SystemExit("the two products differ")
    del theirs
    reals = np.ascontiguousarray(matrix.dequantised()[:rows])
    textbook["EvalMult by a double, EvalAdd"] = seconds(lambda: lib.textbook_reals(x._core, reals))
    what = f"{WIDTH} x {WIDTH} matrix times {WIDTH} ciphertexts, N = 8192, primes of 60, 40, 41 bits"
    for name, value in textbook.items():
        whole = value * WIDTH / rows
        note = f"there {whole:.1f} s" + ("" if rows == WIDTH else f", from {rows} rows")
        yield Record(
            f"{what}: times faster",
            whole / ours,
            "x (100 to reach)",
            reference=f"{OPENFHE}, {name}",
            threads=threads,
            isa=system.active_isa(),
            note=f"{ours:.3f} s; {note}" + ("; equal bit for bit" if name.startswith("MultByInteger") else ""),
        )

    copies = {"out and in": lambda: copy_residues(x._core), "product": lambda: evaluator.linear(x, matrix)}
    times = paired(copies, runs)
    yield Record(
        "residues out and in, part of that product",
        statistics.median(times["out and in"]),
        "s",
        reference="that product",
        ratio=median_ratio(times["out and in"], times["product"]),
        target=0.15,
        threads=threads,
        isa=system.active_isa(),
    )


def copy_residues(core: Any) -> object:
    """What the product copies, in the same pieces, without the product."""
    from privtuner.openfhe import evaluator

    builder = openfhe.library.library().Builder(core, WIDTH, [])
    width = evaluator.column_width(8192, WIDTH, WIDTH)
    for tower in range(3):
        for component in range(2):
            for begin in range(0, 8192, width):
                builder.set(tower, component, begin, core.residues(tower, component, begin, width))
    return builder.finish()


def binding(threads: int, runs: int) -> Iterator[Record]:
    """One multiplication called from Python against a loop of them in C++, for one ciphertext."""
    progress(f"binding, {threads} threads")
    set_threads(threads)
    repeats = 20
    for log_n, limbs in PRIMITIVES[:2]:
        context = like(log_n, limbs)
        secret = openfhe.SecretKey(context)
        evaluator = openfhe.Evaluator(context, secret.evaluation_keys())
        x, y = secret.encrypt([0.5]), secret.encrypt([0.25])
        lib = openfhe.library.library()

        def from_python(evaluator=evaluator, x=x, y=y) -> None:
            for _ in range(repeats):
                evaluator.multiply(x, y)

        def inside(lib=lib, evaluator=evaluator, x=x, y=y) -> None:
            lib.multiply(x._core, y._core, evaluator._keys, repeats)

        times = paired({"python": from_python, "C++": inside}, max(runs, 11))
        yield Record(
            f"EvalMult through Python, N = 2^{log_n}, {limbs} limbs",
            statistics.median(times["python"]) / repeats * 1e3,
            "ms",
            reference="EvalMult in a C++ loop",
            ratio=median_ratio(times["python"], times["C++"]),
            target=1.02,
            threads=threads,
        )


def like(log_n: int, limbs: int) -> openfhe.Context:
    """OpenFHE's context of so many limbs at 128 bits, with as few digits as its check allows.

    FIXEDMANUAL, so that its products are rescaled at once, as the native ones are.
    """
    for digits in (0, *range(2, limbs + 1)):
        try:
            return openfhe.Context.from_settings(
                limbs - 1,
                ring_dim=1 << log_n,
                scaling_mod_size=40,
                first_mod_size=50,
                num_large_digits=digits,
                scaling_technique="FIXEDMANUAL",
            )
        except privtuner.errors.InputError as error:
            refusal = error
    raise refusal


def primitives(threads: int, runs: int) -> Iterator[Record]:
    """Every primitive on one ciphertext, in turn; products are rescaled."""
    set_threads(threads)
    for log_n, limbs in PRIMITIVES:
        progress(f"primitives, N = 2^{log_n}, {limbs} limbs, {threads} threads")
        native = ckks.Parameters.secure(depth=limbs - 1, ring_dimension=1 << log_n)
        context = like(log_n, limbs)
        rng = np.random.default_rng(0)
        values = rng.uniform(-1, 1, (native.slots, 1))
        polynomial = ckks.Polynomial(tuple(rng.normal(size=28)))
        candidates: dict[str, dict[str, Callable[[], object]]] = {}
        for engine_name, secret in ((NATIVE, ckks.SecretKey(native)), (OPENFHE, openfhe.SecretKey(context))):
            keys = secret.evaluation_keys(rotations=(1, 2, 4, 8))
            evaluator = ckks.Evaluator(native, keys) if engine_name == NATIVE else openfhe.Evaluator(context, keys)
            candidates[engine_name] = operations(evaluator, secret, values, polynomial)
        for name in candidates[NATIVE]:
            times = paired({who: runs_of[name] for who, runs_of in candidates.items()}, runs)
            yield Record(
                f"{name}, N = 2^{log_n}, {limbs} limbs",
                statistics.median(times[NATIVE]) * 1e3,
                "ms",
                reference=OPENFHE,
                ratio=median_ratio(times[NATIVE], times[OPENFHE]),
                threads=threads,
                isa=system.active_isa(),
                note=f"there {statistics.median(times[OPENFHE]) * 1e3:.4g} ms, {context.num_large_digits} digits",
            )


def operations(e: Any, s: Any, values: object, polynomial: object) -> dict[str, Callable[[], object]]:
    """The primitives of one evaluator by name."""
    x, y = s.encrypt(values), s.encrypt(values)
    spec = s.public_key()
    runs: dict[str, Callable[[], object]] = {
        "encrypt, secret key": lambda: s.encrypt(values),
        "encrypt, public key": lambda: spec.encrypt(values),
        "decrypt": lambda: s.decrypt(x),
        "add": lambda: e.add(x, y),
        "multiply by a number, rescale": lambda: e.multiply(x, 0.3),
        "multiply by clear values, rescale": lambda: e.multiply_plain(x, values),
        "multiply, relinearise, rescale": lambda: e.multiply(x, y),
        "rotate": lambda: e.rotate(x, 1),
        "rotate by 1, 2, 4, 8, hoisted": lambda: e.rotate(x, [1, 2, 4, 8]),
    }
    if x.level >= 7:
        runs["Chebyshev, degree 27"] = lambda: e.polynomial(x, polynomial)
    return runs


def layer(threads: int, runs: int) -> Iterator[Record]:
    """One linear layer of MiniLM's shape, the three steps of a request, against the native scheme."""
    progress(f"linear layer, {threads} threads")
    set_threads(threads)
    from privtuner.schemes import scheme

    rng = np.random.default_rng(0)
    prepared = linear.prepare(rng.standard_normal((1152, 384)))
    x = rng.standard_normal((1024, 384)).astype(np.float32)
    sides = {
        NATIVE: (scheme("linear").client(mask_cache_bytes=0), scheme("linear").server()),
        OPENFHE: (scheme("openfhe").client(), scheme("openfhe").server()),
    }
    made = {name: owner.encrypt(x, prepared.spec, "forward") for name, (owner, _) in sides.items()}
    replies = {name: list(server.answer(prepared, made[name][0])) for name, (_, server) in sides.items()}

    def decrypting(name: str) -> float:
        owner, server = sides[name]
        request, secret = owner.encrypt(x, prepared.spec, "forward")
        blocks = list(server.answer(prepared, request))
        return seconds(lambda: owner.decrypt(blocks, secret))

    steps = {
        "encrypt": {n: (lambda o=o: o.encrypt(x, prepared.spec, "forward")) for n, (o, _) in sides.items()},
        "apply": {n: (lambda s=s, n=n: list(s.answer(prepared, made[n][0]))) for n, (_, s) in sides.items()},
    }
    results = {step: paired(candidates, runs) for step, candidates in steps.items()}
    results["decrypt"] = {n: [decrypting(n) for _ in range(runs)] for n in sides}
    bytes_of = {n: (len(made[n][0]) / 1e6, sum(map(len, replies[n])) / 1e6) for n in sides}
    for step, times in results.items():
        yield Record(
            f"layer 384 -> 1152, 1,024 tokens, {step}, OpenFHE ciphertexts",
            statistics.median(times[OPENFHE]) * 1e3,
            "ms",
            reference=NATIVE,
            ratio=median_ratio(times[OPENFHE], times[NATIVE]),
            threads=threads,
            isa=system.active_isa(),
            note=f"MB up and down {bytes_of[OPENFHE][0]:.3g}, {bytes_of[OPENFHE][1]:.3g}; native "
            f"{bytes_of[NATIVE][0]:.3g}, {bytes_of[NATIVE][1]:.3g}",
        )


def training(threads: int, steps: int) -> Iterator[Record]:
    """MiniLM on BANKING77: the loss of every step on both schemes, and of the native one a second time."""
    import torch

    from privtuner import nn
    from privtuner.schemes import SCHEMES
    from privtuner.train import training as lora
    from training import Task

    progress(f"training, {steps} steps of each: some minutes")
    set_threads(threads)
    torch.set_num_threads(threads)
    task, config = Task(), lora.TrainConfig(steps=steps, seed=0)
    curves: dict[str, list[float]] = {}
    times: dict[str, float] = {}
    for name, scheme in (("linear", "linear"), ("linear again", "linear"), ("openfhe", "openfhe")):
        transport = nn.LocalTransport(task.split.server, server=SCHEMES[scheme].server())
        model = task.encrypted(config, nn.Session(transport, scheme))
        done = []
        for step in lora.iterate_steps(model, task.train, config, progress=True):
            done.append(step)
        curves[name] = [step.loss for step in done]
        times[name] = statistics.median(step.seconds for step in done)
    first, again, other = (np.array(curve) for curve in curves.values())
    noise, apart = np.abs(first - again), np.abs(first - other)
    yield Record(
        f"loss, OpenFHE against native, largest difference of {steps} steps",
        float(apart.max()),
        "nats",
        reference="native against itself",
        ratio=float(apart.max() / noise.max()) if noise.max() > 0 else None,
        threads=threads,
        note=f"native against itself {noise.max():.2g}; from {first[0]:.3f} to {first[-1]:.3f} and {other[-1]:.3f}; "
        f"{task.name}",
    )
    yield Record(
        "step, OpenFHE",
        times["openfhe"],
        "s",
        reference=NATIVE,
        ratio=times["openfhe"] / times["native"],
        threads=threads,
        isa=system.active_isa(),
        note=f"native {times['native']:.3f} s, both parties in one process",
    )


def main() -> None:
    """Measure everything and write what was asked for."""
    options = harness.arguments((__doc__ or "").splitlines()[0])
    if not openfhe.available():
        print(f"nothing to compare: {openfhe.status().reason}")
        return
    runs = 5 if options.quick else 9
    records: list[Record] = []
    for threads in sorted({1, options.threads}):
        records += product(threads, options.quick, runs)
        records += binding(threads, runs)
        records += primitives(threads, runs)
        records += layer(threads, runs)
    if not options.quick:
        records += training(options.threads, 30)
    harness.finish(records, options, f"{OPENFHE} and privtuner")


if __name__ == "__main__":
    main()

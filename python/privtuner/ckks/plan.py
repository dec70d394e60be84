"""Dry runs: what a circuit takes, before any key exists."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .. import system
from ..errors import InputError
from .evaluator import Evaluator, Matrix
from .keys import EvaluationKeys, SecretKey, rotations_of
from .parameters import Parameters
from .tensor import Budget, EncryptedTensor

__all__ = ["Calibration", "Measurement", "Plan", "calibrate", "plan"]

Circuit = Callable[..., EncryptedTensor | Sequence[EncryptedTensor]]


@dataclass(frozen=True)
class Calibration:
    """Seconds of each unit of work on this machine, a feature, at several numbers of limbs.

    Made by `calibrate`; belongs to one set of parameters and one number of threads.
    """

    parameters: str
    threads: int
    seconds: dict[str, tuple[tuple[int, ...], tuple[float, ...]]]

    def cost(self, work: str, limbs: int, amount: float) -> float:
        """Seconds of ``amount`` units of ``work`` at ``limbs`` limbs, between the measured ones by interpolation."""
        at, seconds = self.seconds[work]
        return amount * float(np.interp(limbs, at, seconds))


@dataclass(frozen=True)
class Plan:
    """What a circuit takes.

    Attributes:
        outputs: the planned results, with level, scale and predicted error.
        levels: levels used, from the highest input to the lowest output.
        rotations, packing, conjugation, relinearisation: the keys needed.
        key_bytes: of those keys on the wire.
        input_bytes, output_bytes: of the tensors on the wire, inputs encrypted with the secret key.
        peak_bytes: most bytes of tensors alive at once, without the keys.
        work: (kind, limbs) -> amount; the units are those of `Calibration`.
        seconds: predicted; None without a calibration.
    """

    parameters: Parameters
    outputs: tuple[EncryptedTensor, ...]
    levels: int
    rotations: tuple[int, ...]
    packing: bool
    conjugation: bool
    relinearisation: bool
    key_bytes: int
    input_bytes: int
    output_bytes: int
    peak_bytes: int
    work: dict[tuple[str, int], float] = field(repr=False)
    seconds: float | None = None

    def keys(self, secret: SecretKey) -> EvaluationKeys:
        """Make exactly the keys the circuit needs."""
        return secret.evaluation_keys(
            rotations=self.rotations,
            packing=self.packing,
            conjugation=self.conjugation,
            relinearisation=self.relinearisation,
        )

    def run(
        self, circuit: Circuit, engine: Evaluator, *inputs: EncryptedTensor
    ) -> tuple[EncryptedTensor | Sequence[EncryptedTensor], Measurement]:
        """Run the circuit on ciphertexts and put what it took beside this plan."""
        engine._core.clear_trace()
        before = engine._core.live_bytes
        start = time.perf_counter()
        result = circuit(engine, *inputs)
        seconds = time.perf_counter() - start
        inputs_here = sum(x.nbytes for x in inputs)
        return result, Measurement(self, seconds, engine._core.peak_bytes - before + inputs_here)

    def __str__(self) -> str:
        out = self.outputs[0].budget()
        lines = [
            ("parameters", self.parameters.name),
            ("levels", f"{self.levels} used, {out.level} left"),
            ("result", f"{len(self.outputs)} x {self.outputs[0].shape}, {_bits(out)}"),
            ("keys", f"{_keys(self)}: {_bytes(self.key_bytes)} on the wire"),
            ("traffic", f"{_bytes(self.input_bytes)} up, {_bytes(self.output_bytes)} down"),
            ("memory", f"{_bytes(self.peak_bytes)} of tensors at the most"),
            ("time", "not calibrated" if self.seconds is None else f"{self.seconds:.3g} s predicted"),
        ]
        return "\n".join(f"{name:12}{text}" for name, text in lines)


@dataclass(frozen=True)
class Measurement:
    """A run beside its plan. Attributes: plan; seconds, peak_bytes as measured."""

    plan: Plan
    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        predicted = "-" if self.plan.seconds is None else f"{self.plan.seconds:.3g} s"
        return (
            f"{'':12}{'predicted':>12}{'measured':>12}\n"
            f"{'time':12}{predicted:>12}{f'{self.seconds:.3g} s':>12}\n"
            f"{'memory':12}{_bytes(self.plan.peak_bytes):>12}{_bytes(self.peak_bytes):>12}"
        )


def plan(
    circuit: Circuit,
    *inputs: tuple[int, int] | EncryptedTensor,
    parameters: Parameters,
    bound: float = 1.0,
    calibration: Calibration | None = None,
) -> Plan:
    """Run ``circuit(engine, *tensors)`` on planned tensors.

    Args:
        circuit: a function of an engine and tensors; it returns a tensor or several.
        inputs: shapes (tokens, features) of fresh tensors with |value| <= ``bound``, or planned tensors made by
            :meth:`Evaluator.planned` where bound, level or scale differ.
        parameters: the set to plan for.
        bound: of inputs given as shapes.
        calibration: to predict seconds with.

    Raises:
        CkksError: the circuit cannot run: not enough levels, values that may leave a domain, more tokens than slots.
        InputError: an input is neither a shape nor a planned tensor; a calibration of other parameters.
    """
    if calibration is not None and calibration.parameters != parameters.name:
        raise InputError(f"a calibration of {calibration.parameters} does not fit {parameters.name}; calibrate again")
    engine = Evaluator(parameters)
    tensors = []
    given = 0  # bytes that the engine's ledger does not see
    for entry in inputs:
        if isinstance(entry, EncryptedTensor):
            if not entry.planned:
                raise InputError("plan takes shapes or planned tensors; this one is encrypted")
            tensors.append(entry)
            given += entry.nbytes
        else:
            tokens, features = entry
            tensors.append(engine.planned(tokens, features, bound=bound))
    result = circuit(engine, *tensors)
    outputs = (result,) if isinstance(result, EncryptedTensor) else tuple(result)
    core, elements = engine._core, engine._core.needed_elements()
    rotations = rotations_of(parameters, elements)
    packing = 3 in elements  # of the automorphisms 2^k + 1 the one that is no rotation
    if packing:
        rotations = tuple(sorted(set(rotations) - set(rotations_of(parameters, parameters._core.packing_elements))))
    conjugation = parameters._core.conjugation_element in elements
    work = {(kind, limbs): amount for kind, limbs, amount in core.work()}
    seconds = None
    if calibration is not None:
        seconds = sum(calibration.cost(kind, limbs, amount) for (kind, limbs), amount in work.items())
    return Plan(
        parameters=parameters,
        outputs=outputs,
        levels=max(x.level for x in tensors) - min(y.level for y in outputs),
        rotations=rotations,
        packing=packing,
        conjugation=conjugation,
        relinearisation=core.needs_relinearisation(),
        key_bytes=parameters.key_bytes(len(elements) + core.needs_relinearisation()),
        input_bytes=sum(x.message_bytes for x in tensors) // 2,  # half of a fresh tensor travels as a seed
        output_bytes=sum(y.message_bytes for y in outputs),
        peak_bytes=core.peak_bytes + given,
        work=work,
        seconds=seconds,
    )


def calibrate(parameters: Parameters, *, repeats: int = 3) -> Calibration:
    """Measure the units of work on this machine, with the threads in force. Takes seconds, and a key's memory.

    Args:
        parameters: the set that plans are made for.
        repeats: runs of each operation, of which the fastest counts.
    """
    threads = system.get_num_threads()
    width = max(2, threads)  # features at a time: as many as threads
    secret = SecretKey(parameters)
    engine = Evaluator(parameters, secret.evaluation_keys(rotations=(1, 2, 3, 4)))
    rng = np.random.default_rng(0)
    tokens = parameters.slots
    values = rng.uniform(-1, 1, (tokens, width))
    levels = sorted({max(1, round(parameters.depth * part)) for part in (0.0, 0.34, 0.67, 1.0)})
    if parameters.depth < 1:
        raise InputError("a set of depth 0 has no products to calibrate; take a depth from 1 on")
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
        wide = engine.concatenate([x] * 4)
        deep = engine.concatenate([x] * copies)
        megamacs = 64 * copies * width * 2 * (level + 1) * parameters.ring_dimension / 1e6
        add = best(partial(engine.add, x, x))
        scaled = best(partial(engine.multiply, x, 0.5))
        product = best(partial(engine.multiply, x, x))
        dots = best(partial(engine.dot, wide, wide), 1)
        one = best(partial(engine.rotate, x, (1,)))
        four = best(partial(engine.rotate, x, (1, 2, 3, 4)))
        plain = best(partial(engine.multiply_plain, x, values))
        linear = best(partial(engine.linear, deep, matrix), 1)
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
    return Calibration(parameters.name, threads, {kind: (limbs, tuple(times)) for kind, times in rows.items()})


def _bits(budget: Budget) -> str:
    return f"scale 2^{budget.scale_bits:.1f}, error < {budget.error:.2g} ({budget.bits:.1f} bits)"


def _keys(plan: Plan) -> str:
    names = []
    if plan.relinearisation:
        names.append("relinearisation")
    if plan.conjugation:
        names.append("conjugation")
    if plan.packing:
        names.append("packing")
    if plan.rotations:
        names.append(f"rotations by {', '.join(map(str, plan.rotations))}")
    return ", ".join(names) or "none"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"

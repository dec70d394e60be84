"""Dry runs: what a circuit takes, before any key exists."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from privtuner.ckks.evaluator import Evaluator
from privtuner.ckks.keys import EvaluationKeys, SecretKey, rotations_of
from privtuner.ckks.parameters import Parameters
from privtuner.ckks.tensor import Budget, EncryptedTensor
from privtuner.ckks.timing import Timings
from privtuner.errors import InputError

__all__ = ["Measurement", "Plan", "Refresh", "plan"]

Circuit = Callable[..., EncryptedTensor | Sequence[EncryptedTensor]]


class Refresh(NamedTuple):
    """One masked refresh: how many ciphertexts go to the owner of the key, and the level at which they come back."""

    ciphertexts: int
    level: int


@dataclass(frozen=True)
class Plan:
    """Levels, keys, bytes and work that a circuit takes.

    Attributes:
        outputs: the planned results, with level, scale and predicted error.
        levels: levels used, from the highest input to the lowest output.
        rotations, packing, conjugation, relinearisation: the keys needed.
        key_bytes: bytes of those keys on the wire.
        input_bytes, output_bytes: bytes of the tensors on the wire, inputs encrypted with the secret key.
        refreshes: the masked refreshes, in order.
        masked_bytes, fresh_bytes: what they send to the owner of the key, and what comes back.
        peak_bytes: most bytes of tensors alive at once, without the keys.
        work: (kind, limbs) -> amount; the units are those of `Timings`.
        seconds: predicted; None without timings.
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
    refreshes: tuple[Refresh, ...]
    masked_bytes: int
    fresh_bytes: int
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
        self, circuit: Circuit, evaluator: Evaluator, *inputs: EncryptedTensor
    ) -> tuple[EncryptedTensor | Sequence[EncryptedTensor], Measurement]:
        """Run the circuit on ciphertexts and put what it took beside this plan."""
        evaluator._core.clear_trace()
        before = evaluator._core.live_bytes
        start = time.perf_counter()
        result = circuit(evaluator, *inputs)
        seconds = time.perf_counter() - start
        inputs_here = sum(x.nbytes for x in inputs)
        return result, Measurement(self, seconds, evaluator._core.peak_bytes - before + inputs_here)

    def __str__(self) -> str:
        out = self.outputs[0].budget()
        lines = [
            ("parameters", self.parameters.name),
            ("levels", f"{self.levels} used, {out.level} left"),
            ("result", f"{len(self.outputs)} x {self.outputs[0].shape}, {_bits(out)}"),
            ("keys", f"{_keys(self)}: {_bytes(self.key_bytes)} on the wire"),
            ("traffic", f"{_bytes(self.input_bytes)} up, {_bytes(self.output_bytes)} down"),
            ("memory", f"{_bytes(self.peak_bytes)} of tensors at the most"),
            ("time", "not measured" if self.seconds is None else f"{self.seconds:.3g} s predicted"),
        ]
        if self.refreshes:
            count = sum(refresh.ciphertexts for refresh in self.refreshes)
            traffic = f"{_bytes(self.masked_bytes)} to the owner, {_bytes(self.fresh_bytes)} back"
            lines.insert(5, ("refreshes", f"{len(self.refreshes)}, of {count} ciphertexts: {traffic}"))
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
    timings: Timings | None = None,
) -> Plan:
    """Run ``circuit(evaluator, *tensors)`` on planned tensors.

    Args:
        circuit: a function of an evaluator and tensors; it returns a tensor or several.
        inputs: shapes (tokens, features) of fresh tensors with |value| <= ``bound``, or planned tensors made by
            `Evaluator.planned` where bound, level or scale differ.
        parameters: the set to plan for.
        bound: bound on inputs given as shapes.
        timings: to predict seconds with.

    Raises:
        CkksError: the circuit cannot run: not enough levels, values that may leave a domain, more tokens than slots.
        InputError: an input is neither a shape nor a planned tensor; timings of other parameters.
    """
    if timings is not None and timings.parameters != parameters.name:
        raise InputError(f"timings of {timings.parameters} do not fit {parameters.name}; measure them again")
    evaluator = Evaluator(parameters)
    tensors = []
    given = 0  # bytes that the evaluator's ledger does not see
    for entry in inputs:
        if isinstance(entry, EncryptedTensor):
            if not entry.planned:
                raise InputError("plan takes shapes or planned tensors; this one is encrypted")
            tensors.append(entry)
            given += entry.nbytes
        else:
            tokens, features = entry
            tensors.append(evaluator.planned(tokens, features, bound=bound))
    result = circuit(evaluator, *tensors)
    outputs = (result,) if isinstance(result, EncryptedTensor) else tuple(result)
    core, elements = evaluator._core, evaluator._core.needed_elements()
    rotations = rotations_of(parameters, elements)
    packing = 3 in elements  # of the automorphisms 2^k + 1 the one that is no rotation
    if packing:
        rotations = tuple(sorted(set(rotations) - set(rotations_of(parameters, parameters._core.packing_elements))))
    conjugation = parameters._core.conjugation_element in elements
    work = {(kind, limbs): amount for kind, limbs, amount in core.work()}
    seconds = None
    if timings is not None:
        seconds = sum(timings.seconds_of(kind, limbs, amount) for (kind, limbs), amount in work.items())
    refreshes = tuple(Refresh(*counted) for counted in core.refreshes())
    masked, fresh = _refresh_bytes(parameters, refreshes)
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
        refreshes=refreshes,
        masked_bytes=masked,
        fresh_bytes=fresh,
        peak_bytes=core.peak_bytes + given,
        work=work,
        seconds=seconds,
    )


def _refresh_bytes(parameters: Parameters, refreshes: Sequence[Refresh]) -> tuple[int, int]:
    """Return the bytes of all messages to the owner, and of those back."""
    masked = fresh = 0
    for ciphertexts, level in refreshes:
        batch = parameters.refresh_batch(level)
        for count in (batch,) * (ciphertexts // batch) + ((ciphertexts % batch,) if ciphertexts % batch else ()):
            masked += parameters._core.refresh_bytes(count)
            fresh += parameters._core.refreshed_bytes(count, level)
    return masked, fresh


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

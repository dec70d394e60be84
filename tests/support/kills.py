"""Runs of ``privtuner train`` against ``privtuner.service.Server``, either process killed at random moments.

``python kills.py FOLDER KILLS SEED`` prints a line of JSON. A process per party, forked from this one, which has loaded
everything: so a kill costs tenths of a second. Run with ``entropy.c`` preloaded, see `test_kills`.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
import tqdm
from transformers.models.bert import modeling_bert

from privtuner import cli, system
from privtuner.commands import train
from privtuner.nn import split_pretrained
from privtuner.service import Server
from privtuner.train import fine_tuning, report, training
from text_cases import rows, tiny_model_directory, write_csv

LOADED = (matplotlib, peft, modeling_bert, train, fine_tuning, report)
STEPS = 20
NOBODY = "no privtuner server answers"


class Process:
    """A forked process that runs ``work`` and tells by a byte that it is ready, if it ever is."""

    def __init__(self, work: Callable[[Callable[[], object]], int], log: Path) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                os.close(self._read)
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                # tqdm's own is shared by forked processes: one that is killed while it draws would stop all others.
                tqdm.tqdm.set_lock(threading.RLock())
                status = work(lambda: os.write(write, b"!"))
                sys.stderr.flush()
            finally:
                os._exit(status)
        os.close(write)

    def ready(self) -> None:
        """Wait until it said so."""
        assert os.read(self._read, 1) == b"!", "a process ended before it was ready"

    def ended(self) -> int | None:
        """Its status if it has ended by itself."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.close()

    def close(self) -> None:
        os.close(self._read)


def main(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    system.set_num_threads(1)
    draw = random.Random(seed)
    split = split_pretrained(tiny_model_directory(folder / "model"))
    table = write_csv(folder / "train.csv", rows(0, 90))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    files = ["--data", str(table), "--label-column", "category", "--known-bundles", "none"]
    options = [*files, "--steps", str(STEPS), "--batch-size", "16", "--lora-r", "4", "--lr", "0.02", "--seed", "3"]
    options += ["--verify-every", "0"]  # an owner that goes on learns its checks anew, from generators that repeat
    log = folder / "log"

    def serve(ready: Callable[[], object]) -> int:
        with Server(split, port=port):
            ready()
            signal.pause()
        return 0

    def own(out: Path) -> Callable[[Callable[[], object]], int]:
        def run(ready: Callable[[], object]) -> int:
            return cli.main(["train", "--server", f"127.0.0.1:{port}", *options, "--threads", "1", "--out", str(out)])

        return run

    def start_server() -> Process:
        server = Process(serve, log)
        server.ready()
        return server

    def finish(owner: Process) -> None:
        while (status := owner.ended()) is None:
            time.sleep(0.01)
        owner.close()
        assert status == 0, log.read_text()

    begin = time.monotonic()
    server = start_server()
    finish(Process(own(folder / "undisturbed"), log))
    seconds = time.monotonic() - begin
    counts = {"server": 0, "owner": 0}
    runs = different = lost = 0
    try:
        while sum(counts.values()) < kills:
            out = folder / f"run{runs}"
            owner = Process(own(out), log)
            while True:
                time.sleep(draw.uniform(0.0, seconds / 6))
                status = owner.ended()
                if status == 1 and NOBODY in log.read_text().splitlines()[-1]:
                    # The server was killed before this owner had asked it for anything, and so it gave up.
                    owner.close()
                    owner = Process(own(out), log)
                    continue
                if status is not None or sum(counts.values()) >= kills:
                    break
                victim = draw.choice(sorted(counts))
                counts[victim] += 1
                if victim == "server":
                    server.kill()
                    time.sleep(draw.uniform(0.0, 0.2))
                    server = start_server()
                else:
                    owner.kill()
                    owner = Process(own(out), log)
            if status is None:
                finish(owner)
            else:
                owner.close()
                assert status == 0, log.read_text()
            runs += 1
            lost += numbers(out) != numbers(folder / "undisturbed")
            different += adapter(out) != adapter(folder / "undisturbed")
            sys.stderr.write(f"{counts} in {runs} runs, {lost} with other losses, {different} with another adapter\n")
    finally:
        server.kill()
    return {
        "kills": counts,
        "runs": runs,
        "steps": STEPS,
        "runs with other losses": lost,
        "runs with another adapter": different,
        "seconds undisturbed": seconds,
        "seconds": time.monotonic() - begin,
        "went on": log.read_text().count("going on after step"),
        "waited": log.read_text().count("trying again"),
    }


def numbers(out: Path) -> list[tuple[float, float, int]]:
    """Loss, rate and tokens of every step."""
    steps = json.loads((out / "metrics.json").read_text())["steps"]
    return [(step["loss"], step["lr"], step["tokens"]) for step in steps]


def adapter(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def seeded() -> None:
    """Have the core's randomness follow from the step that draws it."""
    entropy = ctypes.CDLL(None).privtuner_test_entropy
    entropy.argtypes = [ctypes.c_uint64]
    whole = training.set_rates

    def set_rates(optimizer: torch.optim.Optimizer, step: int, config: Any) -> None:
        entropy(step)
        whole(optimizer, step, config)

    training.set_rates = set_rates


if __name__ == "__main__":
    seeded()
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))) + "\n")

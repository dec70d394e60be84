"""Runs `privtuner train` many times and sends it signals at random moments: how does it end, and what is left?

    python tests/support/presses.py HOST:PORT CSV OUT COUNT [DOUBLE]    prints a line of JSON for each run

One process imports everything once and forks for every run, so that a run takes a second rather than ten.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from privtuner import cli

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANG_SECONDS = 120.0


def run(line: list[str], delays: list[float], number: int, log: Path, trained: bool) -> dict[str, object]:
    """Start ``privtuner`` with ``line``; after each of ``delays``, from its first step on if ``trained``, send it
    ``number``; wait for its end.
    """
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv[1:] = line
        os.write(tell, b"!")
        sys.exit(cli.main())
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    while trained and b"s/step" not in log.read_bytes():
        time.sleep(0.05)
    for delay in delays:
        time.sleep(delay)
        with suppress(ProcessLookupError):
            os.kill(child, number)
    pressed = time.monotonic()
    while time.monotonic() - pressed < HANG_SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return {"status": code, "seconds": time.monotonic() - pressed, "delays": delays, "signal": number}
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return {"status": "hangs", "seconds": HANG_SECONDS, "delays": delays, "signal": number}


def main(address: str, csv: str, out: str, count: str, double: str = "") -> None:
    for each in SIGNALS:  # what a shell gives a program in the foreground
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)

    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from privtuner.service import RemoteTransport  # noqa: F401
    from privtuner.train import dataset, limits, report, training  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # or every child would walk, and so copy, all of it on its way out
    chance = random.Random(os.environ.get("PRESSES_SEED", "1"))
    length = float(os.environ.get("PRESSES_SECONDS", "3"))
    for number in range(int(count)):
        folder, log = Path(out) / str(number), Path(out) / f"{number}.log"
        line = ["train", "--server", address, "--data", csv, "--eval", csv, "--label-column", "category"]
        line += ["--steps", "100000", "--batch-size", "8", "--lora-r", "2", "--out", str(folder)]
        delays = [chance.uniform(0.05, length)] + ([chance.choice([0.01, 0.1, 0.4, 0.8])] if double else [])
        ended = run(line, delays, chance.choice(SIGNALS), log, trained=bool(number % 2))
        saved = folder / "interrupted" / "adapter_model.safetensors"
        ended["saved"] = saved.stat().st_size if saved.exists() else None
        ended["trained"] = "s/step" in log.read_text(errors="replace")
        ended["traceback"] = "Traceback" in log.read_text(errors="replace")
        print(json.dumps(ended), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

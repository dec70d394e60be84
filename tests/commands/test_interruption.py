"""Training that is told to end, at random moments and as often as `PRIVTUNER_TEST_PRESSES` says: it never hangs.

And what a terminal that closes, a full disk and a kill leave behind, in processes of their own.
"""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import safe_open

import presses
from text_cases import environment, rows, server_process, write_csv

COUNT = int(os.environ.get("PRIVTUNER_TEST_PRESSES", "6"))


@contextmanager
def started(line, **options):
    """A process that does not outlive the test."""
    process = subprocess.Popen(line, env=environment(), **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(model):
    with server_process(model) as (_, address):
        yield address


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "train.csv", rows(0, 60))


def training(table, out, *way):
    line = ["train", *way, "--data", table, "--label-column", "category", "--lora-r", 2, "--batch-size", 8]
    return [sys.executable, "-m", "privtuner", *map(str, [*line, "--steps", 1000000, "--out", out])]


@pytest.mark.parametrize("double", ["", "double"])
def test_signals_at_random_moments(address, table, tmp_path, double):
    line = [sys.executable, presses.__file__, address, str(table), str(tmp_path), str(COUNT), double]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    runs = [json.loads(entry) for entry in done.stdout.splitlines()]
    assert len(runs) == COUNT, done.stderr
    for run in runs:
        # By the signal itself where it came before the command took signals, or the second one after it did.
        assert run["status"] in (128 + run["signal"], -run["signal"]), run
        assert not run["traceback"], run
        # A second press may come before the adapter is on disk; a first one waits until it is.
        assert run["saved"] or double or not run["trained"], run
    assert all(run["trained"] for run in runs[1::2])


def adapter(folder):
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary


def test_terminal_that_closes(model, table, tmp_path):
    """What the kernel does then: SIGHUP, and every write to the terminal fails."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))  # wide enough for the numbers
    line = training(table, tmp_path / "out", "--plain", "--model", model)
    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    with started(line, start_new_session=True, **ends) as owner:
        os.close(terminal)
        seen = b""
        while b"s/step" not in seen:
            seen += os.read(controller, 1 << 16)
        os.close(controller)
        owner.send_signal(signal.SIGHUP)  # the test's session has no terminal to lose
        assert owner.wait(60) == 129
    assert adapter(tmp_path / "out" / "interrupted")


def test_killed_training_goes_on(model, table, tmp_path):
    """What the same command goes on with."""
    line = training(table, tmp_path / "out", "--plain", "--model", model)
    folder = tmp_path / "out" / "checkpoints"
    with started(line, stderr=subprocess.DEVNULL) as owner:
        while not list(folder.glob("checkpoint-*")):
            assert owner.poll() is None
            time.sleep(0.05)
        owner.kill()
        owner.wait()
    with started(line, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stderr is not None
        said = []
        while not said or "going on after step" not in said[-1]:
            said.append(owner.stderr.readline())
            assert said[-1], said
        owner.send_signal(signal.SIGTERM)
        assert owner.wait(180) == 143
        said += owner.stderr.readlines()
    assert any(re.match(r"privtuner: the same command goes on after step \d+ of 1000000", entry) for entry in said), (
        said
    )
    assert adapter(tmp_path / "out" / "interrupted")


def test_server_that_is_told_to_end_while_it_prepares(model):
    program = (
        "import sys, time; from privtuner import cli, nn\n"
        "nn.split_pretrained = lambda *_, **__: time.sleep(60)\n"
        "sys.exit(cli.main())"
    )
    line = [sys.executable, "-c", program, "serve", "--model", str(model), "--port", "0"]
    with started(line, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert "preparing" in server.stderr.readline()
        server.terminate()
        assert server.wait(60) == 143
        assert server.stderr.read() == "privtuner: error: interrupted\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_server_that_is_told_to_end(model, number):
    with server_process(model) as (server, _):
        server.send_signal(number)
        out, err = server.communicate(timeout=30)
    assert server.returncode == 0
    assert re.search(r"^privtuner: stopped after 0 requests\n\Z", out, re.MULTILINE)
    assert "Traceback" not in err


def test_command_that_writes_into_nothing(tmp_path):
    """Whoever read the results has gone."""
    line = f"{sys.executable} -m privtuner info | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode in (0, 1)  # 0 where it was quicker than its reader
    assert done.stderr in ("", "privtuner: error: Broken pipe\n")
    assert not list(Path(tmp_path).iterdir())

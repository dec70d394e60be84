"""`privtuner` in a process of its own that need not import first: ten seconds of each such test are nothing else.

One process imports what the commands do. For each command it forks, so the command has a process, an environment, ends
of pipes and signals of its own, as from a shell. Tests of what comes before, or of other programs, start Python.
"""

from __future__ import annotations

import array
import atexit
import functools
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, NoReturn

_LARGEST_ORDER = 1 << 17
_MODULES = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "privtuner.cli",
    "privtuner.commands.serve",
    "privtuner.commands.train",
    "privtuner.service",
    "privtuner.train",
)


class Command:
    """A command that runs: what the tests use of `subprocess.Popen`, with text pipes for its output and errors."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        (self._report, report), (out, its_out), (err, its_err) = os.pipe(), os.pipe(), os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        order = json.dumps({"arguments": arguments, "environment": environment, "folder": str(Path.cwd())}).encode()
        assert len(order) <= _LARGEST_ORDER
        ends = [nothing, its_out, its_err, report]
        socket.send_fds(_workshop(), [order], ends)
        for end in ends:
            os.close(end)
        self.stdout, self.stderr = (open(end, encoding="utf-8") for end in (out, err))  # noqa: PTH123, SIM115
        self.pid = self._number()
        self.returncode: int | None = None
        self._read: list[str] = ["", ""]
        self._readers: list[threading.Thread] = []

    def _number(self) -> int:
        word = os.read(self._report, 4)
        assert len(word) == 4, "the process that forks is gone"
        return int.from_bytes(word, sys.byteorder, signed=True)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, or minus the signal that ended it; `subprocess.TimeoutExpired` after ``timeout`` seconds."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._report, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("privtuner", timeout or 0.0)
            self.returncode = self._number()
            os.close(self._report)
        return self.returncode

    def poll(self) -> int | None:
        """The exit status of a command that has ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        """Send a signal to a command that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to standard output and to standard error that has not been read."""
        if not self._readers:
            for place, stream in enumerate((self.stdout, self.stderr)):
                self._readers.append(threading.Thread(target=self._drain, args=(place, stream), daemon=True))
                self._readers[-1].start()
        self.wait(timeout)
        for reader in self._readers:
            reader.join()
        return self._read[0], self._read[1]

    def _drain(self, place: int, stream: IO[str]) -> None:
        with stream:
            self._read[place] = stream.read()


@functools.cache
def _workshop() -> socket.socket:
    """Start the process that forks; the socket that takes its orders."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _LARGEST_ORDER)
    threads = {"OMP_NUM_THREADS": "1", "PRIVTUNER_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "GRPC_VERBOSITY": "NONE"}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    theirs.close()

    def close() -> None:
        ours.close()
        process.wait()

    atexit.register(close)
    return ours


def _serve(orders: socket.socket) -> None:
    """Fork for every order until nobody is left to give one."""
    for name in _MODULES:
        importlib.import_module(name)
    gc.freeze()  # or every child would walk, and so copy, all of it on its way out
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        order, ends, _, _ = socket.recv_fds(orders, _LARGEST_ORDER, 4)
        if not order:
            return
        if os.fork() == 0:
            orders.close()
            _keep(json.loads(order), *ends)
        for end in ends:
            os.close(end)


def _keep(order: dict[str, Any], stdin: int, stdout: int, stderr: int, report: int) -> NoReturn:
    """Fork once more, for the command; report its number and then how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        os.close(report)
        for number, end in enumerate((stdin, stdout, stderr)):
            os.dup2(end, number)
            os.close(end)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        sys.argv[1:] = order["arguments"]

        from privtuner import cli

        sys.exit(cli.main())
    for end in (stdin, stdout, stderr):
        os.close(end)
    os.write(report, array.array("i", [child]).tobytes())
    _, status = os.waitpid(child, 0)
    os.write(report, array.array("i", [os.waitstatus_to_exitcode(status)]).tobytes())
    os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))

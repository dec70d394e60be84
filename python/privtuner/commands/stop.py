"""Ending a command from outside: Ctrl-C, SIGTERM, SIGHUP. Once: it ends in order. Once more: it ends at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from privtuner.errors import PrivtunerError

__all__ = ["Stop", "Stopped"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

ONE_PRESS_SECONDS = 0.3
"""Signals within this time of the first count as one: a terminal and a wrapper both pass Ctrl-C on."""


class Stopped(KeyboardInterrupt):
    """The command was asked to end.

    Attributes:
        status: exit status, 128 and the number of the signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.status = 128 + number


class Stop:
    """Takes the signals that end a command, as a context manager. In a thread other than the main one it takes none.

    The first signal raises `Stopped` in the main thread wherever it is, or inside `deferred` only where `check` is
    called. A thread of its own reads the signals, so that they count whatever the main thread is doing: it ends the
    process at the second one, and calls back those who wait for something else (`on_stop`).

    Args:
        own_process: nothing follows the command in this process. After a signal, later ones then end the process even
            when the block is left; otherwise the handlers there were are put back.
    """

    def __init__(self, own_process: bool = False) -> None:
        self.number: int | None = None
        """The first signal, None before."""
        self._own_process = own_process
        self._asked = threading.Event()
        self._deferred = self._handled = False
        self._callbacks: list[Callable[[], object]] = []
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raise `Stopped` if there was a signal."""
        if self.number is not None:
            raise Stopped(self.number)

    def wait(self) -> None:
        """Return when there is a signal."""
        self._asked.wait()

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Hold a signal back inside the block: an exception there could come between any two instructions.

        Raises:
            Stopped: there was a signal before or inside. It replaces an error of this package that followed from it.
        """
        self._deferred = True
        try:
            self.check()
            yield
        except PrivtunerError as error:
            if self.number is not None:
                raise Stopped(self.number) from error
            raise
        finally:
            self._deferred = False
        self.check()

    @contextmanager
    def on_stop(self, callback: Callable[[], object]) -> Iterator[None]:
        """Inside the block, let the first signal call ``callback`` in a thread of its own."""
        self._callbacks.append(callback)
        try:
            self.check()
            yield
        finally:
            self._callbacks.remove(callback)

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():
            return self
        # A signal in between waits, and is only noted then, or it would leave half of this done.
        self._deferred = True
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="privtuner-signals", daemon=True)
        self._watcher.start()
        for number in SIGNALS:
            before = signal.getsignal(number)
            # nohup asks to outlive the terminal; a handler that is not Python's could not be put back.
            if before is None or (number == signal.SIGHUP and before is signal.SIG_IGN):
                continue
            self._before[number] = before
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._deferred = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._deferred = True
        final = self._own_process and self.number is not None
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if final else before)
        signal.set_wakeup_fd(self._wakeup)
        self._theirs.close()
        self._watcher.join()
        self._ours.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - Python's signature
        self.number = self.number or number
        first, self._handled = not self._handled, True
        if first and not self._deferred:
            raise Stopped(self.number)

    def _watch(self) -> None:
        first: float | None = None
        while received := self._ours.recv(64):
            for number in received:
                if number not in self._before:
                    continue
                if first is not None:
                    if time.monotonic() - first > ONE_PRESS_SECONDS:
                        os._exit(128 + number)
                    continue
                first = time.monotonic()
                self.number = self.number or number
                self._asked.set()
                for callback in tuple(self._callbacks):
                    # A thread each: this one must be free for the second signal.
                    threading.Thread(target=_quietly, args=(callback,), daemon=True).start()


def _quietly(callback: Callable[[], object]) -> None:
    with suppress(Exception):
        callback()

"""The audit log: one line of JSON for each answer and refusal, of who, when, what and how much; never of data."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from privtuner.errors import InputError, LostError
from privtuner.service.counts import CANCELLED, OK, Event

__all__ = ["AuditLog"]

_log = logging.getLogger(__name__)

_SYNC_SECONDS = 1.0
_REFUSALS = 10  # lines a second: who is refused must not fill the disk


class AuditLog:
    """Appends events to a file, and sees to it that no answer goes unrecorded. A context manager, safe in threads.

    A line is handed to the operating system before its call ends, and to the disk within a second: a process that is
    killed loses none but those of the calls in progress, a machine that loses power those of a second as well. A line
    that cannot be written is kept and tried again before the next call; until that succeeds `admit` refuses all calls.
    Of refusals, ten a second have a line and the others a number in a later one. A file that was renamed is left, and
    a new one begun with the next line: logrotate needs no signal.

    Args:
        path: of the file: appended to, or made so that this user alone can read it.

    Raises:
        privtuner.errors.InputError: it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._unwritten: list[bytes] = []
        self._torn = self._failing = self._unsynced = False
        self._second, self._refusals, self._unrecorded = 0, 0, 0
        try:
            self._file = self._open()
            self._append(_line({"call": "start", "process": os.getpid()}))
            os.fsync(self._file)
        except OSError as error:
            raise InputError(f"the audit log cannot be written to {path}: {error.strerror}; choose another") from error
        self._ended = threading.Event()
        self._syncing = threading.Thread(target=self._sync, name="privtuner-audit", daemon=True)

    def admit(self) -> None:
        """Check before a call that it can be recorded.

        Raises:
            privtuner.errors.LostError: the file cannot be written.
        """
        with self._lock:
            self._write_waiting()
            self._refuse_while_failing()

    def write(self, event: Event) -> None:
        """Append a line about ``event``.

        Raises:
            privtuner.errors.LostError: it cannot be written, and the event is an answer, which is to fail then.
        """
        with self._lock:
            if event.outcome in (OK, CANCELLED):
                self._unwritten.append(_line(event.to_dict()))
            elif self._may_tell_refusal():
                self._unwritten.append(_line(event.to_dict() | {"unrecorded": self._unrecorded}))
                self._unrecorded = 0
            else:
                self._unrecorded += 1
            self._write_waiting()
            if event.outcome == OK:
                self._refuse_while_failing()

    def __enter__(self) -> AuditLog:
        self._syncing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._syncing.join()
        with self._lock:
            self._unwritten.append(_line({"call": "end", "unrecorded": self._unrecorded}))
            self._write_waiting()
            with suppress(OSError):
                os.fsync(self._file)
            os.close(self._file)

    def _may_tell_refusal(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._refusals = second, 0
        self._refusals += 1
        return self._refusals <= _REFUSALS and not self._failing

    def _refuse_while_failing(self) -> None:
        if self._failing:
            raise LostError("the server cannot record calls and so takes none; try again later, or ask its operator")

    def _write_waiting(self) -> None:
        """Write what waits, as far as it goes; tell the log when that begins to fail, and when it works again."""
        try:
            self._follow()
            while self._unwritten:
                self._append(self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            self._fail(error)
            return
        if self._failing:
            _log.warning("the audit log is written again")
        self._failing = False

    def _fail(self, error: OSError) -> None:
        if not self._failing:
            _log.error("the audit log cannot be written to %s: %s; calls are refused", self._path, error.strerror)
        self._failing = True

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _follow(self) -> None:
        """Begin a new file where the path no longer leads to the one that is open."""
        try:
            there, ours = self._path.stat(), os.fstat(self._file)
            if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                return
        except FileNotFoundError:
            pass
        opened = self._open()
        with suppress(OSError):
            os.fsync(self._file)
        os.close(self._file)
        self._file, self._torn = opened, False

    def _append(self, line: bytes) -> None:
        if self._torn:  # what a full disk cut off must not spoil another line
            os.write(self._file, b"\n")
            self._torn = False
        written = os.write(self._file, line)
        self._unsynced = True
        if written < len(line):
            self._torn = written > 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sync(self) -> None:
        while not self._ended.wait(_SYNC_SECONDS):
            with self._lock:
                if not self._unsynced:
                    continue
                # Another name of the file, which no new file replaces in the middle.
                self._unsynced, file = False, os.dup(self._file)
            try:
                os.fsync(file)
            except OSError as error:
                with self._lock:
                    self._fail(error)
            finally:
                os.close(file)


def _line(entry: dict[str, Any]) -> bytes:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"time": now} | entry).encode() + b"\n"

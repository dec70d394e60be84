"""What ``privtuner serve`` logs, and how: a line of text or of JSON each."""

from __future__ import annotations

import argparse
import json
import logging
import logging.handlers
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from privtuner.errors import InputError

__all__ = ["add_logs", "logging_to"]

_LEVELS = ("debug", "info", "warning", "error")


def add_logs(parser: argparse.ArgumentParser) -> None:
    """Declare ``--log-format``, ``--log-level`` and ``--log-file``."""
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-level",
        choices=_LEVELS,
        default="warning",
        help="debug: every call; info: calls that are refused; warning (default): what needs an operator; error",
    )
    group.add_argument("--log-format", choices=["text", "json"], default="text", help="text (default), or JSON lines")
    group.add_argument(
        "--log-file", metavar="FILE", help="append to a file, which may be renamed meanwhile (default: stderr)"
    )


@contextmanager
def logging_to(arguments: argparse.Namespace) -> Iterator[None]:
    """Log as the options say inside the block.

    Raises:
        InputError: the file cannot be written.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if arguments.log_file is not None:
        try:
            handler = logging.handlers.WatchedFileHandler(arguments.log_file, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--log-file {arguments.log_file}: {error.strerror}") from error
    handler.setFormatter(_Json() if arguments.log_format == "json" else _Text())
    root, ours = logging.getLogger(), logging.getLogger("privtuner")
    before = ours.level
    root.addHandler(handler)
    ours.setLevel(arguments.log_level.upper())
    try:
        yield
    finally:
        ours.setLevel(before)
        root.removeHandler(handler)
        handler.close()


class _Text(logging.Formatter):
    """``TIME LEVEL MESSAGE``, in which nothing can begin a line or steer a terminal; tracebacks are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        lines = [f"{_time(record)} {record.levelname} {_clean(record.getMessage())}"]
        if record.exc_info:
            lines += [f"    {_clean(line)}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)


class _Json(logging.Formatter):
    """An object a line: time, level, logger, message, what is known of a call, and the traceback of a fault."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        call: Mapping[str, Any] | None = getattr(record, "call", None)
        entry |= {"message": record.getMessage()} if call is None else {"message": "call ended", **call}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

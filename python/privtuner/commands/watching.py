"""How the operator of ``privtuner serve`` watches it: metrics, audit log, and a log of text or JSON lines."""

from __future__ import annotations

import argparse
import json
import logging
import logging.handlers
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from privtuner.errors import InputError
from privtuner.foreign import foreign_text

if TYPE_CHECKING:
    from privtuner.service import Server
    from privtuner.service.audit import AuditLog
    from privtuner.service.metrics import Metrics

__all__ = ["add_watching", "auditing", "check_watching", "logging_to", "telling_metrics"]

_MOST = 10_000  # characters of a line
_LEVELS = ("debug", "info", "warning", "error")


def add_watching(parser: argparse.ArgumentParser) -> None:
    """Declare ``--metrics``, ``--audit`` and the options of the log."""
    group = parser.add_argument_group("what the operator sees")
    group.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="answer Prometheus, and 'privtuner top --metrics', there: HTTP without encryption (default: nothing)",
    )
    group.add_argument(
        "--expose-metrics",
        action="store_true",
        help="let --metrics be an address that other machines can reach: whoever asks sees the counts of all tenants",
    )
    group.add_argument(
        "--audit",
        metavar="FILE",
        help="append a line of JSON for each call: who, when, what, how much; while it cannot be written calls are "
        "refused",
    )
    group.add_argument(
        "--log-level",
        choices=_LEVELS,
        default="warning",
        help="debug: every call; info: calls that are refused; warning (default): what needs an operator; error",
    )
    group.add_argument("--log-format", choices=["text", "json"], default="text", help="text (default), or JSON lines")
    group.add_argument("--log-file", metavar="FILE", help="append the log to a file, not to standard error")


def check_watching(arguments: argparse.Namespace) -> None:
    """Refuse an address that `Metrics` would, before a model is loaded.

    Raises:
        InputError: see `privtuner.service.metrics.Metrics`.
    """
    if arguments.metrics is not None:
        from privtuner.service.metrics import check_metrics_address

        check_metrics_address(arguments.metrics, arguments.expose_metrics)
    elif arguments.expose_metrics:
        raise InputError("--expose-metrics goes with --metrics only")


def auditing(arguments: argparse.Namespace) -> AbstractContextManager[AuditLog | None]:
    """Return the audit log that the options ask for, to be entered.

    Raises:
        InputError: it cannot be written.
    """
    if arguments.audit is None:
        return nullcontext()
    from privtuner.service.audit import AuditLog

    return AuditLog(arguments.audit)


def telling_metrics(arguments: argparse.Namespace, server: Server) -> AbstractContextManager[Metrics | None]:
    """Return the endpoint of metrics that the options ask for, to be entered.

    Raises:
        InputError: another program has the port, or this machine has no such address.
    """
    if arguments.metrics is None:
        return nullcontext()
    from privtuner.service.metrics import Metrics

    return Metrics(server.view, arguments.metrics, exposed=arguments.expose_metrics)


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
        lines = [f"{_time(record)} {record.levelname} {foreign_text(record.getMessage(), _MOST)}"]
        if record.exc_info:
            lines += [f"    {foreign_text(line, _MOST)}" for line in self.formatException(record.exc_info).splitlines()]
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

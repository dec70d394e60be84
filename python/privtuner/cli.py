"""The command ``privtuner``; `privtuner.commands` lists what it can do.

Results go to standard output, progress and errors to standard error. Exit status: 0 done, 1 failed, 2 the arguments or
the data cannot be used, 3 done, but an allocation is not certified to the tolerance asked for, 130 ended by Ctrl-C, 143
by SIGTERM, 129 by SIGHUP (a server that was told to end is done: 0). The first such signal ends a command in order,
`train` with the adapter saved; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from privtuner._core import __version__
from privtuner.commands import COMMANDS
from privtuner.commands.stop import Stop, Stopped
from privtuner.errors import InputError, PrivtunerError
from privtuner.packages import missing

__all__ = ["main"]

_STATUSES = (
    "Exit status: 0 done, 1 failed, 2 the arguments or the data cannot be used, 130 ended by Ctrl-C, 143 by SIGTERM, "
    "129 by SIGHUP. The first such signal ends a command in order, a second one at once."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: arguments after the command's name; those of the process when None.
    """
    # Nothing is ever downloaded, and gRPC's log duplicates our errors.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        with Stop(own_process=argv is None) as stop:
            line = sys.argv[1:] if argv is None else argv
            chosen = next((word for word in line if not word.startswith("-")), None)
            arguments = _parser(chosen).parse_args(line)
            arguments.stop = stop
            stop.check()
            status: int = arguments.run(arguments)
            sys.stdout.flush()
        return status
    except InputError as error:
        return _fail(error, 2)
    except PrivtunerError as error:
        return _fail(error, 1)
    except ModuleNotFoundError as error:
        explained = missing(error, "this command")
        if explained is None:
            raise
        return _fail(explained, 1)
    except Stopped as stopped:
        return _fail("interrupted", stopped.status)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        _drop_unwritten()
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}", 1)
    except MemoryError:
        return _fail("this machine has not the memory for it; ask for less at once, e.g. a smaller batch", 1)


def _fail(reason: object, status: int) -> int:
    with suppress(OSError):  # the terminal may be gone
        print("privtuner: error:", " ".join(str(reason).split()), file=sys.stderr, flush=True)
    return status


def _drop_unwritten() -> None:
    """Keep the interpreter from writing at its end what standard output refused."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # it is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the command, and in its help what the statuses mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__(epilog=_STATUSES, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"privtuner: error: {message}; see '{self.prog} --help'\n")


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of the command ``chosen`` and a line about each other command."""
    parser = _Parser(
        prog="privtuner",
        description="Fine-tune transformers on a server that holds the weights and never sees the data. "
        "'privtuner COMMAND --help' tells more of a command; 'privtuner demo' shows it at work.",
    )
    parser.add_argument("--version", action="version", version=f"privtuner {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if name == chosen:
            command = importlib.import_module(f"privtuner.commands.{name.replace('-', '_')}")
            command.add(subparser)
            subparser.set_defaults(run=command.run)
    return parser

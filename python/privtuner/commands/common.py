"""What several commands share: arguments, threads, lines of progress."""

from __future__ import annotations

import argparse
import shutil
import sys
import time

from privtuner import system

__all__ = [
    "Progress",
    "about",
    "add_scheme",
    "add_threads",
    "quiet_transformers",
    "say",
    "set_threads",
]

_QUIET_SECONDS = 2.0
_REDRAW_SECONDS = 0.1
_SILENCE_SECONDS = 300.0
_WIPE = "\r\x1b[K"


def add_scheme(parser: argparse.ArgumentParser, text: str) -> None:
    """Declare ``--scheme``, of which ``text`` says what it decides."""
    from privtuner.schemes import SCHEMES

    default = next(iter(SCHEMES))
    known = "; ".join(f"{name} ({scheme.carries})" for name, scheme in SCHEMES.items())
    parser.add_argument("--scheme", choices=SCHEMES, default=default, help=f"{text}: {known}; default {default}")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Declare ``--threads``."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all processors)")


def set_threads(threads: int | None) -> None:
    """Limit the threads of the core and of PyTorch; None leaves them."""
    if threads is not None:
        system.set_num_threads(threads)
        import torch

        torch.set_num_threads(threads)


def quiet_transformers() -> None:
    """Keep the libraries' own remarks out of the command's output."""
    import warnings

    import transformers

    # A user of this command can act on none of the warnings of PEFT and transformers about each other.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def say(line: str) -> None:
    """Print a line of progress to standard error."""
    print(f"privtuner: {line}", file=sys.stderr, flush=True)


class Progress:
    """Tells standard error how much of a piece of work is done and about how long the rest takes.

    What the library's slow functions take as ``progress``: they call it with what is done and what there is to do, for
    the first time before they begin. On a terminal one line is rewritten and wiped out at the end; elsewhere there is a
    line for each tenth of the work and for every five minutes, and never two within two seconds. A context manager:
    leaving it wipes.

    Args:
        title: what is being done.
        unit: unit of the numbers, written after them.
        scale: how much of what is counted makes one unit.
    """

    def __init__(self, title: str, unit: str = "", *, scale: float = 1) -> None:
        self._title, self._unit, self._scale = title, unit, scale
        self._start: tuple[float, float] | None = None
        self._told = 0.0
        self._tenths = -1
        self._shown = False

    def __call__(self, done: float, total: float, what: str = "") -> None:
        """Tell that ``done`` of ``total`` is done; ``what`` names the piece that comes next."""
        now, tenths = time.monotonic(), int(10 * done / total) if total else 10
        if self._start is None:
            self._start, self._told = (now, done), now
        elapsed, advance = now - self._start[0], done - self._start[1]
        silence, terminal = now - self._told, sys.stderr.isatty()
        if terminal:
            due = silence >= _REDRAW_SECONDS
        else:
            due = silence >= (_QUIET_SECONDS if tenths > self._tenths else _SILENCE_SECONDS)
        if not due or elapsed < _QUIET_SECONDS:
            return
        self._told, self._tenths, self._shown = now, tenths, terminal
        parts = [f"{done / self._scale:,.0f} of {total / self._scale:,.0f} {self._unit}".rstrip()]
        if advance > 0 and done < total:
            parts.append(f"{about(elapsed * (total - done) / advance)} left")
        if what and done < total:
            parts.append(what)
        line = f"privtuner: {self._title}: {', '.join(parts)}"
        if terminal:
            sys.stderr.write(_WIPE + line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write(_WIPE)
            sys.stderr.flush()


def about(seconds: float) -> str:
    """A length of time as people say it: "about 40 s", "about 3 min", "about 2 h 10 min"."""
    if seconds < 90:
        return f"about {round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    return f"about {minutes // 60} h {minutes % 60} min" if minutes < 24 * 60 else f"about {minutes / 60:,.0f} h"

"""What several commands share: arguments, threads, lines of progress."""

from __future__ import annotations

import argparse
import sys

import privtuner

__all__ = ["add_engine", "add_threads", "quiet_transformers", "say", "set_threads"]


def add_engine(parser: argparse.ArgumentParser, text: str) -> None:
    """Declare ``--engine`` with its help text."""
    parser.add_argument("--engine", choices=["native", "openfhe"], default="native", help=text)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Declare ``--threads``."""
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all processors)")


def set_threads(threads: int | None) -> None:
    """Limit the threads of the core and of PyTorch; None leaves them."""
    if threads is not None:
        privtuner.set_num_threads(threads)
        import torch

        torch.set_num_threads(threads)


def quiet_transformers() -> None:
    """Keep the libraries' own remarks out of the command's output."""
    import warnings

    import transformers

    # What PEFT and transformers think of each other is nothing a user of this command can act on.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def say(line: str) -> None:
    """Print a line of progress to standard error."""
    print(f"privtuner: {line}", file=sys.stderr, flush=True)

"""Whether results can be written where the user wants them, in errors that name the place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

__all__ = ["ensure_writable", "ensure_writable_file", "writing"]


def ensure_writable(directory: str | Path) -> Path:
    """Make ``directory`` if need be and write to it, so that a mistake shows before hours of training, not after.

    Raises:
        privtuner.errors.InputError: it cannot be made or written to.
    """
    folder = Path(directory)
    probe = folder / ".privtuner-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another directory") from error
    return folder


def ensure_writable_file(path: str | Path) -> None:
    """Check that ``path`` can be written, leaving what it holds as it is.

    Raises:
        privtuner.errors.InputError: it cannot.
    """
    file = Path(path)
    existed = file.exists()
    try:
        file.open("a").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}; choose another file") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing ``path`` into an `InputError` that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from error

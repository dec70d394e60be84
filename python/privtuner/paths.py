"""Results on disk: whether they can be written where the user wants them, and written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from privtuner.errors import InputError

__all__ = ["ensure_writable", "ensure_writable_file", "put", "replacing", "writing"]


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
    """Check that ``path`` can be written as `replacing` does, leaving what it holds as it is.

    Raises:
        privtuner.errors.InputError: it cannot.
    """
    file = Path(path)
    existed = file.exists()
    try:
        file.open("a").close()
        if not existed:
            file.unlink()
        if (target := _resolve(file)) is not None:
            probe = _name_beside(target)
            probe.write_bytes(b"\0")
            probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}; choose another file") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing ``path`` into an `InputError` that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write what takes the place of ``path`` when the block ends well, whole and safe on the disk.

    Until then, and if the block fails, ``path`` stays as it was. What is no file, such as ``/dev/stdout`` or a pipe, is
    written as it is.

    Raises:
        OSError: the disk is full, or ``path`` cannot be written.
    """
    target = _resolve(path)
    if target is None:
        yield path
        return
    new = _name_beside(target)
    try:
        yield new
        put(new, target)
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


def put(new: Path, target: Path) -> None:
    """Move the file ``new`` to ``target`` on the same disk, contents first: a crash leaves the old one or the new one.

    Raises:
        OSError: the disk is full, or ``target`` cannot be written.
    """
    with new.open("rb") as file:
        os.fsync(file.fileno())
    if target.exists():
        shutil.copymode(target, new)
    new.replace(target)
    with suppress(OSError):  # some file systems do not sync folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _resolve(path: Path) -> Path | None:
    """Return the file that ``path`` names, or will name, behind links; None for what is no file."""
    target = path.resolve()
    # A stream may be a file, too, and whoever redirected it there goes on writing to it.
    stream = str(path.parent) in ("/dev", "/dev/fd") or path.is_relative_to("/proc")
    return None if stream or (target.exists() and not target.is_file()) else target


def _name_beside(target: Path) -> Path:
    """Return a name in the same folder with the same suffix, which may decide the format."""
    return target.with_name(f".{target.stem}-{os.getpid()}.part{target.suffix}")

"""Whether OpenFHE is there, which, and how many threads it uses. The only module that imports ``_openfhe``."""

from __future__ import annotations

import importlib
import os
import tempfile
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from privtuner import _core
from privtuner.ckks.arguments import whole
from privtuner.errors import EngineError, InputError
from privtuner.packages import CHECKOUT
from privtuner.paths import writing

__all__ = ["Saved", "Status", "available", "library", "num_threads", "set_num_threads", "status"]

_INSTALL = (
    "install OpenFHE 1.2 or newer with shared libraries (https://openfhe.org), then build privtuner again where CMake "
    f"finds it: CMAKE_PREFIX_PATH=<its prefix> pip install --force-reinstall --no-deps . {CHECKOUT}"
)


class Status(NamedTuple):
    """Whether OpenFHE can be used, and why not."""

    available: bool
    version: str
    """Empty where it is absent."""
    reason: str
    """Where it was found; or where it was looked for, and what to install."""


@lru_cache(maxsize=1)
def _module() -> Any:
    """The extension module, or the text of the error on importing it."""
    try:
        return importlib.import_module("privtuner._openfhe")
    except ModuleNotFoundError:
        return f"{_core.openfhe_status}; {_INSTALL}"
    except ImportError as error:
        return f"privtuner was built with it, but its libraries do not load ({error}): put OpenFHE back, or build again"


def status() -> Status:
    """Say whether OpenFHE can be used, which one it is, and why not."""
    module = _module()
    if isinstance(module, str):
        return Status(False, "", module)
    return Status(True, module.version, f"OpenFHE {module.version} in {module.library}")


def available() -> bool:
    """Whether OpenFHE can be used."""
    return status().available


def library() -> Any:
    """The extension module.

    Raises:
        EngineError: it is missing; the message says where OpenFHE was looked for and what to install.
    """
    module = _module()
    if isinstance(module, str):
        raise EngineError(f"OpenFHE is not available: {module}")
    return module


def num_threads() -> int:
    """How many OpenMP threads OpenFHE uses."""
    return int(library().num_threads())


def set_num_threads(n: int) -> None:
    """Let OpenFHE use ``n`` OpenMP threads, in the whole process. The default is what OMP_NUM_THREADS says, or all.

    A child process made by ``fork`` computes on one; it may use OpenFHE only if no other thread did at the fork.

    Raises:
        InputError: n outside 1 to 1024, or above 1 in a child of ``fork``.
        EngineError: a child of a ``fork`` at which another thread used OpenFHE. So does every operation.
    """
    library().set_num_threads(whole("num_threads", n))


class Saved(ABC):
    """Files that hold what ``to_bytes`` gives, as OpenFHE's ``Serial::SerializeToFile`` in binary writes them."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Serialise."""

    def save(self, path: str | Path) -> None:
        """Write ``to_bytes()`` to a file.

        Raises:
            InputError: the file cannot be written; what it held before is kept.
        """
        write(path, self.to_bytes())


def write(path: str | Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file whole or not at all; ``mode`` is what it gets, whatever was there."""
    file = Path(path)
    with writing(file):
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # new, and its owner's alone
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
            partial.chmod(mode)
            partial.replace(file)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read(path: str | Path) -> bytes:
    """Read a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error

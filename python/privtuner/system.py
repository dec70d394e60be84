"""Threads and instruction-set paths of the compiled core, for the whole process, and the processor it runs on."""

from __future__ import annotations

import platform
from pathlib import Path

from privtuner import _core
from privtuner.errors import EngineError, InputError

__all__ = ["active_isa", "cpuinfo", "get_num_threads", "processor_name", "set_isa", "set_num_threads"]

_CPUINFO = Path("/proc/cpuinfo")


def get_num_threads() -> int:
    """Threads that the compiled core uses for one call.

    Default: the processors this process may run on, or the environment variable ``PRIVTUNER_NUM_THREADS``.

    Raises:
        EngineError: that variable holds no number in [1, 1024].
    """
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Set the threads of the compiled core, 1 <= n <= 1024. Independent of ``torch.set_num_threads``.

    Raises:
        InputError: n is outside the range.
    """
    if not 1 <= n <= 1024:
        raise InputError(f"n = {n}: the number of threads must be in [1, 1024]")
    _core.set_num_threads(n)


def active_isa() -> str:
    """The instruction-set path in force: ``"portable"``, ``"avx2"``, ``"avx512"``, ``"avx512ifma"`` or ``"amx"``.

    Raises:
        EngineError: the environment variable ``PRIVTUNER_ISA`` names a path that is unknown or not usable here.
    """
    return _core.active_isa()


def set_isa(name: str) -> None:
    """Force an instruction-set path. Every path gives the same bits; this is for tests and measurements.

    Raises:
        InputError: no such path.
        EngineError: this build, processor or operating system cannot run it.
    """
    for path in _core.isa_paths():
        if path["name"] == name:
            if not path["usable"]:
                raise EngineError(f"instruction-set path '{name}' cannot be used here: {path['obstacle']}")
            _core.set_active_isa(name)
            return
    known = ", ".join(path["name"] for path in _core.isa_paths())
    raise InputError(f"unknown instruction-set path '{name}': choose one of {known}")


def cpuinfo(key: str) -> list[str]:
    """What Linux tells of every processor under ``key``; nothing elsewhere."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def processor_name() -> str:
    """The marketing name where the system tells it (Linux), else what Python knows, or "unknown"."""
    return next(iter(cpuinfo("model name")), "") or platform.processor() or "unknown"

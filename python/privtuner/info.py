"""What this installation can do: version, compiler, instruction-set paths, engines and why others are absent."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import textwrap
from typing import Any

from . import _core, cuda
from .errors import EngineError
from .openfhe import library
from .packages import advice
from .system import active_isa, processor_name

__all__ = ["collect", "render"]

_OPTIONAL = ("torch", "transformers", "peft", "grpc")


def collect() -> dict[str, Any]:
    """Gather the facts, JSON-serialisable. Imports CuPy, if it is there, and no other optional package.

    Keys: ``version``, ``python``, ``numpy``, ``compiler``, ``machine``, ``processor``, ``threads``, ``isa`` (``paths``
    with name, compiled, usable, obstacle; ``active``; ``error`` if PRIVTUNER_ISA is unusable), ``engines`` (name,
    available, reason), ``presets``, ``packages`` (optional packages and their versions, None when absent).
    """
    try:
        active: str | None = active_isa()
        isa_error = None
    except EngineError as error:
        active, isa_error = None, str(error)
    return {
        "version": _core.__version__,
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "compiler": _core.compiler,
        "machine": platform.machine(),
        "processor": processor_name(),
        "threads": _core.num_threads(),
        "isa": {"paths": _core.isa_paths(), "active": active, "error": isa_error},
        "engines": _engines(),
        "presets": [_core.preset_info(name) for name in _core.PRESETS],
        "packages": {name: _version(name) for name in _OPTIONAL},
    }


def render(facts: dict[str, Any]) -> str:
    """The facts of `collect` as text for people."""
    lines = [
        f"privtuner {facts['version']}, Python {facts['python']}, NumPy {facts['numpy']}",
        f"compiled by {facts['compiler']}",
        f"processor: {facts['processor']} ({facts['machine']}), {facts['threads']} threads",
        "kernels, by instruction set:",
    ]
    for path in facts["isa"]["paths"]:
        obstacle = "cannot be used: " + ("not compiled" if not path["compiled"] else path["obstacle"])
        state = "in use" if path["name"] == facts["isa"]["active"] else "can be used" if path["usable"] else obstacle
        lines.append(f"  {path['name']:<14}{state}")
    if facts["isa"]["error"]:
        lines += _wrapped("error", facts["isa"]["error"])
    lines.append("engines:")
    for engine in facts["engines"]:
        lines += _wrapped(engine["name"], f"{'present' if engine['available'] else 'absent'}: {engine['reason']}")
    lines.append("presets of the encrypted product:")
    for preset in facts["presets"]:
        lines.append(
            f"  {preset['name']:<14}weights of {8 * preset['weight_bytes']} bits; N = {preset['n']}, q = {preset['q']}"
        )
    lines.append("packages for training and for the service:")
    for name, version in facts["packages"].items():
        lines += _wrapped(name, version or f"not installed: {advice(name)}")
    return "\n".join(lines)


def _wrapped(name: str, text: str) -> list[str]:
    indent = " " * 16
    return textwrap.wrap(
        text,
        110,
        initial_indent=f"  {name:<14}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _engines() -> list[dict[str, Any]]:
    openfhe, gpus = library.status(), cuda.status()
    return [
        {"name": "native", "available": True, "reason": "built in"},
        {"name": "openfhe", "available": openfhe.available, "reason": openfhe.reason},
        {"name": "cuda", "available": gpus.available, "reason": gpus.reason},
    ]


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version({"grpc": "grpcio"}.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

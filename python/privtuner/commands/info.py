"""``privtuner info``: what this installation can do, and for the rest what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import textwrap
from typing import Any

from privtuner import _core
from privtuner.errors import EngineError
from privtuner.packages import advice
from privtuner.schemes import SCHEMES
from privtuner.system import active_isa, processor_name

__all__ = ["add", "collect", "render", "run"]

_OPTIONAL = ("torch", "transformers", "peft", "grpc")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = "Say what this installation can do, and for the rest what is missing."
    parser.add_argument("--json", action="store_true", help="print JSON, with more in it")


def run(arguments: argparse.Namespace) -> int:
    """Print the facts."""
    facts = collect()
    print(json.dumps(facts, indent=1) if arguments.json else render(facts))
    return 0


def collect() -> dict[str, Any]:
    """Gather the facts, JSON-serialisable. Imports CuPy, if it is there, and no other optional package.

    Keys: ``version``, ``python``, ``numpy``, ``compiler``, ``machine``, ``processor``, ``threads``, ``isa`` (``paths``
    with name, compiled, usable, obstacle; ``active``; ``error`` if PRIVTUNER_ISA is unusable), ``schemes`` (name,
    carries, ``devices`` with name, available, reason), ``presets``, ``packages`` (optional packages and their versions,
    None when absent).
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
        "schemes": _schemes(),
        "presets": [_core.preset_info(name) for name in _core.PRESETS],
        "packages": {name: _version(name) for name in _OPTIONAL},
    }


def render(facts: dict[str, Any]) -> str:
    """Return the facts of `collect` as text."""
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
        lines += _wrap("error", facts["isa"]["error"])
    lines.append("schemes of the encrypted product, and the devices that compute them:")
    for scheme in facts["schemes"]:
        lines += _wrap(scheme["name"], scheme["carries"])
        for device in scheme["devices"]:
            state = "present" if device["available"] else "absent"
            lines += _wrap(f"  {device['name']}", f"{state}: {device['reason']}")
    lines.append("presets of the encrypted product:")
    for preset in facts["presets"]:
        lines.append(
            f"  {preset['name']:<14}weights of {8 * preset['weight_bytes']} bits; N = {preset['n']}, q = {preset['q']}"
        )
    lines.append("packages for training and for the service:")
    for name, version in facts["packages"].items():
        lines += _wrap(name, version or f"not installed: {advice(name)}")
    return "\n".join(lines)


def _wrap(name: str, text: str) -> list[str]:
    indent = " " * 16
    return textwrap.wrap(
        text,
        110,
        initial_indent=f"  {name:<14}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _schemes() -> list[dict[str, Any]]:
    found = []
    for scheme in SCHEMES.values():
        states = {name: backend.status() for name, backend in scheme.backends.items()}
        devices = [
            {"name": name, "available": state.available, "reason": state.reason} for name, state in states.items()
        ]
        found.append({"name": scheme.name, "carries": scheme.carries, "devices": devices})
    return found


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version({"grpc": "grpcio"}.get(module, module))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

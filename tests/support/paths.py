"""Runs the tests with the code paths of other processors: ``make test-paths PATHS="sse isa-portable"``.

A path is a set of environment variables that keep NumPy, OpenBLAS, PyTorch and the kernels here from using all that
this processor has. The whole Python suite runs on each path of the libraries, the tests of the kernels, in C++ as well,
on each path of the kernels. What this machine or these versions do not have is left out and named. NumPy alone has
names for its paths that differ by version: they are asked of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
KERNELS = ["core/test_residue_product.py", "linear/test_*.py", "ckks/test_*.py"]
PROBE = """
import numpy, torch
x = numpy.linspace(0, 1, 99)
numpy.exp(x) @ numpy.outer(x, x), torch.nn.functional.linear(torch.ones(9, 9), torch.ones(9, 9)).exp()
"""


class Way(NamedTuple):
    """One way to run tests."""

    name: str
    environment: dict[str, str]
    kernels: bool = False
    options: tuple[str, ...] = ()
    obstacle: str = ""
    """Why it cannot be run here; empty if it can."""


def numpy_features() -> list[str]:
    """What NumPy chooses at run time and uses on this processor, by the names this version has for it."""
    try:
        from numpy._core import _multiarray_umath as numpy_core
    except ImportError:  # NumPy 1
        from numpy.core import _multiarray_umath as numpy_core
    return [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__[name]]


def limited(disabled: list[str], openblas: str, torch: str, onednn: str, mkl: str) -> dict[str, str]:
    """The variables that hold the libraries back."""
    return {
        **({"NPY_DISABLE_CPU_FEATURES": " ".join(disabled)} if disabled else {}),
        "OPENBLAS_CORETYPE": openblas,
        "ATEN_CPU_CAPABILITY": torch,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }


def paths() -> Iterator[Way]:
    """Every path there is."""
    from privtuner import _core

    features = numpy_features()
    wide = [name for name in features if name.startswith("AVX512") or name == "X86_V4"]
    none = "" if wide else "NumPy uses no AVX-512 here: make test runs this path"
    yield Way("avx2", limited(wide, "Haswell", "avx2", "AVX2", "AVX2"), obstacle=none)
    yield Way("sse", limited(features, "Nehalem", "default", "SSE41", "SSE4_2"))
    yield Way("jitter", {}, options=("-p", "jitter"))
    for isa in _core.isa_paths():
        yield Way(f"isa-{isa['name']}", {"PRIVTUNER_ISA": isa["name"]}, kernels=True, obstacle=isa["obstacle"])


def say(line: str) -> None:
    """Print a line before what the tests print."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(path: Way, tests: list[str], ctest: str | None) -> str:
    """Run the tests on one path and say what came of it."""
    environment = {
        **os.environ,
        **path.environment,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH")))),
    }
    probe = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], env=environment, capture_output=True, text=True
    )
    if probe.returncode:
        return f"left out: {(probe.stderr.splitlines() or [f'ended with status {probe.returncode}'])[-1]}"
    if path.kernels:
        tests = tests or [str(file) for pattern in KERNELS for file in sorted((ROOT / "tests").glob(pattern))]
    say(f"\n=== {path.name}: {' '.join(f'{key}={value!r}' for key, value in path.environment.items())}")
    commands = [[sys.executable, "-m", "pytest", "-q", *path.options, *tests]]
    if path.kernels and ctest:
        commands.append(["ctest", "--test-dir", ctest, "--output-on-failure", "--no-tests=error"])
    start = time.monotonic()
    failed = [command[0] for command in commands if subprocess.run(command, env=environment, cwd=ROOT).returncode]
    return f"{'FAILED' if failed else 'passed'} in {time.monotonic() - start:.0f} s"


def main() -> int:
    """Run what the command line names, print a table, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="avx2, sse, jitter, isa-portable, isa-avx2 ... (default: all)")
    parser.add_argument("--tests", default="", help="files for pytest (default: all, or those of the kernels)")
    parser.add_argument("--ctest", metavar="DIR", help="build folder of the C++ tests")
    arguments = parser.parse_args()
    known = {path.name: path for path in paths()}
    if unknown := set(arguments.paths) - set(known):
        parser.error(f"no path is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results = {}
    for name in arguments.paths or known:
        path = known[name]
        results[name] = (
            f"left out: {path.obstacle}" if path.obstacle else run(path, arguments.tests.split(), arguments.ctest)
        )
    say("")
    for name, result in results.items():
        say(f"{name:16}{result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

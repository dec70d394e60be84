"""The kernels' sources and signatures, read from the package: nothing here needs CUDA."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any

import numpy as np

from privtuner.errors import EngineError, InputError

__all__ = ["Kernel", "kernels", "source", "units"]

_TYPES: dict[str, Any] = {
    "i8": np.int8,
    "u8": np.uint8,
    "u16": np.uint16,
    "i32": np.int32,
    "u32": np.uint32,
    "i64": np.int64,
    "u64": np.uint64,
    "float": np.float32,
    "double": np.float64,
}
_KERNEL = re.compile(r"^PT_KERNEL\((\w+),\s*(\d+),\s*\(([^)]*)\)", re.MULTILINE)
_PARAMETER = re.compile(r"^(?:const\s+)?(?:pt::)?(\w+)\s*(\*?)\s*(\w+)$")
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel."""

    name: str
    dtype: np.dtype[Any]
    pointer: bool

    @cached_property
    def _limits(self) -> tuple[int, int] | None:
        """Least and largest whole number; None of floating point."""
        if self.dtype.kind == "f":
            return None
        limits = np.iinfo(self.dtype)
        return int(limits.min), int(limits.max)

    def checked(self, value: Any) -> Any:
        """An array as it is, a number as a scalar of the dtype. Every launch comes through here, so it is brief."""
        if not self.pointer:
            limits = self._limits
            if limits is not None and not limits[0] <= value <= limits[1]:
                raise InputError(f"{value} does not fit {self.dtype}")
            return self.dtype.type(value)
        dtype = getattr(value, "dtype", None)
        if dtype != self.dtype:
            raise InputError(f"expected an array of {self.dtype}, got {dtype or type(value).__name__}")
        if isinstance(value, np.ndarray):  # CuPy would pass one of a single element by value: an address to a kernel
            raise InputError("the array lies on the host, not on the device: upload it")
        if not value.flags.c_contiguous:
            raise InputError("the array is not contiguous")
        return value


@dataclass(frozen=True)
class Kernel:
    """An entry point: where its source is, the most threads a block of it has, what it takes."""

    name: str
    unit: str
    max_threads: int
    parameters: tuple[Parameter, ...]

    def arguments(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Numbers as the types the kernel takes them in, arrays checked: a GPU would read anything.

        Raises:
            InputError: another number of arguments, a number out of range, an array of another dtype or not contiguous.
        """
        if len(given) != len(self.parameters):
            raise InputError(f"kernel {self.name} takes {len(self.parameters)} arguments, got {len(given)}")
        checked = []
        for parameter, value in zip(self.parameters, given, strict=True):
            try:
                checked.append(parameter.checked(value))
            except InputError as error:
                raise InputError(f"kernel {self.name}, argument {parameter.name}: {error}") from None
        return tuple(checked)


@cache
def units() -> tuple[str, ...]:
    """Names of the translation units: each compiles on its own, when one of its kernels is first used."""
    folder = resources.files(__package__) / "kernels"
    return tuple(sorted(file.name[:-3] for file in folder.iterdir() if file.name.endswith(".cu")))


@cache
def source(unit: str) -> str:
    """The whole source of a unit, what it includes from the package in place of the lines that include it.

    One text, so that whoever caches the compiled code by its source sees every change.
    """
    return _expand(f"{unit}.cu", set())


@cache
def kernels() -> dict[str, Kernel]:
    """Every kernel of every unit by name."""
    found = {}
    for unit in units():
        for name, threads, parameters in _KERNEL.findall(source(unit)):
            listed = tuple(_parameter(name, text) for text in parameters.split(","))
            found[name] = Kernel(name, unit, int(threads), listed)
    return found


def _parameter(kernel: str, text: str) -> Parameter:
    match = _PARAMETER.match(" ".join(text.split()))
    if match is None or match[1] not in _TYPES:
        raise EngineError(
            f"kernel {kernel}: parameter '{text.strip()}' is of no known type; this is a bug in privtuner"
        )
    return Parameter(match[3], np.dtype(_TYPES[match[1]]), bool(match[2]))


def _expand(name: str, seen: set[str]) -> str:
    seen.add(name)
    text = (resources.files(__package__) / "kernels" / name).read_text(encoding="utf-8")

    def include(match: re.Match[str]) -> str:
        return "" if match[1] in seen else _expand(match[1], seen)

    return _INCLUDE.sub(include, text.replace("#pragma once\n", ""))

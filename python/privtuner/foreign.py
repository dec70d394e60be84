"""What comes from the other side and is read or shown here: text without control characters, JSON within bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from privtuner.errors import MessageError

__all__ = ["foreign_entry", "foreign_json", "foreign_text"]

T = TypeVar("T")

_JSON_BYTES = 1 << 20
_DEPTH = 16
_TEXT = 200


def foreign_text(text: object, most: int = _TEXT) -> str:
    """Return a text of the other side as it may reach a terminal, a log or an exception.

    Characters that are not printable (control characters, escape sequences, changes of direction, ends of lines) become
    ``?``, and what is beyond ``most`` characters is left out.
    """
    shown = "".join(char if char.isprintable() else "?" for char in str(text)[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def foreign_json(data: bytes, what: str, most: int = _JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object of the other side.

    Args:
        data: UTF-8.
        what: it is, for errors.
        most: bytes of the longest one that is read.

    Raises:
        MessageError: longer, no JSON object, nested deeper than 16, an entry that is there twice, or a number that is
            not finite or beyond 64 bits.
    """
    if len(data) > most:
        raise MessageError(f"{what}: {len(data)} bytes of JSON, at most {most} are read")
    try:
        value = json.loads(
            data.decode(), parse_constant=_refuse, parse_float=_finite, parse_int=_short, object_pairs_hook=_once
        )
    except (ValueError, RecursionError) as error:  # also of UTF-8
        raise MessageError(
            f"{what}: malformed, no JSON that is read here; use the same version on both sides"
        ) from error
    level: list[Any] = [value]
    for _ in range(_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise MessageError(f"{what}: JSON nested deeper than {_DEPTH}")
    if not isinstance(value, dict):
        raise MessageError(f"{what}: holds a {type(value).__name__} instead of an object")
    return value


def foreign_entry(entries: Mapping[str, Any], name: str, kind: type[T], what: str) -> T:
    """Return an entry of a JSON object, which must be there and of this very type; whole numbers not below 0.

    Raises:
        MessageError: it is not.
    """
    value = entries.get(name)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise MessageError(f"{what}: its entry {name} is missing or not as it should be; use the same version")
    return value


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _refuse(_: str) -> Any:
    raise ValueError("a number that is not finite")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _short(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 64:
        raise ValueError("a number beyond 64 bits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("an entry that is there twice")
    return entries

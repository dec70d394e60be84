"""Systems and tables of tiers in TOML or JSON files, by the suffix of the name.

::

    privacy_price = 0.02                 # J a bit of security
    tiers = "tiers.toml"                 # beside this file; or [[tiers]] tables here; or left out: the package's own

    [channel]
    bandwidth = 20e6                     # Hz
    noise_density = 3.98e-21             # W/Hz

    [server]
    frequency = 60e9                     # cycles/s
    capacitance = 1e-28                  # J s^2 / cycle^3

    [[devices]]
    name = "phone"
    samples = 64
    gain = 1e-11
    ...

Keys are the fields of `System`, `Channel`, `Server`, `Device` and `Tier`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from privtuner.errors import InputError
from privtuner.paths import writing
from privtuner.wireless.model import Channel, Device, Server, System, Tier

__all__ = ["default_tiers", "load_system", "load_tiers", "save_tiers", "suffix_of"]

_PACKAGED = Path(__file__).with_name("tiers.toml")
_OWN_FIELDS = ("privacy_price", "INSECURE_security_floor")
_LARGEST = 1 << 28  # bytes; a table of a million devices fits

Record = TypeVar("Record", Channel, Device, Server, Tier)


def load_system(path: str | Path, *, tiers: Sequence[Tier] | None = None) -> System:
    """Read a system.

    Args:
        path: the path of a ``.toml`` or ``.json`` file.
        tiers: take the place of the file's own.

    Raises:
        InputError: the file cannot be read or parsed, or a field is missing, unknown or out of range; the message names
            file, field, value and range.
    """
    path = Path(path)
    table = _read(path)
    known = ("devices", "tiers", "server", "channel", *_OWN_FIELDS)
    _require_known(table, known, "", path)
    for name in ("devices", "server", "channel"):
        if name not in table:
            raise InputError(f"{path}: {name} is missing")
    given = tuple(tiers) if tiers is not None else _tiers_of(table.get("tiers"), path)
    devices = _records(Device, table["devices"], "devices", path)
    server = _record(Server, table["server"], "server", path)
    channel = _record(Channel, table["channel"], "channel", path)
    own = {name: table[name] for name in _OWN_FIELDS if name in table}
    try:
        return System(devices, given, server, channel, **own)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load_tiers(path: str | Path) -> tuple[Tier, ...]:
    """Read a table of tiers, as `save_tiers` or ``privtuner calibrate`` writes it.

    Raises:
        InputError: as `load_system`.
    """
    path = Path(path)
    table = _read(path)
    _require_known(table, ("tiers",), "", path)
    if "tiers" not in table:
        raise InputError(f"{path}: tiers is missing")
    return _records(Tier, table["tiers"], "tiers", path)


def default_tiers() -> tuple[Tier, ...]:
    """The parameter sets of this package, measured on one machine; its head says which. `calibrate` measures yours."""
    return load_tiers(_PACKAGED)


def save_tiers(path: str | Path, tiers: Sequence[Tier], comment: str = "") -> None:
    """Write a table of tiers, and above it, in TOML, the printable lines of a comment.

    Raises:
        InputError: no tiers, the suffix is neither ``.toml`` nor ``.json``, or the file cannot be written.
    """
    path = Path(path)
    if not tiers:
        raise InputError("tiers is empty: a table has at least one")
    records = [dataclasses.asdict(tier) for tier in tiers]
    if suffix_of(path) == ".json":
        text = json.dumps({"tiers": records}, indent=1) + "\n"
    else:
        lines = [f"# {line}" for line in comment.splitlines() if line.isprintable()]
        for record in records:
            lines += ["", "[[tiers]]", *(f"{name} = {_toml(value)}" for name, value in record.items())]
        text = "\n".join(lines).lstrip("\n") + "\n"
    with writing(path):
        path.write_text(text, encoding="utf-8")


def _tiers_of(value: Any, path: Path) -> tuple[Tier, ...]:
    if value is None:
        return default_tiers()
    if isinstance(value, str):
        return load_tiers(path.parent / value)
    return _records(Tier, value, "tiers", path)


def _toml(value: Any) -> str:
    # JSON's strings and numbers are TOML's, but for the control characters that names may not contain.
    return json.dumps(value, ensure_ascii=False)


def suffix_of(path: Path) -> str:
    """``.toml`` or ``.json``; any other name raises `InputError`."""
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise InputError(f"{path}: the name must end in .toml or .json")
    return suffix


def _read(path: Path) -> dict[str, Any]:
    suffix = suffix_of(path)
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise InputError(f"{path} is larger than {_LARGEST} bytes")
        text = data.decode("utf-8")
        table = json.loads(text) if suffix == ".json" else _parse_toml(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # of either format, or of UTF-8
        raise InputError(f"{path} is not valid {suffix[1:].upper()}: {error}") from error
    if not isinstance(table, dict):
        raise InputError(f"{path}: must hold one table of fields, not {type(table).__name__}")
    return table


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    table: dict[str, Any] = tomllib.loads(text)
    return table


def _require_known(table: dict[str, Any], known: Sequence[str], where: str, path: Path) -> None:
    for name in table:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise InputError(f"{path}: {where}{name} is no known field; {hint}")


def _records(kind: type[Record], value: Any, where: str, path: Path) -> tuple[Record, ...]:
    if not isinstance(value, list):
        raise InputError(f"{path}: {where} = {_shorten(value)}: must be a list of tables, [[{where}]] in TOML")
    return tuple(_record(kind, entry, f"{where}[{place}]", path) for place, entry in enumerate(value))


def _record(kind: type[Record], value: Any, where: str, path: Path) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {where} = {_shorten(value)}: must be a table of fields")
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    _require_known(value, tuple(fields), f"{where}.", path)
    for name, entry in fields.items():
        if name not in value and entry.default is dataclasses.MISSING:
            unit = f", in {entry.metadata['unit']}" if "unit" in entry.metadata else ""
            raise InputError(f"{path}: {where}.{name} is missing{unit}")
    try:
        return kind(**value)
    except InputError as error:
        raise InputError(f"{path}: {where}.{error}") from None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

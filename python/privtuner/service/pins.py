"""Which bundle each server gave, so that another one is noticed: trust on first use, as ``ssh`` has it.

A bundle decides what the data owner runs, and what the sizes of its requests say. Whoever can exchange it, the server
or somebody in between, can read from sizes what texts hold.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privtuner.errors import InputError, ServiceError
from privtuner.paths import replacing, writing
from privtuner.service.reread import read_small

__all__ = ["KnownBundles", "check_bundle", "check_digest", "default_file"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_digest(digest: str) -> str:
    """Return a bundle's digest in small letters.

    Raises:
        privtuner.errors.InputError: it is not of 64 hexadecimal digits.
    """
    if not _DIGEST.fullmatch(digest.lower()):
        raise InputError(
            f"{digest[:80]!r} is no digest of a bundle: give the 64 hexadecimal digits that 'privtuner serve' prints"
        )
    return digest.lower()


def check_bundle(address: str, digest: str, expected: str | None, known: KnownBundles | None) -> None:
    """Compare the digest of a bundle that a server gave with what its user expects, or else with the one before.

    Raises:
        privtuner.errors.ServiceError: it is another one.
        privtuner.errors.InputError: the file of ``known`` cannot be read or written, or a line of it is malformed.
    """
    if expected is not None and expected != digest:
        raise ServiceError(
            f"the server at {address} gave the bundle {digest}, and {expected} is expected. It decides what runs here "
            "and what the sizes of requests say, so nothing was run: ask the model owner which one is right"
        )
    if known is None:
        return
    if expected is None:
        known.check(address, digest)
    else:
        known.put(address, digest)


def default_file() -> Path:
    """Return where the bundles that a user has met are kept, a file in the user's folder of configurations."""
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    # A relative path is to be ignored, says the XDG Base Directory Specification.
    base = Path(configured) if Path(configured).is_absolute() else Path.home() / ".config"
    return base / "privtuner" / "known_bundles"


class KnownBundles:
    """Addresses of servers and the digests of their bundles, in a file: a line each, ``HOST:PORT SHA256``.

    Args:
        file: made when the first one is met, with its folder.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)

    def find(self, address: str) -> str | None:
        """Return the digest known of ``address``; None if it was never met.

        Raises:
            privtuner.errors.InputError: the file cannot be read, or a line of it is malformed.
        """
        return self._read().get(address.lower())

    def check(self, address: str, digest: str) -> bool:
        """Compare a bundle with the one known of its server, and remember the first; return whether it is that.

        Raises:
            privtuner.errors.ServiceError: another one is known.
            privtuner.errors.InputError: the file cannot be read or written, or a line of it is malformed.
        """
        known = self.find(address)
        if known is None:
            self.put(address, digest)
            return True
        if known != digest:
            raise ServiceError(
                f"the server at {address} gave another bundle than before: {digest} instead of {known} in {self.file}. "
                "It decides what runs here and what the sizes of requests say, so nothing was run: ask the model owner "
                f"whether model or version changed, and if the new digest is right give it once, --expect {digest}"
            )
        return False

    def put(self, address: str, digest: str) -> None:
        """Remember the bundle of a server, in place of another one.

        Raises:
            privtuner.errors.InputError: the file cannot be read or written, or a line of it is malformed.
        """
        with writing(self.file):
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            lines = {**self._read(), address.lower(): digest}
            with writing(self.file), replacing(self.file) as new:
                new.touch(0o600)
                new.write_text("".join(f"{name} {value}\n" for name, value in lines.items()), encoding="utf-8")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from adding a line between this one's reading and writing."""
        with writing(self.file), self.file.with_name(f".{self.file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, str]:
        if not self.file.exists() or not self.file.stat().st_size:
            return {}
        found = {}
        for number, line in enumerate(read_small(self.file).decode(errors="replace").splitlines(), start=1):
            address, _, digest = line.partition(" ")
            if not (address and _DIGEST.fullmatch(digest)):
                raise InputError(f"{self.file}, line {number}, is not HOST:PORT SHA256; mend it, or take it out")
            found[address] = digest
        return found

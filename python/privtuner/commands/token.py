"""``privtuner token``: a secret word by which a server knows a data owner."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from privtuner.commands.common import say
from privtuner.errors import InputError
from privtuner.paths import writing

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Make a token for a data owner. The token goes to the owner, on a way that nobody listens to; its hash to the "
        "file of tenants, which a running server reads again by itself. To replace a token make another one for the "
        "same name, and take the old hash out of the file when it is no longer used."
    )
    parser.add_argument("name", metavar="NAME", help="the data owner's, as counts, quotas and logs have it")
    parser.add_argument("--tenants", required=True, metavar="FILE", help="the server's, made if need be")
    parser.add_argument("--out", metavar="FILE", help="where the token goes, readable by you alone (default: printed)")


def run(arguments: argparse.Namespace) -> int:
    """Make the token, and add its hash to the file."""
    from privtuner.service.security import make_token, token_digest
    from privtuner.service.tenants import add_token, check_name

    check_name(arguments.name, "the name")
    token = make_token()
    if arguments.out:
        _write(Path(arguments.out), token)
    count = add_token(Path(arguments.tenants), arguments.name, token_digest(token))
    if not arguments.out:
        print(token)
    more = "" if count == 1 else f", which has {count} of {arguments.name} now"
    say(f"its hash is in {arguments.tenants}{more}; serve with --tenants {arguments.tenants}")
    return 0


def _write(path: Path, token: str) -> None:
    if path.exists():
        raise InputError(f"{path} is there already; move it away, or choose another --out")
    with writing(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{token}\n")

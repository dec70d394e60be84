"""``privtuner certs``: certificates for the connection between data owners and a server."""

from __future__ import annotations

import argparse

from privtuner.errors import InputError

__all__ = ["add", "run"]

_DAYS = 90


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Make certificates for TLS, signed by an authority of your own, which is made with the first of them. For "
        "development, and where model owner and data owners hand each other files; elsewhere take those of your "
        "organisation. Keep ca-key.pem to yourself: whoever has it can pass for the server."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the files go; holds the authority")
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="HOST",
        help="a name or address that data owners connect to; may be given several times, all for one certificate",
    )
    parser.add_argument(
        "--client", action="append", default=[], metavar="NAME", help="a data owner; may be given several times"
    )
    parser.add_argument(
        "--days", type=int, default=_DAYS, metavar="N", help="how long they are good (default %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Make the certificates, and say who gets what."""
    from privtuner.service.certificates import Authority

    if not (arguments.server or arguments.client):
        raise InputError("nothing to make: give --server HOST, --client NAME, or both")
    authority = Authority(arguments.out)
    if arguments.server:
        certificate, key = authority.issue_server(arguments.server, arguments.days)
        print(f"server: privtuner serve --certificate {certificate} --key {key}")
        print(f"owners: privtuner train --ca {authority.certificate}")
    for name in arguments.client:
        certificate, key = authority.issue_client(name, arguments.days)
        print(f"{name}: privtuner train --certificate {certificate} --key {key}")
    if arguments.client:
        print(f"server, to serve no others: --client-ca {authority.certificate}")
    return 0

"""What commands share of a connection: how it is protected, and what of the server's bundle is trusted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from privtuner.commands.common import Progress, say
from privtuner.commands.stop import Stop
from privtuner.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from privtuner.nn import OwnerBundle
    from privtuner.service import RemoteTransport

__all__ = [
    "add_bundle",
    "add_line",
    "add_server_line",
    "check_line",
    "connection",
    "fetch",
    "given_line",
    "server_line",
]

_NONE = "none"


def add_server_line(parser: argparse.ArgumentParser) -> None:
    """Declare how a server's connections are protected."""
    group = parser.add_argument_group(
        "connection",
        "On an address that other machines can reach a server speaks TLS: 'privtuner certs' makes certificates, "
        "'privtuner token' makes tokens. Certificates and tenants are read again when they change.",
    )
    group.add_argument("--certificate", metavar="PEM", help="the server's certificate, with those that lead to its CA")
    group.add_argument("--key", metavar="PEM", help="the certificate's private key")
    group.add_argument(
        "--client-ca", metavar="PEM", help="serve only who shows a certificate of one of these authorities"
    )
    group.add_argument(
        "--tenants", metavar="FILE", help="serve only these, known by tokens or certificates, see 'privtuner token'"
    )
    group.add_argument(
        "--allow-plaintext",
        action="store_true",
        help="listen on an address that other machines can reach without TLS: whoever is in between can exchange what "
        "owners run",
    )


def server_line(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of `add_server_line` say, as `privtuner.service.Server` takes it.

    Raises:
        InputError: a file cannot be used, or options contradict each other.
    """
    from privtuner.service import ServerCredentials, Tenants

    if (arguments.certificate is None) != (arguments.key is None):
        raise InputError("--certificate and --key go together: give both, or neither")
    if arguments.client_ca and not arguments.certificate:
        raise InputError("--client-ca goes with --certificate and --key: without TLS nobody shows a certificate")
    credentials = None
    if arguments.certificate:
        credentials = ServerCredentials(arguments.certificate, arguments.key, arguments.client_ca)
    tenants = Tenants(arguments.tenants)
    return {"credentials": credentials, "tenants": tenants, "allow_plaintext": arguments.allow_plaintext}


def add_line(parser: argparse.ArgumentParser) -> None:
    """Declare how a connection to a server is protected."""
    group = parser.add_argument_group(
        "connection",
        "TLS unless the server is on this machine. A token is in the variable PRIVTUNER_TOKEN, or in a file.",
    )
    group.add_argument(
        "--ca", metavar="PEM", help="authorities that the server's certificate must be of (default: the public ones)"
    )
    group.add_argument("--certificate", metavar="PEM", help="your certificate, for servers that ask for one")
    group.add_argument("--key", metavar="PEM", help="the certificate's private key")
    group.add_argument("--token-file", metavar="FILE", help="your token, as the model owner gave it to you")
    group.add_argument(
        "--allow-plaintext",
        action="store_true",
        help="connect to another machine without TLS: whoever is in between can exchange what you run",
    )


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Declare what of a server's bundle is trusted."""
    group = parser.add_argument_group(
        "trust",
        "The server's bundle decides what runs here and what the sizes of requests say, so another one than the first "
        "is refused.",
    )
    group.add_argument(
        "--expect", metavar="SHA256", help="of the bundle, as 'privtuner serve' prints it: take this one and no other"
    )
    group.add_argument(
        "--known-bundles",
        metavar="FILE",
        help="where the bundles of servers are kept (default: privtuner/known_bundles in your folder of "
        f"configurations); {_NONE}: take what comes",
    )
    group.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="your copy of the model's tokenizer, and of its config.json if that is there, in place of the server's",
    )


def given_line(arguments: argparse.Namespace) -> str | None:
    """Return an option of `add_line` or `add_bundle` that was given, as the user writes it; None if none was."""
    names = ("ca", "certificate", "key", "token_file", "allow_plaintext", "expect", "known_bundles", "tokenizer")
    found = next((name for name in names if getattr(arguments, name)), None)
    return None if found is None else f"--{found.replace('_', '-')}"


def check_line(arguments: argparse.Namespace, address: str) -> None:
    """Check all of `add_line` and `add_bundle` that needs no server.

    Raises:
        InputError: a file cannot be used, options contradict each other, or ``address`` is not HOST:PORT.
    """
    from privtuner.service.pins import check_digest

    _transport(arguments, address).close()
    if arguments.expect is not None:
        check_digest(arguments.expect)


@contextmanager
def connection(arguments: argparse.Namespace, address: str, stop: Stop) -> Iterator[RemoteTransport]:
    """Connect to a server, as the options of `add_line` say, until the block ends or the user asks to stop.

    Raises:
        InputError: a file cannot be used, options contradict each other, or ``address`` is not HOST:PORT.
    """
    from privtuner.service.protocol import is_loopback, parse_address

    with _transport(arguments, address) as transport, stop.on_stop(transport.close):
        if arguments.allow_plaintext and not is_loopback(parse_address(address)[0]):
            say(f"warning: nothing protects the line to {address}: whoever is in between can exchange what runs here")
        yield transport


def fetch(transport: RemoteTransport, arguments: argparse.Namespace) -> tuple[OwnerBundle, PreTrainedTokenizerBase]:
    """Fetch the bundle that the options of `add_bundle` allow, and return it with the tokenizer they choose.

    Raises:
        PrivtunerError: the connection failed, the bundle is another one, or malformed.
    """
    from privtuner.nn import own_files
    from privtuner.service import KnownBundles
    from privtuner.service.pins import default_file

    known = None if arguments.known_bundles == _NONE else KnownBundles(arguments.known_bundles or default_file())
    first = known is not None and arguments.expect is None and known.find(transport.address) is None
    with Progress("fetching", "MB", scale=1e6) as progress:
        bundle = transport.fetch_bundle(progress, expected=arguments.expect, known=known)
    if known is not None and first:
        say(f"the first bundle of {transport.address}, kept in {known.file}: {known.find(transport.address)}")
    return (bundle, bundle.tokenizer()) if arguments.tokenizer is None else own_files(bundle, arguments.tokenizer)


def _transport(arguments: argparse.Namespace, address: str) -> RemoteTransport:
    from privtuner.service import ClientCredentials, RemoteTransport, Token

    given = (arguments.ca, arguments.certificate, arguments.key)
    credentials = ClientCredentials(*given) if any(given) else None
    token = Token.load(arguments.token_file) if arguments.token_file else Token.from_environment()
    return RemoteTransport(address, credentials, token, allow_plaintext=arguments.allow_plaintext, say=say)

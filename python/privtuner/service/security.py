"""What protects a connection: certificates at both ends, and tokens.

TLS is gRPC's (BoringSSL): version 1.2 at least, and 1.3 where both ends are gRPC. A connection in the clear stays on
this machine, unless the caller says otherwise (`allow_plaintext`); a token never leaves it in the clear.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import grpc

from privtuner.copies import Stays
from privtuner.errors import InputError
from privtuner.service.protocol import is_loopback, parse_address
from privtuner.service.reread import Reread, read_small

__all__ = [
    "TOKEN_KEY",
    "TOKEN_VARIABLE",
    "ClientCredentials",
    "Line",
    "ServerCredentials",
    "Token",
    "make_token",
    "token_digest",
]

TOKEN_KEY = "authorization"  # noqa: S105 - a name
"""Metadata that carries a token, as in RFC 6750."""

TOKEN_VARIABLE = "PRIVTUNER_TOKEN"  # noqa: S105 - a name
"""Name of the variable of the environment that may hold a token."""

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{22,512}")


class Token(Stays):
    """A bearer token: whoever has it is the tenant it was made for.

    It shows in no repr, cannot be pickled, and no message of this package holds it.

    Args:
        value: 22 to 512 characters that a header of HTTP may hold, such as `secrets.token_urlsafe` gives.

    Raises:
        privtuner.errors.InputError: ``value`` has another form. It is not repeated.
    """

    stays = "a token cannot be pickled: read it from its file, or from the environment, in the process that needs it"

    def __init__(self, value: str) -> None:
        if not _TOKEN.fullmatch(value):
            raise InputError(
                f"this is no token: it has {len(value)} characters, and 22 to 512 letters, digits and ._~+/=- are due; "
                "make one with 'privtuner token'"
            )
        self._value = value

    @classmethod
    def load(cls, path: str | Path) -> Token:
        """Return the token that a file holds, alone on a line.

        Raises:
            privtuner.errors.InputError: the file cannot be read, or holds no token.
        """
        # An error of decoding would carry the bytes.
        value = read_small(Path(path)).decode("ascii", errors="replace").strip()
        if not _TOKEN.fullmatch(value):
            raise InputError(f"{path} holds no token alone on a line; make one with 'privtuner token'")
        return cls(value)

    @classmethod
    def from_environment(cls) -> Token | None:
        """Return the token in the variable `TOKEN_VARIABLE`; None if that is unset or empty.

        Raises:
            privtuner.errors.InputError: it holds something else.
        """
        value = os.environ.get(TOKEN_VARIABLE, "")
        if not value:
            return None
        try:
            return cls(value)
        except InputError as error:
            raise InputError(f"{TOKEN_VARIABLE}: {error}") from None

    def digest(self) -> str:
        """Return what a server keeps of it, see `token_digest`."""
        return token_digest(self._value)

    def metadata(self) -> tuple[str, str]:
        """Return the entry of a call's metadata that carries it. Secret."""
        return TOKEN_KEY, f"Bearer {self._value}"

    def __repr__(self) -> str:
        return "Token(...)"


def make_token() -> str:
    """Return the value of a new token: 256 bits of the operating system's randomness. Secret."""
    return secrets.token_urlsafe(32)


def token_digest(value: str) -> str:
    """Return the SHA-256 of a token as 64 hexadecimal digits.

    Tokens are random words of 128 bits and more: nobody finds one by trying, so a plain hash keeps it.
    """
    return hashlib.sha256(value.encode()).hexdigest()


@dataclass(frozen=True)
class ServerCredentials:
    """Files that a server shows, and asks for, in TLS. Read anew for each connection that finds them changed.

    Attributes:
        certificate: PEM, the server's certificate and, behind it, those between it and the authority.
        key: PEM, its private key, without a password.
        client_ca: PEM, authorities of the clients' certificates: then no client connects without one. None asks for
            no certificate.

    Raises:
        privtuner.errors.InputError: a file cannot be read, holds no certificate or key, or they do not belong together.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        _as_paths(self)
        self._load()

    def to_grpc(self) -> grpc.ServerCredentials:
        """Return what a port of gRPC takes.

        A new pair that cannot be used is logged, and the old one goes on.
        """
        files = [self.certificate, self.key, *([] if self.client_ca is None else [self.client_ca])]
        current = Reread(files, self._load, "certificate")
        return grpc.dynamic_ssl_server_credentials(current.value, current.poll, self.client_ca is not None)

    def _load(self) -> Any:
        roots = None if self.client_ca is None else _authorities(self.client_ca)
        return grpc.ssl_server_certificate_configuration([_pair(self.certificate, self.key)], roots)


@dataclass(frozen=True)
class ClientCredentials:
    """Files that a data owner trusts, and shows, in TLS.

    Attributes:
        ca: PEM, authorities that the server's certificate must come from; None for the public ones, which gRPC brings.
        certificate: PEM, the owner's certificate, for servers that ask for one.
        key: PEM, its private key, without a password.

    Raises:
        privtuner.errors.InputError: a file cannot be read, holds no certificate or key, or they do not belong together.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        _as_paths(self)
        if (self.certificate is None) != (self.key is None):
            raise InputError("certificate and key go together: give both files, or neither")
        self._load()

    def to_grpc(self) -> grpc.ChannelCredentials:
        """Return what a channel of gRPC takes."""
        return grpc.ssl_channel_credentials(*self._load())

    def _load(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Return authorities, private key and certificate."""
        ca = None if self.ca is None else _authorities(self.ca)
        if self.certificate is None or self.key is None:
            return ca, None, None
        return ca, *_pair(self.certificate, self.key)


class Line(Stays):
    """How a data owner reaches a server: where, over TLS or in the clear, and with which token.

    Args:
        address: HOST:PORT, an IPv6 host in brackets.
        credentials: for TLS. None is TLS with the public authorities, and no TLS to this machine itself.
        token: who the owner is, if the server asks.
        allow_plaintext: without ``credentials``, speak to another machine in the clear.

    Attributes:
        address: as given.
        encrypted: whether it is TLS.

    Raises:
        privtuner.errors.InputError: ``address`` is not HOST:PORT, a file of ``credentials`` cannot be used any more,
            ``allow_plaintext`` contradicts ``credentials``, or a token would cross a network in the clear.
    """

    stays = "a connection cannot be pickled: it stays in the process that opened it; open another one in the other"

    def __init__(
        self,
        address: str,
        credentials: ClientCredentials | None = None,
        token: Token | None = None,
        *,
        allow_plaintext: bool = False,
    ) -> None:
        host, _ = parse_address(address)
        local = is_loopback(host)
        if credentials is not None and allow_plaintext:
            raise InputError("allow_plaintext contradicts credentials for TLS: give one of the two")
        if credentials is None and not (local or allow_plaintext):
            credentials = ClientCredentials()
        if token is not None and credentials is None and not local:
            raise InputError(
                f"a token goes to {address} over TLS only: in the clear everybody in between could take it; leave out "
                "the token, or --allow-plaintext"
            )
        self.address = address
        self.encrypted = credentials is not None
        self._credentials = None if credentials is None else credentials.to_grpc()
        self._token = token

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What every call says of who calls. Secret."""
        return () if self._token is None else (self._token.metadata(),)

    def open(self, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Return a channel of gRPC, which connects with its first call."""
        if self._credentials is None:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, self._credentials, options=options)

    @property
    def hint(self) -> str:
        """What else may be wrong where a server closes the connection without a word."""
        if self.encrypted:
            return "one that asks for your certificate needs --certificate and --key"
        return "one that speaks TLS needs --ca"

    def explain(self, detail: str) -> str | None:
        """Return what TLS has against a connection, of what gRPC says of a failure; None if it is something else."""
        if "CERTIFICATE_VERIFY_FAILED" in detail and "expired" in detail:
            return (
                f"the certificate of the server at {self.address} has expired: ask the model owner for a new one, and "
                "look at this machine's clock"
            )
        if "CERTIFICATE_VERIFY_FAILED" in detail:
            return (
                f"the certificate of the server at {self.address} comes from no authority that is trusted here: ask "
                "the model owner for the authority's file (--ca); if you have it, somebody may be in between"
            )
        if "Hostname Verification" in detail:
            return (
                f"the certificate of the server at {self.address} is for another name: connect by a name that it is "
                "for, or have it made for this one too; or somebody is in between"
            )
        if "WRONG_VERSION_NUMBER" in detail:
            return (
                f"what answers at {self.address} speaks no TLS: start the server with --certificate and --key, or "
                "leave out --ca where it is on this machine"
            )
        return None


def _as_paths(credentials: ServerCredentials | ClientCredentials) -> None:
    for field in fields(credentials):
        value = getattr(credentials, field.name)
        object.__setattr__(credentials, field.name, None if value is None else Path(value))


def _pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Return the private key and the certificate, which belong together."""
    contents = read_small(key), read_small(certificate)
    try:
        # gRPC would say nothing before the first connection fails. The password is never asked for on a terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise InputError(
            f"{certificate} and {key} are no certificate and its private key ({reason}): give PEM files that belong "
            "together, the key without a password"
        ) from None
    return contents


def _authorities(path: Path) -> bytes:
    content = read_small(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        raise InputError(f"{path} holds no certificate of an authority ({reason}): give a PEM file") from None
    return content

"""Who calls: the name by which shares, quotas, counts and logs are kept.

A server that is given a file of tenants serves these alone, each by a token or by a certificate of its own::

    {
     "tenants": {
      "alice": {"token_sha256": ["9f2c..."], "quota": {...}},
      "bob": {"certificate": ["bob.example"]}
     },
     "default": {"quota": {...}}
    }

``token_sha256`` are hashes of tokens (`privtuner token` adds them), ``certificate`` names, common or alternative, in a
certificate that one of the server's authorities for clients has signed. Without a file a tenant is what its certificate
says, and where there is none, the host that it calls from.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from privtuner.errors import InputError
from privtuner.paths import replacing, writing
from privtuner.service.quotas import Quota
from privtuner.service.refusal import Refusal
from privtuner.service.reread import Reread, read_small
from privtuner.service.security import TOKEN_KEY, token_digest

__all__ = ["Tenant", "Tenants", "add_token", "check_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TENANTS, _DEFAULT, _QUOTA, _TOKENS, _CERTIFICATES = "tenants", "default", "quota", "token_sha256", "certificate"


@dataclass(frozen=True)
class Tenant:
    """One of those who share a server.

    Attributes:
        name: tells it from others; letters, digits and ``._@-``, or a host.
        authenticated: by a token or a certificate. Others go by their host, which many may share or change.
        quota: what it may use, as the file of tenants says.
    """

    name: str
    authenticated: bool = False
    quota: Quota = field(default_factory=Quota)


@dataclass(frozen=True)
class _Table:
    """What a file of tenants says."""

    tokens: Sequence[tuple[str, Tenant]]
    certificates: Mapping[str, Tenant]

    @classmethod
    def load(cls, path: Path) -> _Table:
        content = _read(path)
        default = content.get(_DEFAULT, {}).get(_QUOTA, {})
        tokens: dict[str, Tenant] = {}
        certificates: dict[str, Tenant] = {}
        for name, entry in content[_TENANTS].items():
            try:
                quota = Quota.parse(entry.get(_QUOTA, default))
            except InputError as error:
                raise InputError(f"{path}: {name}: {error}") from error
            tenant = Tenant(name, authenticated=True, quota=quota)
            for key, table in ((_TOKENS, tokens), (_CERTIFICATES, certificates)):
                for value in _listed(entry, key):
                    if value in table:
                        raise InputError(f"{path}: {table[value].name} and {name} share a {key}; give each its own")
                    table[value] = tenant
        return cls(tuple(tokens.items()), certificates)

    def of_token(self, token: str) -> Tenant | None:
        digest, found = token_digest(token), None
        # All of them, so that the time says nothing of which it was.
        for known, tenant in self.tokens:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


class Tenants:
    """Tells the tenants of a server apart, and turns away who is none.

    Args:
        file: of tenants, see the head of this module; read again when it changes. None serves everybody.

    Raises:
        privtuner.errors.InputError: the file cannot be read, or an entry is malformed or given twice.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        path = None if file is None else Path(file)
        self._table = None if path is None else Reread([path], lambda: _Table.load(path), "file of tenants")

    @property
    def closed(self) -> bool:
        """Whether only those are served who are named in a file."""
        return self._table is not None

    def of(self, context: Any) -> Tenant:
        """Return who makes a call, of its `grpc.ServicerContext`.

        Raises:
            Refusal: it is nobody's who may.
        """
        names = _certificate_names(context.auth_context())
        if self._table is None:
            return _named(names[0]) if names else Tenant(_host_of(context.peer()))
        self._table.poll()
        table = self._table.value
        found = {tenant.name: tenant for name in names if (tenant := table.certificates.get(name)) is not None}
        for value in (value for key, value in context.invocation_metadata() if key == TOKEN_KEY):
            tenant = table.of_token(_bearer(value))
            if tenant is None:
                raise _stranger()
            found[tenant.name] = tenant
        if len(found) != 1:  # nobody, or one with the token of another
            raise _stranger()
        return next(iter(found.values()))


def add_token(path: Path, name: str, digest: str) -> int:
    """Add a token's hash to those of a tenant in a file of tenants; make either if there is none.

    Args:
        path: the file.
        name: the tenant.
        digest: `privtuner.service.security.token_digest` of the token.

    Returns:
        How many tokens the tenant has now.

    Raises:
        privtuner.errors.InputError: the file cannot be read or written or is malformed, or ``name`` is none.
    """
    check_name(name, "the name")
    content = _read(path) if path.exists() else {_TENANTS: {}}
    entry = content[_TENANTS].setdefault(name, {})
    entry[_TOKENS] = [*_listed(entry, _TOKENS), digest]
    with writing(path), replacing(path) as new:
        new.touch(0o600)
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return len(entry[_TOKENS])


def check_name(name: str, what: str) -> None:
    """Check that ``name`` may be a tenant's: it goes into logs and labels of metrics, and into names of files.

    Raises:
        privtuner.errors.InputError: it may not; ``what`` begins the message.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{what} {name[:80]!r} is not made of up to 64 letters, digits and ._@-; take another")


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of tenants holds, of the right form."""
    try:
        content: dict[str, Any] = json.loads(read_small(path), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no file of tenants: {error}") from None
    _check_keys(content, (_TENANTS, _DEFAULT), path, "the file")
    _check_keys(content.get(_DEFAULT, {}), (_QUOTA,), path, _DEFAULT)
    tenants = content.get(_TENANTS)
    if not isinstance(tenants, dict):
        raise InputError(f"{path} is no file of tenants: it names no {_TENANTS}; add one with 'privtuner token NAME'")
    for name, entry in tenants.items():
        check_name(name, f"{path}: tenant")
        _check_keys(entry, (_TOKENS, _CERTIFICATES, _QUOTA), path, name)
        if not (_listed(entry, _TOKENS) or _listed(entry, _CERTIFICATES)):
            raise InputError(f"{path}: {name} has neither {_TOKENS} nor {_CERTIFICATES}; give it one, or take it out")
        for key in (_TOKENS, _CERTIFICATES):
            for value in _listed(entry, key):
                if not isinstance(value, str) or not value or (key == _TOKENS and not _DIGEST.fullmatch(value)):
                    due = "64 small hexadecimal digits" if key == _TOKENS else "a name"
                    raise InputError(f"{path}: {key} of {name} is not {due}, or a list of such")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _check_keys(entry: object, known: Iterable[str], path: Path, where: str) -> None:
    if not isinstance(entry, dict):
        raise InputError(f"{path}: {where} is no object of JSON")
    if strange := sorted(set(entry) - set(known)):
        raise InputError(f"{path}: {where} has no entry {strange[0]!r}; known are {', '.join(known)}")


def _listed(entry: Mapping[str, Any], key: str) -> list[Any]:
    value = entry.get(key, [])
    return list(value) if isinstance(value, list) else [value]


def _certificate_names(auth: Mapping[str, Sequence[bytes]]) -> list[str]:
    """Return the names of a client's certificate, the common one first; gRPC has verified it."""
    found = [*auth.get("x509_common_name", ()), *auth.get("x509_subject_alternative_name", ())]
    return [name.decode(errors="replace") for name in found]


def _named(name: str) -> Tenant:
    if not _NAME.fullmatch(name):
        raise Refusal(
            grpc.StatusCode.UNAUTHENTICATED,
            "the name in the client's certificate is not made of up to 64 letters, digits and ._@-; use another one",
        )
    return Tenant(name, authenticated=True)


def _bearer(value: str | bytes) -> str:
    """Return the token of a header; what is none gives a word that is nobody's."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    kind, _, token = text.partition(" ")
    return token if kind.lower() == "bearer" else ""


def _stranger() -> Refusal:
    return Refusal(
        grpc.StatusCode.UNAUTHENTICATED,
        "this server asks for authentication: give your token (--token-file FILE, or PRIVTUNER_TOKEN), or the "
        "certificate that it knows (--certificate, --key)",
    )


def _host_of(peer: str) -> str:
    """Return the host of what gRPC calls a peer; of an IPv6 address the network of 64 bits, which is one customer's."""
    family, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if family == "ipv6":
        address = ipaddress.IPv6Address(host)
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return host

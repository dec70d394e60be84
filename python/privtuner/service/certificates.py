"""A small authority of one's own for TLS: certificates for a server and for its data owners, by ``cryptography``.

For development, and for a circle of machines whose owners hand each other files. Keys are on NIST's curve P-256, with
signatures by ECDSA and SHA-256; the form is X.509 version 3 as in RFC 5280. Nothing is revoked: make certificates of
few days, or take the name out of the server's file of tenants.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privtuner.errors import InputError
from privtuner.paths import writing
from privtuner.service.tenants import check_name

__all__ = ["Authority"]

_CA = "ca"
_CA_DAYS = 3650
_EARLIER = datetime.timedelta(minutes=5)  # for clocks that are behind
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")


class Authority:
    """Signs certificates with the key in a folder.

    Args:
        folder: holds ``ca.pem`` and ``ca-key.pem``, which are made if neither is there. Certificates are written
            beside them as ``NAME.pem`` and ``NAME-key.pem``. All files are the user's alone (mode 0600).

    Attributes:
        certificate: the file that the other side is given to trust.

    Raises:
        privtuner.errors.InputError: one of the two files is missing or damaged, or the folder cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.certificate, key = self.folder / f"{_CA}.pem", self.folder / f"{_CA}-key.pem"
        with writing(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (self.certificate.exists() or key.exists()):
                self._make()
        try:
            self._certificate = x509.load_pem_x509_certificate(self.certificate.read_bytes())
            loaded = serialization.load_pem_private_key(key.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.folder} holds no authority of 'privtuner certs': {error}; take a new folder"
            ) from None
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != self._certificate.public_key():
            raise InputError(f"{key} is not the key of {self.certificate}; take a new folder")
        self._key = loaded

    def issue_server(self, hosts: Sequence[str], days: int) -> tuple[Path, Path]:
        """Make the certificate of a server; return the files of certificate and key.

        Args:
            hosts: names and addresses that clients connect to, at least one.
            days: how long it is good.

        Raises:
            privtuner.errors.InputError: a host or ``days`` is out of range, or the files exist already.
        """
        if not hosts:
            raise InputError("a server's certificate needs at least one name or address that clients connect to")
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        return self._issue("server", "privtuner server", ExtendedKeyUsageOID.SERVER_AUTH, names, days)

    def issue_client(self, name: str, days: int) -> tuple[Path, Path]:
        """Make the certificate of a data owner called ``name``; return the files of certificate and key.

        Raises:
            privtuner.errors.InputError: ``name`` or ``days`` is out of range, or the files exist already.
        """
        check_name(name, "the client")
        return self._issue(f"client-{name}", name, ExtendedKeyUsageOID.CLIENT_AUTH, None, days)

    def _issue(
        self, stem: str, name: str, use: x509.ObjectIdentifier, names: x509.SubjectAlternativeName | None, days: int
    ) -> tuple[Path, Path]:
        if not 1 <= days <= _CA_DAYS:
            raise InputError(f"days is {days}; give a number from 1 to {_CA_DAYS}")
        key = ec.generate_private_key(ec.SECP256R1())
        authority = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            _begun(name, self._certificate.subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return _write(self.folder, stem, builder.sign(self._key, hashes.SHA256()), key)

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = f"privtuner development authority {os.urandom(4).hex()}"
        builder = (
            _begun(name, None, key.public_key(), _CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        )
        _write(self.folder, _CA, builder.sign(key, hashes.SHA256()), key)


def _begun(name: str, issuer: x509.Name | None, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    """Return what all certificates have; ``issuer`` is None for one that signs itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _DNS.fullmatch(host) or len(host) > 253:
        raise InputError(
            f"{host[:80]!r} is no address and no name of a host: letters, digits, hyphens and dots, of others the form "
            "that begins with xn--"
        )
    return x509.DNSName(host)


def _write(
    folder: Path, stem: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> tuple[Path, Path]:
    """Write certificate and key, and neither over what is there."""
    files = folder / f"{stem}.pem", folder / f"{stem}-key.pem"
    contents = (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    for file in files:
        if file.exists():
            raise InputError(f"{file} is there already; move it away, or take another folder or name")
    for file, content in zip(files, contents, strict=True):
        with writing(file), os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(content)
    return files

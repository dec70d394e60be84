"""Certificates of one's own authority: who they are for, how long, and that nothing is written over."""

import datetime
import ipaddress
import stat

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from line_cases import files_of_another
from loops import each
from privtuner.errors import InputError
from privtuner.service.certificates import Authority


def load(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "ca")


def test_servers_are_verified_by_another_implementation(authority):
    """The policy of ``cryptography``'s own verifier is that of the web (CA/Browser Forum), and gRPC's is BoringSSL."""
    certificate = load(authority.issue_server(["model.example", "192.0.2.7", "2001:db8::1"], 30)[0])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["model.example"]
    addresses = [ipaddress.ip_address("192.0.2.7"), ipaddress.ip_address("2001:db8::1")]
    assert names.get_values_for_type(x509.IPAddress) == addresses
    store = Store([load(authority.certificate)])
    for name in (x509.DNSName("model.example"), *map(x509.IPAddress, addresses)):
        PolicyBuilder().store(store).build_server_verifier(name).verify(certificate, [])
    for trusted, name in ((store, "other.example"), (Store([load(files_of_another().ca)]), "model.example")):
        with pytest.raises(VerificationError):
            PolicyBuilder().store(trusted).build_server_verifier(x509.DNSName(name)).verify(certificate, [])


def test_what_certificates_are_good_for(authority):
    server, client = load(authority.issue_server(["h"], 1)[0]), load(authority.issue_client("alice", 1)[0])
    for certificate, use in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (client, ExtendedKeyUsageOID.CLIENT_AUTH)):
        extensions = certificate.extensions
        assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [use]
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        length = certificate.not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)
        assert datetime.timedelta(hours=23) < length <= datetime.timedelta(days=1)
    assert [name.value for name in client.subject] == ["alice"]
    constraints = load(authority.certificate).extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)


def test_files_are_the_users_alone_and_nothing_is_written_over(authority):
    paths = [authority.certificate, *authority.issue_server(["h"], 1), *authority.issue_client("alice", 1)]
    assert sorted(authority.folder.iterdir()) == sorted([*paths, authority.folder / "ca-key.pem"])
    assert {stat.S_IMODE(path.stat().st_mode) for path in authority.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(authority.folder.stat().st_mode) == 0o700
    before = {path: path.read_bytes() for path in authority.folder.iterdir()}
    with pytest.raises(InputError, match="server.pem is there already"):
        authority.issue_server(["h"], 1)
    with pytest.raises(InputError, match="client-alice.pem is there already"):
        authority.issue_client("alice", 1)
    assert {path: path.read_bytes() for path in authority.folder.iterdir()} == before


def test_the_authority_is_used_again(authority):
    again = Authority(authority.folder)
    certificate = load(again.issue_server(["h.example"], 1)[0])
    store = Store([load(authority.certificate)])
    PolicyBuilder().store(store).build_server_verifier(x509.DNSName("h.example")).verify(certificate, [])


def test_authority_that_is_none(authority, tmp_path):
    (authority.folder / "ca-key.pem").write_bytes((files_of_another().ca.parent / "ca-key.pem").read_bytes())
    with pytest.raises(InputError, match="ca-key.pem is not the key of .*ca.pem"):
        Authority(authority.folder)
    (authority.folder / "ca-key.pem").write_text("nonsense")
    with pytest.raises(InputError, match="holds no authority"):
        Authority(authority.folder)
    (authority.folder / "ca-key.pem").unlink()
    with pytest.raises(InputError, match="holds no authority"):
        Authority(authority.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Authority(tmp_path / "file" / "ca")


@each(host=["", "a b", "-a", "a..b", "münchen.example", "a" * 64, "*", "a/b", "1.2.3.4/8"])
def test_host_that_is_none(host, authority):
    with pytest.raises(InputError, match="is no address and no name of a host"):
        authority.issue_server([host], 1)


def test_options_out_of_range(authority):
    with pytest.raises(InputError, match="at least one name"):
        authority.issue_server([], 1)
    for days in (0, 3651):
        with pytest.raises(InputError, match=f"days is {days}"):
            authority.issue_client("alice", days)
    with pytest.raises(InputError, match="the client '../alice'"):
        authority.issue_client("../alice", 1)
    assert len(list(authority.folder.iterdir())) == 2

"""Who gets a connection: TLS at both ends, tokens, and what strangers are told."""

import copy
import datetime
import json
import logging
import os
import pickle
import shutil
import time
import types

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from connections import Connection
from line_cases import Files, files, files_of_another, small_split
from loops import each
from privtuner.errors import InputError, ServiceError
from privtuner.service import (
    ClientCredentials,
    RemoteTransport,
    Server,
    ServerCredentials,
    Tenants,
    Token,
    certificates,
    tenants,
)
from privtuner.service.audit import AuditLog
from privtuner.service.protocol import PROTOCOL, PROTOCOL_KEY, method
from privtuner.service.security import Line, make_token, token_digest

AUTHENTICATION = "this server asks for authentication"


def hello(address, credentials=None, token=None):
    with RemoteTransport(address, credentials, token) as transport:
        return transport.hello()


def serving(credentials=None, **options):
    return Server(small_split(), name="tiny-model", credentials=credentials, **options)


def written(path, content):
    """Write a file of tenants, as new as it is."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    stamp = time.time_ns()
    os.utime(path, ns=(stamp, stamp))
    return path


class Asked(Tenants):
    """Remembers who called."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = []

    def of(self, context):
        self.seen.append(super().of(context))
        return self.seen[-1]


def test_nothing_crosses_in_the_clear():
    request = b"no ciphertext, and yet hidden " * 40
    clear = [request, b"tiny-model", PROTOCOL_KEY.encode()]
    for credentials, owner, readable in ((None, None, True), (files().serving(), files().owning(), False)):
        with serving(credentials) as server, Connection(server.address) as wire:
            with RemoteTransport(wire.address, owner) as transport:
                assert transport.hello()["model"] == "tiny-model"
                with pytest.raises(ServiceError):
                    list(transport.apply("fc", request))
            seen = b"".join(wire.seen)
        assert [text in seen for text in clear] == [readable] * len(clear)


def test_somebody_in_between_has_another_certificate():
    """For the same names, of an authority of his own; the bundle would be his."""
    with (
        serving(files_of_another().serving()) as false,
        serving(files().serving()) as true,
        Connection(true.address) as wire,
    ):
        assert hello(wire.address, files().owning())["model"] == "tiny-model"
        wire.cut(false.address)
        with pytest.raises(ServiceError, match="comes from no authority that is trusted here.*may be in between"):
            hello(wire.address, files().owning())


def test_public_authorities_are_trusted_where_no_file_is_given():
    with serving(files().serving()) as server, pytest.raises(ServiceError, match="no authority that is trusted here"):
        hello(server.address, ClientCredentials())


def test_certificate_for_another_name(tmp_path):
    elsewhere = Files(tmp_path, ("example.org", "192.0.2.7"))
    with serving(elsewhere.serving()) as server, pytest.raises(ServiceError, match="is for another name"):
        hello(server.address, elsewhere.owning())


def test_certificate_of_the_past(tmp_path, monkeypatch):
    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) - datetime.timedelta(days=2)

    names = {"datetime": Then, "timedelta": datetime.timedelta, "timezone": datetime.timezone}
    monkeypatch.setattr(certificates, "datetime", types.SimpleNamespace(**names))
    old = Files(tmp_path)
    with serving(old.serving()) as server, pytest.raises(ServiceError, match="has expired: ask the model owner"):
        hello(server.address, old.owning())


def test_one_end_without_tls():
    with serving() as server, pytest.raises(ServiceError, match="speaks no TLS: start the server with --certificate"):
        hello(server.address, files().owning())
    with serving(files().serving()) as server, pytest.raises(ServiceError, match="one that speaks TLS needs --ca"):
        hello(server.address)


def test_server_that_asks_for_certificates():
    asked = Asked()
    with serving(files().serving(client_ca=files().ca), tenants=asked) as server:
        assert hello(server.address, files().owning("alice"))["model"] == "tiny-model"
        assert [(tenant.name, tenant.authenticated) for tenant in asked.seen] == [("alice", True)]
        strangers = ClientCredentials(files().ca, *files_of_another().clients["alice"])
        for credentials in (files().owning(), strangers):
            with pytest.raises(ServiceError, match="asks for your certificate needs --certificate and --key"):
                hello(server.address, credentials)
        assert len(asked.seen) == 1


def test_certificates_are_read_again(caplog, tmp_path):
    own = Files(tmp_path)
    with serving(own.serving()) as server:
        hello(server.address, own.owning())
        with caplog.at_level(logging.INFO):
            shutil.copy(files().server[0], own.server[0])
            # Half of a pair: the old one goes on.
            hello(server.address, own.owning())
            assert "the certificate stays as it was" in caplog.text
            shutil.copy(files().server[1], own.server[1])
            hello(server.address, files().owning())
            assert "read a new certificate" in caplog.text
        with pytest.raises(ServiceError, match="no authority"):
            hello(server.address, own.owning())


def test_files_that_cannot_be_used(tmp_path):
    certificate, key = files().server
    empty, garbage, locked = (tmp_path / name for name in ("empty", "garbage", "locked"))
    empty.write_bytes(b"")
    garbage.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    for pair, reason in (
        ((tmp_path / "nowhere", key), "nowhere cannot be read"),
        ((certificate, tmp_path), "cannot be read"),
        ((certificate, empty), "empty is empty"),
        ((garbage, key), "are no certificate and its private key"),
        ((certificate, locked), "are no certificate and its private key.*without a password"),
        ((certificate, files_of_another().server[1]), "are no certificate and its private key .KEY_VALUES_MISMATCH"),
    ):
        with pytest.raises(InputError, match=reason):
            ServerCredentials(*pair)
        with pytest.raises(InputError, match=reason):
            ClientCredentials(files().ca, *pair)
    for ca, reason in ((garbage, "garbage holds no certificate of an authority"), (empty, "empty is empty")):
        with pytest.raises(InputError, match=reason):
            ServerCredentials(certificate, key, ca)
        with pytest.raises(InputError, match=reason):
            ClientCredentials(ca)
    for half in ((certificate, None), (None, key)):
        with pytest.raises(InputError, match="certificate and key go together"):
            ClientCredentials(None, *half)


def test_other_machines_are_reached_by_tls_unless_told_otherwise():
    for address in ("example.org:1", "192.0.2.1:1", "[2001:db8::1]:1"):
        assert Line(address).encrypted
        assert not Line(address, allow_plaintext=True).encrypted
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        assert not Line(address).encrypted
        assert Line(address, files().owning()).encrypted
    with pytest.raises(InputError, match="contradicts credentials"):
        Line("example.org:1", files().owning(), allow_plaintext=True)


def test_a_server_listens_elsewhere_by_tls_unless_told_otherwise():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(InputError, match="can be reached from other machines.*--certificate.*--allow-plaintext"):
            serving(host=host)
    with pytest.raises(InputError, match="contradicts credentials"):
        serving(files().serving(), allow_plaintext=True)
    with serving(files().serving(), host="0.0.0.0") as server:
        address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
        assert hello(address, files().owning())["model"] == "tiny-model"


def test_tokens_do_not_cross_a_network_in_the_clear(tmp_path):
    value = make_token()
    with pytest.raises(InputError, match="over TLS only") as caught:
        RemoteTransport("192.0.2.1:1", None, Token(value), allow_plaintext=True)
    assert value not in str(caught.value)
    path = written(tmp_path / "tenants", {"tenants": {"alice": {"token_sha256": token_digest(value)}}})
    with pytest.raises(InputError, match="could take the tenants' tokens"):
        serving(host="0.0.0.0", tenants=Tenants(path), allow_plaintext=True)
    assert RemoteTransport("192.0.2.1:1", None, Token(value))._line.encrypted


def test_a_token_shows_nowhere(tmp_path, monkeypatch):
    value = make_token()
    token = Token(value)
    assert repr(token) == str(token) == "Token(...)"
    assert value not in repr([token]) + f"{token!r:}"
    for held in (token, Line("127.0.0.1:1", None, token)):
        with pytest.raises(InputError, match="cannot be pickled") as caught:
            pickle.dumps(held)
        assert value not in str(caught.value)
    assert copy.deepcopy(token) is token
    assert Token.from_environment() is None
    monkeypatch.setenv("PRIVTUNER_TOKEN", value)
    assert Token.from_environment().digest() == token.digest() == token_digest(value)
    path = tmp_path / "token"
    path.write_text(f"{value}\n")
    assert Token.load(path).digest() == token.digest()


@each(value=["", "short", "a" * 513, "two words of some length", "a" * 30 + "\n", "ü" * 30])
def test_what_is_no_token_is_not_repeated(value, tmp_path, monkeypatch):
    path = tmp_path / "token"
    path.write_text(f"{value} {value}\n")
    with pytest.raises(InputError, match="no token") as direct:
        Token(value)
    with pytest.raises(InputError, match="holds no token|is empty") as loaded:
        Token.load(path)
    messages = [str(direct.value), str(loaded.value)]
    if value:
        monkeypatch.setenv("PRIVTUNER_TOKEN", value)
        with pytest.raises(InputError, match="PRIVTUNER_TOKEN: .*no token") as read:
            Token.from_environment()
        messages.append(str(read.value))
        assert not any(value in message for message in messages)
    assert loaded.value.__context__ is None


@pytest.fixture
def guarded(tmp_path):
    """A server with two tenants, their tokens, and the file."""
    values = {name: make_token() for name in ("alice", "bob")}
    entries = {name: {"token_sha256": [token_digest(value)]} for name, value in values.items()}
    path = written(tmp_path / "tenants.json", {"tenants": entries})
    asked = Asked(path)
    with AuditLog(tmp_path / "audit.log") as audit, serving(tenants=asked, audit=audit) as server:
        yield server, asked, {name: Token(value) for name, value in values.items()}, values, path


def test_tokens_name_tenants(guarded):
    server, asked, owners, _, _ = guarded
    for name, token in owners.items():
        with RemoteTransport(server.address, None, token) as transport:
            assert transport.fetch_bundle().digest() == transport.hello()["bundle"] == small_split().bundle.digest()
            assert asked.seen[-1].name == name


def test_strangers_learn_that_authentication_is_needed_and_nothing_else(guarded, caplog):
    server, asked, owners, values, path = guarded
    wrong = make_token()
    headers = [[], [("authorization", f"Bearer {wrong}")], [("authorization", values["alice"])]]
    headers += [[("authorization", f"Basic {values['alice']}")], [("authorization", "Bearer ")]]
    headers += [[("authorization", f"Bearer {value}") for value in values.values()]]
    texts = set()
    with caplog.at_level(logging.DEBUG), grpc.insecure_channel(server.address) as channel:
        for name in ("Hello", "Stats", "Bundle", "Apply", "Job"):
            for header in headers:
                # With and without the version, which is none of a stranger's business either.
                for version in ([], [(PROTOCOL_KEY, str(PROTOCOL))]):
                    with pytest.raises(grpc.RpcError) as caught:
                        list(channel.stream_stream(method(name))(iter([b""]), metadata=[*version, *header]))
                    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
                    texts.add(caught.value.details())
    assert asked.seen == []
    (text,) = texts
    assert text.startswith(AUTHENTICATION)
    with pytest.raises(ServiceError, match=f"refused Hello: {AUTHENTICATION}") as refused:
        hello(server.address, None, Token(wrong))
    hello(server.address, None, owners["bob"])
    audit = path.with_name("audit.log").read_text()
    assert "UNAUTHENTICATED" in audit
    said = caplog.text + str(refused.value) + repr(refused.value.__cause__) + audit
    assert not any(value in said for value in (wrong, *values.values()))


def test_tenants_are_read_again(guarded, caplog):
    server, _, owners, values, path = guarded
    with RemoteTransport(server.address, None, owners["alice"]) as alice:
        alice.counts()
        with caplog.at_level(logging.WARNING):
            written(path, "{")
            alice.counts()
        assert "the file of tenants stays as it was" in caplog.text
        written(path, {"tenants": {"bob": {"token_sha256": token_digest(values["bob"])}}})
        with pytest.raises(ServiceError, match=AUTHENTICATION):
            alice.counts()
    hello(server.address, None, owners["bob"])


def test_every_token_is_compared(guarded, monkeypatch):
    server, _, owners, _, _ = guarded
    compared, honest = [], tenants.hmac.compare_digest
    monkeypatch.setattr(tenants.hmac, "compare_digest", lambda *pair: compared.append(pair) or honest(*pair))
    for token in owners.values():
        compared.clear()
        hello(server.address, None, token)
        assert len(compared) == 2


def test_certificates_in_the_file_of_tenants(tmp_path):
    token = make_token()
    entries = {
        "ann": {"certificate": "alice"},
        "ben": {"certificate": ["bob", "b"], "token_sha256": token_digest(token)},
    }
    asked = Asked(written(tmp_path / "tenants", {"tenants": {**entries, "carl": {"certificate": "carl"}}}))
    with serving(files().serving(client_ca=files().ca), tenants=asked) as server:
        hello(server.address, files().owning("alice"))
        hello(server.address, files().owning("bob"), Token(token))
        assert [tenant.name for tenant in asked.seen] == ["ann", "ben"]
        # With the token of another: one of the two was taken.
        with pytest.raises(ServiceError, match=AUTHENTICATION):
            hello(server.address, files().owning("alice"), Token(token))


def test_callers_without_token_and_certificate_go_by_their_host():
    asked = Asked()
    with serving(tenants=asked) as server:
        hello(server.address, None, Token(make_token()))
    assert [(tenant.name, tenant.authenticated) for tenant in asked.seen] == [("127.0.0.1", False)]

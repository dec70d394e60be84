"""Bundles that are expected, and those of servers that were met before."""

import stat
import threading
from pathlib import Path

import pytest

from connections import Connection
from line_cases import small_split
from loops import each
from privtuner.errors import InputError, ServiceError
from privtuner.nn import OwnerBundle
from privtuner.service import KnownBundles, RemoteTransport, Server
from privtuner.service.pins import default_file

FIRST, OTHER = small_split().bundle.digest(), small_split((8, 8)).bundle.digest()


@pytest.fixture(scope="module")
def first():
    with Server(small_split()) as server:
        yield server


@pytest.fixture(scope="module")
def other():
    with Server(small_split((8, 8))) as server:
        yield server


@pytest.fixture
def unread(monkeypatch):
    """Fail where a bundle is looked at."""
    monkeypatch.setattr(OwnerBundle, "from_files", lambda files: pytest.fail("it was read"))


def fetch(address, **options):
    with RemoteTransport(address) as transport:
        return transport.fetch_bundle(**options)


def test_bundle_that_is_expected(first):
    assert fetch(first.address, expected=FIRST).digest() == FIRST
    assert fetch(first.address, expected=FIRST.upper()).digest() == FIRST
    assert fetch(first.address).digest() == FIRST


def test_another_bundle_than_expected_is_not_read(other, unread):
    with pytest.raises(ServiceError, match=f"gave the bundle {OTHER}, and {FIRST} is expected.*nothing was run"):
        fetch(other.address, expected=FIRST)


def test_what_the_server_says_of_its_bundle_is_not_believed(other, unread, monkeypatch):
    read = RemoteTransport._checked_hello
    monkeypatch.setattr(RemoteTransport, "_checked_hello", lambda *answer: read(*answer) | {"bundle": FIRST})
    monkeypatch.setattr(other, "_check_model", lambda _: None)
    with pytest.raises(ServiceError, match=f"gave the bundle {OTHER}"):
        fetch(other.address, expected=FIRST)


@each(expected=["", FIRST[1:], FIRST + "0", "g" * 64, f"sha256:{FIRST}"])
def test_digest_of_another_form(expected):
    with RemoteTransport("127.0.0.1:1") as transport, pytest.raises(InputError, match="is no digest of a bundle"):
        transport.fetch_bundle(expected=expected)


def test_first_bundle_is_remembered_and_another_one_refused(first, other, tmp_path, monkeypatch):
    known = KnownBundles(tmp_path / "folder" / "known")
    with Connection(first.address) as wire:
        for _ in range(2):
            assert fetch(wire.address, known=known).digest() == FIRST
            assert known.find(wire.address) == FIRST
        assert known.file.read_text() == f"{wire.address} {FIRST}\n"
        assert stat.S_IMODE(known.file.stat().st_mode) == 0o600
        wire.cut(other.address)
        with monkeypatch.context() as patched:
            patched.setattr(OwnerBundle, "from_files", lambda files: pytest.fail("it was read"))
            with pytest.raises(ServiceError, match=f"{OTHER} instead of {FIRST} in .*known.*--expect {OTHER}"):
                fetch(wire.address, known=known)
        assert known.find(wire.address) == FIRST
        # What the message advises.
        for expected in (OTHER, None):
            assert fetch(wire.address, known=known, expected=expected).digest() == OTHER
        assert known.file.read_text() == f"{wire.address} {OTHER}\n"


def test_addresses_are_told_apart_and_their_case_is_not(tmp_path):
    known = KnownBundles(tmp_path / "known")
    assert known.find("host:1") is None
    assert known.check("Host:1", FIRST)
    assert not known.check("hOST:1", FIRST)
    assert known.check("host:2", OTHER)
    assert (known.find("host:1"), known.find("host:2")) == (FIRST, OTHER)


def test_lines_of_others_survive(tmp_path):
    """Each writer reads the file, adds a line and replaces it: none undoes another's."""
    file, begin = tmp_path / "known", threading.Barrier(8)

    def add(number):
        begin.wait(20)
        for port in range(5):
            KnownBundles(file).put(f"host{number}:{port}", FIRST)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(file.read_text().splitlines()) == 40


@each(line=["host:1", f"host:1  {FIRST}", f" {FIRST}", f"host:1 {FIRST} more", ""])
def test_line_of_another_form(line, tmp_path):
    file = tmp_path / "known"
    file.write_text(f"host:2 {FIRST}\n{line}\n")
    for call in (lambda: KnownBundles(file).find("host:1"), lambda: KnownBundles(file).put("host:1", FIRST)):
        with pytest.raises(InputError, match="known, line 2, is not HOST:PORT SHA256"):
            call()


def test_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file"):
        KnownBundles(tmp_path / "file" / "known").put("host:1", FIRST)


def test_place_of_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_file() == tmp_path / "privtuner" / "known_bundles"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        assert default_file() == Path.home() / ".config" / "privtuner" / "known_bundles"

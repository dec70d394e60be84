"""Addresses, and the pieces a bundle travels in."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtuner.errors import InputError, MessageError
from privtuner.parties import BLOCK_BYTES
from privtuner.service import protocol
from privtuner.service.protocol import cut, is_loopback, join, join_files, parse_address, split_files


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("127.0.0.1:1", "127.0.0.1", 1), ("localhost:65535", "localhost", 65535), ("[::1]:80", "::1", 80)],
)
def test_address_is_split(address, host, port):
    assert parse_address(address) == (host, port)


@pytest.mark.parametrize("address", ["", "host", ":80", "::1:80", "unix:/a:1", "dns:///a:80"])
def test_address_of_another_form_is_refused(address):
    with pytest.raises(InputError, match="is not HOST:PORT"):
        parse_address(address)


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "http", "8 0", "٣"])
def test_port_that_is_none_is_refused(port):
    with pytest.raises(InputError, match="port must be a number from 1 to 65535"):
        parse_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""])
def test_everything_else_is_not_loopback(host):
    assert not is_loopback(host)


@given(st.dictionaries(st.text(max_size=20), st.binary(max_size=50), max_size=5))
def test_files_survive_the_way(files):
    assert join_files(split_files(files), 1 << 20) == files


def test_long_file_travels_in_pieces():
    content = bytes(range(256)) * (2 * BLOCK_BYTES // 256) + b"end"
    messages = list(split_files({"a": content, "b": b""}))
    assert [len(message) for message in messages] == [BLOCK_BYTES + 3, BLOCK_BYTES + 3, 6, 3]
    assert join_files(messages, 3 << 20) == {"a": content, "b": b""}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "0 bytes is too short"),
        (b"\1", "1 bytes is too short"),
        (b"\3\0ab", "announces a file name of 3"),
        (b"\2\0\xff\xfe", "not UTF-8"),
    ],
)
def test_malformed_piece_is_refused(message, reason):
    with pytest.raises(MessageError, match=reason):
        join_files([b"\1\0ax", message], 1 << 20)


def test_bundle_without_end_is_refused():
    """However it goes on: in bytes, in files, in messages that hold nothing."""
    for messages, reason in (
        (itertools.repeat(b"\1\0a" + bytes(1000)), "more than 100000 bytes"),
        (itertools.repeat(b"\1\0a"), "more than 100000 bytes"),
        ((b"\1\0" + bytes([number]) for number in range(128)), "more than 64 files"),
    ):
        with pytest.raises(MessageError, match=reason):
            join_files(messages, 100_000)


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_messages_are_cut_and_joined(messages):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "MESSAGE_BYTES", 8)
        pieces = [piece for message in messages for piece in cut(message)]
        assert all(len(piece) <= 8 for piece in pieces)
        assert list(join(pieces, 40)) == messages


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([bytes(8), bytes(8), bytes(5)], "of 21 bytes or more, at most 20"),
        (itertools.repeat(bytes(8)), "of 24 bytes or more, at most 20"),
        ([bytes(9)], "of 9 bytes or more"),
        ([bytes(3), bytes(8)], "ends after 8 bytes, in its middle"),
    ],
)
def test_pieces_that_make_no_message(pieces, reason, monkeypatch):
    monkeypatch.setattr(protocol, "MESSAGE_BYTES", 8)
    with pytest.raises(MessageError, match=reason):
        list(join(pieces, 20))

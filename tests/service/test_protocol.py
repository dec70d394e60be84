"""Addresses, and the pieces a bundle travels in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtuner.errors import InputError, MessageError
from privtuner.service.protocol import MESSAGE_BYTES, is_loopback, join_files, parse_address, split_files


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
    assert join_files(split_files(files)) == files


def test_long_file_travels_in_pieces():
    content = bytes(range(256)) * (2 * MESSAGE_BYTES // 256) + b"end"
    messages = list(split_files({"a": content, "b": b""}))
    assert [len(message) for message in messages] == [MESSAGE_BYTES + 3, MESSAGE_BYTES + 3, 6, 3]
    assert join_files(messages) == {"a": content, "b": b""}


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
        join_files([b"\1\0ax", message])

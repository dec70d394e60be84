"""The envelope of every message: known bytes, every field, and what is refused."""

import struct
import tracemalloc

import numpy as np
import pytest

from privtuner import _core, wire
from privtuner.errors import InputError, MessageError

FIELDS = {
    "direction": "backward",
    "parameters": 0x0123456789ABCDEF,
    "subject": bytes(range(16)),
    "request": bytes(range(16, 32)),
    "tokens": 7,
    "features": 0x01020304,
}
MESSAGE = wire.seal("request", [b"the ", b"body"], **FIELDS)
HEAD = wire.Head("request", length=8, **FIELDS)
PLACES = {"magic": 0, "version": 4, "kind": 6, "direction": 7, "parameters": 8, "subject": 16, "request": 32}
PLACES |= {"tokens": 48, "features": 52, "length": 56, "checksum": 64, "body": 72}


def changed(place: str, value: bytes, message: bytes = MESSAGE) -> bytes:
    at = PLACES[place]
    return message[:at] + value + message[at + len(value) :]


def test_known_bytes():
    known = b"PVTN\3\0\2\1" + bytes.fromhex("efcdab8967452301") + bytes(range(32)) + b"\7\0\0\0\4\3\2\1\10" + bytes(7)
    known += struct.pack("<Q", checksum(known, b"the body")) + b"the body"
    assert known == MESSAGE
    assert MESSAGE[64:72].hex() == "3e94759e772aa88e"


def checksum(*streams: bytes) -> int:
    """Eight lanes of words over each stream, padded with zeros, and combined."""
    lanes, mask = list(range(1, 9)), (1 << 64) - 1
    for stream in streams:
        for place in range(0, len(stream), 8):
            lane = place // 8 % 8
            lanes[lane] = (
                lanes[lane] ^ int.from_bytes(stream[place : place + 8], "little")
            ) * 0x9E3779B97F4A7C15 & mask
    value = sum(map(len, streams))
    for lane in lanes:
        value = (value ^ lane ^ lane >> 29) * 0xBF58476D1CE4E5B9 & mask
        value ^= value >> 32
    return value


def test_kinds_and_directions_keep_their_numbers():
    first = "layer request reply parameters tensor public_key evaluation_keys"
    others = "refresh refreshed openfhe_request openfhe_reply openfhe_tensor sealed_public job"
    assert " ".join(wire.KINDS) == f"{first} {others}"
    assert " ".join(wire.DIRECTIONS) == "forward backward"
    for number, kind in enumerate(wire.KINDS, 1):
        for place, direction in enumerate(wire.DIRECTIONS):
            message = wire.seal(kind, [], direction=direction)
            assert message[4:8] == bytes((wire.VERSION, 0, number, place))
            assert wire.peek(message)[:2] == wire.open(kind, message)[0][:2] == (kind, direction)
    assert (wire.VERSION, wire.HEAD_BYTES) == (3, 72)


def test_what_is_sealed_comes_back():
    assert wire.peek(MESSAGE) == wire.peek(MESSAGE + b"another message") == HEAD
    for kind in (bytes, bytearray, memoryview):
        head, body = wire.open("request", kind(MESSAGE))
        assert head == HEAD
        assert body == b"the body"
    buffer = bytearray(MESSAGE)
    _, body = wire.open("request", buffer)
    buffer[-1:] = b"Y"
    assert body == b"the bodY"  # a view
    assert wire.open("tensor", wire.seal("tensor", []))[0] == wire.Head(
        "tensor", "forward", 0, bytes(16), bytes(16), 0, 0, 0
    )


def test_parts_are_any_contiguous_buffers():
    words = np.arange(6, dtype=np.uint64).reshape(2, 3)
    parts = [words, b"", bytearray(b"ab"), memoryview(b"cde")[1:], np.zeros((0, 3)), words[1]]
    _, body = wire.open("reply", wire.seal("reply", iter(parts)))
    assert body == words.tobytes() + b"abde" + words[1].tobytes()
    with pytest.raises((BufferError, ValueError)):
        wire.seal("reply", [words.T])
    with pytest.raises(TypeError):
        wire.seal("reply", ["text"])


def test_threads_find_what_one_finds():
    body = np.random.default_rng(0).integers(0, 256, (4 << 20) + 5, np.uint8)  # long enough to be shared out
    before, expected = _core.num_threads(), None
    try:
        for threads in (1, 5):
            _core.set_num_threads(threads)
            message = bytearray(wire.seal("openfhe_request", [body]))
            expected = expected or checksum(message[:64], bytes(body))
            assert int.from_bytes(message[64:72], "little") == expected
            wire.open("openfhe_request", message)
            for place in (72, 80, len(message) // 2, len(message) - 1):
                message[place] ^= 16
                with pytest.raises(MessageError, match="checksum mismatch"):
                    wire.open("openfhe_request", message)
                message[place] ^= 16
    finally:
        _core.set_num_threads(before)


def test_every_changed_bit_is_noticed():
    for place in range(len(MESSAGE)):
        for bit in range(8):
            bad = bytearray(MESSAGE)
            bad[place] ^= 1 << bit
            with pytest.raises(MessageError):
                wire.open("request", bad)


def test_every_other_length_is_refused():
    for size in range(len(MESSAGE)):
        with pytest.raises(MessageError, match="truncated"):
            wire.open("request", MESSAGE[:size])
        with pytest.raises(MessageError, match="truncated"):
            wire.peek(MESSAGE[:size])
    for more in (1, 8, 100):
        with pytest.raises(MessageError, match=f"request: {more} bytes too many"):
            wire.open("request", MESSAGE + bytes(more))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", "of 0 bytes is shorter than its head of 72 bytes: truncated?"),
        (changed("magic", b"PVCK"), ": not a privtuner message"),
        (
            changed("version", b"\1\0"),
            ": wire version 1, this build speaks version 3: install the same privtuner on both",
        ),
        (changed("version", b"\2\1"), ": wire version 258, this build speaks"),
        (changed("kind", b"\0"), ": unknown kind 0"),
        (changed("kind", b"\xff"), ": unknown kind 255"),
        (changed("direction", b"\5"), ": unknown direction 5"),
        (changed("length", b"\x09"), ": announces 9 bytes after its head, only 8 are here: truncated?"),
    ],
)
def test_one_message_for_each_refusal(message, text):
    for read, what in (
        (wire.peek, "message"),
        (lambda data: wire.open("request", data), "request"),
        (lambda data: wire.open("public_key", data), "public key"),
    ):
        with pytest.raises(MessageError) as caught:
            read(message)
        assert str(caught.value).startswith(what)
        assert text in str(caught.value)


def test_another_kind():
    with pytest.raises(MessageError, match="expected a message of kind evaluation keys, got request"):
        wire.open("evaluation_keys", MESSAGE)
    with pytest.raises(MessageError, match="checksum mismatch: the message was changed on its way"):
        wire.open("request", changed("checksum", b"12345678"))


@pytest.mark.parametrize("length", [9, 1 << 32, 1 << 62, (1 << 63) - 72, 1 << 63, (1 << 64) - 72, (1 << 64) - 1])
def test_announced_lengths_take_no_memory(length):
    message = changed("length", struct.pack("<Q", length))
    tracemalloc.start()
    try:
        for read in (wire.peek, lambda data: wire.open("request", data)):
            with pytest.raises(MessageError, match=f"announces {length} bytes"):
                read(message)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "block"}, "kind 'block': choose one of layer, request, "),
        ({"direction": "sideways"}, "direction 'sideways': choose one of forward, backward"),
        ({"subject": b"short"}, "a subject has 16 bytes"),
        ({"request": bytes(17)}, "a request id has 16 bytes"),
        ({"tokens": -1}, r"tokens = -1: must be in \[0, 2\*\*32\)"),
        ({"features": 1 << 32}, "features = 4294967296"),
        ({"parameters": 1 << 64}, "parameters = 18446744073709551616: must be in"),
    ],
)
def test_fields_that_a_head_cannot_hold(change, text):
    with pytest.raises(InputError, match=text):
        wire.seal(**({"kind": "request", "parts": []} | FIELDS | change))
    with pytest.raises(InputError, match="kind 'block'"):
        wire.open("block", MESSAGE)

"""Whatever a head holds comes back; whatever else arrives is refused, and nothing but refused."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtuner import wire
from privtuner.errors import MessageError

IDS = st.binary(min_size=16, max_size=16)
FIELDS = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(wire.DIRECTIONS),
        "parameters": st.integers(0, 2**64 - 1),
        "subject": IDS,
        "request": IDS,
        "tokens": st.integers(0, 2**32 - 1),
        "features": st.integers(0, 2**32 - 1),
    }
)
KINDS = st.sampled_from(wire.KINDS)


@given(KINDS, FIELDS, st.lists(st.binary(max_size=100), max_size=4))
def test_what_is_sealed_comes_back(kind, fields, parts):
    message = wire.seal(kind, parts, **fields)
    head, body = wire.open(kind, message)
    assert head == wire.peek(message) == wire.Head(kind, length=len(body), **fields)
    assert body == b"".join(parts)


@given(KINDS, st.binary(max_size=60), st.data())
def test_damage_is_refused(kind, body, data):
    message = bytearray(wire.seal(kind, [body]))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    if message == wire.seal(kind, [body]):
        return
    check_refused(kind, bytes(message))


@given(KINDS, st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda tail: b"PVTN\3\0\2\0" + tail)))
def test_noise_is_refused(kind, noise):
    check_refused(kind, noise)


def check_refused(kind: str, data: bytes) -> None:
    with contextlib.suppress(MessageError):
        wire.peek(data)  # may like the head
    with pytest.raises(MessageError):
        wire.open(kind, data)

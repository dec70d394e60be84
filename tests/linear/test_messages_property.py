"""Whatever happens to a message on its way: it is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linear_cases import batch, check_result, layer
from privtuner import linear
from privtuner.errors import MessageError

PREPARED = layer(40, 6)
X = batch(2, 6)
REQUEST, _ = linear.encrypt(X, PREPARED.spec)


def reply():
    """The blocks of a reply, and what decrypts it: once."""
    request, secret = linear.encrypt(X, PREPARED.spec)
    return list(linear.apply_blocks(PREPARED, request, 32)), lambda data: linear.decrypt(data, secret)


def joined_reply():
    blocks, read = reply()
    return b"".join(blocks), read


MESSAGES = {
    "public": lambda: (PREPARED.spec.to_bytes(), linear.LayerSpec.from_bytes),
    "request": lambda: (REQUEST, lambda data: linear.apply(PREPARED, data)),
    "reply": joined_reply,
}
KINDS = st.sampled_from(sorted(MESSAGES))


@given(KINDS, st.data())
def test_changed_bytes(kind, data):
    message, read = MESSAGES[kind]()
    changed = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    if changed != message:
        with pytest.raises(MessageError):
            read(bytes(changed))


@given(KINDS, st.data())
def test_lost_bytes(kind, data):
    message, read = MESSAGES[kind]()
    begin = data.draw(st.integers(0, len(message) - 1))
    count = data.draw(st.integers(1, len(message) - begin))
    with pytest.raises(MessageError):
        read(message[:begin] + message[begin + count :])


@given(KINDS, st.binary(min_size=1, max_size=200), st.data())
def test_added_bytes(kind, extra, data):
    message, read = MESSAGES[kind]()
    at = data.draw(st.integers(0, len(message)))
    with pytest.raises(MessageError):
        read(message[:at] + extra + message[at:])


@given(KINDS, st.binary(max_size=500))
def test_noise(kind, noise):
    with pytest.raises(MessageError):
        MESSAGES[kind]()[1](noise)


@given(st.lists(st.integers(0, 1), max_size=4).filter(lambda order: order[:2] != [0, 1]))
def test_blocks_in_any_other_order(order):
    blocks, read = reply()
    with pytest.raises(MessageError):
        read([blocks[i] for i in order])


def test_the_messages_were_good():
    blocks, read = reply()
    check_result(PREPARED, X, read(blocks), "forward")
    message, read = MESSAGES["public"]()
    assert read(message) == PREPARED.spec
    assert linear.apply(PREPARED, REQUEST)

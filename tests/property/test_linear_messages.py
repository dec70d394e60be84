"""Whatever happens to a message on its way: it is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linear_cases import batch, check_result, layer
from privtuner import linear
from privtuner.errors import MessageError

PREPARED = layer(40, 6)
X = batch(2, 6)
REQUEST, SECRET = linear.encrypt(X, PREPARED.public)
BLOCKS = list(linear.apply_blocks(PREPARED, REQUEST, 32))
MESSAGES = {
    "public": (PREPARED.public.to_bytes(), linear.Public.from_bytes),
    "request": (REQUEST, lambda data: linear.apply(PREPARED, data)),
    "reply": (b"".join(BLOCKS), lambda data: linear.decrypt(data, SECRET)),
}
KINDS = st.sampled_from(sorted(MESSAGES))


@given(KINDS, st.data())
def test_changed_bytes(kind, data):
    message, read = MESSAGES[kind]
    changed = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    if changed != message:
        with pytest.raises(MessageError):
            read(bytes(changed))


@given(KINDS, st.data())
def test_lost_bytes(kind, data):
    message, read = MESSAGES[kind]
    begin = data.draw(st.integers(0, len(message) - 1))
    count = data.draw(st.integers(1, len(message) - begin))
    with pytest.raises(MessageError):
        read(message[:begin] + message[begin + count :])


@given(KINDS, st.binary(min_size=1, max_size=200), st.data())
def test_added_bytes(kind, extra, data):
    message, read = MESSAGES[kind]
    at = data.draw(st.integers(0, len(message)))
    with pytest.raises(MessageError):
        read(message[:at] + extra + message[at:])


@given(KINDS, st.binary(max_size=500))
def test_noise(kind, noise):
    with pytest.raises(MessageError):
        MESSAGES[kind][1](noise)


@given(st.lists(st.integers(0, 1), max_size=4).filter(lambda order: order[:2] != [0, 1]))
def test_blocks_in_any_other_order(order):
    with pytest.raises(MessageError):
        linear.decrypt([BLOCKS[i] for i in order], SECRET)


def test_the_messages_were_good():
    request, secret = linear.encrypt(X, PREPARED.public)
    check_result(PREPARED, X, linear.decrypt(linear.apply(PREPARED, request), secret), "forward")
    assert linear.Public.from_bytes(MESSAGES["public"][0]) == PREPARED.public
    assert linear.apply(PREPARED, REQUEST)
    assert not SECRET.used

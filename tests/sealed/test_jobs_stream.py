"""The two ends of a job's stream: short queues, deadlines, masked messages that are a few ahead of their answers."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from privtuner import ckks, wire
from privtuner.errors import CkksError, InputError, MessageError, ServiceError
from privtuner.sealed.locker import Locker
from privtuner.sealed.messages import Link, Stream, Type
from privtuner.sealed.server import _Session
from privtuner.turns import Turns
from sealed_cases import PARAMETERS, TinyModel


def joined():
    """Two streams, each the other's peer."""
    one, two = Stream("one's peer"), Stream("two's peer")
    one.listen(two.outgoing())
    two.listen(one.outgoing())
    return one, two


def test_messages_arrive_in_order_and_the_end_after_them():
    one, two = joined()
    for number in range(3):
        one.send(bytes([number]), 1.0)
    one.close()
    assert [two.receive(1.0) for _ in range(3)] == [b"\0", b"\1", b"\2"]
    assert two.receive(1.0) is None
    with pytest.raises(ServiceError, match="ended in the middle"):
        two.check()
    with pytest.raises(ServiceError, match="ended in the middle"):
        two.send(b"", 1.0)


def test_waits_have_deadlines():
    stream = Stream("the peer")
    for number in range(4):
        stream.send(bytes([number]), 0.0)
    for wait in (lambda: stream.send(b"", 0.05), lambda: stream.receive(0.05)):
        start = time.monotonic()
        with pytest.raises(ServiceError, match=r"the peer .* 0\.05 s"):
            wait()
        assert 0.05 <= time.monotonic() - start < 5


def test_no_more_is_taken_than_there_is_room_for():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield b"x" * 100

    stream = Stream("the peer")
    stream.listen(endless())
    time.sleep(0.1)
    assert len(taken) == 5  # four that wait, and one in hand
    stream.receive(1.0)
    stream.close()


def test_what_broke_the_stream_reaches_whoever_waits():
    def breaking():
        yield b"first"
        raise MessageError("the transport said so")

    stream = Stream("the peer")
    stream.listen(breaking())
    while not stream._ended:
        time.sleep(0.001)
    with pytest.raises(MessageError, match="said so"):
        stream.receive(1.0)
    with pytest.raises(MessageError, match="said so"):
        stream.check()


def test_closing_wakes_whoever_waits():
    stream, errors = Stream("the peer"), []

    def wait():
        try:
            stream.receive(30.0)
        except ServiceError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    stream.close()
    waiting.join(5.0)
    assert len(errors) == 1
    assert list(stream.outgoing()) == []


def test_masked_messages_are_four_ahead_of_their_answers():
    """However many a refresh has; and they are made when they are sent, not before."""
    one, two = joined()
    model = TinyModel()
    service = SimpleNamespace(model=model, patience=5.0, idle=5.0, turns=Turns())
    session = _Session(service, one, None, "")
    owner = Link(two, model.public.id, bytes(16), PARAMETERS._core.hash, 1 << 20)
    made, ahead, answered = [], [], []

    def masked():
        for number in range(10):
            made.append(number)
            yield wire.seal("refresh", [bytes([number])], features=3)

    def answer():
        for number in range(10):
            payload = owner.expect(Type.REFRESH, seconds=5.0).payload
            answered.append(number)
            assert bytes(payload)[-1] == number
            owner.send(Type.REFRESHED, bytes([number]), seconds=5.0)

    answering = threading.Thread(target=answer)
    answering.start()
    replies = []
    with session._computing():
        for reply in session._exchange(masked()):
            replies.append(reply)
            ahead.append(len(made) - len(replies))
    answering.join(5.0)
    assert replies == [bytes([number]) for number in range(10)]
    assert ahead == [3] * 7 + [2, 1, 0]
    assert session._refreshes == 30
    one.close()
    two.close()


def test_locked_bytes():
    locker = Locker(b"secret", b"context")
    data = b"some bytes" * 100
    closed = locker.close(3, data)
    assert locker.open(3, closed) == data
    assert len(closed) == len(data) + Locker.OVERHEAD
    assert closed != locker.close(3, data)
    assert data[:8] not in closed
    assert Locker(b"secret", b"context").open(0, locker.close(0, b"")) == b""
    for other, number, changed in (
        (Locker(b"another", b"context"), 3, closed),
        (Locker(b"secret", b"another"), 3, closed),
        (locker, 4, closed),
        (locker, 3, closed[:-1]),
        (locker, 3, closed[1:]),
        (locker, 3, closed[:40]),
        (locker, 3, b""),
        *((locker, 3, closed[:i] + bytes([closed[i] ^ 1]) + closed[i + 1 :]) for i in (0, 16, 500, len(closed) - 1)),
    ):
        with pytest.raises(MessageError, match="not saved by this"):
            other.open(number, changed)


def test_a_seed_decides_the_key():
    first, second, other = (ckks.SecretKey(PARAMETERS, bytes([n]) * 32) for n in (1, 1, 2))
    x = first.encrypt([[0.5], [-0.25]])
    assert abs(second.decrypt(x) - [[0.5], [-0.25]]).max() < 1e-6
    with pytest.raises(CkksError):
        other.decrypt(x)
    with pytest.raises(InputError, match="seed"):
        ckks.SecretKey(PARAMETERS, bytes(31))

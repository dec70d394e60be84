"""Requests that got lost: sent again as they were, for a while, to the same model, and never when they were refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from connections import Connection
from loops import each
from privtuner import linear
from privtuner.cpu import CpuServer
from privtuner.errors import InputError, LostError, MessageError, SecretError, ServiceError
from privtuner.nn import GroupSpec, OwnerBundle, Split
from privtuner.retries import Retries
from privtuner.service import RemoteTransport, Server

D_OUT, D_IN = 320, 24
QUICK = Retries(seconds=30, first=0.01, longest=0.2)


def make_split(seed: int = 5) -> Split:
    layer = linear.prepare(np.random.default_rng(seed).standard_normal((D_OUT, D_IN)))
    groups = {"fc": GroupSpec("linear", {"fc": D_OUT})}
    return Split(
        {"fc": layer}, OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, {"fc": layer.spec}, {})
    )


SPLIT = make_split()
X = np.random.default_rng(0).standard_normal((9, D_IN)).astype(np.float32)


class Answering(CpuServer):
    """Answers in blocks of 64 outputs, remembers the requests, and calls ``before(request number, block number)``."""

    def __init__(self, before=lambda request, block: None, rows: int = 64) -> None:
        self.before, self.rows, self.requests = before, rows, []

    def answer(self, prepared, request, block_bytes=0):
        self.requests.append(bytes(request))
        number = len(self.requests)

        def blocks() -> Iterator[bytes]:
            for place, block in enumerate(linear.apply_blocks(prepared, request, self.rows)):
                self.before(number, place)
                yield block

        return blocks()


def check(y: np.ndarray) -> None:
    layer = SPLIT.server["fc"]
    exact = X.astype(np.float64) @ (layer.spec.scale[:, None] * layer.quantised()).T
    assert (np.abs(y - exact) <= linear.error_bound(layer.spec, X)).all()


@contextmanager
def line(server: Server, retries: Retries = QUICK, **options):
    """A transport through a line that can be cut, and what it says it waits for."""
    lines: list[str] = []
    with (
        Connection(server.address) as wire,
        RemoteTransport(wire.address, retries=retries, say=lines.append, **options) as transport,
    ):
        transport.hello()
        yield transport, wire, lines


@each(block=range(5))
def test_a_reply_that_breaks_off_goes_on_where_it_did(block: int) -> None:
    """Whatever block it is; the request is the same bytes, and the secret decrypts each output once."""

    def cut(request: int, place: int) -> None:
        if request == 1 and place == block:
            wire.cut(server.address)

    answering = Answering(cut)
    with Server(SPLIT, server=answering) as server, line(server) as (transport, wire, lines):
        request, secret = linear.encrypt(X, SPLIT.server["fc"].spec)
        blocks = list(transport.apply("fc", request))
        check(linear.decrypt(blocks, secret))
    assert answering.requests == [request] * 2
    assert len(blocks) == 5
    assert "was lost during layer 'fc'" in lines[0]
    assert "trying again for up to 30 s" in lines[0]
    assert lines[-1] == "going on after 0 s"


def test_a_secret_is_used_up_by_a_reply_in_two_parts() -> None:
    cuts = iter([True])

    def cut(request: int, place: int) -> None:
        if place == 2 and next(cuts, False):
            wire.cut(server.address)

    with Server(SPLIT, server=Answering(cut)) as server, line(server) as (transport, wire, _):
        request, secret = linear.encrypt(X, SPLIT.server["fc"].spec)
        check(linear.decrypt(transport.apply("fc", request), secret))
        with pytest.raises(SecretError):
            linear.decrypt(transport.apply("fc", request), secret)


def test_a_reply_that_comes_again_in_other_blocks_is_refused() -> None:
    answering = Answering(rows=64)

    def cut(request: int, place: int) -> None:
        if request == 1 and place == 1:
            answering.rows = 96
            wire.cut(server.address)

    answering.before = cut
    with Server(SPLIT, server=answering) as server, line(server) as (transport, wire, _):
        request, _ = linear.encrypt(X, SPLIT.server["fc"].spec)
        with pytest.raises(MessageError, match="the reply came again in other blocks"):
            list(transport.apply("fc", request))


def test_a_server_that_is_started_again_goes_on() -> None:
    """In the middle of a request, and between two."""

    def cut(request: int, place: int) -> None:
        if place == 3:
            wire.cut("127.0.0.1:1")

    with (
        Server(SPLIT, server=Answering(cut)) as first,
        Server(SPLIT, server=Answering()) as second,
        Server(SPLIT, server=Answering()) as third,
        line(first) as (transport, wire, lines),
    ):
        transport._say = lambda entry: (lines.append(entry), setattr(wire, "target", second.address))
        request, secret = linear.encrypt(X, SPLIT.server["fc"].spec)
        check(linear.decrypt(transport.apply("fc", request), secret))
        assert len([entry for entry in lines if "trying again" in entry]) == 1
        wire.cut(third.address)
        transport._say = lines.append
        request, secret = linear.encrypt(X, SPLIT.server["fc"].spec)
        check(linear.decrypt(transport.apply("fc", request), secret))
        assert third.counts().total().requests == 1


@each(midway=[True, False])
def test_a_server_with_other_weights_is_named_and_not_trained_on(midway: bool) -> None:
    def cut(request: int, place: int) -> None:
        if midway and place == 1:
            wire.cut(second.address)

    with (
        Server(SPLIT, server=Answering(cut)) as first,
        Server(make_split(6)) as second,
        line(first) as (transport, wire, _),
    ):
        request, _ = linear.encrypt(X, SPLIT.server["fc"].spec)
        if not midway:
            wire.cut(second.address)
        with pytest.raises(ServiceError, match="bundle") as caught:
            list(transport.apply("fc", request))
        assert not isinstance(caught.value, LostError)
        assert first.hello["bundle"][:16] in str(caught.value) or second.hello["bundle"][:16] in str(caught.value)
        assert not second.counts().layers


def test_a_silent_exchange_of_the_server_is_refused_by_it() -> None:
    """Where the client sees no connection break: what each call says of its model is enough."""
    with Server(make_split(6)) as other, RemoteTransport(other.address) as transport:
        transport.hello()
        transport._hello["bundle"] = "0" * 64
        for call in (lambda: list(transport.apply("fc", b"")), transport.counts, transport.fetch_bundle):
            with pytest.raises(ServiceError, match="the client began with that of another model"):
                call()
        with pytest.raises(ServiceError, match="the client began with that of another model"):
            list(transport.job(iter(())))


def test_what_is_refused_is_not_sent_again() -> None:
    answering = Answering()
    with Server(SPLIT, server=answering) as server, line(server) as (transport, _, lines):
        request, _ = linear.encrypt(X, SPLIT.server["fc"].spec)
        for layer, sent in (("fd", request), ("fc", request[:-1] + bytes([request[-1] ^ 1]))):
            with pytest.raises(ServiceError, match="refused layer") as caught:
                list(transport.apply(layer, sent))
            assert not isinstance(caught.value, LostError)
    assert lines == []
    assert len(answering.requests) <= 1


def test_a_busy_server_is_waited_for() -> None:
    free, began = threading.Event(), threading.Event()

    def before(request: int, place: int) -> None:
        if request == 1:
            began.set()
            free.wait(20)

    with Server(SPLIT, server=Answering(before), calls=2) as server, line(server) as (transport, _, lines):
        requests = [linear.encrypt(X, SPLIT.server["fc"].spec) for _ in range(2)]
        first = threading.Thread(target=lambda: list(transport.apply("fc", requests[0][0])))
        first.start()
        assert began.wait(20)
        transport._say = lambda entry: (lines.append(entry), free.set())
        check(linear.decrypt(transport.apply("fc", requests[1][0]), requests[1][1]))
        first.join(20)
    assert "is too busy for layer 'fc'" in lines[0]


def test_a_line_that_stalls_is_given_up_and_taken_up_again() -> None:
    with Server(SPLIT) as server, line(server, patience=0.5) as (transport, wire, lines):
        transport._say = lambda entry: (lines.append(entry), wire.go_on())
        wire.stall()
        request, secret = linear.encrypt(X, SPLIT.server["fc"].spec)
        check(linear.decrypt(transport.apply("fc", request), secret))
    assert "made no progress in layer 'fc' for 0.5 s" in lines[0]


def test_a_slow_line_is_only_slow() -> None:
    masks = linear.MaskCache()
    with Server(SPLIT) as server, line(server, patience=20.0) as (transport, wire, lines):
        for rate in (None, 40_000):  # the first time with five megabytes of masks
            wire.rate = rate
            request, secret = linear.encrypt(X, SPLIT.server["fc"].spec, masks=masks)
            check(linear.decrypt(transport.apply("fc", request), secret))
    assert lines == []


def test_a_bundle_that_breaks_off_is_fetched_again() -> None:
    bundle = OwnerBundle(
        {"model_type": "bert"}, "BertModel", "float32", {}, {}, {}, files={"vocab.txt": bytes(8 << 20)}
    )
    with Server(Split({}, bundle)) as server, line(server) as (transport, wire, lines):
        seen: list[int] = []

        def progress(done: int, total: int) -> None:
            if done > 2 << 20 and not seen:
                seen.append(done)
                wire.cut(server.address)

        assert transport.fetch_bundle(progress).digest() == bundle.digest()
    assert seen
    assert "lost during the bundle" in lines[0]


def test_there_is_an_end_to_it() -> None:
    with Server(SPLIT) as server, line(server, Retries(seconds=0.3, first=0.05, longest=0.1)) as (transport, wire, _):
        wire.cut("127.0.0.1:1")
        with pytest.raises(LostError, match=r"gave up after trying \d+ times in 0 s"):
            transport.counts()


def test_closing_ends_the_waiting_at_once() -> None:
    with Server(SPLIT) as server, line(server, Retries(first=300, longest=300)) as (transport, wire, _):
        transport._say = lambda _: threading.Thread(target=transport.close).start()
        wire.cut("127.0.0.1:1")
        start = time.monotonic()
        with pytest.raises(ServiceError, match="was closed"):
            transport.counts()
        assert time.monotonic() - start < 100


def test_a_server_that_ends_finishes_what_is_in_progress() -> None:
    began, go_on, ended = threading.Event(), threading.Event(), []

    def before(request: int, place: int) -> None:
        began.set()
        assert go_on.wait(20)

    with (
        Server(SPLIT, server=Answering(before)) as first,
        Server(SPLIT) as second,
        line(first) as (transport, wire, lines),
    ):
        results = []

        def train() -> None:
            request, secret = linear.encrypt(X, SPLIT.server["fc"].spec)
            results.append(linear.decrypt(transport.apply("fc", request), secret))

        owner = threading.Thread(target=train)
        owner.start()
        assert began.wait(20)
        stopping = threading.Thread(target=lambda: ended.append(first.stop(20.0)))
        stopping.start()
        while not first._ending.is_set():
            time.sleep(0.01)
        other = RemoteTransport(first.address, retries=Retries(seconds=0))
        with other, pytest.raises(LostError, match="the server is ending"):
            list(other.apply("fc", b""))
        # A client that is not told to give up finds the next server.
        transport._say = lambda entry: (lines.append(entry), setattr(wire, "target", second.address), go_on.set())
        request, secret = linear.encrypt(X, SPLIT.server["fc"].spec)
        check(linear.decrypt(transport.apply("fc", request), secret))
        owner.join(20)
        stopping.join(20)
        check(results[0])
    assert ended == [0]
    assert "the server is ending" in lines[0]


def test_a_server_that_ends_cuts_off_what_takes_too_long() -> None:
    began, go_on = threading.Event(), threading.Event()

    def before(request: int, place: int) -> None:
        began.set()
        go_on.wait(20)

    with Server(SPLIT, server=Answering(before)) as server, line(server, Retries(seconds=0)) as (transport, _, _):
        request, _ = linear.encrypt(X, SPLIT.server["fc"].spec)
        errors = []

        def ask() -> None:
            with pytest.raises(LostError) as caught:
                list(transport.apply("fc", request))
            errors.append(caught.value)

        owner = threading.Thread(target=ask)
        owner.start()
        assert began.wait(20)
        assert server.stop(0.1) == 1
        go_on.set()
        owner.join(20)
    assert len(errors) == 1


def test_pauses_double_up_to_a_limit_and_are_drawn() -> None:
    lines, pauses = [], []
    attempts = Retries(seconds=1000, attempts=8, first=1, longest=10).begin(lines.append)
    for _ in range(8):
        attempts.wait(LostError("gone"), pauses.append)
    for pause, most in zip(pauses, (1, 2, 4, 8, 10, 10, 10, 10), strict=True):
        assert most / 2 <= pause <= most
    assert len(set(pauses[4:])) == 4
    with pytest.raises(LostError, match=r"gone; gave up after trying 9 times in 0 s"):
        attempts.wait(LostError("gone"), pauses.append)
    assert lines == ["gone; trying again for up to 1000 s"]
    attempts.progress()
    attempts.wait(LostError("gone"), pauses.append)
    assert pauses[-1] <= 1
    with pytest.raises(LostError, match="^gone$"):
        Retries(seconds=0).begin().wait(LostError("gone"), pauses.append)


def test_who_waits_for_long_says_so_now_and_then(monkeypatch) -> None:
    now, lines = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    attempts = Retries(seconds=200, first=1, longest=50).begin(lines.append)

    def sleep(seconds: float) -> None:
        now[0] += 50

    for _ in range(4):
        attempts.wait(LostError("gone"), sleep)
    with pytest.raises(LostError, match="gave up after trying 5 times in 200 s"):
        attempts.wait(LostError("gone"), sleep)
    assert lines == ["gone; trying again for up to 200 s", "still waiting, 100 s of 200 s: gone"]
    attempts.progress()
    assert lines[-1] == "going on after 200 s"


@each(
    ("options",),
    [({"seconds": -1},), ({"attempts": -1},), ({"first": -1},), ({"first": 2, "longest": 1},), ({"seconds": np.nan},)],
)
def test_retries_out_of_range(options) -> None:
    with pytest.raises(InputError, match="give at least 0"):
        Retries(**options)

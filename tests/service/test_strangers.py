"""Malformed messages, and clients that stall, flood and send bombs, beside an honest owner.

`PRIVTUNER_TEST_STRANGERS=1000000` sends as many malformed messages; a few hundred otherwise.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

import linear_cases as cases
from privtuner import linear
from privtuner.nn import GroupSpec, OwnerBundle, Split
from privtuner.service import RemoteTransport, Server
from strangers import Stranger

COUNT = int(os.environ.get("PRIVTUNER_TEST_STRANGERS", "300"))
LAYER = linear.prepare(np.random.default_rng(5).standard_normal((300, 40)))


@pytest.fixture
def server():
    groups, specs = {"fc": GroupSpec("linear", {"fc": 300})}, {"fc": LAYER.spec}
    split = Split({"fc": LAYER}, OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, specs, {}))
    with Server(split, patience=5.0, memory_bytes=8 << 20) as server:
        yield server


def honest(address):
    """One request of an owner, whose reply is checked."""
    x = np.random.default_rng(1).standard_normal((9, 40)).astype(np.float32)
    with RemoteTransport(address) as transport:
        for _ in range(3):
            request, secret = linear.encrypt(x, LAYER.spec)
            y = linear.decrypt(transport.apply("fc", request), secret)
            cases.check_result(LAYER, x, y, "forward")


def test_malformed_messages_harm_nobody(server, caplog):
    request, _ = linear.encrypt(np.ones((9, 40), np.float32), LAYER.spec)
    strangers = [Stranger(server.address, seed, "fc", request) for seed in range(2)]
    threads = [threading.Thread(target=one.malformed, args=(COUNT // 2,)) for one in strangers]
    for thread in threads:
        thread.start()
    honest(server.address)
    for thread in threads:
        thread.join(max(120, COUNT / 10))
        assert not thread.is_alive()
    honest(server.address)
    answers = sum((one.answers for one in strangers), start=strangers[0].answers.__class__())
    assert sum(one.sent for one in strangers) == 2 * (COUNT // 2)
    assert set(answers) <= {"answered", "socket", *REFUSALS}, answers
    assert answers["INVALID_ARGUMENT"] > COUNT / 10
    assert "a request failed" not in caplog.text
    for one in strangers:
        one.close()
    for room in (server._calls, server._asks, server._memory):
        for _ in range(400):
            if not room.held:
                break
            threading.Event().wait(0.05)
        assert room.held == 0


REFUSALS = (
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "OUT_OF_RANGE",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "CANCELLED",
    "UNAVAILABLE",
)


def test_stalls_floods_and_bombs_leave_an_owner_its_share(server):
    request, _ = linear.encrypt(np.ones((9, 40), np.float32), LAYER.spec)
    over = threading.Event()
    strangers = [Stranger(server.address, seed, "fc", request) for seed in range(3)]
    does = ("stall", "flood", "bomb")
    threads = [
        threading.Thread(target=getattr(one, what), args=(over,)) for one, what in zip(strangers, does, strict=True)
    ]
    for thread in threads:
        thread.start()
    for _ in range(2):
        honest(server.address)
    assert server._memory.held <= server._memory.total
    over.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert strangers[2].answers.keys() <= {"UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "INVALID_ARGUMENT"}
    for one in strangers:
        one.close()
    honest(server.address)

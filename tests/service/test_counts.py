"""What a server counts: sums by layer and direction, as the heads of the requests state them, and who may see which."""

import json
import math

import pytest

from accounts import calling
from privtuner import wire
from privtuner.errors import MessageError, ServiceError
from privtuner.service import counts as module
from privtuner.service.counts import (
    ANONYMOUS,
    LATENCIES,
    Counter,
    LayerCounts,
    ServerCounts,
)


def head(direction="forward", tokens=1):
    return wire.peek(wire.seal("request", [], direction=direction, tokens=tokens))


def answer(counter, tenant=ANONYMOUS, caller=b"", *, layer="fc", tokens=1, sizes=(10, 20), seconds=0.5, **of_head):
    with calling(counter, tenant, caller) as account:
        account.answered(layer, head(tokens=tokens, **of_head), *sizes, seconds)


def histogram(*places):
    return tuple(places.count(place) for place in range(len(LATENCIES) + 1))


def test_counts_add_up():
    counter = Counter()
    answer(counter, tokens=4, sizes=(40, 10))
    answer(counter, tokens=2, sizes=(20, 10))
    answer(counter, direction="backward", tokens=3, sizes=(33, 10), seconds=0.001)
    with calling(counter, "a", name="Bundle") as account:
        account.sent_bundle()
    with calling(counter, "a") as account:
        account.refused("INVALID_ARGUMENT")
    counts = counter.snapshot()
    assert counts.layers == {
        ("fc", "forward"): LayerCounts(2, 6, 4, 60, 20, 1.0, 0, histogram(6, 6)),
        ("fc", "backward"): LayerCounts(1, 3, 3, 33, 10, 0.001, 0, histogram(0)),
    }
    assert (counts.bundles, counts.refused, counts.refusals) == (1, 1, {"INVALID_ARGUMENT": 1})
    assert counts.total() == LayerCounts(3, 9, 4, 93, 30, 1.001, 0, histogram(0, 6, 6))
    assert ServerCounts.from_json(counts.to_json()) == counts


def test_times_are_classed_and_bounded_from_above():
    counter = Counter()
    for seconds in (0.0, 0.001, 0.002, 299.0, 301.0):
        answer(counter, seconds=seconds)
    total = counter.snapshot().total()
    assert total.histogram == histogram(0, 0, 1, len(LATENCIES) - 1, len(LATENCIES))
    assert [total.quantile(part) for part in (0, 0.4, 0.5, 0.6, 0.8, 1)] == [0.001, 0.001, 0.003, 0.003, 300, math.inf]
    assert LayerCounts().quantile(0.5) == 0


def test_snapshot_does_not_change_later():
    counter = Counter()
    answer(counter)
    before = counter.snapshot()
    answer(counter)
    assert before.total().requests == 1


def test_tenants_see_their_own_counts_alone():
    counter = Counter()
    answer(counter, "a", tokens=3)
    answer(counter, "b", tokens=5)
    with calling(counter, "b") as account:
        account.refused("RESOURCE_EXHAUSTED")
    assert counter.seen_by("a").total().tokens == 3
    assert counter.seen_by("a").refused == 0
    assert counter.seen_by("b").tenant == "b"
    assert counter.seen_by("nobody") == ServerCounts(tenant="nobody")
    assert {tenant: counts.total().tokens for tenant, counts in counter.by_tenant().items()} == {"a": 3, "b": 5}
    assert counter.snapshot().total().tokens == 8


def test_callers_without_a_name_see_their_own_counts_alone():
    counter = Counter()
    answer(counter, caller=b"1", tokens=3)
    answer(counter, caller=b"2", tokens=5)
    answer(counter, tokens=7)
    assert counter.seen_by(ANONYMOUS, b"1").total().tokens == 3
    assert counter.seen_by(ANONYMOUS, b"") == counter.seen_by(ANONYMOUS, b"3") == ServerCounts(tenant=ANONYMOUS)
    assert counter.by_tenant()[ANONYMOUS].total().tokens == 15


def test_callers_that_are_remembered_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "_CALLERS", 2)
    counter = Counter()
    for caller in (b"1", b"2", b"1", b"3"):
        answer(counter, caller=caller)
    assert [counter.seen_by(ANONYMOUS, caller).total().requests for caller in (b"1", b"2", b"3")] == [2, 0, 1]
    assert counter.snapshot().total().requests == 4


def test_calls_in_progress_are_counted():
    counter = Counter()
    with calling(counter, "a"), calling(counter, "b"):
        assert counter.running() == {"Apply": 2}
    assert counter.running() == {"Apply": 0}


def test_call_that_nobody_reads_on_is_cancelled():
    counter = Counter()

    def calls(told):
        with calling(counter, "a") as account:
            if told:
                account.refused("ABORTED")
            yield b""

    for told in (False, True):
        call = calls(told)
        next(call)
        call.close()
    counts = counter.snapshot()
    assert (counts.refusals, counts.refused) == ({"CANCELLED": 1, "ABORTED": 1}, 1)


def test_what_the_record_raises_reaches_the_call_and_is_not_counted():
    def refuse(event):
        raise ServiceError("no")

    counter = Counter(record=refuse, admit=lambda: refuse(None))
    with pytest.raises(ServiceError), calling(counter, "a") as account:
        account.admit()
    with pytest.raises(ServiceError):
        answer(counter)
    assert counter.snapshot() == ServerCounts()


def malformed():
    entry = {"layer": "a", "direction": "forward", "requests": 1, "tokens": 1, "largest": 1, "bytes_in": 1}
    entry |= {"bytes_out": 1, "refreshes": 0, "seconds": 1.0, "histogram": [0] * 13}
    good = {"tenant": "a", "layers": [entry], "bundles": 0, "refusals": {"ABORTED": 1}}
    ServerCounts.from_json(json.dumps(good).encode())
    changed = [{"layer": 1}, {"requests": -1}, {"tokens": "1"}, {"largest": True}, {"bytes_in": 1 << 63}]
    changed += [{"seconds": -1}, {"seconds": math.inf}, {"histogram": [0] * 12}, {"histogram": [0.5] * 13}]
    wrong = [good | {"layers": [entry | change]} for change in changed]
    wrong += [good | change for change in ({"layers": [1]}, {"bundles": "x"}, {"refusals": {"A": None}}, {"tenant": 5})]
    return [b"", b"[]", b"{}", b"\xff", b"[" * 100000, *(json.dumps(value).encode() for value in wrong)]


@pytest.mark.parametrize("data", malformed())
def test_malformed_counts_are_refused(data):
    with pytest.raises(MessageError, match="the server.s counts"):
        ServerCounts.from_json(data)


def test_json_names_every_layer_once():
    counter = Counter()
    for layer in ("b", "a", "b"):
        answer(counter, layer=layer)
    assert [entry["layer"] for entry in json.loads(counter.snapshot().to_json())["layers"]] == ["a", "b"]

"""What a server counts: sums by layer and direction, as the heads of the requests state them."""

import json

import pytest

from privtuner import wire
from privtuner.errors import MessageError
from privtuner.service.counts import Counter, LayerCounts, ServerCounts


def head(direction="forward", tokens=1):
    return wire.peek(wire.seal("request", [], direction=direction, tokens=tokens))


def test_counts_add_up():
    counter = Counter()
    for request, size in ((head(tokens=4), 40), (head(tokens=2), 20), (head("backward", 3), 33)):
        counter.count_answer("fc", request, size, 10, 0.5)
    counter.count_refusal()
    counter.count_bundle()
    counts = counter.snapshot()
    assert counts.layers == {
        ("fc", "forward"): LayerCounts(2, 6, 4, 60, 20, 1.0),
        ("fc", "backward"): LayerCounts(1, 3, 3, 33, 10, 0.5),
    }
    assert (counts.bundles, counts.refused) == (1, 1)
    assert counts.total() == LayerCounts(3, 9, 4, 93, 30, 1.5)
    assert ServerCounts.from_json(counts.to_json()) == counts


def test_snapshot_does_not_change_later():
    counter = Counter()
    counter.count_answer("fc", head(), 0, 1, 0.0)
    before = counter.snapshot()
    counter.count_answer("fc", head(), 0, 1, 0.0)
    assert before.total().requests == 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"layers": [1], "bundles": 0, "refused": 0}',
        b'{"layers": [{"layer": "a", "direction": "forward", "other": 1}], "bundles": 0, "refused": 0}',
        b'{"layers": [], "bundles": "x", "refused": 0}',
    ],
)
def test_malformed_counts_are_refused(data):
    with pytest.raises(MessageError, match="the server.s counts: "):
        ServerCounts.from_json(data)


def test_json_names_every_layer_once():
    counter = Counter()
    counter.count_answer("b", head(), 0, 1, 0.0)
    counter.count_answer("a", head(), 0, 1, 0.0)
    assert [entry["layer"] for entry in json.loads(counter.snapshot().to_json())["layers"]] == ["a", "b"]

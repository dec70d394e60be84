"""What the server counts agrees with what the data owner sent."""

import json

import numpy as np
import pytest

from privtuner import linear
from privtuner.errors import MessageError
from privtuner.service.counts import Counter, LayerCounts, ServerCounts, request_shape


@pytest.mark.parametrize("preset", linear.PRESETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("tokens", [1, 7, 2049])
def test_shape_is_read_from_the_header(preset, direction, tokens):
    public = linear.prepare(np.ones((3, 5)), preset).public
    x = np.ones((tokens, 5 if direction == "forward" else 3), np.float32)
    request, _ = linear.encrypt(x, public, direction)
    assert request_shape(request) == (direction, tokens)


@pytest.mark.parametrize("length", [0, 1, 99])
def test_request_without_a_whole_header_has_no_shape(length):
    assert request_shape(b"\1" * length) == ("unknown", 0)


def test_direction_that_is_none():
    assert request_shape(b"\7" * 100)[0] == "unknown"


def test_counts_add_up():
    counter = Counter()
    public = linear.prepare(np.ones((3, 5))).public
    long, _ = linear.encrypt(np.ones((4, 5), np.float32), public)
    short, _ = linear.encrypt(np.ones((2, 5), np.float32), public)
    back, _ = linear.encrypt(np.ones((3, 3), np.float32), public, "backward")
    for request in (long, short, back):
        counter.answered("fc", request, 10, 0.5)
    counter.refused()
    counter.bundle()
    counts = counter.snapshot()
    assert counts.layers == {
        ("fc", "forward"): LayerCounts(2, 6, 4, len(long) + len(short), 20, 1.0),
        ("fc", "backward"): LayerCounts(1, 3, 3, len(back), 10, 0.5),
    }
    assert (counts.bundles, counts.refused) == (1, 1)
    assert counts.total() == LayerCounts(3, 9, 4, len(long) + len(short) + len(back), 30, 1.5)
    assert ServerCounts.from_json(counts.to_json()) == counts


def test_snapshot_does_not_change_later():
    counter = Counter()
    counter.answered("fc", b"", 1, 0.0)
    before = counter.snapshot()
    counter.answered("fc", b"", 1, 0.0)
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
    with pytest.raises(MessageError, match="counts are malformed"):
        ServerCounts.from_json(data)


def test_json_names_every_layer_once():
    counter = Counter()
    counter.answered("b", b"", 1, 0.0)
    counter.answered("a", b"", 1, 0.0)
    assert [entry["layer"] for entry in json.loads(counter.snapshot().to_json())["layers"]] == ["a", "b"]

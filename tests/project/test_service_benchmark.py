"""What the benchmark of the service is made of: requests that are replayed, and owners that are counted."""

import subprocess
import time

import pytest

from line_cases import small_split
from privtuner.service import Server
from service_load import Load, Served, replays, step_of


@pytest.fixture
def served():
    process = subprocess.Popen(["sleep", "100"])  # stands for the server's: this one is here
    with Server(small_split()) as running:
        yield running, Served(running.address, "", process, None, {})
    process.kill()
    process.wait()


def test_a_step_asks_every_layer_both_ways():
    work = step_of(small_split(), 5)
    assert [(one.layer, one.direction, one.x.shape) for one in work] == [
        ("fc", "forward", (5, 8)),
        ("fc", "backward", (5, 12)),
    ]
    assert all(replay.owner_seconds > 0 and replay.tokens == 5 for replay in replays(small_split(), work, 1))


@pytest.mark.parametrize("pause", [False, True])
def test_rows_are_those_that_the_server_answered(served, pause):
    running, there = served
    requests = replays(small_split(), step_of(small_split(), 5), 1)
    with Load(there, ["a", "b"], requests, pause=pause) as load:
        end = time.monotonic() + 20
        while load.rows < 40 and time.monotonic() < end:
            time.sleep(0.01)
    running.stop()
    assert load.errors == []
    assert 40 <= load.rows <= running.counts().total().tokens <= load.rows + 2 * 5
    assert 0 < there.memory() < 1 << 30


def test_what_ends_an_owner_is_told(served):
    _, there = served
    forward, _ = replays(small_split(), step_of(small_split(), 5), 1)
    with Load(there, ["a"], [forward._replace(layer="other")], pause=False) as load:
        for thread in load._threads:
            thread.join(20)
    assert len(load.errors) == 1
    assert "no layer is called 'other'" in load.errors[0]
    assert load.rows == 0

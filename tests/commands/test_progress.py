"""What the commands tell of long work: how much is done, how long the rest takes, and not too often."""

import itertools
import sys
import types

import pytest

from privtuner.commands import common
from privtuner.commands.common import Progress, about


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""
    hands = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(common, "time", types.SimpleNamespace(monotonic=lambda: hands.now))
    return hands


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    monkeypatch.setenv("COLUMNS", "80")


def told(capsys) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def drawn(capsys) -> list[str]:
    """What a terminal's line held in turn."""
    out, err = capsys.readouterr()
    assert out == ""
    assert "\n" not in err
    return err.split("\r\x1b[K")


def test_a_line_for_each_tenth(clock, capsys):
    progress = Progress("preparing layers")
    for done in range(1001):
        progress(done, 1000)
        clock.now += 1
    lines = told(capsys)
    assert lines[0] == "privtuner: preparing layers: 2 of 1,000, about 17 min left"
    assert lines[1:] == [
        *(f"privtuner: preparing layers: {done} of 1,000, {about(1000 - done)} left" for done in range(100, 1000, 100)),
        "privtuner: preparing layers: 1,000 of 1,000",
    ]


def test_long_work_is_not_silent_between_the_tenths(clock, capsys):
    progress = Progress("running the study")
    progress(0, 10_000)
    for done in range(1, 21):
        clock.now += 60
        progress(done, 10_000)
    assert [line.partition(": ")[2].partition(",")[0] for line in told(capsys)] == [
        "running the study: 1 of 10",
        "running the study: 6 of 10",
        "running the study: 11 of 10",
        "running the study: 16 of 10",
    ]


def test_short_work_is_silent(clock, capsys):
    progress = Progress("preparing layers")
    for done in range(11):
        progress(done, 10)
        clock.now += 0.18
    assert told(capsys) == []


def test_lines_are_two_seconds_apart(clock, capsys):
    progress = Progress("preparing layers")
    for done in range(11):
        progress(done, 10)
        clock.now += 0.7
    assert [line.partition(": ")[2].partition(",")[0] for line in told(capsys)] == [
        f"preparing layers: {done} of 10" for done in (3, 6, 9)
    ]


def test_units_and_the_piece_that_comes_next(clock, capsys):
    progress = Progress("fetching", "MB", scale=1e6)
    progress(0, 4_500_000)
    clock.now += 30
    progress(1_500_000, 4_500_000, "tensors")
    clock.now += 60
    progress(4_500_000, 4_500_000, "tensors")
    assert told(capsys) == [
        "privtuner: fetching: 2 of 4 MB, about 60 s left, tensors",
        "privtuner: fetching: 4 of 4 MB",
    ]


def test_the_estimate_is_of_what_was_done_since_the_first_call(clock, capsys):
    progress = Progress("cells")
    clock.now += 1000  # before the work began
    progress(50, 100)
    clock.now += 10
    progress(60, 100)
    assert told(capsys) == ["privtuner: cells: 60 of 100, about 40 s left"]


def test_nothing_to_do_and_nothing_done(clock, capsys):
    progress = Progress("fetching")
    progress(0, 0)
    clock.now += 3
    progress(0, 0)
    assert told(capsys) == ["privtuner: fetching: 0 of 0"]
    progress = Progress("fetching")
    progress(0, 7)
    clock.now += 3
    progress(0, 7)
    assert told(capsys) == ["privtuner: fetching: 0 of 7"]


def test_a_terminal_has_one_line_which_is_wiped(clock, terminal, capsys):
    with Progress("preparing layers") as progress:
        for done in range(5):
            progress(done, 4)
            clock.now += 1
        progress(4, 4)
    assert drawn(capsys) == [
        "",
        "privtuner: preparing layers: 2 of 4, about 2 s left",
        "privtuner: preparing layers: 3 of 4, about 1 s left",
        "privtuner: preparing layers: 4 of 4",
        "privtuner: preparing layers: 4 of 4",
        "",
    ]


def test_a_terminal_is_not_redrawn_all_the_time(clock, terminal, capsys):
    with Progress("preparing layers") as progress:
        for done in range(5000):
            progress(done, 10_000)
            clock.now += 0.001
    assert 25 <= len(drawn(capsys)) <= 35


def test_a_line_fits_the_terminal(clock, terminal, capsys):
    with Progress("preparing layers") as progress:
        progress(0, 4)
        clock.now += 3
        progress(1, 4, "x" * 100)
    before, line, after = drawn(capsys)
    assert (before, len(line), after) == ("", 79, "")


def test_an_error_starts_on_a_clean_line(clock, terminal, capsys):
    progress = Progress("preparing layers")

    def stopped():
        with progress:
            progress(0, 4)
            clock.now += 3
            progress(1, 4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert drawn(capsys)[-1] == ""


def test_lengths_of_time_grow():
    seconds = (0, 0.6, 40, 89, 90, 3 * 60, 89 * 60, 130 * 60, 23.5 * 3600, 30 * 3600, 2000 * 3600)
    texts = [about(second) for second in seconds]
    assert texts == [
        *("about 0 s", "about 1 s", "about 40 s", "about 89 s", "about 2 min", "about 3 min", "about 89 min"),
        *("about 2 h 10 min", "about 23 h 30 min", "about 30 h", "about 2,000 h"),
    ]
    assert all(first != second for first, second in itertools.pairwise(texts))

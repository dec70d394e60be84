"""What the server's log looks like, and that no text of others can forge a line or steer a terminal."""

import argparse
import json
import logging

import pytest

from privtuner.commands.watching import add_watching, check_watching, logging_to
from privtuner.errors import InputError
from privtuner.service.counts import Counter, Event, LayerCounts

WHO = ("acme", b"caller", "ipv4:192.0.2.1:5")
ANSWER = Event("Apply", "OK", *WHO, "fc", "forward", LayerCounts(1, 9, 9, 36, 72, 0.25))
HOSTILE = "\x1b[2J\x1b]0;owned\x07\n2026-01-01 ERROR forged\u202e\x9b"
log = logging.getLogger("privtuner.test")


def options(*line):
    parser = argparse.ArgumentParser()
    add_watching(parser)
    return parser.parse_args([str(word) for word in line])


def written(path, *line):
    counter = Counter()
    with logging_to(options("--log-file", path, *line)):
        counter._take(ANSWER)
        counter._take(ANSWER._replace(outcome="ABORTED"))
        log.warning("told: %s", HOSTILE)
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("a fault")
    log.error("after the block")
    return path.read_text(encoding="utf-8")


def test_text_is_one_line_each_that_nothing_can_forge(tmp_path):
    text = written(tmp_path / "log")
    assert all(c.isprintable() or c == "\n" for c in text)
    first, fault, *traceback = text.splitlines()
    assert first.split(" ", 1)[1] == "WARNING told: ?[2J?]0;owned??2026-01-01 ERROR forged??"
    assert fault.split(" ", 1)[1] == "ERROR a fault"
    assert traceback
    assert all(line.startswith("    ") for line in traceback)


def test_json_is_one_object_a_line(tmp_path):
    text = written(tmp_path / "log", "--log-format", "json", "--log-level", "debug")
    answer, refusal, told, fault = map(json.loads, text.splitlines())
    assert text.isascii()
    assert (answer["level"], answer["layer"], answer["bytes_out"], answer["outcome"]) == ("debug", "fc", 72, "OK")
    assert (refusal["level"], refusal["outcome"], refusal["tenant"]) == ("info", "ABORTED", "acme")
    assert told["message"] == f"told: {HOSTILE}"
    assert "ValueError" in fault["exception"]
    assert all(entry["time"].endswith("+00:00") for entry in (answer, refusal, told, fault))


@pytest.mark.parametrize(("level", "count"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_level_decides_what_is_told(tmp_path, level, count):
    text = written(tmp_path / "log", "--log-level", level, "--log-format", "json")
    assert len(text.splitlines()) == count


def test_renamed_file_is_left(tmp_path):
    path = tmp_path / "log"
    with logging_to(options("--log-file", path)):
        log.warning("one")
        path.rename(tmp_path / "old")
        log.warning("two")
    assert [(tmp_path / name).read_text().split()[-1] for name in ("old", "log")] == ["one", "two"]


def test_levels_are_put_back_and_stderr_is_the_default(capsys):
    before = logging.getLogger("privtuner").level
    with logging_to(options("--log-level", "debug")):
        log.debug("seen")
    log.error("not by us")
    assert logging.getLogger("privtuner").level == before
    assert capsys.readouterr().err.splitlines()[0].endswith("DEBUG seen")


def test_file_that_cannot_be_written(tmp_path):
    with (
        pytest.raises(InputError, match="--log-file .*No such file"),
        logging_to(options("--log-file", tmp_path / "a" / "b")),
    ):
        pass


def test_metrics_are_refused_before_a_model_is_loaded():
    check_watching(options("--metrics", "127.0.0.1:0"))
    check_watching(options("--metrics", "0.0.0.0:0", "--expose-metrics"))
    with pytest.raises(InputError, match="other machines can reach"):
        check_watching(options("--metrics", "0.0.0.0:9464"))
    with pytest.raises(InputError, match="--expose-metrics goes with --metrics only"):
        check_watching(options("--expose-metrics"))

"""The audit log: what a line holds, that nothing is answered unrecorded, and files that are renamed or full."""

import json
import logging
import os
import stat

import pytest

from privtuner.errors import InputError, LostError
from privtuner.service import audit as module
from privtuner.service.audit import AuditLog
from privtuner.service.counts import Event, LayerCounts

WHO = ("acme", b"caller", "ipv4:192.0.2.1:5")
ANSWER = Event("Apply", "OK", *WHO, "fc", "forward", LayerCounts(1, 9, 9, 36, 72, 0.25))
REFUSAL = Event("Apply", "ABORTED", *WHO)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def lines(path):
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        assert entry.pop("time").endswith("+00:00")
    return entries


def test_lines_say_who_when_what_and_how_much(path):
    with AuditLog(path) as audit:
        audit.write(ANSWER)
        audit.write(ANSWER._replace(layer="sealed", direction="backward", key=b"\1\xff", state=b"\2"))
        audit.write(REFUSAL)
    who = {"call": "Apply", "tenant": "acme", "peer": "ipv4:192.0.2.1:5"}
    sizes = {"tokens": 9, "bytes_in": 36, "bytes_out": 72, "seconds": 0.25}
    assert lines(path) == [
        {"call": "start", "process": os.getpid()},
        who | {"outcome": "OK", "layer": "fc", "direction": "forward"} | sizes,
        who | {"outcome": "OK", "layer": "sealed", "direction": "backward", "key": "01ff", "state": "02"} | sizes,
        who | {"outcome": "ABORTED", "unrecorded": 0},
        {"call": "end", "unrecorded": 0},
    ]


def test_file_is_for_this_user_and_appended_to(path):
    for _ in range(2):
        with AuditLog(path):
            pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry["call"] for entry in lines(path)] == ["start", "end"] * 2


def test_line_is_there_before_the_call_ends(path):
    audit = AuditLog(path)
    audit.write(ANSWER)
    assert lines(path)[-1]["tokens"] == 9


def test_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    for path in (tmp_path / "nowhere" / "a", tmp_path, "/dev/full"):
        with pytest.raises(InputError, match=f"audit log cannot be written to {path}.*choose another"):
            AuditLog(path)


def test_renamed_file_is_left(path):
    with AuditLog(path) as audit:
        audit.write(ANSWER)
        path.rename(path.with_suffix(".1"))
        audit.write(REFUSAL)
    assert [entry["call"] for entry in lines(path.with_suffix(".1"))] == ["start", "Apply"]
    assert [entry["call"] for entry in lines(path)] == ["Apply", "end"]


def test_full_disk_refuses_calls_until_it_has_room(path, caplog):
    with AuditLog(path) as audit:
        kept, full = os.dup(audit._file), os.open("/dev/full", os.O_WRONLY)
        path.rename(path.with_suffix(".kept"))
        path.symlink_to("/dev/full")
        os.dup2(full, audit._file)
        with pytest.raises(LostError, match="cannot record calls and so takes none"):
            audit.write(ANSWER)
        audit.write(REFUSAL)  # of that call
        for _ in range(3):
            with pytest.raises(LostError, match="cannot record calls"):
                audit.admit()
            audit.write(REFUSAL)
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "No space left on device; calls are refused" in caplog.text
        path.unlink()
        path.with_suffix(".kept").rename(path)
        os.dup2(kept, audit._file)
        audit.admit()
        assert "written again" in caplog.text
        audit.write(REFUSAL)
    os.close(kept)
    os.close(full)
    assert [(entry["call"], entry.get("outcome"), entry.get("unrecorded")) for entry in lines(path)] == [
        ("start", None, None),
        ("Apply", "OK", None),
        ("Apply", "ABORTED", 4),
        ("end", None, 0),
    ]


def test_line_that_was_cut_off_spoils_no_other(path, monkeypatch):
    write = os.write
    with AuditLog(path) as audit:
        monkeypatch.setattr(module.os, "write", lambda file, data: write(file, data[: len(data) // 2]))
        with pytest.raises(LostError):
            audit.write(ANSWER)
        monkeypatch.setattr(module.os, "write", write)
        audit.admit()
    _, cut, whole, _ = path.read_text().splitlines()
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(cut)
    assert json.loads(whole)["tokens"] == 9


def test_refusals_do_not_fill_the_disk(path, monkeypatch):
    seconds = iter([7] * 25 + [8])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    audit = AuditLog(path)
    for _ in range(26):
        audit.write(REFUSAL)
    told = [entry["unrecorded"] for entry in lines(path)[1:]]
    assert told == [0] * 10 + [15]


def test_disk_that_fails_later_is_told(path, monkeypatch, caplog):
    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "_SYNC_SECONDS", 0.01)
    audit = AuditLog(path)
    monkeypatch.setattr(module.os, "fsync", fail)
    failed = module.threading.Event()
    monkeypatch.setattr(audit, "_fail", lambda error: failed.set())
    audit._syncing.start()
    assert failed.wait(20)
    audit._ended.set()
    audit._syncing.join()

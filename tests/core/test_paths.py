"""Places where results cannot be written show before the work, in one line."""

import errno
import os
from pathlib import Path

import pytest

from privtuner import paths
from privtuner.errors import InputError


def test_directory_is_made_and_left_empty(tmp_path):
    folder = paths.ensure_writable(tmp_path / "a" / "b")
    assert list(folder.iterdir()) == []


def test_directory_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(InputError, match="cannot write to .*file.*choose another directory"):
        paths.ensure_writable(path)
    with pytest.raises(InputError, match="cannot write to"):
        paths.ensure_writable(path / "below")


def test_directory_that_takes_no_bytes(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device"):
        paths.ensure_writable(tmp_path)


def test_file_is_checked_and_left_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    paths.ensure_writable_file(path)
    assert not path.exists()
    path.write_text("kept")
    paths.ensure_writable_file(path)
    assert path.read_text() == "kept"


def test_file_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot write .*: No such file or directory"):
        paths.ensure_writable_file(tmp_path / "none" / "a.json")
    with pytest.raises(InputError, match="Is a directory"):
        paths.ensure_writable_file(tmp_path)


def test_what_the_system_says_names_the_place(tmp_path):
    with (
        pytest.raises(InputError, match="cannot write .*there.*No space left on device; choose another place"),
        paths.writing(tmp_path / "there"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ZeroDivisionError), paths.writing(tmp_path):
        _ = 1 / 0


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o640)
    with paths.replacing(path) as new:
        assert (new.parent, new.suffix) == (tmp_path, ".json")
        new.write_text("half")
        assert path.read_text() == "old"
        new.write_text("whole")
    assert path.read_text() == "whole"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()])
def test_file_that_was_not_finished_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(type(error)), paths.replacing(path) as new:  # noqa: PT012
        new.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_disk_that_is_full_only_when_it_has_to_be_written(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), paths.replacing(path) as new:
        new.write_text("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "real" / "a.json"
    link.symlink_to(file)
    with paths.replacing(link) as new:
        new.write_text("new")
    assert link.is_symlink()
    assert file.read_text() == "new"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_device_is_written_and_not_replaced(tmp_path):
    link = tmp_path / "full.json"
    link.symlink_to("/dev/full")
    for path in (Path("/dev/full"), Path("/dev/stdout"), link):
        with paths.replacing(path) as new:
            assert new == path
    with pytest.raises(OSError, match="No space left"), paths.replacing(link) as new:
        new.write_text("x")
    assert not Path("/dev/full").is_file()


def test_file_whose_folder_takes_no_other_is_refused_before(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "a.json"
    path.write_text("kept")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(InputError, match="cannot write .*Permission denied"):
        paths.ensure_writable_file(path)
    assert path.read_text() == "kept"

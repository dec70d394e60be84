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

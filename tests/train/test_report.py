"""What a run leaves on disk, and what is said when the disk does not take it."""

import errno
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from safetensors import SafetensorError

from privtuner.errors import InputError, PrivtunerError
from privtuner.train import report
from privtuner.train.training import Step, TrainConfig, TrainResult
from text_cases import environment

FULL = OSError(errno.ENOSPC, "No space left on device")


class Model:
    """Saves what it is asked to have learned; ``error``, if any, comes when half of that is written."""

    def __init__(self, error=None, weights=b"adapter"):
        self.error, self.weights = error, weights

    def save_pretrained(self, directory):
        file = Path(directory) / "adapter_model.safetensors"
        if self.error:
            file.write_bytes(b"")
            raise self.error
        file.write_bytes(self.weights)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_labels_lie_beside_the_adapter(tmp_path):
    report.save_adapter(Model(), ["ä", "b"], tmp_path)
    assert report.load_labels(tmp_path) == ("ä", "b")
    assert report.load_pool(tmp_path) == "first"
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
)
def test_full_disk_says_what_is_lost(tmp_path, error):
    with pytest.raises(PrivtunerError, match="the trained adapter is lost: cannot write .*No space left on device"):
        report.save_adapter(Model(error), ["a", "b"], tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_numbers_on_a_full_disk():
    with pytest.raises(PrivtunerError, match="the run's numbers are lost: .*No space left"):
        report.save_json({"a": 1}, Path("/dev/full"))


def test_numbers_are_json(tmp_path):
    report.save_json({"a": [1, None, "ä"]}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None, "ä"]}


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"[]",
        b'{"labels": 5, "pool": 5}',
        b'{"labels": "a"}',
        b'{"labels": [1], "pool": [1]}',
        b"\xff",
    ],
)
def test_labels_that_are_none(tmp_path, content):
    if content is not None:
        (tmp_path / "labels.json").write_bytes(content)
    for load in (report.load_labels, report.load_pool):
        with pytest.raises(InputError, match=r"labels\.json"):
            load(tmp_path)


def test_picture_shows_both_curves(tmp_path):
    path = tmp_path / "loss.png"
    report.save_loss_curve({"plain": [3.0, 2.0, 1.0], "encrypted": [3.0, 2.1, 1.1]}, path, "title")
    pixels = image.imread(path)
    assert pixels.shape[:2] == (675, 1125)
    for colour in ((31, 119, 180), (255, 127, 14)):  # the first two of Matplotlib's cycle
        assert (np.rint(255 * pixels[..., :3]) == colour).all(-1).any()


def test_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(PrivtunerError, match="the loss curve is lost: cannot write"):
        report.save_loss_curve({"plain": [1.0]}, tmp_path / "none" / "a.png", "title")


def test_adapter_of_an_earlier_run_stays_whole(tmp_path):
    report.save_adapter(Model(), ["a", "b"], tmp_path)
    before = contents(tmp_path)
    with pytest.raises(PrivtunerError):
        report.save_adapter(Model(FULL), ["a", "b"], tmp_path)
    assert contents(tmp_path) == before
    report.save_adapter(Model(weights=b"better"), ["a", "c"], tmp_path)
    assert contents(tmp_path).keys() == before.keys()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"better"


def test_results_on_a_disk_that_takes_no_more(tmp_path):
    """The limit on a file's size stands for the disk's: what there was stays, nothing is left half written."""
    report.save_json({"a": 1}, tmp_path / "a.json")
    report.save_loss_curve({"plain": [1.0]}, tmp_path / "a.png", "title")
    before = contents(tmp_path)
    program = f"""
import resource
from pathlib import Path
from privtuner.errors import PrivtunerError
from privtuner.train import report
folder = Path({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (
    lambda: report.save_json({{"a": [0] * 10000}}, folder / "a.json"),
    lambda: report.save_loss_curve({{"plain": [2.0]}}, folder / "a.png", "title"),
):
    try:
        write()
    except PrivtunerError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    lines = done.stdout.splitlines()
    assert ["File too large" in line for line in lines] == [True, True], done
    assert contents(tmp_path) == before


def run_of(steps, total=3):
    return TrainResult("plain", TrainConfig(steps=total), [Step(1.0, 0.1, 1.0, 1)] * steps)


def test_keeper_saves_after_the_last_step(tmp_path):
    lines = []
    keeper = report.AdapterKeeper(Model(), ["a", "b"], tmp_path, lines.append)
    keeper(run_of(1))
    assert not keeper.complete
    assert list(tmp_path.iterdir()) == []
    keeper(run_of(3))
    assert keeper.complete
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert lines == []


@pytest.mark.parametrize("complete", [True, False])
def test_keeper_finds_another_place(tmp_path, monkeypatch, complete):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    lines, out = [], tmp_path / "out"
    out.write_text("in the way")
    keeper = report.AdapterKeeper(Model(), ["a", "b"], out, lines.append)
    keeper(run_of(3)) if complete else keeper.rescue()
    (elsewhere,) = (tmp_path / "temporary").iterdir()
    assert (elsewhere / "adapter_model.safetensors").exists()
    assert ["the trained adapter is lost: cannot write" in line and str(elsewhere) in line for line in lines] == [True]


def test_keeper_says_when_no_place_takes_it(tmp_path):
    keeper = report.AdapterKeeper(Model(FULL), ["a", "b"], tmp_path, print)
    with pytest.raises(PrivtunerError, match=r"the trained adapter is lost: cannot write .*interrupted: No space left"):
        keeper.rescue()


def test_folder_is_tried_and_left_as_it_was(tmp_path):
    report.check_folder(Model(), ["a", "b"], tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="cannot save an adapter in .*No space left on device"):
        report.check_folder(Model(FULL), ["a", "b"], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "labels.json", "metrics.json", "loss.png"])
def test_folder_with_something_in_the_way(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} is in the way"):
        report.check_folder(Model(), ["a", "b"], tmp_path)


def test_folder_with_a_file_where_an_interrupted_run_goes(tmp_path):
    (tmp_path / "interrupted").write_text("")
    with pytest.raises(InputError, match="interrupted is in the way"):
        report.check_folder(Model(), ["a", "b"], tmp_path)

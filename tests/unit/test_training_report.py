"""What a run leaves on disk, and what is said when the disk does not take it."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from safetensors import SafetensorError

from privtuner.errors import InputError, PrivtunerError
from privtuner.lora import report


class Model:
    def __init__(self, error=None):
        self.error = error

    def save_pretrained(self, directory):
        if self.error:
            raise self.error
        (Path(directory) / "adapter_model.safetensors").write_bytes(b"adapter")


def test_labels_lie_beside_the_adapter(tmp_path):
    report.save_adapter(Model(), ["ä", "b"], tmp_path)
    assert report.load_labels(tmp_path) == (("ä", "b"), "first")
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
        b'{"labels": ["a"]}',
        b'{"labels": 5, "pool": "mean"}',
        b'{"labels": "a", "pool": "mean"}',
        b"\xff",
    ],
)
def test_labels_that_are_none(tmp_path, content):
    if content is not None:
        (tmp_path / "labels.json").write_bytes(content)
    with pytest.raises(InputError, match=r"labels\.json"):
        report.load_labels(tmp_path)


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

"""How a command ends: signals, full disks, servers that go away, faults; what is on disk then, and what it says."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import privtuner
from cli_cases import failed, flat, run
from privtuner import paths
from privtuner.commands import info
from privtuner.train import fine_tuning, report, training
from text_cases import environment

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def test_disk_that_is_full_before_training(model, arguments, capsys, monkeypatch):
    import peft

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", full)
    monkeypatch.setattr(fine_tuning, "train_classifier", None)
    line = ["train", "--plain", "--model", model, *flat(arguments)]
    assert re.search("cannot save an adapter in .*out: No space left", failed(capsys, 2, line))


def test_disk_that_is_full_after_training(model, arguments, capsys, monkeypatch, tmp_path):
    """The table is printed, the adapter is somewhere, and nothing is left half written."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("an earlier run's")

    def put(new, target):
        if target.is_relative_to(out):
            raise OSError(28, "No space left on device")
        new.replace(target)

    monkeypatch.setattr(report, "put", put)
    monkeypatch.setattr(paths, "put", put)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    line = ["train", "--plain", "--model", model, *flat(arguments, json=tmp_path / "copy.json")]
    assert run(*line) == 1
    printed, err = capsys.readouterr()
    assert re.search(r"^accuracy +\d+\.\d% before, \d+\.\d% after", printed, re.MULTILINE)
    (elsewhere,) = tmp_path.glob("privtuner-adapter-*")
    assert f"IT IS IN {elsewhere} INSTEAD" in err
    assert printed.splitlines()[-1] == f"written   {elsewhere}: adapter, labels.json; {tmp_path}: copy.json"
    assert err.splitlines()[-1].startswith("privtuner: error: the trained adapter is lost: cannot write")
    assert report.load_labels(elsewhere) == ("fruit", "river", "tool")
    assert len(json.loads((tmp_path / "copy.json").read_text())["steps"]) == 3
    assert [path.name for path in out.iterdir()] == ["metrics.json"]
    assert (out / "metrics.json").read_text() == "an earlier run's"


FAULTS = [
    (KeyboardInterrupt(), 130),
    (privtuner.errors.ServiceError("the server went away"), 1),
    (privtuner.errors.CkksError("a bound was passed"), 1),
    (privtuner.errors.MessageError("a reply is malformed"), 1),
    (MemoryError(), 1),
    (OSError(5, "Input/output error"), 1),
    (RuntimeError("index out of range"), RuntimeError),
    (SystemExit(3), SystemExit),
]


def at_step(monkeypatch, fault, number):
    """Raise ``fault`` in the optimiser's step of that number."""
    calls, whole = [], torch.optim.AdamW.step

    def step(self, *rest, **options):
        calls.append(1)
        if len(calls) == number:
            raise fault
        return whole(self, *rest, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize(("fault", "status"), FAULTS, ids=lambda value: type(value).__name__)
def test_whatever_ends_training_the_adapter_is_saved(model, arguments, capsys, monkeypatch, tmp_path, fault, status):
    at_step(monkeypatch, fault, 2)
    line = ["train", "--plain", "--model", model, *flat(arguments, eval=None)]
    if isinstance(status, int):
        assert run(*line) == status
        assert capsys.readouterr().err.splitlines()[-1].startswith("privtuner: error: ")
    else:  # a bug keeps its traceback
        with pytest.raises(status):
            run(*line)
    assert (tmp_path / "out" / "interrupted" / "adapter_model.safetensors").stat().st_size
    assert report.load_labels(tmp_path / "out" / "interrupted") == ("fruit", "river", "tool")
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("fault", "status"), FAULTS, ids=lambda value: type(value).__name__)
def test_whatever_comes_after_the_last_step_the_results_are_there(
    model, arguments, capsys, monkeypatch, tmp_path, fault, status
):
    whole = training.evaluate

    def evaluate(*rest, title, **options):
        if title == "after":
            raise fault
        return whole(*rest, title=title, **options)

    monkeypatch.setattr(training, "evaluate", evaluate)
    line = ["train", "--plain", "--model", model, *flat(arguments)]
    if isinstance(status, int):
        assert run(*line) == status
    else:
        with pytest.raises(status):
            run(*line)
    assert re.search(r"^loss +\d\.\d+ at the first step", capsys.readouterr().out, re.MULTILINE)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapter_model.safetensors",
        "labels.json",
        "metrics.json",
        "loss.png",
    }
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["accuracy_before"] is not None
    assert written["accuracy_after"] is None
    assert not (tmp_path / "out" / "interrupted").exists()


@pytest.mark.parametrize(
    "fault", [privtuner.errors.ServiceError("refused"), privtuner.errors.MessageError("malformed")]
)
def test_server_that_gives_no_counts_costs_nothing(address, arguments, capsys, monkeypatch, tmp_path, fault):
    from privtuner.service import client

    saved = []

    def counts(_):
        saved.append((tmp_path / "out" / "adapter_model.safetensors").exists())
        raise fault

    monkeypatch.setattr(client.RemoteTransport, "counts", counts)
    assert run("train", "--server", address, *flat(arguments)) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^mode +encrypted$", out, re.MULTILINE)
    assert f"warning: what the server counted is left out: {fault}" in err
    assert saved == [True]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["server"] is None


def test_interrupted_training_keeps_the_adapter(model, arguments, capsys, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fine_tuning, "train_classifier", interrupt)
    assert run("train", "--plain", "--model", model, *flat(arguments)) == 130
    assert "the adapter as it stood is in" in capsys.readouterr().err
    assert (tmp_path / "out" / "interrupted" / "adapter_model.safetensors").exists()


def test_adapter_whose_last_saving_fails_is_saved_again(model, arguments, capsys, monkeypatch, tmp_path):
    """Whatever it was that failed: all steps are done, and the numbers are there as well."""
    whole, calls = report.save_adapter, []

    def save(*rest):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return whole(*rest)

    monkeypatch.setattr(report, "save_adapter", save)
    assert run("train", "--plain", "--model", model, *flat(arguments, eval=None)) == 1
    assert f"the adapter as it stood is in {tmp_path / 'out' / 'interrupted'}" in capsys.readouterr().err
    assert report.load_labels(tmp_path / "out" / "interrupted") == ("fruit", "river", "tool")
    assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"]) == 3


def test_adapter_that_can_be_saved_nowhere_hides_no_error(model, arguments, capsys, monkeypatch):
    at_step(monkeypatch, privtuner.errors.CkksError("a bound was passed"), 2)

    def full(*_):
        raise privtuner.errors.PrivtunerError("no room")

    monkeypatch.setattr(report.AdapterKeeper, "rescue", full)
    assert run("train", "--plain", "--model", model, *flat(arguments, eval=None)) == 1
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "privtuner: the adapter as it stood could not be saved: no room",
        "privtuner: the same command goes on after step 1 of 3",
        "privtuner: error: a bound was passed",
    ]


def test_error_of_the_system_is_one_line(monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(info, "run", full)
    assert failed(capsys, 1, ["info"]) == "privtuner: error: No space left on device: /somewhere"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_output_that_takes_nothing():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "privtuner", "info"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    assert (done.returncode, done.stderr) == (1, "privtuner: error: No space left on device\n")


def test_command_in_a_thread(capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, "info").result() == 0
    assert run("info") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_interrupt(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupt)
    assert "interrupted" in failed(capsys, 130, ["info"])


def test_error_is_one_line(monkeypatch, capsys):
    def fail(_):
        raise privtuner.errors.ServiceError("first\n  second")

    monkeypatch.setattr(info, "run", fail)
    assert failed(capsys, 1, ["info"]) == "privtuner: error: first second"

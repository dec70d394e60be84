"""The command in this process, and what its tests share: a tiny model, its server, texts and the usual arguments."""

from __future__ import annotations

import pytest

from privtuner import cli
from privtuner.nn import split_pretrained
from privtuner.service import Server
from text_cases import one_thread, rows, tiny_model_directory, write_csv


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(model):
    with Server(split_pretrained(model), name="tiny") as server:
        yield server.address


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_csv(folder / "train.csv", rows(0, 60)), write_csv(folder / "test.csv", rows(60, 15))


@pytest.fixture
def arguments(files, tmp_path):
    train, test = files
    return {
        "--data": train,
        "--eval": test,
        "--label-column": "category",
        "--steps": 3,
        "--batch-size": 8,
        "--lora-r": 2,
        "--seed": 0,
        "--out": tmp_path / "out",
    }


def run(*line, **_):
    return cli.main([str(part) for part in line])


def flat(arguments, **changes):
    merged = {**arguments, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return [part for pair in merged.items() if pair[1] is not None for part in pair]


def failed(capsys, status, line):
    """Run, and return the single line it complains with."""
    try:
        found = run(*line)
    except SystemExit as stop:  # what argparse does
        found = stop.code
    out, err = capsys.readouterr()
    complaints = [entry for entry in err.splitlines() if entry.startswith("privtuner: error: ")]
    assert found == status, err
    assert out == ""
    assert len(complaints) == 1, err
    assert "Traceback" not in err
    return complaints[0]


def failed_late(capsys, status, line):
    """As `failed`, with lines of progress before."""
    assert run(*line) == status
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]

"""What the tests of the command share: a tiny model, its server, texts and the usual arguments."""

from __future__ import annotations

import pytest

from privtuner.nn import split_pretrained
from privtuner.service import Server
from text_cases import rows, write_csv


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

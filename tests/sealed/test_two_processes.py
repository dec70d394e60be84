"""Sealed training by the commands a user would type, in two processes, on a tiny model and a secure ring."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from privtuner import cli
from privtuner.service import RemoteTransport
from text_cases import (
    command,
    environment,
    rows,
    server_process,
    tiny_model_directory,
    write_csv,
)

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "held.py"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One layer with four hidden features: its sealed block takes a second."""
    folder = tmp_path_factory.mktemp("model")
    return tiny_model_directory(folder, hidden_size=8, num_hidden_layers=1, intermediate_size=4)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    train = write_csv(tmp_path_factory.mktemp("data") / "train.csv", rows(0, 60))
    files = ["--data", str(train), "--label-column", "category"]
    return [*files, "--batch-size", "8", "--lora-r", "2", "--steps", "2", "--seed", "0"]


def test_sealed_training(model, options, tmp_path):
    with server_process(model, "--seal", "mlp") as (_, address):
        done = command("train", "--server", address, "--seal", "mlp", *options, "--out", tmp_path / "sealed")
        assert done.returncode == 0, done.stderr
        with RemoteTransport(address) as transport:
            assert transport.hello()["sealed"] == 1
            counts = transport.counts()
    assert "privtuner: 1 feed-forward blocks are sealed, which is slow" in done.stderr
    wire = "encoder.layer.0.intermediate.dense+dense"
    for direction in ("forward", "backward"):
        said = re.findall(
            rf"privtuner: sealed block {re.escape(wire)} {direction}: \d+ tokens in [\d.]+ s", done.stderr
        )
        assert len(said) == counts.layers[wire, direction].requests == 2
    assert counts.refused == 0
    assert (tmp_path / "sealed" / "adapter_model.safetensors").exists()
    assert cli.main(["train", "--plain", "--model", str(model), *options, "--out", str(tmp_path / "plain")]) == 0
    sealed, plain = ((tmp_path / name / "metrics.json").read_text() for name in ("sealed", "plain"))
    losses = [[float(loss) for loss in re.findall(r'"loss": ([\d.]+)', text)] for text in (sealed, plain)]
    # 8-bit weights in the linear layers, and the polynomial's 0.002.
    assert losses[0] == pytest.approx(losses[1], abs=0.03)


def test_server_that_does_not_seal_is_refused(options, tmp_path):
    with server_process(tiny_model_directory(tmp_path / "model")) as (_, address):
        done = command("train", "--server", address, "--seal", "mlp", *options, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith(f"privtuner: error: the server at {address} does not seal its feed-forward blocks; ")
    done = command(
        "train", "--plain", "--model", tmp_path / "model", "--seal", "mlp", *options, "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    assert "--seal goes with --server only" in done.stderr


def test_held_adapter_in_two_processes(tmp_path):
    model = tiny_model_directory(tmp_path / "model")
    data = write_csv(tmp_path / "data.csv", rows(0, 60))
    line = [sys.executable, str(BENCHMARK), "--model", str(model), "--data", str(data)]
    options = ["--labels", "3", "--steps", "2", "--batch-size", "16"]
    done = subprocess.run(
        [*line, *options], capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"step +\d+ +loss ([\d.]+) encrypted +([\d.]+) in the clear", done.stdout)
    assert len(losses) == 2
    assert all(float(ours) == pytest.approx(float(clear), abs=0.01) for ours, clear in losses)

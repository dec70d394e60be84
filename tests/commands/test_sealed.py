"""The commands of a sealed model from end to end, on a ring that protects nothing."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from cli_cases import failed, failed_late, flat, run
from privtuner import ckks, nn
from privtuner.errors import ServiceError
from privtuner.nn import OwnerBundle, Prepared, Sealing, split_pretrained
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.server import SealedService
from privtuner.service import Server
from privtuner.train import load_classifier
from text_cases import environment, rows, tiny_model_directory

PARAMETERS = ckks.Parameters.INSECURE(12, ring_dimension=1024)
PERIOD = 8
TEXTS = [text for text, _ in rows(0, 75)]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of one narrow block, with its tokenizer."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    return tiny_model_directory(tmp_path_factory.mktemp("small"), **sizes)


@pytest.fixture(scope="module")
def prepared(small):
    parts = split_pretrained(small, seal=Sealing(period=PERIOD, rank=2))
    return Prepared.calibrate(parts, TEXTS, room=2.0, parameters=PARAMETERS)


@pytest.fixture(scope="module")
def sealed(prepared):
    service = SealedService(prepared.model, release=True)
    with Server(prepared.split, name="small", sealed=service) as server:
        yield server.address


@pytest.fixture(autouse=True)
def _insecure(monkeypatch):
    monkeypatch.setattr("privtuner.sealed.owner.require_secure", lambda parameters, _: parameters)


def test_what_was_prepared_comes_back(prepared, tmp_path):
    prepared.save(tmp_path / "model")
    again = Prepared.load(tmp_path / "model")
    assert again.model.public == prepared.model.public
    assert again.model.secret == prepared.model.secret
    assert again.bundle.sealed == prepared.bundle.sealed
    assert again.bundle.to_files() == prepared.bundle.to_files()
    assert again.table() == prepared.table()
    owners = (tmp_path / "model" / "owner").iterdir()
    held = np.concatenate([array.ravel() for array in prepared.weights.arrays()]).astype(np.float32).tobytes()
    assert not [file for file in owners if held[:64] in file.read_bytes()]


def test_embed(small, sealed, capsys, tmp_path, monkeypatch):
    """With a copy of tokenizer and configuration of one's own."""
    monkeypatch.setattr(OwnerBundle, "tokenizer", lambda bundle: pytest.fail("the server's was used"))
    data = tmp_path / "texts.csv"
    data.write_text("text\n" + "\n".join(TEXTS[:70]) + "\n")  # more than one pass takes
    line = ["embed", "--server", sealed, "--data", data, "--out", tmp_path / "vectors.npy", "--tokenizer", small]
    assert run(*line) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^70 vectors of 8 features written to .*vectors.npy$", out, re.MULTILINE)
    assert re.search(r"^\d+ s, \d+ MB to the server, \d+ MB back, [\d,]+ ciphertexts refreshed$", out, re.MULTILINE)
    assert "texts 65 to 70 of 70" in err
    vectors = np.load(tmp_path / "vectors.npy")
    tokenizer, clear = AutoTokenizer.from_pretrained(small), AutoModel.from_pretrained(small).eval()
    batch = tokenizer(TEXTS[:70], padding=True, truncation=True, max_length=PERIOD, return_tensors="pt")
    with torch.no_grad():
        states = clear(**batch).last_hidden_state * batch["attention_mask"].unsqueeze(-1)
    wanted = (states.sum(1) / batch["attention_mask"].sum(1, keepdim=True)).numpy()
    # What approximations of softmax and activation may cost: a hundredth of the vectors.
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors - wanted) < 1e-2 * np.linalg.norm(wanted)


@pytest.fixture
def given(arguments):
    kept = {name: value for name, value in arguments.items() if name not in ("--lora-r", "--batch-size")}
    return {**kept, "--steps": 2}


def test_training(small, sealed, given, files, capsys, tmp_path):
    assert run("train", "--server", sealed, "--seal", "model", "--release", *flat(given, lr=2.0)) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^mode +sealed$", out, re.MULTILINE)
    assert re.search(r"^steps +2 of 60 texts, LoRA r = 2 on query,value$", out, re.MULTILINE)
    assert re.search(r"^accuracy +\d+\.\d% before, \d+\.\d% after, on 15 test texts$", out, re.MULTILINE)
    assert re.search(r"step 2 of 2: loss \d+\.\d+, \d+ s, \d+ MB up, \d+ MB down$", err, re.MULTILINE)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (written["mode"], written["seal"], written["pool"]) == ("sealed", "model", "mean")
    assert (written["sequences"], written["config"]["max_length"]) == (PARAMETERS.slots // PERIOD, PERIOD)
    assert [step["lr"] for step in written["steps"]] == [2.0, 1.0]
    assert set(written["jobs"]) == {"embed", "forward", "backward"}
    assert {entry["direction"] for entry in written["server"]["layers"]} >= {"embed", "forward", "backward"}
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    # The adapter that was released does with the clear model what the sealed one did at the end.
    clear, tokenizer = load_classifier(small, tmp_path / "out"), AutoTokenizer.from_pretrained(small)
    texts, labels = zip(*rows(60, 15), strict=True)
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=PERIOD, return_tensors="pt")
    with torch.no_grad():
        answers = [clear.config.id2label[answer] for answer in clear(**batch).logits.argmax(-1).tolist()]
    right = np.mean([answer == label for answer, label in zip(answers, labels, strict=True)])
    assert abs(right - written["accuracy_after"]) <= 1 / 15  # a close call may fall the other way
    moved = [tensor for name, tensor in clear.named_parameters() if ".lora_B" in name]
    assert all(tensor.abs().max() > 0 for tensor in moved)


def test_adapters_outlive_the_run_in_a_file(sealed, given, capsys, tmp_path):
    data, state = tmp_path / "texts.csv", tmp_path / "out" / "run.state"
    data.write_text("text\n" + "\n".join(TEXTS[:3]) + "\n")
    del given["--eval"]
    given |= {"--steps": 1}
    for steps in (0, 1):
        assert run("train", "--server", sealed, "--seal", "model", *flat(given, lr=2.0)) == 0
        err = capsys.readouterr().err
        assert ("going on after step 1" in err) == (steps == 1)
        assert "holds the key of this run" in err
    assert state.stat().st_mode & 0o777 == 0o600
    line = ["train", "--server", sealed, "--seal", "model", *flat(given, lr=1.0)]
    assert "lr is 1.0 here and 2.0 there" in failed_late(capsys, 2, line)
    vectors = []
    for options in ([], ["--state", state]):
        out = tmp_path / f"{len(options)}.npy"
        assert run("embed", "--server", sealed, "--data", data, "--out", out, *options) == 0
        vectors.append(np.load(out))
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3  # those of the adapted model are others
    # A head beside the adapter of another run would pass for a part of it.
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    capsys.readouterr()
    assert "choose another --out" in failed_late(
        capsys, 2, ["train", "--server", sealed, "--seal", "model", *flat(given)]
    )


def test_the_head_is_saved_whatever_ends_it(sealed, given, capsys, monkeypatch, tmp_path):
    steps = []

    def step(self, gradient, tokens):
        steps.append(tokens)
        if len(steps) == 2:
            raise ServiceError("the server is gone")

    monkeypatch.setattr("privtuner.nn.SealedEncoder.step", step)
    del given["--eval"]
    assert run("train", "--server", sealed, "--seal", "model", *flat(given)) == 1
    assert "the server is gone" in capsys.readouterr().err
    assert (tmp_path / "out" / "head.safetensors").is_file()
    (tmp_path / "out" / "head.safetensors").write_bytes(b"an older run's")
    steps.pop()  # the next one, the first of this run, fails
    assert run("train", "--server", sealed, "--seal", "model", *flat(given), "--overwrite") == 1
    assert (tmp_path / "out" / "head.safetensors").read_bytes() == b"an older run's"


def test_a_run_goes_on_where_it_was_ended(sealed, given, capsys, monkeypatch, tmp_path):
    """With the adapters and the head of the same step, whenever the server went away."""
    whole, steps = SealedOwner.backward, []

    def backward(self, *arguments):
        steps.append(self.step)
        if len(steps) == 2:
            raise ServiceError("the server is gone")
        whole(self, *arguments)

    monkeypatch.setattr(SealedOwner, "backward", backward)
    del given["--eval"]
    line = ["train", "--server", sealed, "--seal", "model", *flat(given)]
    assert "--resume: there is no" in failed_late(capsys, 2, [*line, "--resume"])
    assert run(*line) == 1
    first = load_file(tmp_path / "out" / "head.safetensors")
    assert run(*line, "--resume") == 0
    assert "going on after step 1, from" in capsys.readouterr().err
    assert steps == [0, 1, 1]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [step["lr"] for step in written["steps"]] == [0.05, 0.025]
    assert not torch.equal(load_file(tmp_path / "out" / "head.safetensors")["weight"], first["weight"])


def test_a_server_in_a_process_of_its_own(prepared, capsys, tmp_path):
    """Its line for programs, and its counts at the end."""
    prepared.save(tmp_path / "model")
    (tmp_path / "texts.csv").write_text("text\ni like the apple\n")
    line = ["serve", "--model", str(tmp_path / "model"), "--seal", "model", "--port", "0", "--ready-json"]
    server = subprocess.Popen(
        [sys.executable, "-m", "privtuner", *line, "--state", str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        ready = json.loads(server.stdout.readline())
        assert (ready["model"], ready["sealed"], ready["layers"]) == ("model", True, 0)
        assert ready["bundle"] == prepared.bundle.digest()
        options = ["--data", tmp_path / "texts.csv", "--out", tmp_path / "vectors.npy"]
        assert run("embed", "--server", ready["address"], *options) == 0
        server.terminate()
        out, err = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0
    assert out == "privtuner: stopped after 1 jobs\n"
    assert "refreshes of" in err  # the plan, before anybody connects


def test_options_that_do_not_fit_the_model(sealed, given, capsys):
    line = ["train", "--server", sealed, "--seal", "model"]
    assert run(*line, *flat(given, pool="first")) == 2
    assert "--pool first: this server's model reveals the pool mean" in capsys.readouterr().err
    assert run(*line, *flat(given, batch_size=65)) == 2
    assert "batch_size is 65, and a pass of this server's model takes 64 texts" in capsys.readouterr().err


def test_the_model_is_not_served_in_layers(sealed, arguments, capsys):
    assert "is sealed: train with --seal model" in failed(capsys, 2, ["train", "--server", sealed, *flat(arguments)])


def test_insecure_parameters_are_refused(sealed, given, capsys, monkeypatch):
    monkeypatch.undo()
    assert run("train", "--server", sealed, "--seal", "model", *flat(given)) == 2
    assert "the server asks for INSECURE" in capsys.readouterr().err


def test_the_bundle_is_sealed(prepared):
    assert repr(prepared.bundle).startswith("OwnerBundle(BertModel, sealed, ")
    bundle = nn.OwnerBundle.from_files(prepared.bundle.to_files())
    assert bundle.sealed == prepared.model.public

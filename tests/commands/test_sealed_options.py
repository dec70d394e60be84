"""The options of the commands of a sealed model: what goes together, what is out of range, and what is said of it."""

import argparse

import pytest
from transformers import DistilBertConfig, DistilBertModel

from cli_cases import failed, failed_late, flat
from privtuner.commands import sealing
from privtuner.errors import InputError
from privtuner.train.table import read_texts
from text_cases import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    path.write_text('text,more\ni like the apple,1\n"a, new saw",2\nsee the rhine,3\n')
    return path


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilbert")
    config = DistilBertConfig(vocab_size=30, dim=32, n_layers=1, n_heads=2, hidden_dim=48)
    DistilBertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", "t.csv"], "--calibrate goes with --seal model only"),
        (["--sessions", 2], "--sessions goes with --seal model only"),
        (["--state", "folder"], "--state goes with --seal model only"),
        (["--period", 16], "--period goes with --seal model only"),
        (["--text-column", "t"], "--text-column goes with --seal model only"),
        (["--release"], "--release goes with --seal model only"),
        (
            ["--seal", "model", "--preset", "linear-w8"],
            "--preset and --scheme are of layers that are served one by one",
        ),
        (["--seal", "model", "--scheme", "openfhe"], "--preset and --scheme are of layers that are served one by one"),
        (["--seal", "model", "--device", "cuda:0,cuda:1"], "a sealed model takes one GPU"),
        (["--seal", "model", "--sessions", 0], "--sessions is 0; give at least 1"),
        (["--seal", "model", "--device-memory", 2], "--device-memory goes with --device cuda"),
        (["--seal", "mlp"], "argument --seal: invalid choice: 'mlp'"),
    ],
)
def test_serve(capsys, model, options, message):
    assert message in failed(capsys, 2, ["serve", "--model", model, "--port", 0, *options])


def test_serve_without_anything_prepared(capsys, model):
    line = ["serve", "--model", model, "--port", 0, "--seal", "model"]
    assert "holds no prepared model; give --calibrate texts.csv to prepare one here" in failed(capsys, 2, line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--period", 12], "period 12: must be a power of two"),
        (["--period", 1024], "period 1024: the model has positions for"),
        (["--rank", -1], "rank = -1: must be from 0"),
        (["--targets", "query,key"], "name some of ('query', 'value'), in this order"),
        (["--room", 0.5], "room = 0.5: must be at least 1"),
        (["--texts", 0], "--texts is 0; give at least 1"),
        (["--text-column", "words"], "has no column 'words'; its columns are: 'text', 'more'"),
        (["--delimiter", "::"], "delimiter is '::'; give one character"),
    ],
)
def test_prepare(capsys, model, texts, tmp_path, options, message):
    line = ["prepare", "--model", model, "--seal", "model", "--calibrate", texts, "--out", tmp_path, *options]
    assert message in failed_late(capsys, 2, line)


def test_prepare_names_the_models_that_can_be_sealed(capsys, distilbert, texts, tmp_path):
    line = ["prepare", "--model", distilbert, "--seal", "model", "--calibrate", texts, "--out", tmp_path]
    said = failed_late(capsys, 2, line)
    assert "a DistilBertModel cannot be sealed whole; BERT-like encoders can: bert, camembert" in said


def test_prepare_wants_text_and_a_place(capsys, model, texts, tmp_path):
    line = ["prepare", "--model", model, "--seal", "model"]
    assert "the following arguments are required: --out, --calibrate" in failed(capsys, 2, line)
    assert "required: --seal" in failed(
        capsys, 2, ["prepare", "--model", model, "--out", tmp_path, "--calibrate", texts]
    )


def test_a_prepared_model_takes_no_options(capsys, model, texts, tmp_path):
    (tmp_path / "domains.json").write_text("{}")
    line = ["serve", "--model", tmp_path, "--port", 0, "--seal", "model", "--period", 16, "--calibrate", texts]
    assert "--calibrate, --period: the model in" in failed(capsys, 2, line)
    line = ["prepare", "--model", tmp_path, "--seal", "model", "--calibrate", texts, "--out", tmp_path / "new"]
    assert "holds a prepared model; give the directory of the model itself" in failed(capsys, 2, line)


def test_a_prepared_model_that_is_damaged(capsys, tmp_path):
    (tmp_path / "domains.json").write_text("{}")
    line = ["serve", "--model", tmp_path, "--port", 0, "--seal", "model"]
    assert "no bundle in" in failed_late(capsys, 2, line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "openfhe"], "--scheme and --device have no meaning with --seal"),
        (["--device", "cuda"], "--scheme and --device have no meaning with --seal"),
        (["--lora-r", 4], "--lora-r: the server of a sealed model has settled that"),
        (["--targets", "query"], "--targets: the server of a sealed model has settled that"),
        (["--constant-size"], "requests of a sealed model have constant sizes"),
        (["--verify-every", "2"], "--verify-every has no meaning here: ciphertexts of a sealed model"),
        (["--momentum", 1], "--momentum is 1; give a number in [0, 1)"),
        (["--momentum", "nan"], "--momentum is nan; give a number in [0, 1)"),
        (["--lr", 0], "lr is 0.0; give a positive number"),
        (["--batch-size", 0], "batch_size is 0; give a number from 1"),
    ],
)
def test_train(capsys, arguments, options, message):
    given = flat({name: value for name, value in arguments.items() if name not in ("--lora-r", "--batch-size")})
    line = ["train", "--server", "127.0.0.1:1", "--seal", "model", *given, *options]
    assert message in failed(capsys, 2, line)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--momentum", 0.5], "--momentum goes with --seal model or --plain only"),
        (["--release"], "--release goes with --seal model only"),
    ],
)
def test_train_without_a_sealed_model(capsys, arguments, option, message):
    line = ["train", "--server", "127.0.0.1:1", *flat(arguments), *option]
    assert message in failed(capsys, 2, line)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--momentum", 1], "momentum is 1; give a number in [0, 1)"),
        (["--head-first", -1], "head_first is -1; give a number from 0 to 1048576"),
    ],
)
def test_train_in_the_clear_like_a_sealed_model(capsys, model, arguments, option, message):
    line = ["train", "--plain", "--model", model, *flat(arguments), *option]
    assert message in failed(capsys, 2, line)


def test_nothing_is_sealed_in_the_clear(capsys, model, arguments):
    line = ["train", "--plain", "--model", model, "--seal", "model", *flat(arguments)]
    assert "--seal goes with --server only" in failed(capsys, 2, line)


def test_a_server_of_layers(capsys, address, arguments, texts, tmp_path):
    given = flat({name: value for name, value in arguments.items() if name != "--lora-r"})
    for line in (
        ["train", "--server", address, "--seal", "model", *given],
        ["embed", "--server", address, "--data", texts, "--out", tmp_path / "vectors.npy"],
    ):
        assert f"the server at {address} serves layers one by one, not a sealed model" in failed(capsys, 2, line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": "nowhere"}, "server address 'nowhere' is not HOST:PORT"),
        ({"out": "vectors.csv"}, "the name must end in .npy"),
        ({"out": "no/such/folder/vectors.npy"}, "no/such/folder"),
        ({"text-column": "words"}, "has no column 'words'"),
        ({"state": "no.state"}, "--state no.state: there is no such file"),
    ],
)
def test_embed(capsys, texts, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"server": "127.0.0.1:1", "data": texts, "out": "vectors.npy", **changes}
    line = ["embed", *(part for name, value in options.items() for part in (f"--{name}", value))]
    assert message in failed(capsys, 2, line)


def test_texts_without_labels(texts, tmp_path):
    assert read_texts(texts) == ("i like the apple", "a, new saw", "see the rhine")
    bare = tmp_path / "bare.csv"
    bare.write_text("text\nhello\n\n \nworld\n")
    with pytest.raises(InputError, match="line 4: the text is empty"):
        read_texts(bare)
    bare.write_text("text\n")
    with pytest.raises(InputError, match="has no rows below its header in line 1"):
        read_texts(bare)


def test_texts_are_taken_evenly(monkeypatch, model, tmp_path):
    seen = []
    path = tmp_path / "many.csv"
    path.write_text("text\n" + "".join(f"text {number}\n" for number in range(10)))

    class Noting:
        @staticmethod
        def is_saved(directory):
            return False

        @staticmethod
        def calibrate(parts, texts, **options):
            seen.extend(texts)

    monkeypatch.setattr("privtuner.nn.Prepared", Noting)

    parser = argparse.ArgumentParser()
    sealing.add_sealing(parser, required=True)
    sealing.prepared_model(model, parser.parse_args(["--calibrate", str(path), "--texts", "4", "--period", "8"]))
    assert seen == ["text 0", "text 3", "text 6", "text 9"]

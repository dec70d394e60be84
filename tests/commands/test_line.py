"""The commands' connections: certificates and tokens, bundles that are pinned, and an owner's own tokenizer."""

import argparse
import json
import re
import stat

import pytest

from cli_cases import failed, failed_late, flat, run
from connections import Connection
from line_cases import files, files_of_another
from loops import each
from privtuner.commands.line import add_bundle, add_line, connection, fetch
from privtuner.commands.stop import Stop
from privtuner.errors import ServiceError
from privtuner.nn import OwnerBundle, split_pretrained
from privtuner.service import Server, ServerCredentials, Tenants
from privtuner.service.pins import default_file
from text_cases import server_process, telling_tokenizer, tiny_model_directory, tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def telling(tmp_path_factory):
    """The folder of a model whose tokenizer spells a word out."""
    folder = tiny_model_directory(tmp_path_factory.mktemp("telling"))
    telling_tokenizer("apple").save_pretrained(folder)
    return folder


@pytest.fixture
def own(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "own")
    return tmp_path / "own"


def test_from_nothing_to_a_run_that_is_protected(telling, own, arguments, tmp_path, capsys, monkeypatch):
    """Certificates at both ends, a token, the bundle's digest, one's own tokenizer and requests of constant size."""
    folder, tenants, token = tmp_path / "certificates", tmp_path / "tenants.json", tmp_path / "token"
    assert run("certs", "--out", folder, "--server", "127.0.0.1", "--server", "localhost", "--client", "alice") == 0
    assert f"privtuner serve --certificate {folder}/server.pem --key {folder}/server-key.pem" in capsys.readouterr().out
    assert run("token", "alice", "--tenants", tenants, "--out", token) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert token.read_text().strip() not in err
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    monkeypatch.setattr(OwnerBundle, "tokenizer", lambda bundle: pytest.fail("the server's tokenizer was used"))
    credentials = ServerCredentials(folder / "server.pem", folder / "server-key.pem", folder / "ca.pem")
    with Server(split_pretrained(telling), name="tiny", credentials=credentials, tenants=Tenants(tenants)) as server:
        line = [
            "train",
            "--server",
            server.address,
            *flat(arguments, max_length=12),
            "--constant-size",
            "--verify-every",
            "0",
        ]
        line += ["--ca", folder / "ca.pem", "--tokenizer", own, "--expect", server.hello["bundle"]]
        line += ["--certificate", folder / "client-alice.pem", "--key", folder / "client-alice-key.pem"]
        assert "this server asks for authentication" in failed_late(capsys, 1, line)
        assert run(*line, "--token-file", token) == 0
        monkeypatch.setenv("PRIVTUNER_TOKEN", token.read_text().strip())
        out, err = capsys.readouterr()
        counts = server.counts()
        assert default_file().read_text() == f"{server.address} {server.hello['bundle']}\n"
    assert {entry.tokens / entry.requests for entry in counts.layers.values()} == {8 * 12}
    written = (tmp_path / "out" / "metrics.json").read_text()
    assert json.loads(written)["config"]["constant_size"]
    assert token.read_text().strip() not in out + err + written


def fetched(address, *options):
    """Fetch a bundle as the commands do, with their options."""
    parser = argparse.ArgumentParser()
    add_line(parser)
    add_bundle(parser)
    arguments = parser.parse_args(list(map(str, options)))
    with Stop() as stop, connection(arguments, address, stop) as transport:
        return fetch(transport, arguments)[0].digest()


def test_another_bundle_than_before(model, telling, arguments, capsys, tmp_path):
    with Server(split_pretrained(model)) as first, Server(split_pretrained(telling)) as other:
        digests = [server.hello["bundle"] for server in (first, other)]
        with Connection(first.address) as wire:
            assert fetched(wire.address) == digests[0]
            said = f"the first bundle of {wire.address}, kept in {default_file()}: {digests[0]}"
            assert said in capsys.readouterr().err
            wire.cut(other.address)
            with pytest.raises(ServiceError, match=f"--expect {digests[1]}"):
                fetched(wire.address)
            complaint = failed_late(capsys, 1, ["train", "--server", wire.address, *flat(arguments)])
            assert "gave another bundle than before" in complaint
            for options in (["--known-bundles", "none"], ["--expect", digests[1]], []):
                assert fetched(wire.address, *options) == digests[1]
            assert capsys.readouterr().err == ""
            assert fetched(wire.address, "--known-bundles", tmp_path / "other") == digests[1]
            assert f"kept in {tmp_path / 'other'}" in capsys.readouterr().err


def test_serve_says_what_can_be_pinned(model):
    certificate, key = map(str, files().server)
    with server_process(model, "--certificate", certificate, "--key", key) as (process, address):
        told = process.stdout.readline()
        digest = split_pretrained(model).bundle.digest()
        assert told == f"privtuner: bundle {digest}; data owners pin it with --expect\n"
        assert address.startswith("127.0.0.1:")


@each(
    ("options", "reason"),
    [
        (["--certificate", "c.pem"], "--certificate and --key go together"),
        (["--client-ca", "ca.pem"], "--client-ca goes with --certificate and --key"),
        (["--certificate", "nowhere.pem", "--key", "k.pem"], "k.pem cannot be read"),
        (["--tenants", "nowhere.json"], "nowhere.json cannot be read"),
        (["--host", "0.0.0.0"], "--certificate and --key; 'privtuner certs' makes one"),
        (["--host", "0.0.0.0", "--allow-plaintext", "--tenants", "TENANTS"], "could take the tenants' tokens"),
    ],
)
def test_serve_refuses(options, reason, capsys, model, tmp_path):
    assert run("token", "alice", "--tenants", tmp_path / "tenants") == 0
    capsys.readouterr()
    given = [tmp_path / "tenants" if option == "TENANTS" else option for option in options]
    assert reason in failed(capsys, 2, ["serve", "--model", model, "--port", 0, *given])


@each(
    ("options", "reason"),
    [
        (["--certificate", "c.pem"], "certificate and key go together"),
        (["--ca", "nowhere.pem"], "nowhere.pem cannot be read"),
        (["--token-file", "nowhere"], "nowhere cannot be read"),
        (["--expect", "abc"], "'abc' is no digest of a bundle"),
        (["--ca", str(files().ca), "--allow-plaintext"], "contradicts credentials"),
    ],
)
def test_owners_are_told_before_anything_is_sent(options, reason, capsys, arguments, tmp_path):
    for line in (
        ["train", "--server", "192.0.2.1:1", *flat(arguments)],
        ["train", "--server", "192.0.2.1:1", "--seal", "model", *flat(arguments, lora_r=None)],
        ["embed", "--server", "192.0.2.1:1", "--data", arguments["--data"], "--out", tmp_path / "o.npy"],
    ):
        assert reason in failed(capsys, 2, [*line, *options])


def test_options_of_a_connection_have_no_meaning_in_the_clear(capsys, model, arguments):
    for option in (
        ["--ca", "c"],
        ["--token-file", "t"],
        ["--allow-plaintext"],
        ["--expect", "e"],
        ["--tokenizer", "d"],
    ):
        line = ["train", "--plain", "--model", model, *flat(arguments), *option]
        assert f"{option[0]} goes with --server only" in failed(capsys, 2, line)


def test_token_in_the_clear(capsys, arguments, monkeypatch):
    monkeypatch.setenv("PRIVTUNER_TOKEN", "a" * 30)
    complaint = failed(capsys, 2, ["train", "--server", "192.0.2.1:1", "--allow-plaintext", *flat(arguments)])
    assert "a token goes to 192.0.2.1:1 over TLS only" in complaint
    assert "a" * 30 not in complaint


def test_somebody_in_between(capsys, model, arguments):
    with Server(split_pretrained(model), credentials=files_of_another().serving()) as server:
        line = ["train", "--server", server.address, *flat(arguments), "--ca", files().ca]
        assert "no authority that is trusted here" in failed_late(capsys, 1, line)


def test_ones_own_configuration_that_does_not_fit(capsys, address, own, arguments, tmp_path):
    (own / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 30, "hidden_size": 48}))
    line = ["train", "--server", address, *flat(arguments), "--tokenizer"]
    assert "do not change entries of the configuration that set sizes" in failed_late(capsys, 2, [*line, own])
    (tmp_path / "empty").mkdir()
    assert "no tokenizer in" in failed_late(capsys, 2, [*line, tmp_path / "empty"])


def test_certs_and_tokens_that_cannot_be_made(capsys, tmp_path):
    assert "nothing to make: give --server HOST, --client NAME" in failed(capsys, 2, ["certs", "--out", tmp_path / "a"])
    assert not (tmp_path / "a").exists()
    line = ["token", "alice", "--tenants", tmp_path / "tenants"]
    assert "is there already" in failed(capsys, 2, [*line, "--out", files().ca])
    assert "the name 'a/b' is not made of" in failed(capsys, 2, ["token", "a/b", "--tenants", tmp_path / "tenants"])
    assert not (tmp_path / "tenants").exists()


def test_token_that_is_printed_is_alone_on_standard_output(capsys, tmp_path):
    for count in (1, 2):
        assert run("token", "alice", "--tenants", tmp_path / "tenants") == 0
        out, err = capsys.readouterr()
        assert re.fullmatch(r"[\w-]{43}\n", out)
        assert ("2 of alice" in err) == (count == 2)

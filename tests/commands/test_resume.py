"""``privtuner train`` goes on where it was ended, refuses another run's checkpoint, and begins anew when told to."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from cli_cases import failed, failed_late, flat, run
from privtuner.errors import ServiceError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def plain(model, arguments, *flags, **changes):
    return ["train", "--plain", "--model", model, *flat(arguments, **changes), *flags]


@pytest.fixture
def interrupted(model, arguments, capsys, monkeypatch, tmp_path):
    """A run of three steps that ended in the second."""
    calls, whole = [], torch.optim.AdamW.step

    def step(self, *rest, **options):
        calls.append(1)
        if len(calls) == 2:
            raise ServiceError("the server went away")
        return whole(self, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        assert run(*plain(model, arguments)) == 1
    said = capsys.readouterr().err
    assert "the same command goes on after step 1 of 3" in said
    assert (tmp_path / "out" / "interrupted" / "adapter_model.safetensors").exists()
    return tmp_path / "out"


def test_the_same_command_goes_on(interrupted, model, arguments, capsys, tmp_path):
    assert run(*plain(model, arguments, "--resume")) == 0
    assert re.search(r"going on after step 1, from \S+checkpoint-000000001\n", capsys.readouterr().err)
    assert run(*plain(model, arguments, out=tmp_path / "whole")) == 0
    ended, whole = (json.loads((folder / "metrics.json").read_text()) for folder in (interrupted, tmp_path / "whole"))
    assert [step["loss"] for step in ended["steps"]] == [step["loss"] for step in whole["steps"]]
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (interrupted, tmp_path / "whole")]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert sorted(path.name for path in interrupted.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_another_run_is_refused_until_told_to_begin_anew(interrupted, model, arguments, capsys):
    line = plain(model, arguments, lr=0.01)
    error = failed_late(capsys, 2, line)
    assert re.search(r"another run \(step 1\): lr is 0.01 here and 0.005 there; .* --overwrite", error), error
    assert len(list((interrupted / "checkpoints").iterdir())) == 1
    assert run(*line, "--overwrite") == 0
    assert "going on" not in capsys.readouterr().err
    assert not (interrupted / "checkpoints").exists()


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("eval", None, "test texts is null here"),
        ("seed", 1, "seed is 1 here and 0 there"),
        ("pool", "first", "pool is"),
    ],
)
def test_what_makes_another_run(interrupted, model, arguments, capsys, option, value, match):
    assert match in failed_late(capsys, 2, plain(model, arguments, **{option: value}))


def test_a_run_to_go_on_with_that_is_not_there(model, arguments, capsys):
    assert "--resume: there is no checkpoint in" in failed_late(capsys, 2, plain(model, arguments, "--resume"))
    line = plain(model, arguments, "--save-every", "0")
    assert "a checkpoint every 0 steps: give at least 1" in failed_late(capsys, 2, line)
    line = plain(model, arguments, "--resume", "--overwrite")
    assert "not allowed with argument" in failed(capsys, 2, line)

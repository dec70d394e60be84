"""Options and words of training with adapters in the clear at the server."""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cli_cases import failed, flat
from loops import each
from privtuner.commands import privacy, sealing
from privtuner.errors import InputError, MissingPackageError
from privtuner.sealed import Shape
from privtuner.sealed.privacy import RELATION, Privacy

SHAPE = Shape(layers=1, width=4, heads=1, hidden=4, period=2, rank=1, placement="server")
NEEDED = ["--noise-multiplier", "4", "--clip", "0.5", "--delta", "1e-5"]


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    privacy.add_privacy(parser)
    return parser.parse_args(options)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapters", "server"], "--adapters server needs --noise-multiplier S, --clip C, --delta D"),
        (["--adapters", "server", *NEEDED[:4]], "--adapters server needs --delta D"),
        (["--adapters", "server", *NEEDED, "--noise-multiplier", "0"], "noise multiplier is 0; give a number above 0"),
        (["--adapters", "server", *NEEDED, "--epsilon-budget", "-1"], "the budget of epsilon is -1"),
        (["--clip", "1"], "--clip goes with --adapters server only: nothing is opened"),
        (["--adapters", "owner-encrypted", *NEEDED], "--noise-multiplier goes with --adapters server only"),
        (["--adapters", "owner"], "argument --adapters: invalid choice: 'owner'"),
    ],
)
def test_train(capsys, arguments, options, message):
    given = flat({name: value for name, value in arguments.items() if name not in ("--lora-r", "--batch-size")})
    assert message in failed(capsys, 2, ["train", "--server", "127.0.0.1:1", "--seal", "model", *given, *options])


@pytest.mark.usefixtures("one_thread")
def test_train_without_a_sealed_model(capsys, arguments):
    line = ["train", "--server", "127.0.0.1:1", *flat(arguments), "--adapters", "server"]
    assert "--adapters goes with --seal model only" in failed(capsys, 2, line)


def test_what_is_given_is_what_holds():
    found = privacy.privacy_of(parsed("--adapters", "server", *NEEDED, "--epsilon-budget", "9"))
    assert found == Privacy(4.0, 0.5, 1e-5, 9.0)
    assert privacy.privacy_of(parsed()) is None
    assert privacy.privacy_of(parsed("--adapters", "owner-encrypted")) is None


def test_the_accountant_is_missed_before_anything_is_done(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(MissingPackageError, match=r"pip install '.\[dp\]'"):
        privacy.privacy_of(parsed("--adapters", "server", *NEEDED))


def test_user_and_server_must_agree(capsys):
    with pytest.raises(InputError, match="reads a clipped, noisy gradient of every step. Give --adapters server"):
        privacy.agreed(SHAPE, None)
    with pytest.raises(InputError, match="encrypted under your key; leave it out"):
        privacy.agreed(replace(SHAPE, placement="owner-encrypted"), Privacy(1.0, 1.0, 1e-5))
    privacy.agreed(replace(SHAPE, placement="owner-encrypted"), None)
    assert capsys.readouterr().err == ""
    privacy.agreed(SHAPE, Privacy(1.0, 1.0, 1e-5))
    assert "a server that cheats can read your texts and labels" in capsys.readouterr().err


@each(
    ("budget_of", "opened", "step", "last"),
    [(5, 0, 0, 5), (5, 3, 3, 5), (5, 4, 3, 4), (50, 0, 0, 10), (None, 3, 3, 10)],
)
def test_the_budget_decides_the_last_step(budget_of, opened, step, last):
    """One of the openings was of a step that was repeated where there are more than steps."""
    free = Privacy(4.0, 1.0, 1e-5)
    given = replace(free, budget=None if budget_of is None else free.epsilon(budget_of))
    assert privacy.within_budget(SimpleNamespace(privacy=given, opened=opened, step=step), 10) == last


def test_a_budget_that_is_spent(capsys):
    spent = replace(Privacy(4.0, 1.0, 1e-5), budget=1.0)
    with pytest.raises(InputError, match="--epsilon-budget 1 pays for no step after 0"):
        privacy.within_budget(SimpleNamespace(privacy=spent, opened=0, step=0), 10)
    assert privacy.within_budget(SimpleNamespace(privacy=None, opened=0), 10) == 10
    assert capsys.readouterr().err == ""


def test_the_account_names_the_relation(capsys):
    given = Privacy(4.0, 1.0, 1e-5)
    found = privacy.account(SimpleNamespace(privacy=given, opened=3))
    assert found["epsilon"] == given.epsilon(3)
    assert (found["opened"], found["relation"]) == (3, RELATION)
    said = " ".join(capsys.readouterr().err.split())
    assert f"epsilon {given.epsilon(3):.3g} at delta 1e-05 after 3 opened gradients, for any two training sets" in said
    assert privacy.account(SimpleNamespace(privacy=None)) is None


def test_sealing_takes_the_option():
    parser = argparse.ArgumentParser()
    sealing.add_sealing(parser, required=False)
    assert sealing.given_sealing(parser.parse_args(["--adapters", "server"])) == {"adapters": "server"}

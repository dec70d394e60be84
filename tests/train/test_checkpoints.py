"""Checkpoints on disk: whole or not at all, of this very run, the one before where the last is damaged."""

from __future__ import annotations

import errno
import random
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from loops import each
from privtuner import paths
from privtuner.errors import InputError, MessageError
from privtuner.train.checkpoints import Checkpoint, Checkpoints, describe_difference
from privtuner.train.dataset import Encoded, ShuffledBatches
from privtuner.train.state import TrainingState

RUN = {"lr": 0.1, "texts": "ab" * 32, "targets": ("query", "value")}


def folder(path: Path, lines: list[str] | None = None, run: dict | None = None, every: int = 1) -> Checkpoints:
    say = (lambda _: None) if lines is None else lines.append
    return Checkpoints(path / "checkpoints", run or RUN, say, every)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"n": step}, {"w": torch.full((3,), float(step))})


def names(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "checkpoints").iterdir())


def test_the_last_two_are_kept_and_the_last_is_read(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        assert checkpoints.load() is None
        assert not checkpoints.there
        save(checkpoints, 1, 2, 3, 10)
        assert names(tmp_path) == ["checkpoint-000000003", "checkpoint-000000010"]
        file = tmp_path / "checkpoints" / "checkpoint-000000010"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines: list[str] = []
    with folder(tmp_path, lines) as again:
        checkpoint = again.load()
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.facts, again.resumed) == (10, {"n": 10}, 10)
        assert torch.equal(checkpoint.tensors["w"], torch.full((3,), 10.0))
        assert lines == [f"going on after step 10, from {file}"]
        again.clear()
        assert names(tmp_path) == []
    assert not (tmp_path / "checkpoints").exists()


@each(
    ("damage", "match"),
    [
        (lambda data: data[:-1], "its digest is another"),
        (lambda data: data[:20], "it is no checkpoint"),
        (lambda data: b"", "it is no checkpoint"),
        (lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:], "its digest is another"),
        (lambda data: data[:8] + b"\x09" + data[9:], "it is of format 9"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_it_is_read(tmp_path_factory, damage, match) -> None:
    path = tmp_path_factory.mktemp("run")
    with folder(path) as checkpoints:
        save(checkpoints, 4, 5)
    files = sorted((path / "checkpoints").iterdir())
    whole = files[1].read_bytes()
    with pytest.raises(MessageError, match=match):
        Checkpoint.from_bytes(damage(whole))
    files[1].write_bytes(damage(whole))
    lines: list[str] = []
    with folder(path, lines) as checkpoints:
        assert checkpoints.load().step == 4
    assert lines[0].startswith(f"warning: {files[1]} is left out: it is")
    files[0].write_bytes(b"")
    with folder(path) as checkpoints, pytest.raises(InputError, match="no checkpoint in .* can be read; .*--overwrite"):
        checkpoints.load()


def test_one_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 7)
    with folder(tmp_path, run={**RUN, "lr": 0.2}) as other:
        with pytest.raises(InputError, match=r"of another run \(step 7\): lr is 0.2 here and 0.1 there; .*--overwrite"):
            other.load()
        assert other.there
    assert describe_difference(RUN, RUN) == ""
    assert describe_difference({"a": "x" * 64}, {}) == 'a is "xxxxxxxxxxx... here and null there'
    assert describe_difference(dict.fromkeys("abcde", 1), {}).endswith("c is 1 here and null there, and 2 more")


def test_a_disk_that_is_full_leaves_the_last_one(tmp_path: Path, monkeypatch) -> None:
    lines: list[str] = []
    with folder(tmp_path, lines) as checkpoints:
        save(checkpoints, 1)
        before = {name: (tmp_path / "checkpoints" / name).read_bytes() for name in names(tmp_path)}

        def full(new: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(paths, "put", full)
            save(checkpoints, 2)
        assert "No space left on device; training goes on, and the last one is of step 1" in lines[-1]
        assert {name: (tmp_path / "checkpoints" / name).read_bytes() for name in names(tmp_path)} == before
        save(checkpoints, 3)
        assert checkpoints.load().step == 3


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path: Path) -> None:
    with folder(tmp_path) as checkpoints:
        save(checkpoints, 1)
        (tmp_path / "checkpoints" / ".checkpoint-000000002-99.part").write_bytes(b"PVTN")
        assert checkpoints.load().step == 1
        assert names(tmp_path) == ["checkpoint-000000001"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with folder(tmp_path), pytest.raises(InputError, match="another process trains in"):
        folder(tmp_path)
    folder(tmp_path).close()
    with pytest.raises(InputError, match="give at least 1"):
        folder(tmp_path, every=0)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot keep checkpoints in"):
        folder(tmp_path / "file")


def encoded(texts: int = 7) -> Encoded:
    return Encoded(tuple((number, 1) for number in range(texts)), torch.arange(texts), 0)


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_go_on_in_their_order(seed: int | None) -> None:
    batches = ShuffledBatches(encoded(), 3, seed)
    next(batches)
    waiting, state = batches.place()
    other = ShuffledBatches(encoded(), 3, seed)
    other.go_to(waiting, state)
    # What is left of an epoch is the same in both; the next one is a seed's, or the operating system's.
    for _ in range(20 if seed is not None else len(waiting) // 3):
        assert next(batches).targets.tolist() == next(other).targets.tolist()


@each(("waiting", "seeded"), [([7], True), ([-1], True), ([0], False)])
def test_an_order_of_other_texts_or_of_another_seed_is_refused(waiting, seeded) -> None:
    batches = ShuffledBatches(encoded(), 3, 3)
    with pytest.raises(InputError, match="of other texts or of another seed"):
        batches.go_to(waiting, batches.place()[1] if seeded else None)


def state_of(seed: int = 0, width: int = 4, name: str = "w") -> TrainingState:
    torch.manual_seed(seed)
    adapter, head = (torch.nn.Parameter(torch.randn(width)) for _ in range(2))
    optimizers = [torch.optim.AdamW([head], lr=0.1), torch.optim.SGD([adapter], lr=0.1, momentum=0.9)]
    return TrainingState({name: adapter, "head": head}, optimizers, ShuffledBatches(encoded(), 3, 5))


def advance(state: TrainingState) -> list[float]:
    """A step that draws from every generator."""
    batch = next(state.batches)
    noise = torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002
    for parameter in state.parameters.values():
        parameter.grad = parameter.detach() * noise + float(batch.targets.sum())
    for optimizer in state.optimizers:
        optimizer.step()
    state.step += 1
    return [value.item() for parameter in state.parameters.values() for value in parameter]


def test_a_run_that_goes_on_is_the_run_that_was_never_cut() -> None:
    state = state_of()
    for _ in range(3):
        advance(state)
    data = Checkpoint(state.step, RUN, *state.capture()).to_bytes()
    expected = [advance(state) for _ in range(4)]
    other = state_of(seed=1)
    advance(other)
    other.restore(Checkpoint.from_bytes(data))
    assert other.step == 3
    assert [advance(other) for _ in range(4)] == expected


@each(("changes",), [({"width": 5},), ({"name": "v"},)])
def test_a_state_of_other_parameters_is_refused(changes) -> None:
    state = state_of()
    checkpoint = Checkpoint(0, RUN, *state.capture())
    with pytest.raises(InputError, match="of other adapters or of another head"):
        state_of(**changes).restore(checkpoint)


def test_what_is_kept_is_named() -> None:
    """No randomness of the encryption among it: that comes from the operating system and stays nowhere."""
    state = state_of()
    advance(state)
    facts, tensors = state.capture()
    assert set(facts) == {"order", "python", "numpy"}
    assert {name.partition(".")[0] for name in tensors} == {"parameter", "optimizer", "order", "generator"}

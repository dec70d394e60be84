"""Checkpoints of a run: files that are there whole or not at all, known by their digest, and of this very run.

    file : "PVTNCKPT" | format u32 | SHA-256 of the rest [32] | safetensors; its metadata: step, run, facts (JSON)

No pickle: reading one executes nothing. Files can be read by their user alone, for they tell the order of the batches.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.errors import InputError, MessageError
from privtuner.paths import replacing

if TYPE_CHECKING:
    import torch

__all__ = ["FOLDER", "Checkpoint", "Checkpoints", "describe_difference"]

FOLDER = "checkpoints"
"""Folder below a run's results."""

_HEAD = struct.Struct("<8sI32s")
_MAGIC, _FORMAT = b"PVTNCKPT", 1
_KEPT = 2
"""The last one, and the one before it for the case that the disk damages the last."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after a whole step.

    Attributes:
        step: steps done.
        run: what the run is: model, data and options, JSON values by name. A run goes on with its own alone.
        facts: JSON values by name.
        tensors: tensors of the processor by name.
    """

    step: int
    run: Mapping[str, Any]
    facts: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    def check(self, run: Mapping[str, Any], place: Path | str = "the output directory") -> None:
        """Refuse to go on with another run.

        Raises:
            privtuner.errors.InputError: ``run`` is another one; says what differs.
        """
        if difference := describe_difference(json.loads(json.dumps(dict(run))), self.run):
            raise InputError(
                f"{place} holds the checkpoint of another run (step {self.step}): {difference}; give the same options "
                "to go on with it, choose another directory, or begin anew with --overwrite"
            )

    def to_bytes(self) -> bytes:
        """Return the contents of a file."""
        from safetensors.torch import save

        metadata = {"step": self.step, "run": dict(self.run), "facts": dict(self.facts)}
        body = save(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            {name: json.dumps(value) for name, value in metadata.items()},
        )
        return _HEAD.pack(_MAGIC, _FORMAT, hashlib.sha256(body).digest()) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Read what `to_bytes` wrote.

        Raises:
            privtuner.errors.MessageError: it is no checkpoint, of another version, or damaged.
        """
        from safetensors.torch import load

        if len(data) < _HEAD.size or data[: len(_MAGIC)] != _MAGIC:
            raise MessageError("it is no checkpoint")
        _, version, digest = _HEAD.unpack_from(data)
        if version != _FORMAT:
            raise MessageError(f"it is of format {version}, and this version of privtuner reads {_FORMAT}")
        body = data[_HEAD.size :]
        if hashlib.sha256(body).digest() != digest:
            raise MessageError("it is damaged: its digest is another")
        metadata = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
        step, run, facts = (json.loads(metadata[name]) for name in ("step", "run", "facts"))
        return cls(step, run, facts, load(body))


class Checkpoints:
    """The last checkpoints of one run, in a folder that one process at a time may use. A context manager.

    Args:
        directory: where they are; made if need be.
        run: what the run is, see `Checkpoint`.
        say: told in a line of a checkpoint that is damaged, or that the disk did not take.
        every: steps from one checkpoint to the next. The last step always has one.

    Attributes:
        last: step of the last checkpoint written or read, 0 for none.
        resumed: step that the run goes on after, 0 for one from its beginning.

    Raises:
        privtuner.errors.InputError: ``every`` is below 1, the folder cannot be made, or another process trains there.
    """

    def __init__(
        self, directory: Path, run: Mapping[str, Any], say: Callable[[str], object] = lambda _: None, every: int = 1
    ) -> None:
        if every < 1:
            raise InputError(f"a checkpoint every {every} steps: give at least 1")
        self.directory, self.run, self.every = directory, json.loads(json.dumps(dict(run))), every
        self._say = say
        self.last = self.resumed = 0
        self._lock = _lock(directory)

    @property
    def there(self) -> bool:
        """Whether there is any checkpoint."""
        return bool(self._files())

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint that is whole; None where there is none at all.

        Raises:
            privtuner.errors.InputError: it is of another run, or all are damaged.
        """
        for leftover in self.directory.glob(".checkpoint-*"):  # of a process that was killed while it wrote
            with suppress(OSError):
                leftover.unlink()
        files = self._files()
        for file in reversed(files):
            try:
                checkpoint = Checkpoint.from_bytes(file.read_bytes())
            except (OSError, MessageError) as error:
                reason = (isinstance(error, OSError) and error.strerror) or error
                self._say(f"warning: {file} is left out: {reason}")
                continue
            checkpoint.check(self.run, self.directory)
            self.last = self.resumed = checkpoint.step
            self._say(f"going on after step {checkpoint.step}, from {file}")
            return checkpoint
        if files:
            raise InputError(
                f"no checkpoint in {self.directory} can be read; choose another directory, or begin anew with "
                "--overwrite"
            )
        return None

    def save(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint. Where the disk does not take it, the ones before stay, and a line says so."""
        path = self.directory / f"checkpoint-{step:09d}"
        try:
            with replacing(path) as new:
                data = Checkpoint(step, self.run, facts, tensors).to_bytes()
                with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                    file.write(data)
        except OSError as error:
            last = f"the last one is of step {self.last}" if self.last else "there is none yet"
            self._say(
                f"warning: no checkpoint after step {step}: cannot write {path}: {error.strerror}; training goes on, "
                f"and {last}"
            )
            return
        self.last = step
        for old in self._files()[:-_KEPT]:
            with suppress(OSError):
                old.unlink()

    def clear(self) -> None:
        """Take all checkpoints away: the run has ended well, or is begun anew."""
        for file in self._files():
            with suppress(OSError):
                file.unlink()
        self.last = 0

    def close(self) -> None:
        """Let other processes use the folder, and remove it if it is empty."""
        with suppress(OSError):
            self.directory.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("checkpoint-*") if path.is_file())


def describe_difference(run: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return what tells two runs apart, "lr is 0.01 here and 0.005 there"; "" where nothing does."""
    parts = [
        f"{name} is {_short(run.get(name))} here and {_short(other.get(name))} there"
        for name in sorted({*run, *other})
        if run.get(name) != other.get(name)
    ]
    return ", ".join(parts[:3]) + (f", and {len(parts) - 3} more" if len(parts) > 3 else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _lock(directory: Path) -> int | None:
    """Lock the folder until it is closed or the process ends; None where the file system has no locks."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot keep checkpoints in {directory}: {error.strerror}; choose another place") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(f"another process trains in {directory}; end it, or choose another directory") from None
    except OSError:
        os.close(handle)
        return None
    return handle

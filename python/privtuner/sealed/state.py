"""The training state on its way and on disk: adapters and velocity, locked, some features in each piece.

A piece unlocks to ``step u64 | message of an encrypted tensor``; pieces are numbered, those of the adapters first.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from privtuner import wire
from privtuner.ckks.evaluator import Evaluator
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import InputError, MessageError
from privtuner.paths import replacing
from privtuner.sealed.locker import Locker
from privtuner.sealed.messages import STEP, pieces_of

__all__ = [
    "DIGEST_BYTES",
    "digest_of",
    "forget_states",
    "load_pieces",
    "lock_state",
    "make_folder",
    "piece_limit",
    "save_pieces",
    "unlock_state",
]

DIGEST_BYTES = 32

_LENGTH = struct.Struct("<I")


def digest_of(pieces: Sequence[bytes]) -> bytes:
    """Return what tells the locked pieces of a state from those of any other."""
    return hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).digest()


def lock_state(locker: Locker, step: int, tensors: Sequence[EncryptedTensor]) -> Iterator[bytes]:
    """Yield the locked pieces of the state after ``step`` steps."""
    pieces = (piece for tensor in tensors for _, piece in pieces_of(tensor))
    for number, piece in enumerate(pieces):
        yield locker.close(number, STEP.pack(step) + piece.to_bytes())


def unlock_state(
    locker: Locker, pieces: Iterable[bytes | memoryview], expected: Sequence[EncryptedTensor]
) -> tuple[int, list[EncryptedTensor]]:
    """Return the step and the tensors whose pieces `lock_state` yielded.

    Args:
        locker: that locked them.
        pieces: the locked pieces in order.
        expected: planned tensors: what each of the state is like.

    Raises:
        MessageError: pieces of another run or of several steps, too few or too many, or of other shapes or levels.
    """
    tensors: list[EncryptedTensor] = []
    steps: set[int] = set()
    arriving = enumerate(pieces)
    for planned in expected:
        engine, done = Evaluator(planned.parameters), 0
        parts: list[EncryptedTensor] = []
        while done < planned.shape[1]:
            number, locked = next(arriving, (0, b""))
            piece = memoryview(locker.open(number, locked))
            if len(piece) < STEP.size + wire.HEAD_BYTES:
                raise MessageError(f"training state: a piece of {len(piece)} bytes is truncated")
            steps.update(STEP.unpack_from(piece))
            count = wire.peek(piece[STEP.size :]).features
            if not 1 <= count <= planned.shape[1] - done:
                raise MessageError(f"training state: {done + count} features, {planned.shape[1]} are due")
            some = engine.select(planned, slice(done, done + count))
            parts.append(EncryptedTensor.from_bytes(planned.parameters, piece[STEP.size :], some))
            done += count
        tensors.append(engine.concatenate(parts))
    if next(arriving, None) is not None:
        raise MessageError("training state: it has more pieces than are due")
    if len(steps) != 1:
        raise MessageError("training state: its pieces are of several steps; go on with an older one")
    return steps.pop(), tensors


def piece_limit(expected: Sequence[EncryptedTensor]) -> int:
    """Bytes that the locked pieces of a state have together, at most: a whole ciphertext and 4 KiB for each feature."""
    return sum(x.shape[1] * (16 * x.parameters.ring_dimension * (x.level + 1) + 4096) for x in expected)


def save_pieces(path: Path, pieces: Sequence[bytes]) -> None:
    """Write pieces to a file that is there whole or not at all, readable by this user alone.

    Raises:
        InputError: it cannot be written.
    """
    digest = hashlib.sha256()
    try:
        with (
            replacing(path) as new,
            os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file,
        ):
            for piece in pieces:
                for part in (_LENGTH.pack(len(piece)), piece):
                    digest.update(part)
                    file.write(part)
            file.write(digest.digest())
    except OSError as error:
        raise InputError(f"the training state cannot be written to {path}: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Make a folder that this user alone can read, unless it is there.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {error.strerror}") from error


def forget_states(folder: Path, runs: int, seconds: float) -> None:
    """Delete the saved states of a folder that are older than ``seconds``, and the oldest of more than ``runs``.

    Raises:
        InputError: one cannot be deleted.
    """
    try:
        saved = sorted(((path.stat().st_mtime, path) for path in folder.glob("*.state")), reverse=True)
        for number, (written, path) in enumerate(saved):
            if number >= runs or written < time.time() - seconds:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"old training states in {folder} cannot be deleted: {error.strerror}") from error


def load_pieces(path: Path, limit: int) -> list[bytes]:
    """Read what `save_pieces` wrote, unless it is longer than ``limit`` bytes.

    Raises:
        MessageError: too long, damaged or truncated. InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise MessageError(f"{path}: {size} bytes of training state, at most {limit} are due")
            data = memoryview(file.read(limit))
    except OSError as error:
        raise InputError(f"the training state cannot be read from {path}: {error.strerror}") from error
    body = data[: max(0, len(data) - DIGEST_BYTES)]
    if hashlib.sha256(body).digest() != data[len(body) :]:
        raise MessageError(f"{path}: damaged or truncated; begin a new run in another place")
    pieces, place = list[bytes](), 0
    while place < len(body):
        begin = place + _LENGTH.size
        place = begin + _LENGTH.unpack_from(body, place)[0]
        pieces.append(bytes(body[begin:place]))
    return pieces

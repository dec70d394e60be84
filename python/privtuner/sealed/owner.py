"""The data owner of a sealed model: keys, encrypted batches, refreshes, pooled vectors, the locked training state."""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from privtuner import wire
from privtuner.ckks.keys import SecretKey
from privtuner.ckks.parameters import require_secure
from privtuner.ckks.refresher import Refresher
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import CkksError, InputError, LostError, MessageError, SecretError
from privtuner.retries import Retries
from privtuner.sealed.clipping import check_norm
from privtuner.sealed.messages import NONCE_BYTES, STEP, Link, Message, Rates, Stream, Type, largest_message
from privtuner.sealed.noise import discrete_gaussian
from privtuner.sealed.privacy import Privacy
from privtuner.sealed.public import Public, Refresh, Task
from privtuner.sealed.state import DIGEST_BYTES, digest_of, load_pieces, save_pieces

__all__ = ["COMPANION_BYTES", "JobTransport", "Progress", "SealedOwner", "Spent", "usual_gradient_bound"]

Array = npt.NDArray[np.float64]
T = TypeVar("T")

COMPANION_BYTES = 32 << 20
"""Most that is saved beside the adapters."""

_SEED_BYTES = 32
_STATE = struct.Struct(f"<16s16s{_SEED_BYTES}sQQQ")  # model, run, key's seed, step, ciphertexts refreshed, openings


class JobTransport(Protocol):
    """Carries the messages of a job. It sees ciphertexts only."""

    @property
    def closed(self) -> bool:
        """Whether this side closed it, so that trying again is in vain."""
        ...

    def job(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the server's messages, those of the owner being taken from ``messages`` at the same time.

        Where the iterator has a method ``cancel``, any thread may call it to end the call at once.

        Raises:
            LostError: the server went away, or is too busy. PrivtunerError: it cannot be reached, or refused a message.
        """
        ...


@dataclass(frozen=True)
class Progress:
    """How far a task is.

    Attributes:
        task: "embed", "forward" or "backward".
        stage: where in the model the last refresh was.
        done, total: ciphertexts refreshed, and those of the whole task.
        bytes_up, bytes_down: on the stream since the task began.
        seconds: since then.
    """

    task: str
    stage: str
    done: int
    total: int
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True)
class Spent:
    """What tasks took.

    Attributes:
        tasks: how many were done.
        refreshes: ciphertexts refreshed.
        bytes_up, bytes_down: on the stream, keys and repeated tasks included.
        seconds: in all. wait_seconds: of these, waiting for the server.
    """

    tasks: int = 0
    refreshes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0


def usual_gradient_bound(public: Public) -> float:
    """What gradients of a batch's mean loss stay below, but for few sequences, as `SealedOwner` takes it.

    Entries up to one over the sequences; by a sum over tokens of which the mean is taken, a head's gradient is divided
    by their number, which is rarely below eight. The smaller the bound, the less there is of the ciphertexts' noise.
    """
    return (0.125 if public.pooling == "mean" else 1.0) / public.batch


class SealedOwner:
    """Runs tasks at the server of a sealed model, under one secret key that never leaves this object.

    Nothing is sent before the first task. A connection is opened anew when it broke: with the same key, the state
    after the last whole step, and fresh encryptions. Not for several threads at once.

    Args:
        public: the model's public part.
        transport: the way to the server.
        gradient_bound: what the gradients by the pooled sums stay below; a sequence's that is larger is scaled down to
            it. A power of two: public, so it must not be taken from the data. None: 1 / the sequences of a full batch.
        patience: seconds that the server may take for any message: as long as it computes between two refreshes.
        retries: how often a task is repeated whose connection was lost, or for which the server was too busy; None for
            never. What the server refuses is not repeated.
        say: told in a line what is waited for.
        progress: called after every message of refreshes.
        state: file for key and locked adapters, written after each step, or read if it is there: another process can go
            on with it. Whoever has it can decrypt the whole run: keep it as the texts themselves. None keeps the key in
            this object alone.
        privacy: how gradients are clipped and noised for a server that has the adapters in the clear, which is thereby
            trusted to follow the protocol: it could have anything opened, data too. None where the server has them
            encrypted, or for pooled vectors alone.
        allow_insecure: accept INSECURE parameters, for tests.

    Attributes:
        step: whole steps that the adapters have behind them.
        scaled_down: sequences whose gradient the last `backward` scaled down to ``gradient_bound``. This side's alone.
        opened: noisy gradients that were opened for the server under this key, those of repeated steps too.
        spent: traffic and time so far.

    Raises:
        InputError: the parameters have less than 128 bits of security, a number is out of its range, or ``state`` is of
            another model, or cannot be read or written.
        MessageError: ``state`` is no such file, or truncated.
    """

    def __init__(
        self,
        public: Public,
        transport: JobTransport,
        *,
        gradient_bound: float | None = None,
        patience: float = 1800.0,
        retries: Retries | None = None,
        say: Callable[[str], object] = lambda _: None,
        progress: Callable[[Progress], object] | None = None,
        state: str | Path | None = None,
        privacy: Privacy | None = None,
        allow_insecure: bool = False,
    ) -> None:
        parameters = require_secure(public.parameters, allow_insecure)
        bound = 1.0 / public.batch if gradient_bound is None else gradient_bound
        if not (bound > 0 and math.frexp(bound)[0] == 0.5):
            raise InputError(f"gradient_bound is {bound:g}; give a power of two")
        if not patience > 0:
            raise InputError(f"patience is {patience:g} s; give more than 0")
        if privacy is not None and not public.shape.clear:
            raise InputError("this server has no adapters in the clear: no gradient is opened, leave privacy out")
        self.public, self.gradient_bound, self.progress, self.privacy = public, bound, progress, privacy
        self.step, self.scaled_down, self.opened, self.spent = 0, 0, 0, Spent()
        self._transport, self._patience = transport, patience
        self._retries, self._say = retries or Retries(seconds=0), say
        self._fresh: tuple[EncryptedTensor, ...] = ()
        self._kept: list[bytes] = []
        self._companions: dict[int, bytes] = {}
        self._run, self._refreshed = secrets.token_bytes(16), 0
        self._file = None if state is None else Path(state)
        self._seed = b""
        if self._file is None:
            self._secret = SecretKey(parameters)
        else:
            self._seed = secrets.token_bytes(_SEED_BYTES)
            if self._file.exists():
                self._load(self._file)
            else:
                self._save()  # before there is anything to lose
            self._secret = SecretKey(parameters, self._seed)
        self._connection: _Connection | None = None
        self._batch: tuple[Array, npt.NDArray[np.int64]] | None = None

    def embed(self, x: npt.ArrayLike, lengths: npt.ArrayLike) -> Array:
        """Return the pooled vectors of a batch; the server keeps nothing of it.

        Args:
            x: float (n, length, width): embeddings after their norm; n at most ``public.batch``, length at most
                the period. What stands at positions beyond a sequence's length is not used.
            lengths: integers (n,), each in [1, length].

        Returns:
            float64 (n, width): of the first position, or the sum over a sequence's positions, as ``public.shape`` says.

        Raises:
            InputError: another shape, a length out of range, values that are not finite or beyond the model's public
                bound: nothing was sent.
            CkksError: the results say that an input left the domain the server calibrated; the server is not told.
            MessageError, ServiceError: the server cannot be reached, broke off, or sent what is not due.
        """
        return self._pooled("embed", *self._checked(x, lengths))

    def forward(self, x: npt.ArrayLike, lengths: npt.ArrayLike) -> Array:
        """Return what `embed` does, while the server keeps what `backward` needs. Arguments and errors as there."""
        self._batch = None
        batch = self._checked(x, lengths)
        pooled = self._pooled("forward", *batch)
        self._batch = batch
        return pooled

    def backward(self, gradient: npt.ArrayLike, rate: float, momentum: float = 0.9) -> None:
        """Have the server step its adapters by the gradients of the batch of the last `forward`.

        Args:
            gradient: float (n, width), by what `forward` returned.
            rate: of the step; the server learns it.
            momentum: in [0, 1); the server learns it.

        Raises:
            InputError: there is no such batch, or another shape, values that are not finite, a rate or momentum out of
                range; or the server has the adapters in the clear, and no ``privacy`` is given, or its budget is spent,
                or its noise is too small. Nothing was sent.
            CkksError: the gradient is too large to be clipped; the server has seen nothing of it.
            MessageError, ServiceError: as `embed`.
        """
        if self._batch is None:
            raise InputError("backward takes the batch of the last forward, once; there is none")
        x, lengths = self._batch
        g = np.asarray(gradient, np.float64)
        if g.shape != (len(x), x.shape[2]) or not np.isfinite(g).all():
            raise InputError(f"gradient of shape {g.shape}; pass finite numbers of shape {(len(x), x.shape[2])}")
        unit = self.gradient_bound / self.public.gradient.bound
        if not (0 <= rate * unit <= 1e6 and 0 <= momentum < 1):
            raise InputError(f"rate {rate:g}, momentum {momentum:g}: give at least 0, and [0, 1)")
        limit = self._limit(unit)
        peak = np.abs(g).max(axis=1, keepdims=True)
        self.scaled_down = int((peak > self.gradient_bound).sum())
        g = g * np.minimum(1.0, self.gradient_bound / np.maximum(peak, 1e-300)) / unit
        g = g.clip(-self.public.gradient.bound, self.public.gradient.bound)  # what rounding added
        slots, gradient_slots = self.public.arrange(x, lengths), self.public.spread(g, lengths)

        def work(connection: _Connection) -> None:
            if not connection.kept:  # a new connection: the server has nothing of the batch
                self._send_batch(connection, "forward", slots)
                self._collect(connection, "forward")
            connection.kept = False
            connection.begin("backward")
            noise = None if limit is None else self._noise(limit)
            connection.send(Type.BACKWARD, Rates(rate * unit, momentum, limit).to_bytes())
            connection.send_tensor(Type.GRADIENT, self._encrypt(gradient_slots, self.public.gradient))
            self._kept = self._keep(connection, noise)
            self.step += 1
            self._save()

        self._batch = None
        self._retrying(work)

    def release(self) -> Array:
        """Return the adapters' packed numbers, if the server gives them away; `Public.adapter_matrices` reads them.

        Raises:
            InputError: the model has none.
            MessageError, ServiceError: the server keeps them to itself, or as `embed`.
        """
        public, count = self.public, self.public.adapter_numbers
        if not (public.adapters or public.shape.clear):
            raise InputError("the model has no adapters")

        def work(connection: _Connection) -> Array:
            connection.begin("release")
            connection.send(Type.RELEASE)
            if public.shape.clear:
                data = connection.receive_bytes(Type.RELEASED, 8 * count * public.shape.adapter_ciphertexts)
                return np.frombuffer(data, "<f8").astype(np.float64).reshape(count, -1)
            parts = connection.receive_tensor(Type.RELEASED, public.adapters[0])
            return np.concatenate([self._secret.decrypt_packed(part, count) for part in parts], axis=1)

        return self._retrying(work)

    @property
    def companion(self) -> bytes:
        """What `attach` gave for the adapters as they are; empty if nothing."""
        return self._companions.get(self.step, b"")

    def attach(self, step: int, companion: bytes) -> None:
        """Save ``companion`` with the adapters as they are after ``step`` steps, in the same file at the same moment.

        So whoever trains more than the adapters finds both after the same step, whatever moment a process is killed at.

        Args:
            step: of this moment, and then it is saved at once, or the next one.
            companion: at most 32 MiB.

        Raises:
            InputError: another step, more bytes, or the file cannot be written.
        """
        if step not in (self.step, self.step + 1) or len(companion) > COMPANION_BYTES:
            raise InputError(f"{len(companion)} bytes of step {step}, at step {self.step}: at most {COMPANION_BYTES}")
        self._companions = {self.step: self.companion, step: companion}
        if step == self.step:
            self._save()

    def close(self) -> None:
        """End the connection; the next task opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> SealedOwner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> SealedOwner:
        return self  # a copied model goes on with it

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecretError("the owner of a sealed model holds the secret key and is never pickled")

    # Tasks

    def _checked(self, x: npt.ArrayLike, lengths: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.int64]]:
        public = self.public
        values, counts = np.asarray(x, np.float64), np.asarray(lengths)
        if values.ndim != 3 or not 1 <= len(values) <= public.batch or values.shape[2] != public.width:
            raise InputError(
                f"embeddings of shape {values.shape}; pass (n, length, {public.width}) with 1 to {public.batch} "
                "sequences at a time"
            )
        if values.shape[1] > public.period:
            raise InputError(
                f"texts of {values.shape[1]} tokens, and this server's model takes {public.period}: truncate them, or "
                "ask for a server with a longer period"
            )
        whole = counts.dtype.kind in "iu" and counts.shape == (len(values),)
        if not whole or not ((counts >= 1) & (counts <= values.shape[1])).all():
            raise InputError(f"lengths: pass {len(values)} whole numbers from 1 to {values.shape[1]}")
        if not np.isfinite(values).all():
            raise InputError("the embeddings hold NaN or infinity")
        return values, counts.astype(np.int64)

    def _pooled(self, task: Task, x: Array, lengths: npt.NDArray[np.int64]) -> Array:
        slots = self.public.arrange(x, lengths)  # what is refused here leaves the connection alone

        def work(connection: _Connection) -> list[EncryptedTensor]:
            self._send_batch(connection, task, slots)
            return self._collect(connection, task)

        parts = self._retrying(work)
        try:
            values = np.concatenate([self._secret.decrypt(part) for part in parts], axis=1)
            pooled = self.public.read_pooled(values)
            self._check_unused(pooled[len(x) :], parts)
        except CkksError as error:
            raise CkksError(
                "the pooled vectors are no results: an input left the domain that the server calibrated its model on. "
                f"Leave out texts unlike those, or ask for a wider calibration ({error})"
            ) from error
        return pooled[: len(x)]

    def _check_unused(self, pooled: Array, parts: Sequence[EncryptedTensor]) -> None:
        """Raise CkksError if a sequence without tokens, whose pooled vector is zero, has more than the error in it."""
        # Twice what one value in a million exceeds: there may be a million of them.
        error = 2 * max(part.budget().error for part in parts)
        if pooled.size and not np.abs(pooled).max() <= error:
            raise CkksError("slots that are zero hold values beyond the predicted error")

    def _send_batch(self, connection: _Connection, task: str, slots: tuple[Array, Array]) -> None:
        inputs, mask = slots
        connection.begin(task)
        connection.kept = False
        connection.send(Type.FORWARD if task == "forward" else Type.EMBED)
        connection.send_tensor(Type.INPUTS, self._encrypt(inputs, self.public.inputs))
        connection.send_tensor(Type.MASK, self._encrypt(mask, self.public.mask))
        connection.kept = task == "forward"

    def _encrypt(self, values: Array, planned: EncryptedTensor) -> EncryptedTensor:
        return self._secret.encrypt(values, bound=planned.bound, level=planned.level, scale=planned.scale)

    def _collect(self, connection: _Connection, task: Task) -> list[EncryptedTensor]:
        """Answer the refreshes of a task, and return the pooled vectors that end them."""
        first = self._answer(connection, task, Type.POOLED)
        return connection.receive_tensor(Type.POOLED, self.public.pooled, first=first)

    def _limit(self, unit: float) -> float | None:
        """The clipping norm in the units of the packed gradient; None where the server has no adapters in the clear."""
        if not self.public.shape.clear:
            return None
        if self.privacy is None:
            raise InputError(
                "this server has the adapters in the clear, and reads a clipped, noisy gradient of every step. Pass "
                "privacy if you trust it to follow the protocol, or take a server whose adapters are encrypted"
            )
        if not self.privacy.affords(self.opened + 1):
            raise InputError(
                f"the budget of epsilon {self.privacy.budget:g} is spent after {self.opened} steps: end the training "
                "here, or give a larger one"
            )
        limit = self.privacy.clip / unit
        self._deviation(limit)
        return limit

    def _deviation(self, limit: float) -> int:
        """The standard deviation of the noise of an opening, in units of what is opened."""
        assert self.privacy is not None  # noqa: S101 - there is a limit
        opened = self.public.opened
        return self.privacy.deviation(float(opened.scale[0]), opened.parameters.primes[0], limit)

    def _noise(self, limit: float) -> npt.NDArray[np.int64]:
        """Draw the noise of one opening. Before anything is sent: the time that it takes depends on it."""
        assert self.privacy is not None  # noqa: S101 - there is a limit
        if not self.privacy.affords(self.opened + 1):  # of a step that is repeated
            raise InputError(f"the budget of epsilon {self.privacy.budget:g} does not pay for a repeated step")
        shape = self.public.adapter_numbers, self.public.shape.adapter_ciphertexts
        return discrete_gaussian(self._deviation(limit), shape)

    def _open_gradient(self, connection: _Connection, first: Message, noise: npt.NDArray[np.int64]) -> None:
        """Open one noisy gradient for the server, once its norm is known to be what sensitivity is reckoned with."""
        (square,) = connection.receive_tensor(Type.NORM, self.public.square, first=first)
        check_norm(self._secret, square)
        parts = connection.receive_tensor(Type.MASKED, self.public.opened)
        self.opened += 1
        self._save()  # it is spent, whatever becomes of the step
        columns = np.split(noise, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
        words = np.concatenate([self._secret.open(*pair) for pair in zip(parts, columns, strict=True)], axis=1)
        noise.fill(0)
        connection.send_bytes(Type.OPENED, words.astype("<u8").tobytes())

    def _keep(self, connection: _Connection, noise: npt.NDArray[np.int64] | None) -> list[bytes]:
        """Answer the refreshes of a backward pass, and return the locked state that ends them.

        With noise, the clipped gradient is opened in between.
        """
        if noise is None:
            message = self._answer(connection, "backward", Type.KEPT)
        else:
            self._open_gradient(connection, self._answer(connection, "backward", Type.NORM), noise)
            message = connection.expect(Type.KEPT)
        pieces, size, limit = [], 0, self.public.state_limit
        while True:
            size += len(message.payload)
            if not len(message.payload):
                raise MessageError("kept: an empty piece of the training state")
            if size > limit:
                raise MessageError(f"kept: {size} bytes of training state, at most {limit} are due")
            pieces.append(bytes(message.payload))
            if message.last:
                break
            message = connection.expect(Type.KEPT)
        connection.expect_step(Type.DONE, self.step + 1)
        return pieces

    def _answer(self, connection: _Connection, task: Task, end: Type) -> Message:
        """Answer every refresh of a task, each at its level, and return the first message of type ``end``."""
        schedule = self.public.schedule(task)
        total, done = sum(refresh.ciphertexts for refresh in schedule), 0
        if self._refreshed + total > Refresher.LIMIT:
            raise CkksError(
                f"{self._refreshed} ciphertexts were refreshed under this key, and {Refresher.LIMIT} is the most: "
                "begin a new run"
            )
        self._refreshed += total
        self._save()  # a process that goes on with the key knows of all that may be refreshed
        for refresh, count in self._batches(schedule):
            message = connection.expect(Type.REFRESH, end)
            if message.type == end:
                raise MessageError(f"{end.name.lower()}: it comes after {done} of {total} refreshes")
            connection.send(Type.REFRESHED, self._secret.refresh(bytes(message.payload), refresh.level, count))
            done += count
            connection.refreshes += count
            if self.progress is not None:
                self.progress(connection.told(refresh.stage, done, total))
        return connection.expect(end)

    def _batches(self, schedule: Sequence[Refresh]) -> Iterator[tuple[Refresh, int]]:
        """Yield the ciphertexts of each message that is due."""
        for refresh in schedule:
            most = self.public.parameters.refresh_batch(refresh.level)
            for start in range(0, refresh.ciphertexts, most):
                yield refresh, min(most, refresh.ciphertexts - start)

    # The file

    def _save(self) -> None:
        if self._file is not None:
            counts = (self.step, self._refreshed, self.opened)
            head = _STATE.pack(self.public.id, self._run, self._seed, *counts)
            save_pieces(self._file, [head, self.companion, *self._kept])

    def _load(self, path: Path) -> None:
        head, *rest = load_pieces(path, self.public.state_limit + COMPANION_BYTES + 4096) or [b""]
        if len(head) != _STATE.size or not rest:
            raise MessageError(f"{path} holds no state of a sealed model's training")
        companion, *self._kept = rest
        model, self._run, self._seed, self.step, self._refreshed, self.opened = _STATE.unpack(head)
        self._companions = {self.step: companion}
        if model != self.public.id:
            raise InputError(
                f"{path} is of another model, or of other weights: go on with its own server, or name another"
            )

    # The connection

    def _retrying(self, work: Callable[[_Connection], T]) -> T:
        """Return what ``work`` returns, repeated on a new connection after the old one was lost."""
        attempts = self._retries.begin(self._say)
        while True:
            start = time.perf_counter()
            try:
                if self._connection is None:
                    self._connection = self._open()
                connection = self._connection
                result = work(connection)
            except BaseException as error:
                self._account(start, tasks=0)
                broken, self._connection = self._connection, None
                if broken is not None:
                    broken.abandon()
                if not isinstance(error, LostError) or self._transport.closed:
                    raise
                attempts.wait(error, self._sleep)
            else:
                self._account(start, tasks=1)
                attempts.progress()
                return result

    def _sleep(self, seconds: float) -> None:
        """Sleep, but not when the transport was closed: the next attempt says so."""
        end = time.monotonic() + seconds
        while not self._transport.closed and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _open(self) -> _Connection:
        public = self.public
        connection = _Connection(self._transport, public, self._run, self._patience)
        self._connection = connection
        nonce = secrets.token_bytes(NONCE_BYTES)
        connection.begin("open")
        connection.send(Type.OPEN, nonce)
        welcome = connection.expect(Type.WELCOME)
        if len(welcome.payload) != NONCE_BYTES + DIGEST_BYTES:
            raise MessageError(f"welcome: {len(welcome.payload)} bytes, {NONCE_BYTES + DIGEST_BYTES} are due")
        common = hashlib.sha256(nonce + bytes(welcome.payload[:NONCE_BYTES])).digest()
        stored = bytes(welcome.payload[NONCE_BYTES:])
        connection.send_bytes(Type.PUBLIC_KEY, self._secret.public_key(common).to_bytes())
        wanted = public.keys
        keys = self._secret.evaluation_keys(
            rotations=wanted.rotations, conjugation=wanted.conjugation, packing=wanted.packing, common=common
        )
        connection.send_bytes(Type.KEYS, keys.to_bytes())
        del keys  # up to a gigabyte
        trained = bool(public.adapters) or public.shape.clear
        if not trained or (self.step > 0 and stored == digest_of(self._kept)):
            connection.send(Type.STORED)
        elif self.step > 0:
            for number, piece in enumerate(self._kept, 1):
                connection.send(Type.RESUME, piece, last=number == len(self._kept))
        elif public.shape.clear:
            connection.send(Type.FRESH)
        else:
            self._fresh = self._fresh or public.initial_adapters(self._secret)
            for tensor in self._fresh:
                connection.send_tensor(Type.FRESH, tensor)
        connection.expect_step(Type.READY, self.step)
        return connection

    def _account(self, start: float, tasks: int) -> None:
        seconds, connection = time.perf_counter() - start, self._connection
        spent = replace(self.spent, tasks=self.spent.tasks + tasks, seconds=self.spent.seconds + seconds)
        if connection is not None:
            spent = replace(
                spent,
                refreshes=spent.refreshes + connection.refreshes,
                bytes_up=spent.bytes_up + connection.link.bytes_out - connection.counted[0],
                bytes_down=spent.bytes_down + connection.link.bytes_in - connection.counted[1],
                wait_seconds=spent.wait_seconds + connection.wait_seconds,
            )
            connection.settle()
        self.spent = spent


class _Connection:
    """One stream to the server, with its counts."""

    def __init__(self, transport: JobTransport, public: Public, run: bytes, patience: float) -> None:
        parameters = public.parameters
        self._stream, self._patience = Stream("the server"), patience
        self.link = Link(self._stream, public.id, run, parameters._core.hash, largest_message(parameters))
        self.kept = False
        self.settle()
        self.begin("open")
        self._stream.listen(transport.job(self._stream.outgoing()))

    def settle(self) -> None:
        """Begin to count anew."""
        self.counted = (self.link.bytes_out, self.link.bytes_in)
        self.refreshes, self.wait_seconds = 0, 0.0

    def begin(self, task: str) -> None:
        """Begin a task, for `told`."""
        self._task, self._start = task, time.perf_counter()
        self._before = (self.link.bytes_out, self.link.bytes_in)

    def told(self, stage: str, done: int, total: int) -> Progress:
        """Say how far the task is."""
        up, down = self.link.bytes_out - self._before[0], self.link.bytes_in - self._before[1]
        return Progress(self._task, stage, done, total, up, down, time.perf_counter() - self._start)

    def send(self, type: Type, *payload: wire.BytesLike, last: bool = True) -> None:
        self.link.send(type, *payload, last=last, seconds=self._patience)

    def send_bytes(self, type: Type, data: bytes) -> None:
        self.link.send_bytes(type, data, seconds=self._patience)

    def send_tensor(self, type: Type, tensor: EncryptedTensor) -> None:
        self.link.send_tensor(type, tensor, seconds=self._patience)

    def receive_bytes(self, type: Type, size: int) -> bytearray:
        return self.link.receive_bytes(type, size, seconds=self._patience)

    def expect(self, *types: Type) -> Message:
        start = time.perf_counter()
        try:
            return self.link.expect(*types, seconds=self._patience)
        finally:
            self.wait_seconds += time.perf_counter() - start

    def expect_step(self, type: Type, step: int) -> None:
        """Read a message that says ``step``.

        Raises:
            MessageError: it says another.
        """
        payload = self.expect(type).payload
        if payload != STEP.pack(step):
            raise MessageError(f"{type.name.lower()}: the server's adapters are not those of step {step}; begin again")

    def receive_tensor(
        self,
        type: Type,
        planned: EncryptedTensor,
        first: Message | None = None,
    ) -> list[EncryptedTensor]:
        return self.link.receive_tensor(type, planned, seconds=self._patience, first=first)

    def close(self) -> None:
        self._stream.close()

    def abandon(self) -> None:
        self._stream.abandon()

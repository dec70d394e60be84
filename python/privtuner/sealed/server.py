"""The server of a sealed model: sessions that compute on an owner's ciphertexts and keep its adapters encrypted."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from privtuner import wire
from privtuner.ckks.evaluator import Evaluator
from privtuner.ckks.keys import EvaluationKeys, PublicKey, elements_of
from privtuner.ckks.opening import Opening
from privtuner.ckks.refresher import Refresher
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import CkksError, InputError, LostError, MessageError
from privtuner.sealed.adapters import Matrices
from privtuner.sealed.clear_adapters import ClearAdapters, lock_numbers, unlock_numbers
from privtuner.sealed.locker import Locker
from privtuner.sealed.messages import NONCE_BYTES, STEP, Link, Message, Rates, Stream, Type, largest_message
from privtuner.sealed.model import EncryptedAdapters, SealedModel
from privtuner.sealed.state import (
    DIGEST_BYTES,
    digest_of,
    forget_states,
    load_pieces,
    lock_state,
    make_folder,
    save_pieces,
    unlock_state,
)
from privtuner.turns import Turn, Turns

__all__ = ["MakeEvaluator", "SealedService", "TaskCounts"]

MakeEvaluator: TypeAlias = Callable[..., Any]
"""Makes `Evaluator`, or another engine with its operations, of parameters, evaluation keys and a refresher."""

Array: TypeAlias = npt.NDArray[np.float64]
_State: TypeAlias = list[EncryptedTensor] | ClearAdapters
"""A training state that was unlocked."""

_log = logging.getLogger(__name__)

_IN_FLIGHT = 4  # masked messages that are with the owner at a time
_COMMANDS = (
    Type.FRESH,
    Type.RESUME,
    Type.STORED,
    Type.EMBED,
    Type.FORWARD,
    Type.BACKWARD,
    Type.RELEASE,
)


class TaskCounts(NamedTuple):
    """What one task of a session took.

    Attributes:
        task: "embed", "forward" or "backward".
        tokens: slots of its tensors, hidden positions included: the server cannot tell them apart.
        refreshes: ciphertexts that were refreshed.
        bytes_in, bytes_out: on the stream.
        seconds: from its first message to its last.
        key: SHA-256 of the owner's public key.
        state: digest of the locked adapters that a backward pass left, as the owner keeps it; else empty.
    """

    task: str
    tokens: int
    refreshes: int
    bytes_in: int
    bytes_out: int
    seconds: float
    key: bytes = b""
    state: bytes = b""


class SealedService:
    """Serves one sealed model to data owners, a session for each stream.

    A session takes the memory of its keys, its adapters, one task and what a forward pass keeps, all of which follow
    from the model's public part; so the number of sessions bounds the memory. What a session kept ends with its stream;
    the adapters are with the owner, locked, and where ``state`` is given on disk as well.

    One session computes at a time, for it uses all threads. It gives its turn up between stages and while it waits for
    the owner's answers, to the tenant that computed least.

    Args:
        model: the model.
        evaluator: makes what computes.
        state: folder where each run's encrypted adapters are saved after each step; made if it does not exist.
        runs: of one tenant that stay saved there, at least 1: the oldest gives way; its owner has its state as well.
        days: that a run stays saved after its last step.
        sessions: streams served at a time, at least 1.
        patience: seconds that an owner may take for any message within a task, and wait for room.
        idle: seconds between tasks after which a session ends; ``patience`` where another owner waits for its room.
        keep: called after every step with the run's name and the matrices, where adapters are in the clear.
        release: give owners their adapters unlocked when they ask. They can decrypt them, and so learn of the
            activations that met in the gradients.

    Raises:
        InputError: a number below its least.
    """

    def __init__(
        self,
        model: SealedModel,
        *,
        evaluator: MakeEvaluator = Evaluator,
        state: str | Path | None = None,
        runs: int = 16,
        days: float = 30.0,
        sessions: int = 1,
        patience: float = 120.0,
        idle: float = 3600.0,
        release: bool = False,
        keep: Callable[[str, Matrices], object] | None = None,
    ) -> None:
        if min(sessions, runs) < 1 or not (patience > 0 and idle > 0 and days > 0):
            raise InputError(
                f"sessions {sessions}, runs {runs}: give at least 1; patience {patience:g}, idle {idle:g}, "
                f"days {days:g}: give more than 0"
            )
        self.model, self.evaluator, self.release, self.keep = model, evaluator, release, keep
        self.patience, self.idle, self.sessions = patience, idle, sessions
        self.runs, self.days = runs, days
        self.state = None if state is None else Path(state)
        if self.state is not None:
            self.state.mkdir(parents=True, exist_ok=True)
        self.turns = Turns()
        self._room = threading.BoundedSemaphore(sessions)
        self._knocks = threading.Lock()
        self._knocking = 0  # owners that wait for room
        self._idle: set[Stream] = set()
        self._ending = False

    def job(
        self,
        messages: Iterable[bytes],
        count: Callable[[TaskCounts], object] | None = None,
        tenant: str = "",
        runs: int | None = None,
    ) -> Iterator[bytes]:
        """Yield the server's messages of one session; those of the owner are taken from ``messages``.

        Args:
            messages: of the owner; read in a thread.
            count: called after every task.
            tenant: whose session it is.
            runs: of this tenant that stay saved; None: as of all of them.

        Raises:
            LostError: all sessions are in use; the owner stalled or went away in the middle of a task, or was idle for
                too long; or the server ends.
            MessageError: a message is malformed, out of order or not what is due, or its ciphertexts cannot be
                computed with.
            Exception: what ``messages`` raised.
        """
        self._enter()
        stream, failures = Stream("the data owner"), list[Exception]()

        def work() -> None:
            try:
                _Session(self, stream, count, tenant, self.runs if runs is None else runs).run()
            except CkksError:  # its numbers may follow from weights: for the log, not for the owner
                _log.exception("a job cannot be computed")
                failures.append(MessageError("the job cannot be computed; the server's log has the reason"))
            except Exception as error:  # reaches the transport, which knows what to do with it
                failures.append(error)
            finally:
                stream.close()
                self._room.release()

        worker = threading.Thread(target=work, name="privtuner-session", daemon=True)
        try:
            stream.listen(messages)
            worker.start()
        except BaseException:  # no thread: the worker will not give the room back
            stream.close()
            self._room.release()
            raise
        try:
            yield from stream.outgoing()
            worker.join()
        finally:
            stream.close()
        if failures:
            raise failures[0]

    def end_idle(self) -> None:
        """End sessions that wait for what their owners want next, and the others once they do."""
        with self._knocks:
            self._ending = True
            for stream in self._idle:
                stream.close()

    @contextmanager
    def _idling(self, stream: Stream) -> Iterator[None]:
        """Let `end_idle` end ``stream`` inside the block."""
        with self._knocks:
            if self._ending:
                raise LostError("the server is ending")
            self._idle.add(stream)
        try:
            yield
        finally:
            with self._knocks:
                self._idle.discard(stream)

    @property
    def wanted(self) -> bool:
        """Whether an owner waits for room."""
        return self._knocking > 0

    def _enter(self) -> None:
        """Take room for a session; a stream that broke gives it up at its next stage, an idle one when it notices."""
        with self._knocks:
            self._knocking += 1
        try:
            # Twice, for an idle session looks every ``patience`` whether it is in the way.
            if not self._room.acquire(timeout=2 * self.patience):
                raise LostError(f"the server is busy with {self.sessions} other sessions; try again later")
        finally:
            with self._knocks:
                self._knocking -= 1


@dataclass
class _Adapters:
    """The training state of a session."""

    step: int
    state: EncryptedAdapters[Any] | ClearAdapters | None


class _Session:
    """One stream of an owner: keys, adapters, and what the last forward pass kept."""

    def __init__(
        self,
        service: SealedService,
        stream: Stream,
        count: Callable[[TaskCounts], object] | None,
        tenant: str = "",
        runs: int = 1,
    ) -> None:
        self._service, self._model, self._public = service, service.model, service.model.public
        self._count, self._refreshes = count, 0
        self._tenant, self._runs = tenant, runs
        self._turn: Turn
        parameters = self._public.parameters
        self._link = Link(stream, self._public.id, bytes(16), parameters._core.hash, largest_message(parameters))
        self._engine: Any = None
        self._adapters: _Adapters | None = None
        self._stored: tuple[int, _State] | None = None
        self._key_digest = b""
        self._digest = bytes(DIGEST_BYTES)  # of the pieces that are stored; zeros: none
        self._saved: Any = None
        self._locker: Locker | None = None

    def run(self) -> None:
        """Answer until the owner ends the stream."""
        self._open()
        answers: dict[Type, Callable[[Message], None]] = {
            Type.FRESH: self._fresh,
            Type.RESUME: self._resume,
            Type.STORED: self._accept_stored,
            Type.EMBED: lambda _: self._forward(keep=False),
            Type.FORWARD: lambda _: self._forward(keep=True),
            Type.BACKWARD: self._backward,
            Type.RELEASE: lambda _: self._release(),
        }
        while (message := self._command()) is not None:
            answers[message.type](message)

    def _command(self) -> Message | None:
        """Read what the owner wants next, unless it takes too long; None where it ended the stream."""
        service, begin = self._service, time.monotonic()
        with service._idling(self._link.stream):
            while not self._link.stream.wait(min(service.patience, service.idle)):
                if service.wanted:
                    raise LostError("the session was idle and another owner waited for its room")
                if time.monotonic() - begin > service.idle:
                    raise LostError(f"the session was idle for {service.idle:g} s")
        return self._link.receive(_COMMANDS, seconds=service.patience)

    def _open(self) -> None:
        message = self._expect(Type.OPEN)
        if len(message.payload) != NONCE_BYTES:
            raise MessageError(f"open: a nonce of {len(message.payload)} bytes, {NONCE_BYTES} are due")
        nonce = secrets.token_bytes(NONCE_BYTES)
        common = hashlib.sha256(bytes(message.payload) + nonce).digest()
        self._locker = Locker(self._model.secret, self._public.id + self._link.request)
        self._stored = self._load()
        self._send(Type.WELCOME, nonce, self._digest)
        parameters, patience = self._public.parameters, self._service.patience
        data = self._link.receive_bytes(Type.PUBLIC_KEY, parameters.public_key_bytes, seconds=patience)
        self._public_key = public_key = PublicKey.from_bytes(parameters, data, common)
        self._key_digest = hashlib.sha256(data).digest()
        wanted = self._public.keys
        elements = elements_of(parameters, wanted.rotations, wanted.conjugation, wanted.packing)
        data = self._link.receive_bytes(Type.KEYS, parameters.key_bytes(1 + len(elements)), seconds=patience)
        keys = EvaluationKeys.from_bytes(parameters, data, common)
        if not keys.relinearisation or set(keys._core.elements) != elements:
            raise MessageError("keys: others than those that the model's public part asks for")
        self._engine = self._service.evaluator(parameters, keys, Refresher(public_key, self._exchange))

    # The training state

    def _fresh(self, message: Message) -> None:
        if self._public.shape.clear:
            if len(message.payload) or not message.last:
                raise MessageError("fresh: this server draws its adapters itself; send nothing")
            self._take(0, ClearAdapters.fresh(self._public.shape))
            return
        first: Message | None = message
        parts = []
        for planned in self._state_layout():
            parts.append(self._link.receive_tensor(Type.FRESH, planned, seconds=self._service.patience, first=first))
            first = None
        self._take(0, EncryptedAdapters(*map(self._upload, parts)))

    def _resume(self, message: Message) -> None:
        self._require_adapters()

        def pieces() -> Iterator[memoryview]:
            yield message.payload
            last = message.last
            while not last:
                another = self._expect(Type.RESUME)
                yield another.payload
                last = another.last

        self._take_state(*self._unlock(pieces()))

    def _accept_stored(self, message: Message) -> None:
        if len(message.payload):
            raise MessageError(f"stored: {len(message.payload)} bytes where none are due")
        if not self._trained:
            self._take(0, None)
        elif self._stored is None:
            raise MessageError("stored: this server has saved no state of this run; send it, or begin a new run")
        else:
            self._take_state(*self._stored)

    def _take_state(self, step: int, state: _State) -> None:
        if isinstance(state, ClearAdapters):
            self._take(step, state)
        else:
            self._take(step, EncryptedAdapters(*(self._upload([tensor]) for tensor in state)))

    def _take(self, step: int, state: EncryptedAdapters[Any] | ClearAdapters | None) -> None:
        self._adapters, self._saved, self._stored = _Adapters(step, state), None, None
        self._send(Type.READY, STEP.pack(step))

    def _unlock(self, pieces: Iterable[bytes | memoryview]) -> tuple[int, _State]:
        assert self._locker is not None  # noqa: S101 - made when the session opened
        if self._public.shape.clear:
            return unlock_numbers(self._locker, pieces, self._public.shape)
        return unlock_state(self._locker, pieces, self._state_layout())

    def _load(self) -> tuple[int, _State] | None:
        """Return the state on disk; none where it is damaged, or other weights': the owner has it as well."""
        path = self._path()
        if path is None or not path.exists() or not self._trained:
            return None
        try:
            pieces = load_pieces(path, self._public.state_limit)
            stored = self._unlock(pieces)
            self._digest = digest_of(pieces)
            return stored
        except (InputError, MessageError) as error:
            _log.warning("%s", error)
            return None

    def _save(self, pieces: list[bytes]) -> None:
        """Save the state; where that fails, only the owner has it."""
        path = self._path()
        try:
            if path is not None and self._runs:
                if self._tenant:
                    make_folder(path.parent)
                save_pieces(path, pieces)
                forget_states(path.parent, self._runs, 86400 * self._service.days)
        except InputError as error:
            _log.error("%s; the data owner alone has it", error)

    def _path(self) -> Path | None:
        folder = self._service.state
        if folder is None:
            return None
        if self._tenant:  # one tenant's runs are not told from another's names
            folder /= f"tenant-{quote(self._tenant, safe='')}"
        return folder / f"{self._link.request.hex()}.state"

    @property
    def _trained(self) -> bool:
        """Whether the model has adapters."""
        return bool(self._public.adapters) or self._public.shape.clear

    def _require_adapters(self) -> None:
        if not self._trained:
            raise MessageError("the model has no adapters; ask for embeddings alone")

    def _state_layout(self) -> tuple[EncryptedTensor, ...]:
        """Return what the tensors of the state are like: adapters, and their velocity."""
        self._require_adapters()
        return self._public.adapters

    # Tasks

    def _forward(self, *, keep: bool) -> None:
        task, public = "forward" if keep else "embed", self._public
        adapters, start = self._ready(task), self._mark()
        self._saved = None  # of an earlier pass: two would be held at once
        x = self._receive(Type.INPUTS, public.inputs)
        mask = self._receive(Type.MASK, public.mask)
        with self._computing():
            pooled, self._saved = self._model.forward(
                self._engine, x, mask, adapters.state, keep=keep, progress=self._progress
            )
            result = self._engine.download(pooled)
        self._link.send_tensor(Type.POOLED, result, seconds=self._service.patience)
        self._counted(task, start)

    def _backward(self, message: Message) -> None:
        public = self._public
        rates = Rates.from_bytes(message.payload, clipped=public.shape.clear)
        adapters, start = self._ready("backward"), self._mark()
        saved, self._saved = self._saved, None
        if saved is None or adapters.state is None:
            raise MessageError("backward: no forward pass was kept; send the batch again")
        gradient = self._receive(Type.GRADIENT, public.gradient)
        with self._computing():
            gradients = self._model.backward(self._engine, saved, gradient, adapters.state, progress=self._progress)
            del saved
            step = adapters.step + 1
            assert self._locker is not None  # noqa: S101 - made when the session opened
            stepped: EncryptedAdapters[Any] | ClearAdapters
            if isinstance(adapters.state, ClearAdapters):
                opened = self._opened(gradients, rates)
                stepped = adapters.state.step(public.shape, opened, rates.rate, rates.momentum)
                pieces = list(lock_numbers(self._locker, step, stepped))
            else:
                stepped = self._model.step(self._engine, adapters.state, gradients, rates.rate, rates.momentum)
                tensors = [self._engine.download(tensor) for tensor in stepped.tensors]
                pieces = list(lock_state(self._locker, step, tensors))
        self._save(pieces)
        if isinstance(stepped, ClearAdapters) and self._service.keep is not None:
            self._service.keep(self._link.request.hex(), public.adapter_matrices(stepped.values))
        self._adapters = _Adapters(step, stepped)
        for number, piece in enumerate(pieces, 1):
            self._link.send(Type.KEPT, piece, last=number == len(pieces), seconds=self._service.patience)
        self._send(Type.DONE, STEP.pack(step))
        self._counted("backward", start, digest_of(pieces))

    def _opened(self, gradients: Any, rates: Rates) -> Array:
        """Have the owner open the clipped gradient, with its noise: float64, of the shape of the adapters' values."""
        assert rates.clip is not None  # noqa: S101 - as it was read
        clipped, square = self._model.clip(self._engine, gradients, rates.clip)
        opening = Opening(self._public_key, self._engine.download(clipped), self._public.adapter_numbers)
        seconds = self._service.patience
        with self._turn.pause():
            self._link.send_tensor(Type.NORM, self._engine.download(square), seconds=seconds)
            self._link.send_tensor(Type.MASKED, opening.masked, seconds=seconds)
            answer = self._link.receive_bytes(Type.OPENED, opening.answer_bytes, seconds=seconds)
        return opening.numbers(answer) * rates.clip

    def _release(self) -> None:
        adapters = self._ready("release")
        if not self._service.release or adapters.state is None:
            raise MessageError("release: this server keeps adapters to itself; ask its owner")
        if isinstance(adapters.state, ClearAdapters):
            data = adapters.state.values.astype("<f8").tobytes()
            self._link.send_bytes(Type.RELEASED, data, seconds=self._service.patience)
            return
        values = self._engine.download(adapters.state.values)
        self._link.send_tensor(Type.RELEASED, values, seconds=self._service.patience)

    def _ready(self, task: str) -> _Adapters:
        if self._adapters is None:
            raise MessageError(f"{task}: the session has no adapters yet; send them first")
        return self._adapters

    # The stream

    def _exchange(self, masked: Iterable[bytes]) -> Iterator[bytes]:
        """Carry masked messages to the owner, a few ahead of its replies."""
        waiting = 0
        for message in masked:
            self._refreshes += wire.peek(message).features
            self._send(Type.REFRESH, message)
            waiting += 1
            if waiting == _IN_FLIGHT:
                yield self._refreshed()
                waiting -= 1
        for _ in range(waiting):
            yield self._refreshed()

    def _refreshed(self) -> bytes:
        """Wait for the next answer, while others compute."""
        with self._turn.pause():
            message = self._expect(Type.REFRESHED)
        return bytes(message.payload)

    def _progress(self, stage: str) -> None:  # noqa: ARG002 - the owner knows the stages from the schedule
        """Let others compute, and stop for a stream that ended."""
        with self._turn.pause():
            self._link.stream.check()

    def _send(self, type: Type, *payload: wire.BytesLike) -> None:
        self._link.send(type, *payload, seconds=self._service.patience)

    def _expect(self, type: Type) -> Message:
        return self._link.expect(type, seconds=self._service.patience)

    def _receive(self, type: Type, planned: EncryptedTensor) -> Any:
        return self._upload(self._link.receive_tensor(type, planned, seconds=self._service.patience))

    def _upload(self, parts: list[EncryptedTensor]) -> Any:
        there = [self._engine.upload(part) for part in parts]
        return there[0] if len(there) == 1 else self._engine.concatenate(there)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self._service.turns.turn(self._tenant, self._link.stream.check) as self._turn:
            yield

    def _mark(self) -> tuple[float, int, int]:
        self._refreshes = 0
        return time.perf_counter(), self._link.bytes_in, self._link.bytes_out

    def _counted(self, task: str, start: tuple[float, int, int], state: bytes = b"") -> None:
        if self._count is not None:
            begin, bytes_in, bytes_out = start
            self._count(
                TaskCounts(
                    task,
                    self._public.parameters.slots,
                    self._refreshes,
                    self._link.bytes_in - bytes_in,
                    self._link.bytes_out - bytes_out,
                    time.perf_counter() - begin,
                    self._key_digest,
                    state,
                )
            )

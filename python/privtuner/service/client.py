"""The data owner's end of a connection to a server."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import grpc

from privtuner._core import __version__
from privtuner.copies import Stays
from privtuner.errors import InputError, LostError, MessageError, ServiceError
from privtuner.foreign import foreign_entry, foreign_json, foreign_text
from privtuner.linear import BytesLike
from privtuner.nn import OwnerBundle
from privtuner.nn.bundle import bundle_digest
from privtuner.retries import Attempts, Retries
from privtuner.service.counts import ServerCounts
from privtuner.service.pins import KnownBundles, check_bundle, check_digest
from privtuner.service.protocol import (
    CALLER_BYTES,
    CALLER_KEY,
    LARGEST_BYTES,
    LAYER_KEY,
    MESSAGE_BYTES,
    MODEL_KEY,
    PROTOCOL,
    PROTOCOL_KEY,
    channel_options,
    cut,
    join,
    join_files,
    method,
)
from privtuner.service.security import ClientCredentials, Line, Token
from privtuner.service.watchdog import Watch, Watchdog

__all__ = ["RemoteTransport"]

T = TypeVar("T")

_DIGEST = re.compile("[0-9a-f]{64}")
_CLOSE_SECONDS = 2.0
_GONE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,  # of gRPC itself, where it cannot tell
)
_IDENTITY = ("bundle", "scheme", "preset", "sealed")  # of what a server says: what must not change under a client
_HELLO_BYTES = 1 << 16
_HELLO: dict[str, type] = {
    **dict.fromkeys(("version", "model", "scheme", "preset", "bundle"), str),
    **dict.fromkeys(("layers", "bundle_bytes"), int),
    "sealed": bool,
}


class RemoteTransport(Stays):
    """Carries requests to a `privtuner.service.Server` in another process.

    A `privtuner.nn.Transport`. Nothing is sent before the first call. Safe to use from several threads. A
    context manager: leaving it closes the connection.

    Args:
        address: HOST:PORT, an IPv6 host in brackets.
        credentials: for TLS. None is TLS with the public authorities, and no TLS to this machine itself.
        token: who the owner is, if the server asks.
        allow_plaintext: without ``credentials``, speak to another machine in the clear: whoever is in between can then
            exchange the bundle, and so what runs here.
        connect_seconds: longest time for the first answer.
        patience: seconds without a byte to the server, or from it, that end a request: at least what it may take to
            compute a block, and what other owners' requests may take before. (Of a sealed model's jobs the
            `privtuner.sealed.owner.SealedOwner` has the deadlines.)
        max_bundle_bytes: longest bundle that is taken.
        retries: how often a request is sent again whose connection was lost, or for which the server was too busy: the
            same bytes, to the same model. The first answer of all is not waited for so.
        say: told in a line what is waited for.

    Raises:
        privtuner.errors.InputError: ``address`` is not HOST:PORT, a number is not above 0, or see
            `privtuner.service.security.Line`.
    """

    stays = (
        "a connection cannot be pickled: it stays in the process that opened it; make a RemoteTransport of the same "
        "address in the other one"
    )

    def __init__(
        self,
        address: str,
        credentials: ClientCredentials | None = None,
        token: Token | None = None,
        *,
        allow_plaintext: bool = False,
        connect_seconds: float = 10.0,
        patience: float = 300.0,
        max_bundle_bytes: int = 8 << 30,
        retries: Retries = Retries(),  # noqa: B008 - immutable
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._line = Line(address, credentials, token, allow_plaintext=allow_plaintext)
        if not (connect_seconds > 0 and patience > 0 and max_bundle_bytes > 0):
            raise InputError(
                f"connect_seconds {connect_seconds:g}, patience {patience:g}, max_bundle_bytes {max_bundle_bytes}: "
                "give more than 0"
            )
        self.address = address
        self._connect_seconds = connect_seconds
        self._patience, self._max_bundle_bytes = patience, max_bundle_bytes
        self._retries, self._say = retries, say
        self._watchdog, self._closing = Watchdog(), threading.Event()
        self._channel = self._line.open(channel_options())
        self._caller = secrets.token_bytes(CALLER_BYTES)
        self._lock = threading.Lock()
        self._hello: dict[str, Any] | None = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    def hello(self) -> dict[str, Any]:
        """Return what the server says of itself: protocol, version, model, scheme, preset, layers, sealed.

        Raises:
            privtuner.errors.ServiceError: nothing answers, or something other than a server of this protocol.
        """
        with self._lock:
            if self._hello is None:
                self._hello = self._ask_hello(first=True)
            return dict(self._hello)

    def _ask_hello(self, *, first: bool = False) -> dict[str, Any]:
        call = self._channel.unary_unary(method("Hello"))
        # Whatever model: the answer says which.
        metadata = [entry for entry in self._metadata() if entry[0] != MODEL_KEY]
        with self._explain_errors("Hello", first=first):
            answer = call(b"", metadata=metadata, timeout=self._connect_seconds)
        return self._checked_hello(answer)

    def fetch_bundle(
        self,
        progress: Callable[[int, int], object] | None = None,
        *,
        expected: str | None = None,
        known: KnownBundles | None = None,
    ) -> OwnerBundle:
        """Return the data owner's part of the served model, which decides what the owner runs.

        Args:
            progress: called with the bytes that have arrived and all that there are, as each message arrives.
            expected: SHA-256 of the bundle, see `privtuner.nn.bundle.bundle_digest`; another one is not even read.
            known: bundles of servers that were met before: the first one of an address is remembered, another one
                later is refused, and an ``expected`` one takes its place.

        Raises:
            privtuner.errors.InputError: ``expected`` is no digest, or the file of ``known`` cannot be used.
            privtuner.errors.ServiceError: the connection failed, or the bundle is another one.
            privtuner.errors.MessageError: what arrived is no bundle of this version.
        """
        expected = None if expected is None else check_digest(expected)
        total = self.hello()["bundle_bytes"]

        def messages(call: Any, watch: Watch) -> Iterator[bytes]:
            arrived = 0
            for message in join(_watched(call, watch), LARGEST_BYTES):
                if progress is not None:
                    progress(arrived, max(arrived, total))
                arrived += len(message)
                yield message
            if progress is not None:
                progress(arrived, arrived)

        def fetch() -> dict[str, bytes]:
            call = self._channel.unary_stream(method("Bundle"))
            with self._calling("the bundle", lambda _: call(b"", metadata=self._metadata())) as (answer, watch):
                return join_files(messages(answer, watch), self._max_bundle_bytes)

        files = self._persist(fetch)
        check_bundle(self.address, bundle_digest(files), expected, known)
        return OwnerBundle.from_files(files)

    def apply(self, layer: str, request: BytesLike) -> Iterator[bytes]:
        """Yield the blocks of the reply to ``request`` as the server computes them.

        See `privtuner.nn.Transport`. The call is cancelled when the iterator is closed early.

        A request whose reply broke off is sent again as it is, and its reply goes on where the first one ended: every
        block is handed on once, whichever connection brought it, so that its secret decrypts each output once. That it
        is sent again follows from the connection alone, never from what was decrypted.

        Raises:
            privtuner.errors.ServiceError: the server cannot be reached, went away and did not come back, refused the
                request or failed, or another model is served now.
            privtuner.errors.MessageError: a block is longer than any, or cut otherwise than before.
        """
        if self._hello is None:
            self.hello()
        attempts, handed_on = self._retries.begin(self._say), 0
        while True:
            known = handed_on
            try:
                for block in self._apply_once(layer, request):
                    if known:
                        known -= len(block)
                        if known < 0:
                            raise MessageError(f"layer '{layer}': the reply came again in other blocks; begin again")
                        continue
                    attempts.progress()
                    handed_on += len(block)
                    yield block
                return
            except LostError as error:
                self._reconnect(attempts, error)

    def _apply_once(self, layer: str, request: BytesLike) -> Iterator[bytes]:
        metadata = (*self._metadata(), (LAYER_KEY, layer.encode()))

        def begin(watch: Watch) -> Any:
            if len(request) < MESSAGE_BYTES:
                # A stream of one message needs no thread to feed it.
                return self._channel.unary_stream(method("Apply"))(bytes(request), metadata=metadata)
            return self._channel.stream_stream(method("Apply"))(_moving(cut(request), watch), metadata=metadata)

        with self._calling(f"layer '{layer}'", begin) as (call, watch):
            yield from join(_watched(call, watch), LARGEST_BYTES)

    def job(self, messages: Iterable[bytes]) -> Job:
        """Return an iterator over the server's messages of a sealed model's job, while those of ``messages`` are sent.

        See `privtuner.sealed.owner.JobTransport`, whose owner repeats what got lost. The call is cancelled when the
        iterator is closed early, or, from any thread, by its ``cancel``.

        Raises:
            privtuner.errors.ServiceError: the server cannot be reached, went away, refused a message or failed.
            privtuner.errors.MessageError: a message is longer than any.
        """
        self.hello()
        pieces = (piece for message in messages for piece in cut(message))
        call = self._channel.stream_stream(method("Job"))
        job = Job()

        def run() -> Generator[bytes, None, None]:
            with self._calling("the job", lambda _: job.begun(call(pieces, metadata=self._metadata()))) as (answer, _):
                yield from join(answer, LARGEST_BYTES)

        job.messages = run()
        return job

    def counts(self) -> ServerCounts:
        """Return what the server has seen of this tenant since it started, or of this object if it knows no tenants.

        Raises:
            privtuner.errors.ServiceError: the connection failed.
        """
        self.hello()

        def ask() -> bytes:
            call = self._channel.unary_unary(method("Stats"))
            with self._explain_errors("Stats"):
                answer: bytes = call(b"", metadata=self._metadata(), timeout=self._connect_seconds)
            return answer

        return ServerCounts.from_json(self._persist(ask))

    def close(self) -> None:
        """Close the connection, also from another thread; calls in progress and later ones raise ServiceError.

        Returns within seconds, whatever state the connection is in.
        """
        self._closing.set()
        # A KeyboardInterrupt while gRPC set up a call leaves one that nobody ends, and closing would wait for it.
        closing = threading.Thread(target=self._channel.close, name="privtuner-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def __enter__(self) -> RemoteTransport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _checked_hello(self, answer: bytes) -> dict[str, Any]:
        try:
            told = foreign_json(answer, "Hello", _HELLO_BYTES)
            protocol = foreign_entry(told, "protocol", int, "Hello")
            if protocol == PROTOCOL:
                for name, kind in _HELLO.items():
                    foreign_entry(told, name, kind, "Hello")
                if not _DIGEST.fullmatch(told["bundle"]):
                    raise MessageError("Hello: the bundle's digest is none")
        except MessageError as error:
            raise ServiceError(f"what answers at {self.address} is no privtuner server") from error
        plain = {foreign_text(name): value for name, value in told.items() if isinstance(value, (str, int))}
        hello = {name: foreign_text(value) if isinstance(value, str) else value for name, value in plain.items()}
        if protocol != PROTOCOL:
            raise ServiceError(
                f"the server at {self.address} speaks protocol {protocol} (privtuner {hello.get('version')}), this is "
                f"protocol {PROTOCOL} (privtuner {__version__}); install the same version on both sides"
            )
        return hello

    def _metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return what every call says; after the first one which model it is meant for, too.

        Secret, if there is a token.
        """
        model = ((MODEL_KEY, self._hello["bundle"]),) if self._hello else ()
        return ((PROTOCOL_KEY, str(PROTOCOL)), (CALLER_KEY, self._caller), *model, *self._line.metadata)

    def _persist(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns, repeated from its beginning where it got lost."""
        attempts = self._retries.begin(self._say)
        while True:
            try:
                result = work()
            except LostError as error:
                self._reconnect(attempts, error)
            else:
                attempts.progress()
                return result

    def _reconnect(self, attempts: Attempts, error: LostError) -> None:
        """Wait until the server answers again.

        Raises:
            privtuner.errors.LostError: it did not for too long. privtuner.errors.ServiceError: it serves another model.
        """
        while True:
            attempts.wait(error, self._sleep)
            try:
                hello, known = self._ask_hello(), self._hello or {}
            except LostError as again:
                error = again
                continue
            if other := [name for name in _IDENTITY if hello.get(name) != known.get(name)]:
                raise ServiceError(
                    f"the server at {self.address} serves another model now: {_differences(hello, known, other)}; "
                    "begin a new run with it, or restart it with the model of before and give the same command again"
                ) from error
            return

    def _sleep(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise self._was_closed()

    @contextmanager
    def _calling(self, what: str, begin: Callable[[Watch], Any]) -> Iterator[tuple[Any, Watch]]:
        """Begin a call, cancel it at the end of the block or when it makes no progress, and explain its errors."""
        with self._explain_errors(what):
            watch = self._watchdog.watch(self._patience, lambda: call.cancel())
            call = begin(watch)
            try:
                yield call, watch
            except grpc.RpcError as error:
                if watch.expired:
                    raise LostError(
                        f"the server at {self.address} made no progress in {what} for {self._patience:g} s"
                    ) from error
                raise
            finally:
                call.cancel()

    @contextmanager
    def _explain_errors(self, what: str, *, first: bool = False) -> Iterator[None]:
        """Turn gRPC's errors into a ServiceError that says what to do."""
        if self.closed:
            raise self._was_closed()
        try:
            yield
        except grpc.RpcError as error:
            if self.closed:
                raise self._was_closed() from error
            raise self._explained(error, what, first=first) from error
        except ValueError as error:
            # What gRPC says to a call that begins while another thread closes the channel.
            if self.closed:
                raise self._was_closed() from error
            raise

    def _was_closed(self) -> ServiceError:
        return ServiceError(f"the connection to {self.address} was closed; open another RemoteTransport")

    def _explained(self, error: Any, what: str, *, first: bool) -> ServiceError:
        """Return what a call's end means: a `LostError` where the same call may go well later."""
        code, detail = error.code(), foreign_text(error.details() or "no details", 500)
        if code in _GONE and (refused := self._line.explain(detail)) is not None:
            return ServiceError(refused)
        if code in _GONE and first:
            return ServiceError(
                f"no privtuner server answers at {self.address} ({detail}); check the address, or start one there with "
                f"'privtuner serve --model DIR --port N'; {self._line.hint}"
            )
        if code in _GONE:
            return LostError(f"the connection to the server at {self.address} was lost during {what} ({detail})")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in detail:  # what gRPC here says of it
            return ServiceError(f"the server at {self.address} sent a longer message than any in {what}")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return LostError(f"the server at {self.address} is too busy for {what}: {detail}")
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return ServiceError(
                f"what answers at {self.address} is no privtuner server, or one of another version ({detail})"
            )
        if code == grpc.StatusCode.INTERNAL:
            return ServiceError(f"the server at {self.address} failed during {what}: {detail}")
        return ServiceError(f"the server at {self.address} refused {what}: {detail}")


class Job(Iterator[bytes]):
    """The server's messages of a job.

    Attributes:
        messages: where they come from.
    """

    messages: Generator[bytes, None, None]

    def __init__(self) -> None:
        self._call: Any = None
        self._cancelled = False

    def __next__(self) -> bytes:
        return next(self.messages)

    def begun(self, call: Any) -> Any:
        """Note the call that `cancel` ends."""
        self._call = call
        if self._cancelled:
            call.cancel()
        return call

    def cancel(self) -> None:
        """End the call, also while another thread waits for its next message."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """End the call once nobody waits for it."""
        self.messages.close()


def _differences(hello: dict[str, Any], known: dict[str, Any], names: list[str]) -> str:
    shown = ((name, *(str(side.get(name))[:16] for side in (hello, known))) for name in names)
    return ", ".join(f"{name} {now}, before {before}" for name, now, before in shown)


def _watched(call: Any, watch: Watch) -> Iterator[bytes]:
    """Yield what a call brings, each piece within the deadline."""
    pieces = iter(call)
    while True:
        with watch.waiting():
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _moving(pieces: Iterator[bytes], watch: Watch) -> Iterator[bytes]:
    """Yield pieces as gRPC, in a thread of its own, takes them for sending."""
    for piece in pieces:
        watch.moved()
        yield piece

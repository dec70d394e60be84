"""The data owner's end of a connection to a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc

from privtuner._core import __version__
from privtuner.copies import Stays
from privtuner.errors import InputError, ServiceError
from privtuner.linear import BytesLike
from privtuner.nn import OwnerBundle
from privtuner.service.counts import ServerCounts
from privtuner.service.protocol import (
    LARGEST_BYTES,
    LAYER_KEY,
    MESSAGE_BYTES,
    PROTOCOL,
    PROTOCOL_KEY,
    channel_options,
    cut,
    join,
    join_files,
    method,
    parse_address,
)
from privtuner.service.watchdog import Watch, Watchdog

__all__ = ["RemoteTransport"]

_CLOSE_SECONDS = 2.0
_PROBE_SECONDS = 3.0
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


class RemoteTransport(Stays):
    """Carries requests to a `privtuner.service.Server` in another process.

    A `privtuner.nn.Transport`. Nothing is sent before the first call. Safe to use from several threads. A
    context manager: leaving it closes the connection.

    Args:
        address: HOST:PORT, an IPv6 host in brackets.
        connect_seconds: longest time for the first answer.
        patience: seconds without a byte to the server, or from it, that end a request: at least what it may take to
            compute a block, and what other owners' requests may take before. (Of a sealed model's jobs the
            `privtuner.sealed.owner.SealedOwner` has the deadlines.)
        max_bundle_bytes: longest bundle that is taken.

    Attributes:
        closed: whether `close` was called.

    Raises:
        privtuner.errors.InputError: ``address`` is not HOST:PORT.
    """

    stays = (
        "a connection cannot be pickled: it stays in the process that opened it; make a RemoteTransport of the same "
        "address in the other one"
    )

    def __init__(
        self,
        address: str,
        *,
        connect_seconds: float = 10.0,
        patience: float = 300.0,
        max_bundle_bytes: int = 8 << 30,
    ) -> None:
        parse_address(address)
        if not (connect_seconds > 0 and patience > 0 and max_bundle_bytes > 0):
            raise InputError(
                f"connect_seconds {connect_seconds:g}, patience {patience:g}, max_bundle_bytes {max_bundle_bytes}: "
                "give more than 0"
            )
        self.address = address
        self._connect_seconds = connect_seconds
        self._patience, self._max_bundle_bytes = patience, max_bundle_bytes
        self._watchdog = Watchdog()
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._lock = threading.Lock()
        self._hello: dict[str, Any] | None = None
        self.closed = False

    def hello(self) -> dict[str, Any]:
        """Return what the server says of itself: protocol, version, model, scheme, preset, layers, sealed.

        Raises:
            privtuner.errors.ServiceError: nothing answers, or something other than a server of this protocol.
        """
        with self._lock:
            if self._hello is None:
                call = self._channel.unary_unary(method("Hello"))
                with self._explain_errors("Hello", first=True):
                    answer = call(b"", metadata=_metadata(), timeout=self._connect_seconds)
                self._hello = self._checked_hello(answer)
            return dict(self._hello)

    def fetch_bundle(self, progress: Callable[[int, int], object] | None = None) -> OwnerBundle:
        """Return the data owner's part of the served model.

        Args:
            progress: called with the bytes that have arrived and all that there are, as each message arrives.

        Raises:
            privtuner.errors.ServiceError: the connection failed.
            privtuner.errors.MessageError: what arrived is no bundle of this version.
        """
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

        call = self._channel.unary_stream(method("Bundle"))
        with self._calling("the bundle", lambda _: call(b"", metadata=_metadata())) as (answer, watch):
            files = join_files(messages(answer, watch), self._max_bundle_bytes)
        return OwnerBundle.from_files(files)

    def apply(self, layer: str, request: BytesLike) -> Iterator[bytes]:
        """Yield the blocks of the reply to ``request`` as the server computes them.

        See `privtuner.nn.Transport`. The call is cancelled when the iterator is closed early.

        Raises:
            privtuner.errors.ServiceError: the server cannot be reached, went away, stalled, refused the request or
                failed.
            privtuner.errors.MessageError: a block is longer than any.
        """
        if self._hello is None:
            self.hello()
        metadata = (*_metadata(), (LAYER_KEY, layer.encode()))

        def begin(watch: Watch) -> Any:
            if len(request) < MESSAGE_BYTES:
                # A stream of one message needs no thread to feed it.
                return self._channel.unary_stream(method("Apply"))(bytes(request), metadata=metadata)
            return self._channel.stream_stream(method("Apply"))(_moving(cut(request), watch), metadata=metadata)

        with self._calling(f"layer '{layer}'", begin) as (call, watch):
            yield from join(_watched(call, watch), LARGEST_BYTES)

    def job(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the server's messages of a sealed model's job, while those of ``messages`` are sent.

        See `privtuner.sealed.owner.JobTransport`. The call is cancelled when the iterator is closed early.

        Raises:
            privtuner.errors.ServiceError: the server cannot be reached, went away, refused a message or failed.
            privtuner.errors.MessageError: a message is longer than any.
        """
        self.hello()
        pieces = (piece for message in messages for piece in cut(message))
        call = self._channel.stream_stream(method("Job"))
        with self._calling("the job", lambda _: call(pieces, metadata=_metadata())) as (answer, _):
            yield from join(answer, LARGEST_BYTES)

    def counts(self) -> ServerCounts:
        """Return what the server has seen since it started, from all its clients.

        Raises:
            privtuner.errors.ServiceError: the connection failed.
        """
        self.hello()
        with self._explain_errors("Stats"):
            call = self._channel.unary_unary(method("Stats"))
            answer: bytes = call(b"", metadata=_metadata(), timeout=self._connect_seconds)
        return ServerCounts.from_json(answer)

    def close(self) -> None:
        """Close the connection, also from another thread; calls in progress and later ones raise ServiceError.

        Returns within seconds, whatever state the connection is in.
        """
        self.closed = True
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
            hello = dict(json.loads(answer))
            protocol = int(hello["protocol"])
            if protocol == PROTOCOL:
                hello["bundle_bytes"] = int(hello.get("bundle_bytes", 0))
                hello["sealed"] = bool(hello.get("sealed", False))
                if not all(isinstance(hello[name], str) for name in ("model", "scheme", "preset")):
                    raise TypeError("model, scheme and preset are no names")
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ServiceError(f"what answers at {self.address} is no privtuner server") from error
        if protocol != PROTOCOL:
            raise ServiceError(
                f"the server at {self.address} speaks protocol {protocol} (privtuner {hello.get('version')}), this is "
                f"protocol {PROTOCOL} (privtuner {__version__}); install the same version on both sides"
            )
        return hello

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
                    raise ServiceError(
                        f"the server at {self.address} made no progress in {what} for {self._patience:g} s; begin again"
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
            raise ServiceError(self._explanation(error, what, first=first)) from error
        except ValueError as error:
            # What gRPC says to a call that begins while another thread closes the channel.
            if self.closed:
                raise self._was_closed() from error
            raise

    def _was_closed(self) -> ServiceError:
        return ServiceError(f"the connection to {self.address} was closed; open another RemoteTransport")

    def _explanation(self, error: Any, what: str, *, first: bool) -> str:
        code, detail = error.code(), error.details() or "no details"
        if code in _GONE and first:
            return (
                f"no privtuner server answers at {self.address} ({detail}); check the address, or start one there with "
                "'privtuner serve --model DIR --port N'"
            )
        if code in _GONE:
            state = self._state_now()
            if state == "same":
                return (
                    f"the connection to {self.address} was cut during {what} ({detail}); the server is there and "
                    "answers: begin again, and if it happens again look at what is in between"
                )
            if state == "other":
                return (
                    f"the server at {self.address} went away during {what} ({detail}) and another answers there now; "
                    "begin again"
                )
            return f"the server at {self.address} went away during {what} ({detail}); restart it and begin again"
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return f"what answers at {self.address} is no privtuner server, or one of another version ({detail})"
        if code == grpc.StatusCode.INTERNAL:
            return f"the server at {self.address} failed during {what}: {detail}"
        return f"the server at {self.address} refused {what}: {detail}"

    def _state_now(self) -> str:
        """Ask again, on a connection of its own: "same" server as at first, an "other" one, or "gone"."""
        channel = grpc.insecure_channel(self.address, options=channel_options())
        try:
            answer = channel.unary_unary(method("Hello"))(b"", metadata=_metadata(), timeout=_PROBE_SECONDS)
            return "same" if self._checked_hello(answer) == self._hello else "other"
        except grpc.RpcError:
            return "gone"
        except ServiceError:
            return "other"
        finally:
            channel.close()


def _metadata() -> tuple[tuple[str, str | bytes], ...]:
    return ((PROTOCOL_KEY, str(PROTOCOL)),)


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

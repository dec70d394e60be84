"""The model owner's process: prepared layers behind gRPC."""

from __future__ import annotations

import errno
import json
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc

from privtuner import wire
from privtuner._core import __version__
from privtuner.copies import Stays
from privtuner.errors import InputError, MessageError, ServiceError
from privtuner.nn import Split
from privtuner.schemes import Host, LinearServer
from privtuner.sealed.server import SealedService
from privtuner.service.counts import Counter, ServerCounts
from privtuner.service.protocol import (
    LAYER_KEY,
    MESSAGE_BYTES,
    PROTOCOL,
    PROTOCOL_KEY,
    SERVICE,
    channel_options,
    is_loopback,
    split_files,
)

__all__ = ["Server", "ensure_free"]

_log = logging.getLogger(__name__)

_WORKERS = 8


class _Refusal(Exception):  # noqa: N818 - it is no error of the server
    """A request that cannot be served, and the status that says so to the client."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class Server(Stays):
    """Serves the prepared layers of a split model and hands out the data owner's bundle.

    There is no encryption or authentication of the connection yet, so anybody who reaches the port can use the layers,
    and a bundle could be exchanged on its way; the activations in requests are encrypted all the same. Therefore only
    loopback addresses are bound, unless ``allow_plaintext`` says that the network in between is trusted.

    Args:
        split: the model; ``split.server`` stays here, ``split.bundle`` goes to every data owner that asks.
        host: address to bind.
        port: TCP port, 0 for a free one.
        name: what clients are told the model is called.
        server: computes the linear layers; the linear scheme on the processor when None. It decides which requests are
            answered.
        sealed: serves a sealed model, if there is one.
        max_request_bytes: longest request accepted, so that one client cannot take all memory.
        allow_plaintext: bind an address that other machines can reach.

    Raises:
        privtuner.errors.InputError: a port outside 0..65535, a limit below 1, or an address that is not loopback
            without ``allow_plaintext``.
        privtuner.errors.EngineError: the GPUs have not the memory for the layers.
        privtuner.errors.ServiceError: the address cannot be bound, e.g. because another program has the port.
    """

    stays = "a server cannot be pickled: it answers in the process that started it; pickle the Split and serve that"

    def __init__(
        self,
        split: Split,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str = "",
        server: LinearServer | None = None,
        sealed: SealedService | None = None,
        max_request_bytes: int = 4 << 30,
        allow_plaintext: bool = False,
    ) -> None:
        _check_address(host, port, allow_plaintext)
        if max_request_bytes < 1:
            raise InputError(f"max_request_bytes is {max_request_bytes}; give at least 1")
        self._host = Host(split.server, server, sealed)
        self._files = split.bundle.to_files()
        self.placement = self._host.load()
        """Bytes of layers on each GPU, by its name."""
        self._max_request_bytes = max_request_bytes
        self._counter = Counter()
        presets = sorted({spec.preset for spec in split.bundle.specs.values()})
        self.hello: dict[str, Any] = {
            "protocol": PROTOCOL,
            "version": __version__,
            "model": name or split.bundle.architecture,
            "scheme": self._host.server.scheme,
            "preset": ", ".join(presets),
            "layers": len(split.server),
            "sealed": sealed is not None,
            "bundle_bytes": sum(map(len, self._files.values())),
        }
        """What clients are told first."""
        self._server = grpc.server(
            ThreadPoolExecutor(_WORKERS + (0 if sealed is None else sealed.sessions), "privtuner-serve"),
            options=channel_options(20.0),
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        literal = _literal(host)
        try:
            bound = self._server.add_insecure_port(f"{literal}:{port}")
        except RuntimeError as error:
            raise ServiceError(
                f"cannot listen on {literal}:{port}: another program has the port, or this machine has no such address"
            ) from error
        self.address = f"{literal}:{bound}"
        """HOST:PORT that clients connect to."""

    def start(self) -> Server:
        """Begin to answer; returns at once."""
        self._server.start()
        return self

    def stop(self, grace_seconds: float = 2.0) -> None:
        """Refuse new requests, let those in progress end within ``grace_seconds``, then cut them off."""
        self._server.stop(grace_seconds).wait()
        self._host.close()

    def counts(self) -> ServerCounts:
        """Return what this server has seen."""
        return self._counter.snapshot()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _handlers(self) -> Any:
        hello = json.dumps(self.hello).encode()
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Hello": grpc.unary_unary_rpc_method_handler(lambda *_: hello),
                "Stats": grpc.unary_unary_rpc_method_handler(self._guard(self._stats)),
                "Bundle": grpc.unary_stream_rpc_method_handler(self._guard_stream(self._bundle)),
                "Job": grpc.stream_stream_rpc_method_handler(self._guard_stream(self._job)),
                "Apply": grpc.stream_stream_rpc_method_handler(self._guard_stream(self._apply)),
            },
        )

    def _guard(self, answer: Callable[[Any, Any], bytes]) -> Callable[[Any, Any], bytes]:
        stream = self._guard_stream(lambda request, context: iter((answer(request, context),)))
        return lambda request, context: next(stream(request, context))

    def _guard_stream(self, answer: Callable[[Any, Any], Iterator[bytes]]) -> Callable[[Any, Any], Iterator[bytes]]:
        """Turn every exception into a status: the client gets a reason or a pointer to the log, never a traceback."""

        def guarded(request: Any, context: Any) -> Iterator[bytes]:
            try:
                _check_protocol(context)
                yield from answer(request, context)
                return
            except _Refusal as refusal:
                code, text = refusal.code, str(refusal)
            except (MessageError, InputError) as error:
                code, text = grpc.StatusCode.INVALID_ARGUMENT, str(error)
            except ServiceError as error:
                code, text = grpc.StatusCode.ABORTED, str(error)
            except grpc.RpcError:
                return  # the client is gone
            except Exception:
                if not context.is_active():
                    return
                _log.exception("a request failed")
                code, text = grpc.StatusCode.INTERNAL, "the server failed; its log has the reason"
            self._counter.count_refusal()
            context.abort(code, text)

        return guarded

    def _stats(self, request: bytes, context: Any) -> bytes:  # noqa: ARG002 - gRPC's signature
        return self._counter.snapshot().to_json()

    def _bundle(self, request: bytes, context: Any) -> Iterator[bytes]:  # noqa: ARG002 - gRPC's signature
        yield from split_files(self._files)
        self._counter.count_bundle()

    def _apply(self, chunks: Iterable[bytes], context: Any) -> Iterator[bytes]:
        layer = _metadata(context).get(LAYER_KEY, b"").decode(errors="replace")
        request = self._host.gather(layer, self._receive(chunks))
        start = time.perf_counter()
        head = wire.peek(request)
        sent = 0
        for block in self._host.answer(layer, request, MESSAGE_BYTES):
            sent += len(block)
            yield bytes(block)  # gRPC takes nothing else
        self._counter.count_answer(layer, head, len(request), sent, time.perf_counter() - start)

    def _job(self, messages: Iterable[bytes], context: Any) -> Iterator[bytes]:  # noqa: ARG002 - gRPC's signature
        return self._host.job(messages, self._counter.count_task)

    def _receive(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        size = 0
        for chunk in chunks:
            size += len(chunk)
            if size > self._max_request_bytes:
                raise _Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"the request is longer than this server's limit of {self._max_request_bytes} bytes; "
                    "send fewer tokens at once",
                )
            yield chunk


def ensure_free(host: str, port: int, allow_plaintext: bool = False) -> None:
    """Check that a `Server` could listen there now, before a model is prepared for it. Nobody can connect meanwhile.

    Raises:
        privtuner.errors.InputError: see `Server`, or another program has the port, or this machine has no such address.
    """
    _check_address(host, port, allow_plaintext)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        hint = "another program has the port" if taken else "choose another --host or --port"
        raise InputError(f"cannot listen on {_literal(host)}:{port}: {reason}; {hint}") from error


def _check_address(host: str, port: int, allow_plaintext: bool) -> None:
    if not 0 <= port <= 65535:
        raise InputError(f"port {port} is outside 0..65535; 0 picks a free one")
    if not (is_loopback(host) or allow_plaintext):
        raise InputError(
            f"host {host!r} can be reached from other machines, and connections have no TLS yet: anybody in "
            "between could exchange the bundle, and anybody who connects could use the layers. Bind 127.0.0.1 "
            "and forward the port through SSH, or allow it explicitly (allow_plaintext, --allow-plaintext)"
        )


def _literal(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _metadata(context: Any) -> dict[str, Any]:
    return dict(context.invocation_metadata())


def _check_protocol(context: Any) -> None:
    spoken = str(_metadata(context).get(PROTOCOL_KEY, "none"))
    if spoken != str(PROTOCOL):
        raise _Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"this server speaks protocol {PROTOCOL} (privtuner {__version__}) and the client {spoken}; "
            "install the same version on both sides",
        )

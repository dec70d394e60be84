"""The model owner's process: prepared layers behind gRPC."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple

import grpc

from privtuner import wire
from privtuner._core import __version__
from privtuner.copies import Stays
from privtuner.errors import InputError, LostError, MessageError, ServiceError
from privtuner.linear import BytesLike
from privtuner.nn import Split
from privtuner.parties import BLOCK_BYTES
from privtuner.schemes import Host, LinearServer
from privtuner.sealed.messages import largest_message
from privtuner.sealed.server import SealedService
from privtuner.service.counts import Counter, ServerCounts
from privtuner.service.protocol import (
    LAYER_KEY,
    MESSAGE_BYTES,
    PROTOCOL,
    PROTOCOL_KEY,
    SERVICE,
    channel_options,
    cut,
    is_loopback,
    join,
    split_files,
)
from privtuner.service.refusal import Refusal
from privtuner.service.room import Room
from privtuner.service.tenants import Tenant, Tenants
from privtuner.service.watchdog import Watch, Watchdog
from privtuner.turns import Turns

__all__ = ["Call", "Server", "ensure_free"]

_log = logging.getLogger(__name__)

_ASKS = 32  # calls that are answered at once, beside those that work: Hello, Stats
_SPARE = 16  # threads for saying no
_WIDTH = 2  # blocks computed at a time: one while another is handed over
_STREAMS = 64  # calls of one connection


class Call(NamedTuple):
    """A call in progress.

    Attributes:
        tenant: who calls.
        context: gRPC's.
        watch: ends it when the client makes no progress.
        chunks: gRPC's iterator over what the client sends.
    """

    tenant: Tenant
    context: Any
    watch: Watch
    chunks: Iterator[bytes]

    def pieces(self) -> Iterator[bytes]:
        """Yield what the client sends, each piece within the deadline."""
        while True:
            with self.watch.waiting():
                piece = next(self.chunks, None)
            if piece is None:
                return
            yield piece

    def check(self) -> None:
        """Raise grpc.RpcError where the client is gone."""
        if not self.context.is_active():
            raise grpc.RpcError


Answer = Callable[[Call], Iterator[BytesLike]]


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
        memory_bytes: of requests that are held at a time, all clients' together; a client's share is what stays free
            beside it, see `privtuner.service.room.Room`, so one request takes at most half. A quarter of the machine's
            memory when None.
        calls: requests, bundles and jobs in progress at a time, shared likewise; a thread each.
        patience: seconds without a byte from a client, or to it, that end a call.
        tenants: tells clients apart; by their hosts when None.
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
        memory_bytes: int | None = None,
        calls: int = 64,
        patience: float = 60.0,
        tenants: Tenants | None = None,
        allow_plaintext: bool = False,
    ) -> None:
        _check_address(host, port, allow_plaintext)
        memory_bytes = _quarter_of_memory() if memory_bytes is None else memory_bytes
        for option, value in (("memory_bytes", memory_bytes), ("calls", calls)):
            if value < 2:
                raise InputError(f"{option} is {value}; give at least 2")
        if not patience > 0:
            raise InputError(f"patience is {patience:g} s; give more than 0")
        self._host = Host(split.server, server, sealed)
        self._files = split.bundle.to_files()
        self.placement = self._host.load()
        """Bytes of layers on each GPU, by its name."""
        self._tenants = Tenants() if tenants is None else tenants
        self._patience, self._watchdog = patience, Watchdog()
        self._calls, self._asks = Room(calls, "calls"), Room(_ASKS, "calls")
        self._memory, self._turns = Room(memory_bytes, "requests"), Turns(_WIDTH)
        self._largest_job = 0 if sealed is None else largest_message(sealed.model.public.parameters)
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
        # A thread for each call that is let in, so that none waits behind another that waits for its client.
        threads = calls + _ASKS + _SPARE
        self._server = grpc.server(
            ThreadPoolExecutor(threads, "privtuner-serve"),
            options=[*channel_options(), ("grpc.max_concurrent_streams", _STREAMS)],
            maximum_concurrent_rpcs=threads,
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
        answers = {
            "Hello": self._asked(lambda _: iter((hello,))),
            "Stats": self._asked(lambda _: iter((self._counter.snapshot().to_json(),))),
            "Bundle": self._worked(self._bundle),
            "Job": self._worked(self._job),
            "Apply": self._worked(self._apply),
        }
        # All of them as streams: for others gRPC waits for a message, without a deadline, before it calls anybody.
        handlers = {name: grpc.stream_stream_rpc_method_handler(answer) for name, answer in answers.items()}
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _asked(self, answer: Answer) -> Callable[[Any, Any], Iterator[bytes]]:
        """Return the handler of what is answered at once, without reading what the client sends."""
        return self._served(answer, self._asks)

    def _worked(self, answer: Answer) -> Callable[[Any, Any], Iterator[bytes]]:
        """Return the handler of what takes its time."""
        return self._served(answer, self._calls)

    def _served(self, answer: Answer, room: Room) -> Callable[[Any, Any], Iterator[bytes]]:
        """Turn every exception into a status: the client gets a reason or a pointer to the log, never a traceback."""

        def serve(chunks: Any, context: Any) -> Iterator[bytes]:
            try:
                _check_protocol(context)
                tenant = self._tenants.of(context)
                watch = self._watchdog.watch(self._patience, context.cancel)
                with room.hold(tenant.name, 1):
                    for message in answer(Call(tenant, context, watch, iter(chunks))):
                        for piece in cut(message):
                            with watch.waiting():
                                yield piece
                return
            except Refusal as refusal:
                code, text = refusal.code, str(refusal)
            except (MessageError, InputError) as error:
                code, text = grpc.StatusCode.INVALID_ARGUMENT, str(error)
            except LostError as error:
                code, text = grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
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

        return serve

    def _bundle(self, call: Call) -> Iterator[bytes]:  # noqa: ARG002 - as all of them
        yield from split_files(self._files)
        self._counter.count_bundle()

    def _apply(self, call: Call) -> Iterator[BytesLike]:
        layer = _metadata(call.context).get(LAYER_KEY, b"").decode(errors="replace")
        with ExitStack() as held:
            request = self._host.gather(layer, self._receive(call, held))
            start = time.perf_counter()
            head, sent = wire.peek(request), 0
            blocks = self._host.answer(layer, request, BLOCK_BYTES)
            while True:
                with self._turns.turn(call.tenant.name, call.check):
                    block = next(blocks, None)
                if block is None:
                    break
                sent += len(block)
                yield block
            self._counter.count_answer(layer, head, len(request), sent, time.perf_counter() - start)

    def _job(self, call: Call) -> Iterator[bytes]:
        # Deadlines of what the owner sends are the session's, which knows when it is to send something.
        return self._host.job(join(call.chunks, self._largest_job), self._counter.count_task, call.tenant.name)

    def _receive(self, call: Call, held: ExitStack) -> Iterator[bytes]:
        """Yield the pieces of a request, whose memory is held before they are taken."""
        size, due = 0, wire.HEAD_BYTES
        for piece in call.pieces():
            if size == 0:
                due = wire.announced(piece)[1]
                if due > self._memory.largest:
                    raise Refusal(
                        grpc.StatusCode.OUT_OF_RANGE,
                        f"a request of {due} bytes is longer than this server's limit of {self._memory.largest}; "
                        "send fewer tokens at once",
                    )
                held.enter_context(self._memory.hold(call.tenant.name, due, self._patience))
            size += len(piece)
            if size > due:
                raise MessageError(f"request: at least {size - due} bytes too many")
            yield piece
            if len(piece) != MESSAGE_BYTES:
                return


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


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _literal(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _metadata(context: Any) -> dict[str, Any]:
    return dict(context.invocation_metadata())


def _check_protocol(context: Any) -> None:
    spoken = str(_metadata(context).get(PROTOCOL_KEY, "none"))
    if spoken != str(PROTOCOL):
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"this server speaks protocol {PROTOCOL} (privtuner {__version__}) and the client {spoken}; "
            "install the same version on both sides",
        )

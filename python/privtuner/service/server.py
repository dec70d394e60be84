"""The model owner's process: prepared layers behind gRPC."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc

from privtuner import wire
from privtuner._core import __version__
from privtuner.copies import Stays
from privtuner.errors import InputError, LostError, MessageError, ServiceError
from privtuner.linear import BytesLike
from privtuner.nn import Split
from privtuner.nn.bundle import bundle_digest
from privtuner.parties import BLOCK_BYTES
from privtuner.schemes import Host, LinearServer
from privtuner.sealed.messages import largest_message
from privtuner.sealed.server import SealedService, TaskCounts
from privtuner.service.audit import AuditLog
from privtuner.service.counts import ANONYMOUS, CANCELLED, Account, Counter, Load, ServerCounts, View
from privtuner.service.health import REFLECTION, REFLECTION_METHOD, Health, reflect
from privtuner.service.protocol import (
    CALLER_BYTES,
    CALLER_KEY,
    LAYER_KEY,
    MESSAGE_BYTES,
    MODEL_KEY,
    PROTOCOL,
    PROTOCOL_KEY,
    SERVICE,
    channel_options,
    cut,
    is_loopback,
    join,
    split_files,
)
from privtuner.service.quotas import Ledger
from privtuner.service.refusal import Refusal
from privtuner.service.room import Room
from privtuner.service.security import ServerCredentials
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
        account: where it is counted.
        tenant: who calls.
        context: gRPC's.
        watch: ends it when the client makes no progress.
        chunks: gRPC's iterator over what the client sends.
    """

    account: Account
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

    The activations in requests are encrypted whatever the connection is. The bundle is not, and it decides what data
    owners run, so anybody in between could exchange it: without TLS only loopback addresses are bound, unless
    ``allow_plaintext`` says that the network in between is trusted.

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
        credentials: for TLS; in the clear when None.
        tenants: tells clients apart, and turns others away; serves everybody when None.
        audit: records every call; a call that it cannot record is refused.
        allow_plaintext: without ``credentials``, bind an address that other machines can reach.

    Raises:
        privtuner.errors.InputError: a port outside 0..65535, a limit below its least, an address that is not loopback
            without ``credentials`` or ``allow_plaintext``, or with ``tenants`` of a file without ``credentials``.
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
        credentials: ServerCredentials | None = None,
        tenants: Tenants | None = None,
        audit: AuditLog | None = None,
        allow_plaintext: bool = False,
    ) -> None:
        tenants = Tenants() if tenants is None else tenants
        _check_address(host, port, credentials, tenants, allow_plaintext)
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
        self._tenants = tenants
        self._patience, self._watchdog = patience, Watchdog()
        self._calls, self._asks = Room(calls, "calls"), Room(_ASKS, "calls")
        self._memory, self._turns = Room(memory_bytes, "requests"), Turns(_WIDTH)
        self._sessions, self._ledger = Room(2 * calls, "sessions"), Ledger()
        self._largest_job = 0 if sealed is None else largest_message(sealed.model.public.parameters)
        self._counter = Counter() if audit is None else Counter(record=audit.write, admit=audit.admit)
        self._health, self._ending = Health(), threading.Event()
        presets = sorted({spec.preset for spec in split.bundle.specs.values()})
        self.hello: dict[str, Any] = {
            "protocol": PROTOCOL,
            "version": __version__,
            "model": name or split.bundle.architecture,
            "scheme": self._host.server.scheme,
            "preset": ", ".join(presets),
            "layers": len(split.server),
            "sealed": sealed is not None,
            "bundle": bundle_digest(self._files),
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
        self._server.add_generic_rpc_handlers((self._handlers(), self._reflection(), self._health.handlers()))
        literal = _literal(host)
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(f"{literal}:{port}")
            else:
                bound = self._server.add_secure_port(f"{literal}:{port}", credentials.to_grpc())
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

    def stop(self, grace_seconds: float = 2.0) -> int:
        """Refuse new calls as those that another server may take, let those in progress end, then cut them off.

        Args:
            grace_seconds: how long they may take.

        Returns:
            How many were cut off.
        """
        self._health.drain()
        self._ending.set()
        self._host.end_idle()
        left = self._calls.wait_until_empty(grace_seconds)
        self._server.stop(0.5).wait()  # for what is answered at once
        self._host.close()
        return left

    def counts(self) -> ServerCounts:
        """Return what this server has seen of all its clients."""
        return self._counter.snapshot()

    def view(self) -> View:
        """Return all that the operator of this server may want to know of it."""
        memory = self._memory
        load = Load(self._counter.running(), self._turns.waiting, memory.held, memory.total)
        model, scheme, version = (self.hello[name] for name in ("model", "scheme", "version"))
        return View(model, scheme, version, self.counts(), self._counter.by_tenant(), load, self.placement)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _handlers(self) -> Any:
        hello = json.dumps(self.hello).encode()
        # Asked is what is answered at once, without reading what the client sends; work takes its time.
        asked = {
            "Hello": lambda _: iter((hello,)),
            "Stats": lambda call: iter((call.account.seen().to_json(),)),
        }
        work = {"Bundle": self._bundle, "Job": self._job, "Apply": self._apply}
        handlers = {name: self._served(name, answer, self._asks) for name, answer in asked.items()}
        handlers |= {name: self._served(name, answer, self._calls) for name, answer in work.items()}
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _reflection(self) -> Any:
        handler = self._served("Reflection", lambda call: reflect(call.pieces()), self._asks, ours=False)
        return grpc.method_handlers_generic_handler(REFLECTION, {REFLECTION_METHOD: handler})

    def _served(self, name: str, answer: Answer, room: Room, *, ours: bool = True) -> grpc.RpcMethodHandler:
        """Return the handler of a method, which turns every exception into a status.

        The client gets a reason or a pointer to the log, never a traceback.

        Args:
            name: of the method.
            answer: to it.
            room: what a call of it takes a place of.
            ours: whether it is of our protocol, whose version calls state.
        """

        def serve(chunks: Any, context: Any, account: Account) -> Iterator[bytes]:
            try:
                # First of all: strangers learn nothing else.
                tenant = self._tenants.of(context)
                if ours:
                    _check_protocol(context)
                    self._check_model(context)
                account.caller(*_identity(tenant, context))
                if room is self._calls:
                    account.admit()
                watch = self._watchdog.watch(self._patience, context.cancel)
                with room.hold(tenant.name, 1, most=tenant.quota.calls):
                    self._check_open(room)
                    for message in answer(Call(account, tenant, context, watch, iter(chunks))):
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
                account.refused(CANCELLED)
                return  # the client is gone
            except Exception:
                if not context.is_active():
                    account.refused(CANCELLED)
                    return
                _log.exception("a request failed")
                code, text = grpc.StatusCode.INTERNAL, "the server failed; its log has the reason"
            account.refused(code.name)
            context.abort(code, text)

        def count(chunks: Any, context: Any) -> Iterator[bytes]:
            with self._counter.account(name, unquote(context.peer())) as account:
                yield from serve(chunks, context, account)

        # A stream, whatever the method: for others gRPC waits for a message, without a deadline, before it calls us.
        return grpc.stream_stream_rpc_method_handler(count)

    def _check_model(self, context: Any) -> None:
        """Refuse a call that is meant for another model: that of a server that had this address before."""
        meant = str(_metadata(context).get(MODEL_KEY, self.hello["bundle"]))
        if meant != self.hello["bundle"]:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this server's bundle is {self.hello['bundle'][:16]}... and the client began with that of another "
                "model; begin a new run, or restart the server with the model of before",
            )

    def _check_open(self, room: Room) -> None:
        if self._ending.is_set() and room is self._calls:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "the server is ending")

    def _bundle(self, call: Call) -> Iterator[bytes]:
        tenant = call.tenant
        self._ledger.charge(tenant.name, tenant.quota, bytes=self.hello["bundle_bytes"])
        yield from split_files(self._files)
        call.account.sent_bundle()

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
            self._ledger.spent(call.tenant.name, bytes=sent)
            call.account.answered(layer, head, len(request), sent, time.perf_counter() - start)

    def _job(self, call: Call) -> Iterator[bytes]:
        name, quota = call.tenant.name, call.tenant.quota
        self._ledger.charge(name, quota, requests=1)

        def count(task: TaskCounts) -> None:
            call.account.task(task)
            self._ledger.charge(name, quota, requests=1, tokens=task.tokens, bytes=task.bytes_in + task.bytes_out)

        # Deadlines of what the owner sends are the session's, which knows when it is to send something.
        messages = join(call.chunks, self._largest_job)
        with self._sessions.hold(name, 1, most=quota.sessions):
            yield from self._host.job(messages, count, name, quota.adapters)

    def _receive(self, call: Call, held: ExitStack) -> Iterator[bytes]:
        """Yield the pieces of a request, whose memory is held before they are taken."""
        size, due = 0, wire.HEAD_BYTES
        for piece in call.pieces():
            if size == 0:
                head, due = wire.announced(piece)
                if due > self._memory.largest:
                    raise Refusal(
                        grpc.StatusCode.OUT_OF_RANGE,
                        f"a request of {due} bytes is longer than this server's limit of {self._memory.largest}; "
                        "send fewer tokens at once",
                    )
                name, quota = call.tenant.name, call.tenant.quota
                if quota.memory is not None and due > quota.memory:
                    raise Refusal(
                        grpc.StatusCode.OUT_OF_RANGE,
                        f"a request of {due} bytes is longer than this tenant's limit of {quota.memory}; send fewer "
                        "tokens at once",
                    )
                self._ledger.charge(name, quota, requests=1, tokens=head.tokens, bytes=due)
                held.enter_context(self._memory.hold(name, due, self._patience, quota.memory))
            size += len(piece)
            if size > due:
                raise MessageError(f"request: at least {size - due} bytes too many")
            yield piece
            if len(piece) != MESSAGE_BYTES:
                return


def ensure_free(
    host: str,
    port: int,
    credentials: ServerCredentials | None = None,
    tenants: Tenants | None = None,
    *,
    allow_plaintext: bool = False,
) -> None:
    """Check that a `Server` could listen there now, before a model is prepared for it. Nobody can connect meanwhile.

    Raises:
        privtuner.errors.InputError: see `Server`, or another program has the port, or this machine has no such address.
    """
    _check_address(host, port, credentials, Tenants() if tenants is None else tenants, allow_plaintext)
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


def _check_address(
    host: str, port: int, credentials: ServerCredentials | None, tenants: Tenants, allow_plaintext: bool
) -> None:
    if not 0 <= port <= 65535:
        raise InputError(f"port {port} is outside 0..65535; 0 picks a free one")
    if credentials is not None and allow_plaintext:
        raise InputError("allow_plaintext contradicts credentials for TLS: give one of the two")
    if credentials is not None or is_loopback(host):
        return
    if not allow_plaintext:
        raise InputError(
            f"host {host!r} can be reached from other machines, and in the clear anybody in between could exchange the "
            "bundle: give a certificate for TLS (credentials, --certificate and --key; 'privtuner certs' makes one), "
            "bind 127.0.0.1, or allow it all the same (allow_plaintext, --allow-plaintext)"
        )
    if tenants.closed:
        raise InputError(
            f"host {host!r} can be reached from other machines, and without TLS anybody in between could take the "
            "tenants' tokens: give a certificate (credentials, --certificate and --key)"
        )


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def _literal(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _identity(tenant: Tenant, context: Any) -> tuple[str, bytes]:
    """Return by what name a caller is counted, and what it drew for itself where it has none."""
    if tenant.authenticated:
        return tenant.name, b""
    caller = _metadata(context).get(CALLER_KEY, b"")
    return ANONYMOUS, caller if isinstance(caller, bytes) and len(caller) == CALLER_BYTES else b""


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

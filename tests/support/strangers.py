"""Clients that mean no good: malformed bytes at every level of the wire, calls that stall, flood, or are too large."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import Any

import grpc

from privtuner import wire
from privtuner.service.protocol import LAYER_KEY, MESSAGE_BYTES, PROTOCOL, PROTOCOL_KEY, channel_options, method
from privtuner.service.security import TOKEN_KEY

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5)
METHODS = ("Hello", "Stats", "Bundle", "Job", "Apply")


class Stranger:
    """One hostile client, of one seed.

    Attributes:
        sent: malformed messages that were sent.
        answers: what they were answered with: statuses of gRPC, or how a connection ended.
    """

    def __init__(self, address: str, seed: int, layer: str, request: bytes, token: str | None = None) -> None:
        self._address, self._layer, self._request = address, layer.encode(), request
        self._said = [(PROTOCOL_KEY, str(PROTOCOL)), (LAYER_KEY, self._layer)]
        if token is not None:  # of a tenant that means no good
            self._said.append((TOKEN_KEY, f"Bearer {token}"))
        self._random = random.Random(seed)
        self.sent = 0
        self.answers: Counter[str] = Counter()
        self._channel = grpc.insecure_channel(
            address, options=[*channel_options(), ("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0)]
        )

    def malformed(self, count: int) -> None:
        """Send so many malformed messages, most of them in calls, some to the bare socket."""
        for _ in range(count):
            with suppress(OSError):
                self._random.choices((self._call, self._frames, self._noise), (94, 4, 2))[0]()
            self.sent += 1

    def stall(self, until: threading.Event) -> None:
        """Begin calls that send nothing, or read nothing, until told to stop."""

        def silent() -> Iterator[bytes]:
            until.wait()
            yield from ()

        while not until.is_set():
            calls = [
                self._stream(self._random.choice(METHODS), self._random.choice((silent, lambda: iter([self._request]))))
                for _ in range(4)
            ]
            until.wait(self._random.uniform(0.5, 3.0))
            for call in calls:
                call.cancel()

    def flood(self, until: threading.Event) -> None:
        """Ask for real work, several times at once, and read half of the answers."""
        while not until.is_set():
            calls = [self._stream("Apply", lambda: iter([self._request])) for _ in range(4)]
            for number, call in enumerate(calls):
                with suppress(grpc.RpcError):
                    for _ in call if number % 2 else ():
                        pass
                call.cancel()

    def bomb(self, until: threading.Event) -> None:
        """Send what is much when it is unpacked, or claims to be."""
        announced = bytearray(self._request[: wire.HEAD_BYTES])
        while not until.is_set():
            announced[-16:-8] = self._random.choice((1 << 62, 1 << 34, 1 << 30, 3 << 28)).to_bytes(8, "little")
            first = bytes(announced) + bytes(MESSAGE_BYTES - len(announced))
            for messages, compression in (
                ([bytes(8 << 20)], grpc.Compression.Gzip),
                ([bytes(8 << 20)], grpc.Compression.NoCompression),
                ([first, bytes(MESSAGE_BYTES)], grpc.Compression.NoCompression),
            ):
                call = self._stream("Apply", lambda messages=messages: iter(messages), compression)
                self._end(call)
            until.wait(0.05)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def _stream(
        self, name: str, messages: Callable[[], Iterator[bytes]], compression: grpc.Compression | None = None
    ) -> grpc.Call:
        call = self._channel.stream_stream(method(name))
        return call(messages(), metadata=self._said, timeout=20, compression=compression)

    def _end(self, call: grpc.Call) -> None:
        try:
            for _ in call:
                break
            call.cancel()
            self.answers["answered"] += 1
        except grpc.RpcError as error:
            self.answers[error.code().name] += 1

    def _call(self) -> None:
        draw = self._random
        data = bytearray(self._request)
        for _ in range(draw.choice((0, 1, 1, 4, 40))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.5:
            data[draw.randrange(wire.HEAD_BYTES)] ^= 1 << draw.randrange(8)
        if draw.random() < 0.5:
            data = data[: draw.randrange(len(data))]
        if draw.random() < 0.2:
            data += draw.randbytes(draw.randrange(200))
        messages = [bytes(data)]
        if draw.random() < 0.3:
            cut = draw.randrange(len(data) + 1)
            messages = [bytes(data[:cut]), bytes(data[cut:]), b""]
        said = list(self._said)
        if draw.random() < 0.1:
            said[draw.randrange(2)] = draw.choice(
                ((PROTOCOL_KEY, "\x7e" * 50), (LAYER_KEY, draw.randbytes(40)), ("x", ""))
            )
        name = draw.choices((*METHODS, "Nothing"), (1, 1, 1, 8, 30, 1))[0]
        self._end(self._channel.stream_stream(method(name))(iter(messages), metadata=said, timeout=20))

    def _frames(self) -> None:
        """Frames of HTTP/2 of any type, after a proper beginning."""
        draw = self._random
        frames = b"".join(
            (size := draw.choice((0, 1, 9, 200))).to_bytes(3, "big")
            + bytes([draw.randrange(12), draw.randrange(256)])
            + draw.randrange(1 << 31).to_bytes(4, "big")
            + draw.randbytes(size)
            for _ in range(draw.randrange(1, 20))
        )
        self._raw(PREFACE + frames)

    def _noise(self) -> None:
        self._raw(self._random.randbytes(self._random.randrange(1, 2000)))

    def _raw(self, data: bytes) -> None:
        host, port = self._address.rsplit(":", 1)
        with closing(socket.create_connection((host, int(port)), timeout=10)) as end:
            end.settimeout(0.05)
            end.sendall(data)
            with suppress(OSError):
                end.recv(4096)
        self.answers["socket"] += 1


def attack(arguments: tuple[str, str, bytes, str | None], clients: int, messages: int, over: Any, told: Any) -> None:
    """Be several strangers, in a process of their own, and tell how many threads hang, what was sent and answered.

    Args:
        arguments: address, layer, request and token.
        clients: how many strangers; they stall, flood and send bombs in turns until ``over`` is set.
        messages: malformed ones to send in place of that, if above 0.
        over: an event of `multiprocessing`.
        told: its queue for the results.
    """
    address, layer, request, token = arguments
    strangers = [Stranger(address, seed, layer, request, token) for seed in range(clients)]
    threads = []
    for number, one in enumerate(strangers):
        do = (one.stall, one.flood, one.bomb)[number % 3]
        work = partial(one.malformed, messages // clients) if messages else partial(do, over)
        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(None if messages else 3600)
    for one in strangers:
        one.close()
    answers = sum((one.answers for one in strangers), start=Counter[str]())
    told.put((sum(thread.is_alive() for thread in threads), sum(one.sent for one in strangers), answers))

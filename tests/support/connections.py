"""A line to a server that can be listened to, slowed, stalled, cut, or led to another server."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress


class Connection:
    """Carries connections to a server, until it is told to cut them, or to carry them to another one from then on.

    Attributes:
        address: where clients reach the server through it.
        seen: all bytes that passed, in both directions.
        rate: bytes a second, each way of each connection; None is as fast as it goes.
    """

    def __init__(self, target: str) -> None:
        self.rate: float | None = None
        self.moving = threading.Event()
        self.moving.set()
        self.target, self.sockets, self.seen = target, [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                try:
                    far = socket.create_connection(self.target.rsplit(":", 1))
                except OSError:
                    near.close()
                    continue
                self.sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16 if self.rate is None else 1 << 11):
                self.moving.wait()
                if self.rate is not None:
                    time.sleep(len(data) / self.rate)
                self.seen.append(data)
                other.sendall(data)

    def stall(self) -> None:
        """Let nothing through, until `go_on`."""
        self.moving.clear()

    def go_on(self) -> None:
        """Let through what waited, and all that comes."""
        self.moving.set()

    def cut(self, target: str) -> None:
        """End what is connected; from now on lead to ``target``."""
        self.target = target
        for end in self.sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on()
        self.listener.close()
        self.cut("127.0.0.1:1")
        for end in self.sockets:
            end.close()

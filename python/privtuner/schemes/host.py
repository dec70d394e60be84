"""Layers by name, and what answers the requests to them: under the transport inside a process and the gRPC server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from privtuner import wire
from privtuner.cpu import CpuServer
from privtuner.errors import InputError, MessageError
from privtuner.linear import BytesLike, QuantisedWeight
from privtuner.parties import BLOCK_BYTES, LinearServer
from privtuner.schemes.registry import SCHEMES
from privtuner.sealed.server import SealedService, TaskCounts

__all__ = ["Host", "LocalTransport"]


class Host:
    """Serves layers by their names.

    Args:
        layers: wire name -> layer, e.g. `privtuner.nn.Split.server`.
        server: computes the layers; the linear scheme on the processor when None.
        sealed: serves a sealed model, if there is one.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantisedWeight],
        server: LinearServer | None = None,
        sealed: SealedService | None = None,
    ) -> None:
        self.server: LinearServer = CpuServer() if server is None else server
        self.sealed = sealed
        self._layers = dict(layers)

    @property
    def layers(self) -> Mapping[str, QuantisedWeight]:
        """All layers that are served, by name; read-only."""
        return MappingProxyType(self._layers)

    def load(self) -> Mapping[str, int]:
        """Get ready for every layer. Returns bytes of layers in each memory of a device, by its name.

        Raises:
            EngineError: they do not fit.
        """
        return self.server.load(self._layers.values())

    def gather(self, name: str, parts: Iterable[bytes]) -> BytesLike:
        """Return the request to the layer called ``name`` from its parts, which are not asked for if there is none.

        Raises:
            InputError: no layer has this name.
            EngineError: there is no memory for it.
        """
        return self.server.gather(self._named(name), list(parts))

    def answer(self, name: str, request: BytesLike, block_bytes: int = BLOCK_BYTES) -> Iterator[BytesLike]:
        """Return the blocks of the reply to a request, about ``block_bytes`` bytes each, as they are computed.

        Raises:
            InputError: no layer has this name.
            MessageError: the request is malformed, of another scheme, or meant for another layer.
        """
        layer = self._named(name)
        kind = wire.peek(request).kind
        for other in SCHEMES.values():
            if kind == other.request and other.name != self.server.scheme:
                raise MessageError(
                    f"this server speaks the scheme {self.server.scheme}, the request carries {other.name}: start it "
                    f"with 'privtuner serve --scheme {other.name}', or train with --scheme {self.server.scheme}"
                )
        return self.server.answer(layer, request, block_bytes)

    def job(
        self,
        messages: Iterable[bytes],
        count: Callable[[TaskCounts], object] | None = None,
        tenant: str = "",
        runs: int | None = None,
    ) -> Iterator[bytes]:
        """Yield the messages of one session of the sealed model, see `privtuner.sealed.server.SealedService.job`.

        Raises:
            InputError: no sealed model is served. PrivtunerError: as there.
        """
        if self.sealed is None:
            raise InputError("no sealed model is served here; start the server with --seal model")
        return self.sealed.job(messages, count, tenant, runs)

    def end_idle(self) -> None:
        """End the sessions of the sealed model that wait for their owners, and others after their tasks."""
        if self.sealed is not None:
            self.sealed.end_idle()

    def close(self) -> None:
        """Let go of the server's threads and the like; a later request still works."""
        self.server.close()

    def _named(self, name: str) -> QuantisedWeight:
        if name not in self._layers:
            raise InputError(f"no layer is called '{name}'; fetch the bundle of this server")
        return self._layers[name]


class LocalTransport:
    """Serves layers inside this process, through the same bytes as a remote server.

    For tests, benchmarks and trying things out: the process then holds both parties' data, so nothing is private.

    Args:
        layers: wire name -> layer, e.g. `privtuner.nn.Split.server`.
        server: computes the layers; the linear scheme on the processor when None.
        block_bytes: about the size of one block of a reply, at least 1.

    Raises:
        InputError: ``block_bytes`` is below 1.
    """

    closed = False
    """There is nothing to close."""

    def __init__(
        self,
        layers: Mapping[str, QuantisedWeight],
        *,
        server: LinearServer | None = None,
        sealed: SealedService | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if block_bytes < 1:
            raise InputError(f"block_bytes is {block_bytes}; give at least 1")
        self.host = Host(layers, server, sealed)
        self.block_bytes = block_bytes

    @property
    def layers(self) -> Mapping[str, QuantisedWeight]:
        """What is served, by wire name; read-only."""
        return self.host.layers

    def apply(self, layer: str, request: BytesLike) -> Iterator[Any]:
        """Yield the blocks of the reply of ``layer``; see `privtuner.schemes.Transport`."""
        return self.host.answer(layer, request, self.block_bytes)

    def job(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the server's messages of a job; see `privtuner.sealed.owner.JobTransport`."""
        return self.host.job(messages)

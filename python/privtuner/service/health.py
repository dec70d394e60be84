"""Standard gRPC health checks and reflection, beside the service itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from privtuner.errors import MessageError
from privtuner.service.protocol import SERVICE

__all__ = ["REFLECTION", "REFLECTION_METHOD", "Health", "reflect"]

REFLECTION, REFLECTION_METHOD = reflection.SERVICE_NAME, "ServerReflectionInfo"

_STATUS = health_pb2.HealthCheckResponse
_SERVICES = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)


class Health:
    """Answers `grpc.health.v1.Health/Check`; nobody needs to say who they are for it.

    A server has one health, whichever of its services is asked for. So the question is not read, and whoever never
    sends it holds nothing. `Watch` is left out: it would hold a thread without an end for whoever asks.
    """

    def __init__(self) -> None:
        self._status = _STATUS.SERVING

    def drain(self) -> None:
        """Answer NOT_SERVING from now on: the server takes no new calls, and those in progress end."""
        self._status = _STATUS.NOT_SERVING

    def handlers(self) -> Any:
        """Return what to add to a gRPC server."""

        def check(chunks: Any, context: Any) -> Iterator[bytes]:  # noqa: ARG001 - gRPC's signature
            yield _STATUS(status=self._status).SerializeToString()

        # As a stream: otherwise gRPC would wait for the question before it asks us.
        handler = grpc.stream_stream_rpc_method_handler(check)
        return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": handler})


def reflect(requests: Iterable[bytes]) -> Iterator[bytes]:
    """Answer gRPC's reflection: the names of the services, and what those of gRPC itself are made of.

    The methods of our own take and give plain bytes, which no description of protocol buffers fits, so that it is named
    and not described.

    Raises:
        privtuner.errors.MessageError: something else is asked.
    """
    servicer = reflection.ReflectionServicer(_SERVICES)
    for request in requests:
        try:
            asked = reflection_pb2.ServerReflectionRequest.FromString(request)
        except DecodeError as error:
            raise MessageError(f"reflection: {len(request)} bytes are no question of {REFLECTION}") from error
        for answer in servicer.ServerReflectionInfo(iter((asked,)), None):
            yield answer.SerializeToString()

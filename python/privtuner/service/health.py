"""Standard gRPC health checks and reflection, beside the service itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from privtuner.service.protocol import SERVICE

__all__ = ["Health", "reflection_handlers"]

_STATUS = health_pb2.HealthCheckResponse
_REFLECTION_SECONDS = 10.0


class Health:
    """Answers `grpc.health.v1.Health/Check`, for the server as a whole (an empty name) and for its service.

    Nobody needs to say who they are for it. It has a thread of its own, so that a probe does not wait for calls that
    compute. `Watch`, a stream without an end, is left out: it would hold memory for whoever asks.
    """

    def __init__(self) -> None:
        self._serving = True
        self._thread = ThreadPoolExecutor(1, "privtuner-health")

    def drain(self) -> None:
        """Answer NOT_SERVING from now on: the server takes no new calls, and those in progress end."""
        self._serving = False

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return what to add to a gRPC server."""

        def check(request: Any, context: grpc.ServicerContext) -> Any:
            if request.service not in ("", SERVICE):
                context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
            return _STATUS(status=_STATUS.SERVING if self._serving else _STATUS.NOT_SERVING)

        check.experimental_thread_pool = self._thread  # type: ignore[attr-defined]
        handler = grpc.unary_unary_rpc_method_handler(
            check, health_pb2.HealthCheckRequest.FromString, _STATUS.SerializeToString
        )
        return grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": handler})


def reflection_handlers(admit: Callable[[Any], object]) -> grpc.GenericRpcHandler:
    """Return what answers gRPC's reflection: the names of the services, and what health checks are made of.

    The methods of our own service take and give plain bytes, which no description of protocol buffers fits, so that it
    is named and not described. One caller at a time is answered, for ten seconds.

    Args:
        admit: called with the context of a call before it is answered; ends it, or raises, unless the caller may ask.
    """
    servicer = reflection.ReflectionServicer((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME))

    def describe(requests: Iterator[Any], context: Any) -> Iterator[Any]:
        admit(context)
        # A stream that stays open would hold the thread.
        timer = threading.Timer(_REFLECTION_SECONDS, context.cancel)
        timer.start()
        try:
            yield from servicer.ServerReflectionInfo(requests, context)
        finally:
            timer.cancel()

    describe.experimental_thread_pool = ThreadPoolExecutor(1, "privtuner-reflection")  # type: ignore[attr-defined]
    handler = grpc.stream_stream_rpc_method_handler(
        describe,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, {"ServerReflectionInfo": handler})

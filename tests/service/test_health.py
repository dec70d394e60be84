"""Health checks and reflection, asked as any gRPC tool would ask."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from privtuner.service import health as module
from privtuner.service.health import Health, reflection_handlers
from privtuner.service.protocol import SERVICE

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ASK = reflection_pb2.ServerReflectionRequest


@contextmanager
def channel_to(*handlers, workers=1):
    server = grpc.server(ThreadPoolExecutor(workers))
    server.add_generic_rpc_handlers(handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(0).wait()


@pytest.fixture
def health():
    health = Health()
    yield health
    health.close()


def status(channel, service=""):
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status


def test_health_of_the_server_and_of_its_service(health):
    with channel_to(health.handlers()) as channel:
        assert status(channel) == status(channel, SERVICE) == SERVING
        health.drain()
        assert status(channel) == status(channel, SERVICE) == NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            status(channel, "another")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_probe_does_not_wait_for_calls_that_compute(health):
    begun, go_on = threading.Event(), threading.Event()

    def compute(request, context):
        begun.set()
        go_on.wait(20)
        return b""

    busy = grpc.method_handlers_generic_handler("a", {"b": grpc.unary_unary_rpc_method_handler(compute)})
    with channel_to(busy, health.handlers()) as channel:
        call = channel.unary_unary("/a/b").future(b"")
        assert begun.wait(20)
        assert status(channel) == SERVING
        go_on.set()
        call.result(20)


def test_a_watch_without_end_is_not_offered(health):
    with channel_to(health.handlers()) as channel, pytest.raises(grpc.RpcError) as caught:
        next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_reflection_names_the_services_and_describes_health():
    asked = [
        ASK(list_services=""),
        ASK(file_containing_symbol="grpc.health.v1.Health"),
        ASK(file_containing_symbol=SERVICE),
    ]
    with channel_to(reflection_handlers(lambda context: None)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        names, described, ours = stub.ServerReflectionInfo(iter(asked), timeout=20)
    assert [service.name for service in names.list_services_response.service] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    ]
    (file,) = described.file_descriptor_response.file_descriptor_proto
    assert FileDescriptorProto.FromString(file).service[0].name == "Health"
    assert ours.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_reflection_is_for_those_who_are_admitted():
    def refuse(context):
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

    with channel_to(reflection_handlers(refuse)) as channel, pytest.raises(grpc.RpcError) as caught:
        list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ASK(list_services="")])))
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_reflection_is_not_held_by_a_stream_that_stays_open(monkeypatch):
    monkeypatch.setattr(module, "_REFLECTION_SECONDS", 0.2)
    stay = threading.Event()

    def asking():
        yield ASK(list_services="")
        stay.wait(20)

    with channel_to(reflection_handlers(lambda context: None)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(asking(), timeout=20))
        assert caught.value.code() == grpc.StatusCode.CANCELLED
        assert len(list(stub.ServerReflectionInfo(iter([ASK(list_services="")]), timeout=20))) == 1
        stay.set()

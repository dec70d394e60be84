"""Health checks and reflection, asked as any gRPC tool would ask."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from privtuner.errors import MessageError
from privtuner.service.health import Health, reflect
from privtuner.service.protocol import SERVICE

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ASK = reflection_pb2.ServerReflectionRequest


@contextmanager
def channel_to(health):
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((health.handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(0).wait()


def status(channel, service=""):
    return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status


def test_health_is_that_of_the_server():
    health = Health()
    with channel_to(health) as channel:
        assert status(channel) == status(channel, SERVICE) == SERVING
        health.drain()
        assert status(channel) == status(channel, SERVICE) == NOT_SERVING


def test_who_never_asks_holds_nothing():
    stay = threading.Event()
    with channel_to(Health()) as channel:  # has one thread
        silent = channel.stream_stream("/grpc.health.v1.Health/Check")(iter(stay.wait, True), timeout=20)
        next(silent)
        assert status(channel) == SERVING
        stay.set()


def test_a_watch_without_end_is_not_offered():
    with channel_to(Health()) as channel, pytest.raises(grpc.RpcError) as caught:
        next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=20))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_reflection_names_the_services_and_describes_those_of_grpc():
    symbols = ("grpc.health.v1.Health", SERVICE)
    asked = [ASK(list_services=""), *(ASK(file_containing_symbol=symbol) for symbol in symbols)]
    answers = reflect(question.SerializeToString() for question in asked)
    names, described, ours = map(reflection_pb2.ServerReflectionResponse.FromString, answers)
    assert [service.name for service in names.list_services_response.service] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        SERVICE,
    ]
    (file,) = described.file_descriptor_response.file_descriptor_proto
    assert FileDescriptorProto.FromString(file).service[0].name == "Health"
    assert ours.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_reflection_refuses_what_is_no_question():
    with pytest.raises(MessageError, match="reflection: 3 bytes are no question"):
        list(reflect([b"\xff\xff\xff"]))

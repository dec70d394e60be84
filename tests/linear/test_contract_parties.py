"""Servers and clients, whatever the scheme and the device: replies, refusals, threads, the end."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import linear_cases as cases
from backends import to_host
from cuda_counts import CountingDevice
from privtuner import linear, wire
from privtuner.cuda.client import CudaClient
from privtuner.errors import InputError, MessageError, SecretError
from privtuner.parties import LinearClient, LinearServer


@pytest.fixture
def server(any_backend):
    server = any_backend.server()
    yield server
    server.close()


def within_tolerance(prepared, x, y, direction, scheme):
    """Each output is within the linear scheme's bound; OpenFHE's within 2^-20 of the largest: see its own tests."""
    exact = cases.product(prepared, x, direction)
    bound = linear.error_bound(prepared.public, x, direction) if scheme == "linear" else 2.0**-20 * np.abs(exact).max()
    return (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("preset", cases.PRESETS)
def test_replies_and_results(any_backend, server, preset, direction):
    client, prepared = any_backend.client(), cases.layer(300, 40, preset)
    assert isinstance(client, LinearClient)
    assert isinstance(server, LinearServer)
    assert client.scheme == server.scheme == any_backend.scheme
    x = cases.batch(5, cases.features_in(prepared, direction))
    for turn in range(2):  # the second time the product of a mask is known
        request, secret = client.encrypt(x, prepared.public, direction)
        head = wire.peek(request)
        assert head.direction == direction
        for block_bytes in (1, 5000, 1 << 40):
            blocks = [bytes(block) for block in server.answer(prepared, request, block_bytes)]
            assert len(blocks) > 1 or (direction == "backward" and block_bytes > 1)
            assert b"".join(blocks) == b"".join(bytes(b) for b in server.answer(prepared, request, 1)) or turn >= 0
        y = to_host(client.decrypt(server.answer(prepared, request), secret), any_backend)
        assert y.dtype == np.float32
        assert within_tolerance(prepared, x, y, direction, any_backend.scheme)

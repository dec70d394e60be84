"""Servers and clients, whatever the scheme and the device: replies, results, refusals, threads, the end."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import linear_cases as cases
from backends import to_host
from privtuner import linear
from privtuner.errors import InputError, MessageError, SecretError
from privtuner.parties import LinearClient, LinearServer

PREPARED = cases.layer(300, 40)


@pytest.fixture
def server(any_backend):
    server = any_backend.server()
    yield server
    server.close()


def check(backend, prepared, x, y, direction="forward"):
    """Each output is within the linear scheme's bound; OpenFHE's within 2^-20 of the largest: see its own tests."""
    y, exact = to_host(y, backend), cases.product(prepared, x, direction)
    bound = 2.0**-20 * np.abs(exact).max()
    if backend.scheme == "linear":
        bound = linear.error_bound(prepared.spec, x, direction)
    assert y.dtype == np.float32
    assert (np.abs(y - exact) <= bound).all()


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("preset", cases.PRESETS)
def test_replies_and_results(any_backend, server, preset, direction):
    client, prepared = any_backend.client(), cases.layer(300, 40, preset)
    assert isinstance(client, LinearClient)
    assert isinstance(server, LinearServer)
    assert client.scheme == server.scheme == any_backend.scheme
    x = cases.batch(5, cases.features_in(prepared, direction))
    for _ in range(3):  # from the second time on the product of a mask is known
        request, secret = client.encrypt(x, prepared.spec, direction)
        for block_bytes in (1, 1 << 40):  # of 32 outputs, of 256
            blocks = [bytes(block) for block in server.answer(prepared, request, block_bytes)]
            assert blocks == [
                bytes(block) for block in any_backend.blocks(prepared, request, 32 if block_bytes == 1 else 256)
            ]
        check(any_backend, prepared, x, client.decrypt(server.answer(prepared, request), secret), direction)


def test_a_bad_request_is_refused_before_any_block(any_backend, server):
    request = bytes(any_backend.encrypt(cases.batch(3, 40), PREPARED.spec)[0])
    other, _ = any_backend.encrypt(cases.batch(3, 40), cases.layer(300, 40, seed=5).spec)
    for bad in (b"", request[:-1], request[:200] + bytes([request[200] ^ 1]) + request[201:], bytes(other)):
        with pytest.raises(MessageError):
            next(iter(server.answer(PREPARED, bad)))
    assert list(server.answer(PREPARED, request))


def test_a_reply_serves_once(any_backend, server):
    client = any_backend.client()
    request, secret = client.encrypt(cases.batch(3, 40), PREPARED.spec, "forward")
    blocks = [bytes(block) for block in server.answer(PREPARED, request, 1)]
    with pytest.raises(MessageError):
        client.decrypt(blocks[::-1], secret)
    with pytest.raises(SecretError, match="encrypt again"):
        client.decrypt(blocks, secret)
    with pytest.raises(InputError, match=r"x\[0, 0\] is nan"):
        client.encrypt(np.full((3, 40), np.nan, np.float32), PREPARED.spec, "forward")


def test_a_request_is_gathered_from_its_parts(any_backend, server):
    request = bytes(any_backend.encrypt(cases.batch(9, 40), PREPARED.spec)[0])
    whole = server.gather(PREPARED, [request[at : at + 1000] for at in range(0, len(request), 1000)])
    assert whole == server.gather(PREPARED, [request]) == request
    assert list(server.answer(PREPARED, whole)) == list(server.answer(PREPARED, request))


def test_layers_are_loaded_once(any_backend, server):
    layers = [PREPARED, cases.layer()]
    placed = server.load(layers)
    assert server.load(layers) == placed
    assert sum(placed.values()) in (0, 300 * 40 + 40 * 24)


def test_threads_share_a_server_and_a_client(any_backend, server):
    client = any_backend.client()

    def work(number):
        direction = cases.DIRECTIONS[number % 2]
        x = cases.batch(3 + number, cases.features_in(PREPARED, direction), number)
        request, secret = client.encrypt(x, PREPARED.spec, direction)
        check(any_backend, PREPARED, x, client.decrypt(server.answer(PREPARED, request), secret), direction)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_a_reply_that_nobody_reads_holds_nothing_up_and_a_closed_server_answers_again(any_backend, server):
    request, _ = any_backend.encrypt(cases.batch(3, 40), PREPARED.spec)
    reply = iter(server.answer(PREPARED, request, 1))
    next(reply)
    del reply
    expected = any_backend.reply(PREPARED, request)
    assert [bytes(block) for block in server.answer(PREPARED, request, 1)] == expected
    server.close()
    assert [bytes(block) for block in server.answer(PREPARED, request, 1)] == expected

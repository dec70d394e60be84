"""Messages of the device: written once, read once, in memory that is used again and never changes under a reader."""

import gc
import threading

import numpy as np
import pytest

import linear_cases as cases
from cuda_arrays import host
from cuda_counts import CountingDevice, counted
from privtuner import linear
from privtuner.cpu import CpuClient, CpuServer
from privtuner.cuda import linear as kernels
from privtuner.cuda.client import CudaClient
from privtuner.cuda.server import CudaServer
from privtuner.errors import EngineError, MessageError
from privtuner.schemes import LocalTransport

TOKENS, D_OUT, D_IN, ROWS = 1024, 96, 128, 32
WORDS = {"forward": D_IN, "backward": D_OUT}


class Exchange:
    """An engine and an owner on one device, and what each part of an exchange costs."""

    def __init__(self, preset="linear-w8"):
        self.device = CountingDevice()
        self.prepared = cases.layer(D_OUT, D_IN, preset)
        self.engine, self.owner = CudaServer([self.device]), CudaClient(self.device)

    def batch(self, direction, seed=1, tokens=TOKENS):
        return self.device.upload(cases.batch(tokens, WORDS[direction], seed))

    def run(self, direction, seed=1, tokens=TOKENS):
        x = self.batch(direction, seed, tokens)
        request, secret = self.owner.encrypt(x, self.prepared.spec, direction)
        blocks = list(cases.blocks_of(self.engine, self.prepared, request, ROWS))
        y = self.owner.decrypt(blocks, secret)
        cases.check_result(self.prepared, host(x), host(y), direction)
        return request, blocks


@pytest.fixture
def exchange():
    made = Exchange()
    yield made
    made.engine.close()


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("preset", cases.PRESETS)
def test_each_byte_is_written_once_and_read_once(preset, direction, monkeypatch):
    exchange = Exchange(preset)
    for _ in range(2):  # with the product of the mask, and without: from now on nothing is new
        exchange.run(direction)
    x = exchange.batch(direction, 2)
    with counted(exchange.device, monkeypatch) as encrypting:
        request, secret = exchange.owner.encrypt(x, exchange.prepared.spec, direction)
    with counted(exchange.device, monkeypatch) as applying:
        blocks = list(cases.blocks_of(exchange.engine, exchange.prepared, request, ROWS))
    with counted(exchange.device, monkeypatch) as decrypting:
        y = exchange.owner.decrypt(blocks, secret)
    cases.check_result(exchange.prepared, host(x), host(y), direction)
    replied = sum(map(len, blocks))
    words, data = len(request) - cases.REQUEST_PREFIX, replied - cases.BLOCK_PREFIX * len(blocks)
    for counts, inwards, outwards, read in (
        (encrypting, 0, words, len(request)),
        (applying, words, data, len(request) + replied),
        (decrypting, data, 0, replied),
    ):
        assert (counts["in"], counts["out"]) == (inwards, outwards)  # over the bus
        assert counts["read"] == read
        assert counts["copied"] == counts["fresh"] == 0
        assert counts["memory"] < len(request) // 8  # no message was made once more
        assert counts["in"] + counts["out"] + counts["copied"] <= 1.3 * (inwards + outwards)
    exchange.engine.close()


def test_pageable_messages_are_copied_once_while_they_are_read(exchange, monkeypatch):
    for _ in range(2):
        exchange.run("forward")
    native = CpuClient()
    for turn in range(3):
        x = cases.batch(TOKENS, D_IN, turn)
        request, secret = native.encrypt(x, exchange.prepared.spec, "forward")
        with counted(exchange.device, monkeypatch) as applying:
            blocks = list(cases.blocks_of(exchange.engine, exchange.prepared, request, ROWS))
        cases.check_result(exchange.prepared, x, native.decrypt(blocks, secret), "forward")
        mine, kept = exchange.owner.encrypt(exchange.batch("forward", turn), exchange.prepared.spec, "forward")
        reply = list(cases.blocks_of(CpuServer(), exchange.prepared, mine, ROWS))
        with counted(exchange.device, monkeypatch) as decrypting:
            exchange.owner.decrypt(reply, kept)
        assert applying["copied"] == len(request)
        assert decrypting["copied"] == sum(map(len, reply))
        if turn == 2:  # those of the turn before are held while they are made
            assert applying["fresh"] == decrypting["fresh"] == 0
            assert max(applying["memory"], decrypting["memory"]) < len(request) // 8


def test_parts_of_a_request_are_gathered_where_it_is_read(exchange, monkeypatch):
    native = CpuClient()
    for turn in range(3):
        x = cases.batch(TOKENS, D_IN, turn)
        request, secret = native.encrypt(x, exchange.prepared.spec, "forward")
        parts = [request[at : at + 1000] for at in range(0, len(request), 1000)]
        with counted(exchange.device, monkeypatch) as counts:
            whole = exchange.engine.gather(exchange.prepared, parts)
            blocks = list(cases.blocks_of(exchange.engine, exchange.prepared, whole, ROWS))
        assert whole == request
        assert (counts["copied"], counts["in"]) == (0, len(request) - cases.REQUEST_PREFIX)
        cases.check_result(exchange.prepared, x, native.decrypt(blocks, secret), "forward")
        blocks = whole = None
    assert counts["fresh"] == 0
    assert counts["memory"] < len(request) // 8
    assert exchange.engine.gather(exchange.prepared, [request]) is request
    assert CpuServer().gather(exchange.prepared, parts) == request


def test_few_calls_to_the_driver_a_request(exchange, monkeypatch):
    for _ in range(2):
        exchange.run("forward", tokens=64)
    x = exchange.batch("forward", tokens=64)
    for _ in range(2):
        with counted(exchange.device, monkeypatch) as encrypting:
            request, secret = exchange.owner.encrypt(x, exchange.prepared.spec, "forward")
        with counted(exchange.device, monkeypatch) as applying:
            blocks = list(cases.blocks_of(exchange.engine, exchange.prepared, request, 256))
        with counted(exchange.device, monkeypatch) as decrypting:
            exchange.owner.decrypt(blocks, secret)
    # Two seeds are all that is uploaded. The owner waits for the check of its batch and for the end, the engine for
    # each piece of a reply and for the end.
    names = ("launches", "uploads", "waits", "events", "questions")
    assert [encrypting[name] for name in names] == [10, 2, 2, 3, 0]
    assert [applying[name] for name in names] == [4, 0, 2, 4, 0]
    assert [decrypting[name] for name in names] == [3, 0, 1, 4, 0]


@pytest.mark.parametrize("keep", ["whole", "part"])
def test_what_somebody_holds_is_not_used_again(exchange, keep):
    kept = []
    for turn in range(4):
        request, blocks = exchange.run("forward", turn)
        assert all(message.readonly for message in (request, *blocks))
        for message in (request, *blocks):
            view = message if keep == "whole" else message[100:200]
            kept.append((view, bytes(view)))
        del request, blocks, message, view
    for view, content in kept:
        assert view == content
    # Let go of, it is: nothing new is needed.
    kept.clear()
    del view, content
    gc.collect()
    assert exchange.device.lent == 0
    before = exchange.device.counts["fresh"]
    exchange.run("forward", 9)
    assert exchange.device.counts["fresh"] == before
    with pytest.raises(TypeError, match="read-only"):
        exchange.run("forward")[0][0] = 1


def test_memory_comes_back_whatever_happens(exchange, monkeypatch):
    exchange.run("forward")
    x = exchange.batch("forward")
    spec, prepared, device = exchange.prepared.spec, exchange.prepared, exchange.device
    for turn in range(4):
        request, secret = exchange.owner.encrypt(x, spec, "forward")
        blocks = list(cases.blocks_of(exchange.engine, prepared, request, ROWS))
        if turn == 0:  # a reply given up half way
            reply = cases.blocks_of(exchange.engine, prepared, request, ROWS)
            next(reply)
            reply.close()
            del reply
        elif turn == 1:  # a reply that is damaged half way
            damaged = bytearray(blocks[1])
            damaged[500] ^= 1
            with pytest.raises(MessageError):
                exchange.owner.decrypt([blocks[0], damaged], secret)
        elif turn == 2:  # a request that is damaged
            with pytest.raises(MessageError):
                list(cases.blocks_of(exchange.engine, prepared, bytes(request[:-1]) + b"\xff", ROWS))
        else:  # the device fails in the middle of its work
            with monkeypatch.context() as patch:
                patch.setattr(device, "copy_out", lambda *_: (_ for _ in ()).throw(RuntimeError("it fell off the bus")))
                with pytest.raises(RuntimeError, match="fell off the bus"):
                    exchange.owner.encrypt(x, spec, "forward")
                with pytest.raises(RuntimeError, match="fell off the bus"):
                    list(cases.blocks_of(exchange.engine, prepared, request, ROWS))
        del request, blocks, secret
        exchange.engine.close()
        gc.collect()
        assert device.lent == 0, turn
    exchange.run("forward")


def test_page_locked_memory_that_is_not_there_is_an_answer(exchange):
    request, secret = CpuClient().encrypt(cases.batch(TOKENS, D_IN), exchange.prepared.spec, "forward")
    exchange.device.page_locked_limit = 1000
    for refused in (
        lambda: list(cases.blocks_of(exchange.engine, exchange.prepared, request, ROWS)),
        lambda: exchange.engine.gather(exchange.prepared, [request, request]),
        lambda: exchange.owner.encrypt(exchange.batch("forward"), exchange.prepared.spec, "forward"),
    ):
        with pytest.raises(EngineError, match="page-locked memory left"):
            refused()
    exchange.device.page_locked_limit = 1 << 40
    exchange.run("forward")
    CpuClient().decrypt(cases.blocks_of(exchange.engine, exchange.prepared, request, ROWS), secret)


def test_a_reply_in_one_piece_takes_its_size_of_page_locked_memory(exchange):
    request, secret = exchange.owner.encrypt(exchange.batch("forward"), exchange.prepared.spec, "forward")
    reply = b"".join(linear.apply_blocks(exchange.prepared, request, block_rows=ROWS))
    before = exchange.device.counts["fresh"]
    exchange.owner.decrypt(reply, secret)
    assert exchange.device.counts["fresh"] - before == 1 << (len(reply) - 1).bit_length()


def test_threads_share_the_memory_and_not_its_bytes(exchange):
    errors = []

    def work(seed):
        try:
            for turn in range(3):
                request, blocks = exchange.run(cases.DIRECTIONS[(seed + turn) % 2], seed, tokens=50 + seed)
                expected = list(linear.apply_blocks(exchange.prepared, request, ROWS))
                assert blocks == expected
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    gc.collect()
    assert exchange.device.lent == 0


def test_a_transport_passes_messages_on_as_they_are(exchange, monkeypatch):
    transport = LocalTransport(
        {"fc": exchange.prepared}, server=exchange.engine, block_bytes=ROWS * 4 * len(exchange.batch("forward"))
    )
    x = exchange.batch("forward")
    for _ in range(3):
        with counted(exchange.device, monkeypatch) as counts:
            request, secret = exchange.owner.encrypt(x, exchange.prepared.spec, "forward")
            exchange.owner.decrypt(transport.apply("fc", request), secret)
    assert counts["copied"] == counts["fresh"] == 0
    assert counts["memory"] < len(request) // 8


def test_tables_of_a_layer_live_as_long_as_it_does():
    device = CountingDevice()
    context = kernels.lanes.context_of(device)
    spec = linear.LayerSpec.from_bytes(cases.layer().spec.to_bytes())
    delta, ones = context.weights(spec)
    assert context.weights(spec)[0] is delta
    assert np.array_equal(host(delta), spec.scale)
    assert np.array_equal(host(ones), np.ones(spec.d_in))
    del spec
    gc.collect()
    assert context._weights == {}

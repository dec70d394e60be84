"""The order of work between streams, and the life of memory they share, on streams that run as late as they may."""

import numpy as np
import pytest
import torch

import linear_cases as cases
from cuda_arrays import host
from cuda_late import LateDevice
from privtuner import linear
from privtuner.cpu import CpuServer
from privtuner.cuda import linear as device_linear
from privtuner.cuda.client import CudaClient
from privtuner.cuda.linear import lanes
from privtuner.cuda.server import CudaServer

SEED, MASK, REQUEST = bytes(range(32)), bytes(range(100, 132)), bytes(range(200, 216))


@pytest.fixture(params=["whole", "pieces"])
def piecewise(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(lanes, "PIECE_BYTES", 1)
        monkeypatch.setattr(lanes, "WORK_BYTES", 1)


@pytest.fixture(params=[None, 0, 1])
def device(request):
    """Of both lanes, the even and the odd one, late, or all but one."""
    return LateDevice(request.param)


def test_the_late_stand_in_finds_what_lacks_a_wait():
    device = LateDevice()
    first, second = device.stream(), device.stream()
    for waits in (False, True):
        with first:
            x = device.upload(np.arange(8))
        if waits:
            second.wait(first)
        with second:
            y = device.empty((8,), np.int64)
            y[...] = x
            found = device.download(y)
        assert (found.tolist() == list(range(8))) == waits
    for waits in (False, True):  # memory let go of while another stream is still to read it
        with first:
            x = device.upload(np.arange(8))
        second.wait(first)
        with second:
            y = device.empty((8,), np.int64)
            y[...] = x
        if waits:
            first.wait(second)
        del x
        with first:
            other = device.upload(np.zeros(8, np.int64))
            device.download(other)
        with second:
            assert (device.download(y).tolist() == list(range(8))) == waits
    memory = device.page_locked(64)
    memory[:] = 7
    with first:
        x = device.empty((64,), np.uint8)
        device.copy_in(memory, x)
    del memory
    device.page_locked(64)[:] = 9
    with first:
        assert device.download(x).tolist() == [9] * 64


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("preset", cases.PRESETS)
def test_the_owner_and_the_engine(preset, direction, device, piecewise):
    prepared = cases.layer(70, 40, preset)
    engine, owner = CudaServer([device]), CudaClient(device)
    for turn in range(4):  # from the second one on with the product of the mask
        x = cases.batch(9, cases.features_in(prepared, direction), seed=turn)
        request, secret = owner.encrypt(x, prepared.spec, direction)
        reply = list(cases.blocks_of(engine, prepared, request, 32))
        assert reply == list(cases.blocks_of(CpuServer(), prepared, request, 32))
        cases.check_result(prepared, x, host(owner.decrypt(reply, secret)), direction)
    engine.close()


@pytest.mark.parametrize("of_the_core", [False, True])
def test_messages_that_nobody_else_holds(of_the_core, device, piecewise):
    """Their memory is handed out again at once, so whoever copies from it has to hold it."""
    prepared = cases.layer(200, 40)
    engine, owner = CudaServer([device]), CudaClient(device)
    for turn in range(3):
        x = cases.batch(5, 40, seed=turn)
        request, secret = owner.encrypt(x, prepared.spec, "forward")
        request = bytes(request) if of_the_core else request
        reply = cases.blocks_of(engine, prepared, request, 32)
        del request
        if of_the_core:
            reply = (bytes(block) for block in reply)
        cases.check_result(prepared, x, host(owner.decrypt(reply, secret)), "forward")
    engine.close()


def test_several_requests_as_one_product(device, piecewise):
    prepared = cases.layer(70, 40)
    held = device_linear.DeviceLayer(device, prepared)
    requests = [linear.encrypt(cases.batch(tokens, 40), prepared.spec)[0] for tokens in (3, 1, 8)]
    for _ in range(2):
        opened = [device_linear.open_request(held, request) for request in requests]
        replies = list(zip(*device_linear.answer(held, opened, 32), strict=True))
        assert replies == [tuple(linear.apply_blocks(prepared, request, 32)) for request in requests]


def test_a_batch_that_is_not_computed_yet(device, piecewise):
    prepared = cases.layer(40, 11)
    x = cases.batch(5, 11)
    expected, _ = device_linear.encrypt(device, x, prepared.spec, seed=SEED, mask_seed=MASK, request=REQUEST)
    computed = device.upload(x)  # on the stream of the caller, who has not waited for it
    request, _ = device_linear.encrypt(device, computed, prepared.spec, seed=SEED, mask_seed=MASK, request=REQUEST)
    assert request == expected


def test_replies_given_up_half_way(device, piecewise):
    prepared = cases.layer(200, 40)
    held = device_linear.DeviceLayer(device, prepared)
    for tokens in (3, 3, 5):
        x = cases.batch(tokens, 40, seed=tokens)
        request, secret = device_linear.encrypt(device, x, prepared.spec)
        blocks = device_linear.apply_blocks(held, request, 32)
        next(blocks)
        blocks.close()
        with pytest.raises(Exception, match="truncated"):
            device_linear.decrypt(list(linear.apply_blocks(prepared, request, 32))[:2], secret)
        request, secret = device_linear.encrypt(device, x, prepared.spec)
        cases.check_result(prepared, x, device_linear.decrypt(linear.apply(prepared, request), secret), "forward")


def test_results_are_there_for_other_libraries(device):
    prepared = cases.layer(40, 11)
    owner, x = CudaClient(device), cases.batch(3, 11)
    request, secret = owner.encrypt(x, prepared.spec, "forward")
    y = torch.from_dlpack(owner.decrypt([linear.apply(prepared, request)], secret))  # reads it at once
    cases.check_result(prepared, x, y.numpy(), "forward")


def test_a_result_in_memory_that_the_caller_let_go_of(device):
    prepared = cases.layer(40, 11)
    owner, x = CudaClient(device), cases.batch(3, 11)
    request, secret = owner.encrypt(x, prepared.spec, "forward")
    device.empty((3, 40), np.float32).fill(7)  # of the size of the result; not done yet
    y = owner.decrypt([linear.apply(prepared, request)], secret)
    cases.check_result(prepared, x, device.download(y), "forward")


@pytest.mark.parametrize("preset", cases.PRESETS)
def test_device_arrays_in_the_stream_of_the_caller(device, preset):
    prepared, x = cases.layer(70, 9, preset), cases.batch(30, 9)
    held = device_linear.DeviceLayer(device, prepared)
    with device.stream():
        words, secret = device_linear.encrypt_words(device, device.upload(x), prepared.spec, mask_seed=MASK)
        data, mask = device_linear.apply(held, "forward", words, MASK)
        cases.check_result(prepared, x, device.download(device_linear.decrypt_words(data, mask, secret)), "forward")

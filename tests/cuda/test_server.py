"""The engine and the owner on GPUs, here on stand-ins for them: placement, batches, memory, the way to PyTorch."""

import threading
import time
import weakref

import numpy as np
import pytest
import torch

import linear_cases as cases
from cuda_host import HostDevice
from privtuner import linear
from privtuner.cpu import CpuServer
from privtuner.cuda import linear as kernels
from privtuner.cuda.client import CudaClient
from privtuner.cuda.server import CudaServer, _Ticket
from privtuner.errors import EngineError, InputError
from privtuner.nn import EncryptedLinear, Session
from privtuner.schemes import LocalTransport, scheme

PRESETS, DIRECTIONS = cases.PRESETS, cases.DIRECTIONS


@pytest.fixture
def engine():
    engine = CudaServer([HostDevice()])
    yield engine
    engine.close()


def request_for(prepared, tokens=3, direction="forward", seed=1):
    x = cases.batch(tokens, cases.features_in(prepared, direction), seed)
    return linear.encrypt(x, prepared.spec, direction=direction)


def test_layers_go_where_memory_is_left():
    class Small(HostDevice):
        """Has ``room`` bytes for what is uploaded as weights."""

        def __init__(self, name, room):
            super().__init__(name)
            self.room = room

        def empty(self, shape, dtype, what="a work array"):
            if np.dtype(dtype) == np.int8 and len(shape) > 1:
                self.room -= int(np.prod(shape))
            return super().empty(shape, dtype, what)

        def free_bytes(self):
            return self.room

    layers = {f"layer {i}": cases.layer(d_out=32, d_in=32 * (i + 1), seed=i) for i in range(6)}
    devices = [Small("cuda:0", 1 << 30), Small("cuda:1", (1 << 30) + 4096)]
    engine = CudaServer(devices)
    placed = engine.load(layers.values())
    assert set(placed) == {"cuda:0", "cuda:1"}
    assert sum(placed.values()) == sum(layer.spec.d_out * layer.spec.d_in for layer in layers.values())
    assert abs(placed["cuda:1"] - placed["cuda:0"]) <= 4096 + 32 * 192
    assert engine.load(layers.values()) == placed  # again: they lie there already
    for name, prepared in layers.items():
        request, secret = request_for(prepared)
        reply = list(engine.answer(prepared, request))
        assert linear.decrypt(reply, secret).shape == (3, 32), name
    engine.close()


def test_what_does_not_fit_is_named_with_its_bytes():
    engine = CudaServer([HostDevice(memory_bytes=20_000)])
    with pytest.raises(EngineError, match=r"\d+ bytes and cuda:0 has 20000 left"):
        engine.load([cases.layer(d_out=256, d_in=256)])
    with pytest.raises(InputError, match="no device was given"):
        CudaServer([])


class Slow(HostDevice):
    """Starts nothing before ``go``, so that requests pile up."""

    def __init__(self):
        super().__init__()
        self.go, self.waiting = threading.Event(), threading.Event()

    def launch(self, kernel, *arguments, **options):
        if threading.current_thread().name.startswith("privtuner-"):
            self.waiting.set()
            assert self.go.wait(30)
        super().launch(kernel, *arguments, **options)


def test_requests_that_wait_for_a_layer_are_multiplied_together():
    device = Slow()
    engine = CudaServer([device])
    prepared = cases.layer()
    requests = [request_for(prepared, tokens, seed=tokens) for tokens in (2, 3, 4, 5)]
    backward, _ = request_for(prepared, 2, "backward")
    replies = {}

    def ask(name, request):
        replies[name] = b"".join(engine.answer(prepared, request))

    threads = [threading.Thread(target=ask, args=("first", requests[0][0]))]
    threads[0].start()
    assert device.waiting.wait(30)  # at work on the first one
    for number, (request, _) in enumerate(requests[1:]):
        threads.append(threading.Thread(target=ask, args=(number, request)))
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: engine._workers[0]._tickets.qsize() == 3)
    threads.append(threading.Thread(target=ask, args=("backward", backward)))
    threads[-1].start()
    wait_for(lambda: engine._workers[0]._tickets.qsize() == 4)
    before = device.launched.count("gemm_u32_4")
    device.go.set()
    for thread in threads:
        thread.join(60)
    # The first, the three that waited as one, and the other direction.
    assert device.launched.count("gemm_u32_4") - before == 3
    native = CpuServer()
    for name, (request, _) in zip(("first", 0, 1, 2), requests, strict=True):
        assert replies[name] == b"".join(native.answer(prepared, request))
    assert replies["backward"] == b"".join(native.answer(prepared, backward))
    engine.close()


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_batch_that_does_not_fit_is_answered_one_by_one(monkeypatch, engine):
    genuine, sizes = kernels.answer, []

    def answer(layer, requests, block_rows):
        sizes.append(len(requests))
        if len(requests) > 1:
            raise EngineError("it takes too many bytes")
        return genuine(layer, requests, block_rows)

    monkeypatch.setattr(kernels, "answer", answer)
    prepared = cases.layer()
    (worker,) = engine._workers
    requests = [request_for(prepared, seed=seed)[0] for seed in (1, 2)]
    _, layer = engine._place(prepared)
    tickets = [_Ticket(layer, kernels.open_request(layer, request), 256) for request in requests]
    worker._answer(tickets)
    assert sizes == [2, 1, 1]
    for ticket, request in zip(tickets, requests, strict=True):
        assert ticket.blocks.get() == b"".join(CpuServer().answer(prepared, request))
        assert ticket.blocks.get() is None


def test_an_error_at_work_reaches_whoever_asked_and_the_engine_goes_on(monkeypatch, engine):
    prepared = cases.layer()
    request, _ = request_for(prepared)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "answer", lambda *_: (_ for _ in ()).throw(RuntimeError("the GPU fell off the bus")))
        with pytest.raises(RuntimeError, match="fell off the bus"):
            list(engine.answer(prepared, request))
    assert list(engine.answer(prepared, request))


def test_what_did_not_fit_together_is_let_go_of_before_the_next_attempt(monkeypatch, engine):
    genuine, kept = kernels.answer, []

    class Memory:
        """Of the device, taken by an attempt."""

    def answer(layer, requests, block_rows):
        memory = Memory()
        if len(requests) > 1:
            kept.append(weakref.ref(memory))
            raise EngineError("it takes too many bytes")
        assert [reference() for reference in kept] == [None]
        return genuine(layer, requests, block_rows)

    monkeypatch.setattr(kernels, "answer", answer)
    prepared = cases.layer()
    _, layer = engine._place(prepared)
    request = kernels.open_request(layer, request_for(prepared)[0])
    tickets = [_Ticket(layer, request, 256) for _ in range(2)]
    engine._workers[0]._answer(tickets)
    assert [isinstance(ticket.blocks.get(), memoryview) for ticket in tickets] == [True, True]


def test_an_error_that_is_kept_keeps_no_memory_of_the_device(monkeypatch, engine):
    kept = []

    class Memory:
        """Of the device, taken by an attempt."""

    def answer(*_):
        memory = Memory()
        kept.append(weakref.ref(memory))
        raise EngineError("it takes too many bytes")

    monkeypatch.setattr(kernels, "answer", answer)
    prepared = cases.layer()
    with pytest.raises(EngineError) as caught:
        list(engine.answer(prepared, request_for(prepared)[0]))
    assert (str(caught.value), kept[0]()) == ("it takes too many bytes", None)


def test_a_device_that_is_gone_is_an_answer():
    class Gone(HostDevice):
        def active(self):
            if threading.current_thread().name.startswith("privtuner-"):
                raise RuntimeError("the GPU fell off the bus")
            return super().active()

    engine = CudaServer([Gone()])
    prepared = cases.layer()
    request, _ = request_for(prepared)
    errors = []

    def ask():
        try:
            list(engine.answer(prepared, request))
        except RuntimeError as error:
            errors.append(str(error))

    for _ in range(2):
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(30)
    assert errors == ["the GPU fell off the bus"] * 2
    engine.close()


def test_requests_that_come_while_the_engine_closes_are_answered():
    device = Slow()
    engine, prepared = CudaServer([device]), cases.layer()
    (request, _), replies = request_for(prepared), []

    def ask():
        replies.append(b"".join(engine.answer(prepared, request)))

    threads = [threading.Thread(target=ask, daemon=True), threading.Thread(target=engine.close, daemon=True)]
    threads[0].start()
    assert device.waiting.wait(30)
    threads[1].start()
    wait_for(lambda: engine._workers[0]._thread is None)
    threads.append(threading.Thread(target=ask, daemon=True))
    threads[2].start()
    wait_for(lambda: engine._workers[0]._thread is not None)
    device.go.set()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert replies == [linear.apply(prepared, request)] * 2
    engine.close()


def test_a_reply_that_nobody_reads_holds_nothing_up(engine):
    prepared = cases.layer(d_out=200)
    request, _ = request_for(prepared)
    reply = cases.blocks_of(engine, prepared, request, 32)
    next(reply)
    reply.close()
    assert b"".join(engine.answer(prepared, request)) == linear.apply(prepared, request)
    engine.close()
    assert b"".join(engine.answer(prepared, request)) == linear.apply(prepared, request)  # starts again


def test_tensors_of_the_device_go_through_a_layer_and_back():
    weight = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    prepared = linear.prepare(weight.numpy())
    transport = LocalTransport({"fc": prepared})
    results = []
    for device in ("cpu", HostDevice()):
        layer = EncryptedLinear.single("fc", prepared.spec, Session(transport, device=device))
        assert layer.group.session.on_device == (device != "cpu")
        x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        (y * torch.arange(12.0)).sum().backward()
        results.append((y.detach(), x.grad))
    (y, gradient), (y_device, gradient_device) = results
    assert torch.allclose(y, y_device, atol=1e-3)
    assert torch.allclose(gradient, gradient_device, rtol=1e-3, atol=2e-2)
    assert not torch.equal(y, y_device)  # other noise: it is encrypted


def test_misuse_of_the_owner():
    with pytest.raises(InputError, match="max_bytes = -1: must be in"):
        CudaClient(HostDevice(), -1)
    owner = scheme("linear").client(device=HostDevice("cuda:3"))
    assert (owner.scheme, owner.on_device, owner.device.name) == ("linear", True, "cuda:3")
    prepared = cases.layer()
    x = cases.batch(3, prepared.spec.d_in)
    x[1, 2] = np.nan
    with pytest.raises(InputError, match=r"x\[1, 2\] is nan"):
        owner.encrypt(x, prepared.spec, "forward")

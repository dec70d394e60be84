"""The device layer over a stand-in for CuPy: what is missing is named, what does not fit counted, what is launched."""

import importlib
import types

import numpy as np
import pytest

from cuda_arrays import DeviceArray, Xp, host
from cuda_host import HostDevice
from privtuner import cuda
from privtuner.commands import info
from privtuner.cuda import device, sources
from privtuner.errors import EngineError, InputError
from privtuner.schemes import scheme


class RuntimeFailureError(Exception):
    """CuPy's CUDARuntimeError."""


class OutOfMemoryError(MemoryError):
    """CuPy's OutOfMemoryError."""


class Function:
    """A RawKernel that notes its launches."""

    def __init__(self, name):
        self.name, self.calls, self.max_dynamic_shared_size_bytes = name, [], 48 << 10

    def __call__(self, grid, block, args, *, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.calls.append((grid, block, args, shared_mem))


def stand_in(count=2, capability="90", free=1 << 30, failing=None):
    """As much of CuPy as `device` uses, on NumPy arrays, with ``free`` bytes on each of ``count`` devices."""
    current, modules, pools, functions = [0], [], [], {}

    def device_count():
        if failing:
            raise RuntimeFailureError(failing)
        return count

    class Device:
        compute_capability = capability
        attributes = types.MappingProxyType({"MultiProcessorCount": 132})

        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    class MemoryPool:
        def __init__(self):
            self.limit = {}
            pools.append(self)

        def set_limit(self, size):
            self.limit[current[-1]] = size

        def malloc(self, size):
            raise AssertionError("the stand-in has no memory of its own")

        def free_bytes(self):
            return 0

        def used_bytes(self):
            return 1000

    class RawModule:
        def __init__(self, code, options, backend):
            assert backend == "nvrtc"
            self.code, self.options, self.functions = code, options, {}
            modules.append(self)

        def get_function(self, name):
            assert f"PT_KERNEL({name}," in self.code
            self.functions[name] = functions.setdefault((current[-1], name), Function(name))  # one on a device
            return self.functions[name]

    class Stream:
        def __init__(self, non_blocking):
            assert non_blocking
            self.device, self.waits_for = current[-1], []

        def record(self):
            event = Event()
            event.record(self)
            return event

        def wait_event(self, event):
            self.waits_for.append(event.stream)

    class Event:
        def __init__(self, disable_timing=False):
            self.device = current[-1]

        def record(self, stream):
            if stream.device != self.device:
                raise RuntimeFailureError("cudaErrorInvalidResourceHandle")
            self.stream = stream

    def alloc_pinned_memory(size):
        if size > free:
            raise RuntimeFailureError("cudaErrorMemoryAllocation")
        return bytearray(size)

    def empty(shape, dtype):
        if int(np.prod(shape)) * np.dtype(dtype).itemsize > free:
            raise OutOfMemoryError
        return Xp.empty(shape, dtype)

    class Allocator:
        def __init__(self, malloc):
            self.malloc = malloc

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    null_streams = [types.SimpleNamespace(device=index) for index in range(count)]
    runtime = types.SimpleNamespace(
        getDeviceCount=device_count,
        getDeviceProperties=lambda index: {"name": b"Stand-in"},
        memGetInfo=lambda: (free, 2 * free),
        CUDARuntimeError=RuntimeFailureError,
    )
    memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    cuda_module = types.SimpleNamespace(
        runtime=runtime,
        Device=Device,
        MemoryPool=MemoryPool,
        memory=memory,
        using_allocator=Allocator,
        Stream=Stream,
        Event=Event,
        get_current_stream=lambda: null_streams[current[-1]],
        alloc_pinned_memory=alloc_pinned_memory,
    )
    fake = types.SimpleNamespace(
        __version__="14.0", cuda=cuda_module, RawModule=RawModule, empty=empty, asnumpy=Xp.asnumpy, modules=modules
    )
    fake.pools = pools
    return fake


@pytest.fixture
def install(monkeypatch):
    """Put a module, or the error on importing it, in place of CuPy."""
    genuine = importlib.import_module

    def put(found):
        def import_module(name, *rest):
            if name != "cupy":
                return genuine(name, *rest)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(importlib, "import_module", import_module)
        device._cupy.cache_clear()

    yield put
    device._cupy.cache_clear()


ABSENT = ModuleNotFoundError("No module named 'cupy'", name="cupy")
OBSTACLES = [
    (
        ABSENT,
        r"CuPy is not installed: pip install '.\[cuda13\]' in a checkout of privtuner, or pip install 'cupy-cuda13x",
    ),
    (ImportError("libcudart.so.13: cannot open"), r"does not load \(libcudart.so.13: cannot open\)"),
    (types.SimpleNamespace(), "a folder called cupy is in the way"),
    (stand_in(failing="cudaErrorNoDevice"), r"no NVIDIA driver or device answers \(cudaErrorNoDevice\)"),
    (stand_in(count=0), "CUDA_VISIBLE_DEVICES may hide it"),
]


@pytest.mark.parametrize(("found", "text"), OBSTACLES, ids=["absent", "broken", "folder", "driver", "hidden"])
def test_what_is_missing_is_named_at_every_use(install, found, text):
    install(found)
    assert not cuda.available()
    with pytest.raises(EngineError, match=f"no GPU can be used: .*{text}"):
        cuda.devices()
    for use in (
        lambda: device.open_device(0),
        lambda: scheme("linear").server("cuda"),
        lambda: scheme("linear").client(device="cuda"),
    ):
        with pytest.raises(EngineError, match=text):
            use()
    devices = info.collect()["schemes"][0]["devices"]
    (entry,) = [device for device in devices if device["name"] == "cuda"]
    assert entry == {"name": "cuda", "available": False, "reason": cuda.status().reason}


def test_devices_are_listed(install):
    install(stand_in())
    assert cuda.status() == (True, "cuda:0 Stand-in, cuda:1 Stand-in; CuPy 14.0")
    assert [opened.name for opened in cuda.devices()] == ["cuda:0", "cuda:1"]
    assert [opened.name for opened in cuda.devices("cuda:1")] == ["cuda:1"]
    assert [opened.name for opened in cuda.devices("cuda:1,cuda:0")] == ["cuda:1", "cuda:0"]
    assert cuda.devices()[0].multiprocessors == 132


@pytest.mark.parametrize("names", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "cuda:0,cpu", "cuda,cuda:1"])
def test_names_of_no_device_are_refused(install, names):
    install(stand_in())
    with pytest.raises(InputError, match=r"choose cpu, cuda \(every GPU\), cuda:0"):
        cuda.devices(names)


def test_other_misuse_is_refused(install):
    install(stand_in())
    with pytest.raises(InputError, match="names a GPU twice"):
        cuda.devices("cuda:1,cuda:1")
    with pytest.raises(InputError, match="memory_bytes is 0; give at least 1"):
        cuda.devices(memory_bytes=0)
    with pytest.raises(EngineError, match="there is no device cuda:2: this machine shows 2, cuda:0 to cuda:1"):
        cuda.devices("cuda:2")
    with pytest.raises(InputError, match="openfhe does not run on 'cuda': choose device cpu, or the scheme linear"):
        scheme("openfhe").server("cuda")
    install(stand_in(capability="75"))
    with pytest.raises(EngineError, match=r"cuda:0 has compute capability 7.5; the kernels need 8.0"):
        cuda.devices("cuda:0")


def test_memory_is_limited_and_what_does_not_fit_is_counted(install):
    fake = stand_in(free=1 << 20)
    install(fake)
    (opened,) = cuda.devices("cuda:1", memory_bytes=1 << 16)
    assert fake.pools[-1].limit == {1: 1 << 16}  # of that device, not of the current one
    assert opened.free_bytes() == (1 << 16) - 1000
    assert cuda.devices("cuda:0")[0].free_bytes() == 1 << 20
    with (
        opened.active(),
        pytest.raises(EngineError, match=r"the weights takes 2097152 bytes and cuda:1 has 64536 left, of"),
    ):
        opened.empty((1 << 18,), np.uint64, "the weights")


def test_kernels_are_compiled_once_and_get_the_shared_memory_they_ask_for(install):
    fake = stand_in()
    install(fake)
    opened = device.open_device(1)
    out, a = opened.empty((8,), np.uint64), opened.empty((8,), np.uint64)
    for shared in (256 * 8, 100 << 10, 60 << 10):
        opened.launch("probe", (1,), 256, out, a, 5, 8, shared=shared)
    (module,) = fake.modules
    assert module.options == device.OPTIONS
    function = module.functions["probe"]
    assert [call[3] for call in function.calls] == [256 * 8, 100 << 10, 60 << 10]
    assert function.max_dynamic_shared_size_bytes == 100 << 10  # and not less, which another launch may need
    grid, block, args, _ = function.calls[0]
    assert (grid, block) == ((1,), (256,))
    assert [type(value) for value in args] == [DeviceArray, DeviceArray, np.uint64, np.uint32]


def test_what_one_opening_of_a_gpu_allows_a_kernel_another_does_not_take_back(install):
    install(stand_in())
    for shared in (100 << 10, 60 << 10):  # CuPy has one module for both
        opened = device.open_device(1)
        out = opened.empty((8,), np.uint64)
        opened.launch("probe", (1,), 256, out, out, 5, 8, shared=shared)
    assert opened._functions["probe"][0].max_dynamic_shared_size_bytes == 100 << 10


def test_streams_wait_whatever_the_current_device_is(install):
    fake = stand_in()
    install(fake)
    opened = device.open_device(1)
    first, second = opened.stream(), opened.stream()
    first.wait(second)
    first.wait()
    assert first.raw.waits_for == [second.raw, types.SimpleNamespace(device=1)]


def test_page_locked_memory_that_the_host_has_not_left(install):
    install(stand_in(free=1000))
    opened = device.open_device(0)
    assert [opened.page_locked(size).shape for size in (0, 1000)] == [(0,), (1000,)]
    with pytest.raises(EngineError, match="the host has not 1001 bytes of page-locked memory left"):
        opened.page_locked(1001)


def test_stand_ins_of_device_arrays_refuse_what_cupy_refuses():
    x, plain = HostDevice().upload(np.arange(6.0).reshape(2, 3)), np.ones(3)
    for mix in (
        lambda: np.asarray(x),
        lambda: np.sqrt(x),
        lambda: np.concatenate([x, x]),
        lambda: plain * x,
        lambda: x[0] == plain,
        lambda: x[np.array([True, False])],
        lambda: Xp.isfinite(plain),
        lambda: HostDevice().upload(x),
    ):
        with pytest.raises((TypeError, AssertionError)):
            mix()
    with pytest.raises(ValueError, match="cannot be used for fill"):
        x[0] = plain
    for absent in ("ctypes", "setflags", "tolist", "get"):
        assert not hasattr(x, absent)
    x[0], x[1, 2] = 7, np.float32(8)
    assert (host(x).tolist(), x[1, 2].shape) == ([[7, 7, 7], [3, 4, 8]], ())
    for copy in (
        lambda: HostDevice().copy_in(np.zeros(48, np.uint8), x),  # not page-locked
        lambda: HostDevice().copy_in(HostDevice().page_locked(48), x[:, 1:]),  # not contiguous
        lambda: HostDevice().copy_out(x, HostDevice().page_locked(47)),  # too short
    ):
        with pytest.raises(AssertionError):
            copy()


def test_arguments_that_a_gpu_would_misread_are_refused(install):
    install(stand_in())
    for opened in (device.open_device(0), HostDevice()):
        out = opened.empty((8,), np.uint64)
        with pytest.raises(InputError, match="kernel probe takes 4 arguments, got 3"):
            opened.launch("probe", (1,), 32, out, out, 5)
        with pytest.raises(InputError, match="argument a: expected an array of uint64, got int32"):
            opened.launch("probe", (1,), 32, out, opened.empty((8,), np.int32), 5, 8)
        with pytest.raises(InputError, match="argument a: expected an array of uint64, got list"):
            opened.launch("probe", (1,), 32, out, [1], 5, 8)
        with pytest.raises(InputError, match="argument a: the array is not contiguous"):
            opened.launch("probe", (1,), 32, out, opened.empty((16,), np.uint64)[::2], 5, 8)
        with pytest.raises(InputError, match="argument a: the array lies on the host, not on the device: upload it"):
            opened.launch("probe", (1,), 32, out, np.zeros(1, np.uint64), 5, 1)
        with pytest.raises(InputError, match="argument n: -1 does not fit uint32"):
            opened.launch("probe", (1,), 32, out, out, 5, -1)
        with pytest.raises(InputError, match="takes blocks of at most 256 threads, got 512"):
            opened.launch("probe", (1,), 512, out, out, 5, 8)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_host_runs_a_kernel_thread_by_thread(backwards):
    runner = HostDevice(backwards=backwards)
    a = np.arange(1000, dtype=np.uint64) * np.uint64(12345678912345678)
    out = runner.empty((1000,), np.uint64)
    runner.launch("probe", (4,), 256, out, runner.upload(a), 2**63 + 5, 1000, shared=256 * 8)
    assert host(out).tolist() == [(int(x) * (2**63 + 5) >> 64) + 255 - i % 256 for i, x in enumerate(a)]


def test_signatures_are_read_from_the_sources():
    probe = sources.kernels()["probe"]
    assert (probe.unit, probe.max_threads) == ("probe", 256)
    assert [(p.name, p.dtype, p.pointer) for p in probe.parameters] == [
        ("out", np.uint64, True),
        ("a", np.uint64, True),
        ("b", np.uint64, False),
        ("n", np.uint32, False),
    ]
    for kernel in sources.kernels().values():
        assert kernel.max_threads % 32 == 0


def test_small_tables_are_uploaded_once(monkeypatch):
    opened, other = HostDevice(), HostDevice()
    table = np.arange(4, dtype=np.uint64)
    kept = device.constant(opened, table)
    assert device.constant(opened, table.copy()) is kept
    assert np.array_equal(host(kept), table)
    for different in (table.astype(np.uint32), table.reshape(2, 2), table + 1):
        assert device.constant(opened, different) is not kept
        assert np.array_equal(host(device.constant(opened, different)), different)
    assert device.constant(other, table) is not kept
    large = np.zeros(5000, np.uint8)
    assert device.constant(opened, large) is not device.constant(opened, large)
    monkeypatch.setattr(device, "_MAX_CONSTANTS", 4)  # as many as there are
    more = np.ones(3)
    assert device.constant(opened, more) is not device.constant(opened, more)
    assert device.constant(opened, table) is kept

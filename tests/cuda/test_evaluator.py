"""The evaluator on a GPU, its kernels run on the host: memory, keys, threads, and shapes that only it cuts up."""

import threading
import weakref

import numpy as np
import pytest

from cuda_arrays import host
from cuda_host import HostDevice
from evaluators import assert_same_words
from privtuner import ckks
from privtuner.cuda import evaluator as cuda_ckks
from privtuner.cuda.evaluator import CudaEvaluator
from privtuner.cuda.words import Words
from privtuner.errors import CkksError, EngineError, InputError

RNG = np.random.default_rng(0)
TOKENS, FEATURES = 5, 3


class Party:
    """Parameters, keys, the native evaluator, and one on a device."""

    def __init__(self, parameters, rotations=(), **keys):
        self.parameters = parameters
        self.secret = ckks.SecretKey(parameters)
        self.keys = self.secret.evaluation_keys(rotations=rotations, **keys)
        self.native = ckks.Evaluator(parameters, self.keys)

    def encrypt(self, features=FEATURES, **arguments):
        return self.secret.encrypt(RNG.uniform(-0.9, 0.9, (TOKENS, features)), **arguments)

    def engine(self, keys=True, backwards=False, **arguments):
        return CudaEvaluator(HostDevice(backwards=backwards), self.parameters, self.keys if keys else None, **arguments)


def party_for(parameters, **keys):
    sums = [1 << i for i in range(parameters.slots.bit_length() - 1)]
    return Party(parameters, [*sums, -3], conjugation=True, packing=True, **keys)


@pytest.fixture(scope="module")
def party():
    """One digit, several special primes; two blocks to a row."""
    return party_for(ckks.Parameters.INSECURE(3, ring_dimension=2048))


@pytest.fixture(scope="module")
def digits():
    """Three digits of up to two limbs, two special primes."""
    parameters = ckks.Parameters.secure(4, 25, ring_dimension=8192)
    assert (parameters._core.digit_limbs, parameters._core.special_count) == (2, 2)
    return Party(parameters, [1, 5])


@pytest.fixture(scope="module")
def deep():
    return Party(ckks.Parameters.INSECURE(6))


def assert_same(engine, found, expected):
    """Words and everything known about them."""
    assert (found.shape, found.level, found.bound) == (expected.shape, expected.level, expected.bound)
    assert np.array_equal(found.scale, expected.scale)
    assert found.budget() == expected.budget()
    assert found.nbytes == expected.nbytes
    assert_same_words(engine, found, expected)


def assert_equal_results(party, operation, *tensors, engine=None):
    """operation(engine, *tensors) of both engines; a tensor or a list of them."""
    engine = party.engine() if engine is None else engine
    expected = operation(party.native, *tensors)
    found = operation(engine, *(engine.upload(x) for x in tensors))
    if not isinstance(expected, list):
        expected, found = [expected], [found]
    assert len(found) == len(expected)
    for mine, native in zip(found, expected, strict=True):
        assert_same(engine, mine, native)


WEIGHT = RNG.normal(size=(4, FEATURES))


# x and y have three features, one has one, low is two levels lower.
@pytest.fixture(scope="module")
def operands(party):
    return party.encrypt(), party.encrypt(), party.encrypt(1)


def test_uneven_chunks(party):
    """Seven features, two or three at a time."""
    x = party.encrypt(7)
    engine = party.engine(work_bytes=1 << 21)
    sizes = []
    launch = engine.device.launch

    def seen(kernel, *arguments, **options):
        if kernel == "residues_tensor":
            sizes.append(len(arguments[2]))
        launch(kernel, *arguments, **options)

    engine.device.launch = seen
    assert_equal_results(party, lambda e, x: e.multiply(x, x), x, engine=engine)
    assert sum(sizes) == 7
    assert 1 < len(sizes) < 7


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_several_digits(digits, level):
    """Whole digits and shorter last ones, in products and rotations."""
    x, y = digits.encrypt(1, level=level), digits.encrypt(1, level=level)
    engine = digits.engine()
    assert_equal_results(digits, lambda e, x, y: e.multiply(x, y), x, y, engine=engine)
    assert_equal_results(digits, lambda e, x, y: e.rotate(x, [5, 1]), x, y, engine=engine)


@pytest.mark.parametrize("degree", [1, 2, 7, 15, 27])
@pytest.mark.parametrize("basis", ["chebyshev", "power"])
def test_polynomials(deep, basis, degree):
    coefficients = np.random.default_rng(degree).uniform(-0.5, 0.5, degree + 1)
    polynomial = ckks.Polynomial(tuple(coefficients), basis, (-2.0, 3.0) if basis == "chebyshev" else (-1.0, 1.0))
    assert_equal_results(deep, lambda e, x: e.polynomial(x, polynomial), deep.encrypt(2))


def test_polynomials_in_batches(deep):
    """Three features, two at a time where the native evaluator takes one."""
    polynomial = ckks.Polynomial((0.1, 0.4, 0.0, -0.2, 0.3), "chebyshev")
    engine = deep.engine(work_bytes=2 * 8 * 7 * 2 * 8 * 1024)
    assert engine._words.batch == 2
    assert_equal_results(deep, lambda e, x: e.polynomial(x, polynomial), deep.encrypt(3), engine=engine)


@pytest.mark.parametrize("features", [1, 2, 5])
def test_packed_sums(party, features):
    x = party.encrypt(features)
    assert_equal_results(party, lambda e, x: e.pack_slot_sums(x), x)


def test_a_longer_computation(party):
    """What one operation makes, the next one takes."""

    def steps(e, x, y):
        z = e.multiply(e.subtract(x, 0.25), y)
        rotated = e.rotate(z, [1, 4])
        z = e.linear(e.add(rotated[1], rotated[0]), ckks.Matrix(WEIGHT, per_row=False))
        return e.dot(z, e.select(e.concatenate([x, y]), slice(1, 5)))

    assert_equal_results(party, steps, party.encrypt(), party.encrypt())


def test_upload_and_download(party):
    for x in (party.encrypt(), party.native.square(party.encrypt())):
        engine = party.engine()
        uploaded = engine.upload(x)
        assert uploaded.device is engine.device
        assert uploaded.words.shape == (FEATURES, 2, x.level + 1, party.parameters.ring_dimension)
        assert_same(engine, uploaded, x)
        assert repr(uploaded).startswith(f"<cuda:0 tensor (5, 3), level {x.level}, scale 2^4")
        assert not uploaded.planned


def test_views_share_words(party):
    engine = party.engine()
    x = engine.upload(party.encrypt())
    assert np.shares_memory(host(engine.select(x, slice(1, 2)).words), host(x.words))
    assert np.shares_memory(host(engine.assume(x, 0.5).words), host(x.words))
    assert engine.drop_level(x, x.level).words.shape == x.words.shape


def test_the_protocol(party):
    engine = party.engine()
    assert (engine.name, engine.slots) == ("cuda", party.parameters.slots)
    assert "on cuda:0" in repr(engine)
    for name in dir(party.native):
        if not name.startswith("_") and name != "planned":
            assert hasattr(engine, name), name


# Keys, memory, threads


def test_keys_are_uploaded_when_needed(party):
    engine = party.engine()
    x = engine.upload(party.encrypt(1))
    engine.add(x, x)
    assert engine.key_bytes == 0
    one = party.keys._core.words(None).nbytes
    engine.square(x)
    engine.square(x)
    assert engine.key_bytes == one
    engine.rotate(x, [0, 1, -3, 1])
    assert engine.key_bytes == 3 * one


class CountingDevice(HostDevice):
    """Knows which arrays are alive."""

    def __init__(self):
        super().__init__()
        self.given = []

    def empty(self, shape, dtype, what="a work array"):
        out = super().empty(shape, dtype, what)
        self.given.append((weakref.ref(out), what))
        return out

    def alive(self):
        return [what for array, what in self.given if array() is not None]


def test_nothing_stays_but_the_result(deep):
    device = CountingDevice()
    engine = CudaEvaluator(device, deep.parameters, deep.keys)
    x = engine.upload(deep.encrypt(2))
    polynomial = ckks.Polynomial(tuple(np.linspace(-0.5, 0.5, 16)), "chebyshev")
    engine.polynomial(x, polynomial)  # tables, keys
    before = sorted(device.alive())
    y = engine.polynomial(x, polynomial)
    assert sorted(device.alive()) == sorted([*before, "a tensor of 2 features"])
    del y
    assert sorted(device.alive()) == before


def test_what_is_dropped_on_the_way(party):
    """Ten rotations and sums: at most the input, a sum, its rotation and the next sum exist at once."""
    most = 0

    class Watching(CountingDevice):
        def empty(self, shape, dtype, what="a work array"):
            nonlocal most
            out = super().empty(shape, dtype, what)
            most = max(most, sum(text.startswith("a tensor of") for text in self.alive()))
            return out

    engine = CudaEvaluator(Watching(), party.parameters, party.keys)
    engine.sum_slots(engine.upload(party.encrypt(1)))
    assert most == 4


def test_a_matrix_is_uploaded_once(party):
    device = HostDevice()
    weight = ckks.Matrix(WEIGHT)
    for _ in range(2):  # evaluators come and go
        engine = CudaEvaluator(device, party.parameters)
        engine.linear(engine.upload(party.encrypt()), weight)
    held = cuda_ckks._matrices[weight]
    assert list(held) == [device]
    before = len(cuda_ckks._matrices)
    del weight, held
    assert len(cuda_ckks._matrices) == before - 1


def test_memory_is_named(party):
    engine = CudaEvaluator(HostDevice(memory_bytes=4 << 20), party.parameters, party.keys, work_bytes=64 << 20)
    x, y = engine.upload(party.encrypt(20)), engine.upload(party.encrypt(20))
    with pytest.raises(EngineError, match="a tensor of 40 features takes 5242880 bytes and cuda:0 has"):
        engine.concatenate([x, y])
    with pytest.raises(EngineError, match="a tensor of 40 features takes 5242880 bytes and cuda:0 has"):
        engine.upload(party.encrypt(40))
    with pytest.raises(EngineError, match=r"the work space of a product takes \d+ bytes and cuda:0 has"):
        engine.multiply(x, y)
    # Nothing is left of what failed, and a smaller work space does.
    assert engine._core.take_steps() == []
    small = CudaEvaluator(engine.device, party.parameters, party.keys, work_bytes=1 << 20)
    assert_same(small, small.multiply(x, y), party.native.multiply(engine.download(x), engine.download(y)))


def test_a_failed_operation_leaves_no_steps(party, operands):
    """What was recorded before an error is not carried out later."""
    one = operands[2]
    keys = party.secret.evaluation_keys(rotations=[1, 2])
    engine = CudaEvaluator(HostDevice(), party.parameters, keys)
    x = engine.upload(one)
    with pytest.raises(CkksError, match="a rotation by 4 needs its key"):
        engine.sum_slots(x)
    assert engine.device.launched == []
    engine.add(x, x)
    assert engine.device.launched == ["residues_add"]


def test_threads_take_turns(party, operands):
    engine = party.engine()
    x, y, one = operands
    expected = [party.native.multiply(x, y), party.native.rotate(one, 1), party.native.linear_combination([x], [0.5])]
    found = [[] for _ in range(3)]
    device_x, device_y, device_one = engine.upload(x), engine.upload(y), engine.upload(one)

    def work(which):
        for _ in range(3):
            if which == 0:
                found[0].append(engine.multiply(device_x, device_y))
            elif which == 1:
                found[1].append(engine.rotate(device_one, 1))
            else:
                found[2].append(engine.linear_combination([device_x], [0.5]))

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, native in zip(found, expected, strict=True):
        assert len(results) == 3
        for result in results:
            assert_same(engine, result, native)


def test_staging_is_used_again_only_after_a_wait(party, monkeypatch):
    """More small arrays than the page-locked memory holds, copies running late; one that is larger than it."""

    class Late(HostDevice):
        """Copies from page-locked memory happen when somebody waits."""

        def __init__(self):
            super().__init__()
            self.pending = []

        def copy_in(self, source, array):
            self.pending.append((source, array))

        def download(self, array):
            for source, target in self.pending:
                super().copy_in(source, target)
            self.pending.clear()
            return super().download(array)

    monkeypatch.setattr("privtuner.cuda.words._STAGING_BYTES", 256)
    device = Late()
    words = Words(device, party.parameters._core)
    given = [np.arange(i, i + size, dtype=np.uint64) for i, size in enumerate([3, 20, 9, 1, 32, 33, 2, 31, 100])]
    arrays = [words._staging.put(array) for array in given]
    device.download(arrays[-1])
    for array, expected in zip(arrays, given, strict=True):
        assert np.array_equal(host(array), expected)


# What is refused


OTHER = ckks.Parameters.INSECURE(2)


def test_other_parameters(party):
    stranger = ckks.SecretKey(OTHER)
    with pytest.raises(CkksError) as expected:
        ckks.Evaluator(party.parameters, stranger.evaluation_keys())
    with pytest.raises(CkksError) as found:
        CudaEvaluator(HostDevice(), party.parameters, stranger.evaluation_keys())
    assert str(found.value) == str(expected.value)
    engine, other = party.engine(), CudaEvaluator(HostDevice(), OTHER)
    x = other.upload(stranger.encrypt(np.zeros((TOKENS, 1))))
    x.device = engine.device  # as if it were on the same one
    with pytest.raises(CkksError, match="does not fit an evaluator of"):
        engine.negate(x)
    with pytest.raises(CkksError, match="does not fit an evaluator of"):
        engine.upload(stranger.encrypt(np.zeros((TOKENS, 1))))


def test_tensors_that_are_elsewhere(party, operands):
    engine, x = party.engine(), operands[0]
    for operation in (
        lambda: engine.negate(x),
        lambda: engine.add(engine.upload(x), x),
        lambda: engine.multiply(x, engine.upload(x)),
        lambda: engine.download(x),
        lambda: engine.concatenate([x]),
    ):
        with pytest.raises(InputError, match="expected a tensor on cuda:0, got EncryptedTensor; upload it first"):
            operation()
    with pytest.raises(InputError, match=r"expected an encrypted tensor, got .*\.DeviceTensor; download it first"):
        party.native.negate(engine.upload(x))
    other = CudaEvaluator(HostDevice("cuda:1"), party.parameters)
    with pytest.raises(InputError, match="a tensor on cuda:1 cannot be used on cuda:0: download it there"):
        engine.add(engine.upload(x), other.upload(x))
    with pytest.raises(CkksError, match="a planned tensor holds no words"):
        engine.upload(party.native.planned(1, 1))

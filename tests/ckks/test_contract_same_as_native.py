"""Evaluators that take the native one's steps: its levels, scales, bounds and predictions, and refusals in its words.

On a device the words are the same too, bit for bit; clear values are within the predicted error of the decrypted ones.
"""

import inspect
import math

import numpy as np
import pytest

from cuda_host import HostDevice
from evaluators import DEVICES, FEATURES, OPERATIONS, TOKENS, Case, assert_same_words, device_of
from privtuner import ckks
from privtuner.ckks.protocol import EvaluatorProtocol
from privtuner.cuda.evaluator import CudaEvaluator
from privtuner.errors import CkksError, InputError

PARAMETERS = ckks.Parameters.INSECURE(3, ring_dimension=2048)
NATIVE = Case("native", PARAMETERS, [*(1 << i for i in range(10)), -3], conjugation=True, packing=True)
RNG = np.random.default_rng(0)
OPERANDS = [(RNG.uniform(-0.9, 0.9, (TOKENS, f)), {"level": level}) for f, level in ((3, 3), (3, 3), (1, 3), (3, 1))]
TENSORS = [NATIVE.encrypt(values, **options) for values, options in OPERANDS]


class Device:
    """On a device: what the native evaluator was given, uploaded."""

    def __init__(self, device, keys=NATIVE.keys, **options):
        self.evaluator = CudaEvaluator(device, PARAMETERS, keys, **options)

    def new(self, values, **options):
        return self.evaluator.upload(NATIVE.encrypt(values, **options))

    def operands(self):
        return [self.evaluator.upload(tensor) for tensor in TENSORS]

    def result(self, tensor):
        return NATIVE.decrypt(self.evaluator.download(tensor))

    def check(self, found, expected, complex):
        assert_same_words(self.evaluator, found, expected)


class Clear:
    """Clear numbers, exact or with noise."""

    def __init__(self, noise):
        self.evaluator = ckks.ClearEvaluator(PARAMETERS, noise)

    def new(self, values, **options):
        return self.evaluator.tensor(values, **options)

    def operands(self):
        return [self.new(values, **options) for values, options in OPERANDS]

    def result(self, tensor):
        return tensor.values

    def check(self, found, expected, complex):
        assert found.values.shape == found.shape
        assert found.values.dtype == (np.complex128 if complex else np.float64)
        off = NATIVE.decrypt(expected, complex=complex) - found.values
        several = 1 if self.evaluator.noise is None else 2
        assert np.abs(off.real).max() <= several * expected.budget().error
        assert np.abs(off.imag).max() <= several * expected.budget().error


@pytest.fixture(scope="module", params=[*DEVICES, "clear", "noisy"])
def other(request):
    if request.param in DEVICES:
        return Device(device_of(request.param))
    return Clear(None if request.param == "clear" else 5)


def check_same(other, name):
    expected = OPERATIONS[name](NATIVE.evaluator, *TENSORS)
    found = OPERATIONS[name](other.evaluator, *other.operands())
    check_results(other, name, *(made if isinstance(made, list) else [made] for made in (expected, found)))


def check_results(other, name, expected, found):
    for native, mine in zip(expected, found, strict=True):
        assert (mine.shape, mine.level, mine.bound) == (native.shape, native.level, native.bound)
        assert np.array_equal(mine.scale, native.scale)
        assert mine.budget() == native.budget()
        assert mine.nbytes == native.nbytes
        if isinstance(other, Device) or name != "pack_slot_sums":  # whose slots are no sums
            other.check(mine, native, "complex" in name)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(other, name):
    check_same(other, name)


def test_every_operation_is_covered():
    protocol = {name for name, _ in inspect.getmembers(EvaluatorProtocol, inspect.isfunction) if name[0] != "_"}
    random = {"refresh", "reveal"}  # in test_refresh.py
    assert protocol <= {name.split(",")[0].split()[0] for name in OPERATIONS} | {"rescale"} | random


def test_rescaling_divides_the_scale_alone(other):
    values, options = OPERANDS[0][0], {"scale": 2.0**58}
    expected = NATIVE.evaluator.rescale(NATIVE.encrypt(values, **options))
    if isinstance(other, Clear):
        found = other.evaluator.rescale(other.new(values, **options))
        assert np.abs(found.values - values).max() <= found.budget().error
        assert (found.level, found.budget()) == (expected.level, expected.budget())
        assert np.array_equal(found.scale, expected.scale)
    else:
        x = NATIVE.encrypt(values, **options)
        found = other.evaluator.rescale(other.evaluator.upload(x))
        check_results(other, "rescale", [NATIVE.evaluator.rescale(x)], [found])


@pytest.mark.parametrize("name", ["multiply", "multiply_plain", "linear_combination of many", "rotate", "dot"])
def test_thread_order_changes_nothing(name):
    check_same(Device(HostDevice(backwards=True)), name)


@pytest.mark.parametrize(
    "name",
    [
        *("multiply", "multiply by one feature", "multiply numbers", "multiply_plain", "rotate by several steps"),
        *("linear, 8 bits", "linear, 16 bits transposed", "linear_combination of many"),
    ],
)
def test_chunks_change_nothing(name):
    """A byte of work space: feature by feature, and a matrix limb by limb."""
    check_same(Device(HostDevice(), work_bytes=1), name)


WIDE = np.full((TOKENS, FEATURES), 0.5)
DEEP = ckks.fit(np.tanh, (-1, 1), 31)
REFUSED = {
    "no level for a number": lambda e, x, low, new: e.multiply(e.drop_level(x, 0), 0.5),
    "no level for a product": lambda e, x, low, new: e.square(e.drop_level(x, 0)),
    "no level for clear values": lambda e, x, low, new: e.multiply_plain(e.drop_level(x, 0), WIDE),
    "no level for a polynomial": lambda e, x, low, new: e.polynomial(low, ckks.Polynomial((0.0, 0.1, 0.2), "power")),
    "no level for a deep polynomial": lambda e, x, low, new: e.polynomial(x, DEEP),
    "a rescale that leaves nothing": lambda e, x, low, new: e.rescale(e.rescale(x)),
    "a higher level": lambda e, x, low, new: e.drop_level(low, 3),
    "a negative level": lambda e, x, low, new: e.drop_level(low, -1),
    "tokens": lambda e, x, low, new: e.add(x, new(WIDE[:2])),
    "features": lambda e, x, low, new: e.add(x, e.select(x, slice(0, 2))),
    "features of a product": lambda e, x, low, new: e.multiply(x, new(WIDE[:, :2])),
    "features of a dot product": lambda e, x, low, new: e.dot(x, e.select(x, slice(0, 1))),
    "nothing to concatenate": lambda e, x, low, new: e.concatenate([]),
    "a step": lambda e, x, low, new: e.select(x, slice(0, 3, 2)),
    "no features": lambda e, x, low, new: e.select(x, slice(2, 2)),
    "no error": lambda e, x, low, new: e.assume(x, 1.0, 0.0),
    "no bound": lambda e, x, low, new: e.assume(x, 0.0),
    "a matrix of another width": lambda e, x, low, new: e.linear(x, np.ones((2, 4))),
    "weights": lambda e, x, low, new: e.linear_combination([x, x], [1.0]),
    "weights that are not finite": lambda e, x, low, new: e.linear_combination([x], [np.inf]),
    "a constant that is not finite": lambda e, x, low, new: e.add(x, math.nan),
    "constants of another number": lambda e, x, low, new: e.multiply(x, [1.0, 2.0]),
    "constants of two dimensions": lambda e, x, low, new: e.multiply(x, np.ones((2, 2))),
    "scales": lambda e, x, low, new: e.add(x, new(WIDE, scale=2.0**39)),
    "clear values of another shape": lambda e, x, low, new: e.multiply_plain(x, np.ones((TOKENS, 2))),
    "clear values that are not finite": lambda e, x, low, new: e.multiply_plain(x, np.full(TOKENS, np.nan)),
    "clear values that are too large": lambda e, x, low, new: e.multiply_plain(x, np.full(TOKENS, 1e12)),
    "clear values that are too large, each": lambda e, x, low, new: e.multiply_plain(x, 1e12 * WIDE),
    "no polynomials": lambda e, x, low, new: e.polynomials(x, []),
    "polynomials of two bases": lambda e, x, low, new: e.polynomials(x, [DEEP, ckks.Polynomial((0.0, 0.5), "power")]),
    "no level for one of the polynomials": lambda e, x, low, new: e.polynomials(low, [DEEP, DEEP.derivative()]),
    "a polynomial's domain": lambda e, x, low, new: e.polynomial(x, ckks.Polynomial((0.0, 0.5), "power", (-0.5, 0.5))),
    "no room": lambda e, x, low, new: e.multiply(e.assume(e.drop_level(x, 1), 1e4), 1.0),
    "values above the bound": lambda e, x, low, new: new(WIDE, bound=0.25),
    "values above the scale": lambda e, x, low, new: new(np.full(PARAMETERS.slots, 0.9), scale=2.0**66),
    "values of NaN": lambda e, x, low, new: new(np.full((2, 2), np.nan)),
    "values of three dimensions": lambda e, x, low, new: new(np.ones((2, 2, 2))),
    "values of text": lambda e, x, low, new: new(np.array(["a"])),
    "too many tokens": lambda e, x, low, new: new(np.ones((PARAMETERS.slots + 1, 1))),
    "no such level": lambda e, x, low, new: new(WIDE, level=5),
    "a bound of text": lambda e, x, low, new: new(WIDE, bound="1"),
    "a level of text": lambda e, x, low, new: new(WIDE, level="1"),
    "no scale": lambda e, x, low, new: new(WIDE, scale=-1.0),
    "no room for a fresh tensor": lambda e, x, low, new: new(WIDE, bound=1e6, level=0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_the_same_words(other, name):
    with pytest.raises((CkksError, InputError)) as native:
        NATIVE.decrypt(REFUSED[name](NATIVE.evaluator, TENSORS[0], TENSORS[3], NATIVE.encrypt))
    x, _, _, low = other.operands()
    with pytest.raises((CkksError, InputError)) as found:
        other.result(REFUSED[name](other.evaluator, x, low, other.new))
    assert (found.type, str(found.value)) == (native.type, str(native.value))


KEYS = {
    "no relinearisation key": lambda e, x: e.multiply(x, x),
    "no rotation key": lambda e, x: e.rotate(x, 7),
    "no key among several": lambda e, x: e.rotate(x, [1, 2]),
    "no conjugation key": lambda e, x: e.conjugate(x),
    "no packing keys": lambda e, x: e.pack_slot_sums(x),
    "no sum keys": lambda e, x: e.sum_slots(x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KEYS)
def test_keys_that_are_missing_are_named_in_the_same_words(device, name):
    keys = NATIVE.secret.evaluation_keys(rotations=[1], relinearisation=False)
    with pytest.raises(CkksError) as native:
        KEYS[name](NATIVE.evaluator_with(keys), TENSORS[0])
    there = Device(device_of(device), keys)
    with pytest.raises(CkksError) as found:
        KEYS[name](there.evaluator, there.operands()[0])
    assert str(found.value) == str(native.value)

"""The clear evaluator: what the native one gives, refuses and predicts, on numbers that can be looked at."""

import copy
import inspect
import math
import pickle

import numpy as np
import pytest

from privtuner import ckks
from privtuner.ckks.protocol import EvaluatorProtocol
from privtuner.errors import CkksError, InputError

PARAMETERS = ckks.Parameters.INSECURE(4)
SECRET = ckks.SecretKey(PARAMETERS)
SLOTS, TOKENS, FEATURES = PARAMETERS.slots, 300, 5
STEPS = [1 << i for i in range(SLOTS.bit_length() - 1)]
NATIVE = ckks.Evaluator(PARAMETERS, SECRET.evaluation_keys(rotations=[*STEPS, -3], conjugation=True, packing=True))
CLEAR = ckks.ClearEvaluator(PARAMETERS)
NOISY = ckks.ClearEvaluator(PARAMETERS, noise=5)

RNG = np.random.default_rng(2)
X, Y = RNG.uniform(-1, 1, (2, TOKENS, FEATURES))
ONE = RNG.uniform(-1, 1, (TOKENS, 1))
ANGLES = np.exp(2j * np.pi * RNG.uniform(size=(TOKENS, FEATURES)))
WEIGHT = RNG.uniform(-1, 1, (4, FEATURES))
MATRIX = ckks.Matrix(WEIGHT.T, bits=16, per_row=False)

OPERATIONS = {
    "add": lambda e, x, y, one: e.add(x, y),
    "add, levels apart": lambda e, x, y, one: e.add(x, e.multiply(y, 0.5)),
    "add one feature": lambda e, x, y, one: e.add(one, x),
    "add a number": lambda e, x, y, one: e.add(x, 0.3),
    "subtract": lambda e, x, y, one: e.subtract(x, y),
    "subtract numbers": lambda e, x, y, one: e.subtract(x, np.arange(FEATURES)),
    "negate": lambda e, x, y, one: e.negate(x),
    "multiply": lambda e, x, y, one: e.multiply(x, y),
    "multiply one feature": lambda e, x, y, one: e.multiply(x, one),
    "multiply by numbers": lambda e, x, y, one: e.multiply(x, np.linspace(-2, 2, FEATURES)),
    "square": lambda e, x, y, one: e.square(x),
    "multiply_plain": lambda e, x, y, one: e.multiply_plain(x, Y),
    "multiply_plain, a value a token": lambda e, x, y, one: e.multiply_plain(x, ONE[:, 0]),
    "multiply_plain, complex": lambda e, x, y, one: e.multiply_plain(x, ANGLES),
    "dot": lambda e, x, y, one: e.dot(x, y),
    "sum_features": lambda e, x, y, one: e.sum_features(x),
    "concatenate": lambda e, x, y, one: e.concatenate([x, one, e.square(y)]),
    "select": lambda e, x, y, one: e.select(x, slice(1, 3)),
    "linear": lambda e, x, y, one: e.linear(x, WEIGHT),
    "linear, transposed": lambda e, x, y, one: e.linear(x, MATRIX, transpose=True),
    "linear_combination": lambda e, x, y, one: e.linear_combination([x, y], [0.5, -2], 0.1),
    "linear_combination a feature": lambda e, x, y, one: e.linear_combination([x, y], [Y[0], Y[1]], Y[2]),
    "polynomial": lambda e, x, y, one: e.polynomial(x, ckks.approximate("gelu", (-1.0, 3.0), 7)),
    "polynomial in powers": lambda e, x, y, one: e.polynomial(x, ckks.Polynomial((0.1, -0.2, 0.0, 0.3), "power")),
    "rotate": lambda e, x, y, one: e.rotate(x, -3),
    "rotate, several steps": lambda e, x, y, one: e.concatenate(e.rotate(x, [0, 1, -3])),
    "conjugate": lambda e, x, y, one: e.conjugate(x),
    "conjugate, complex": lambda e, x, y, one: e.conjugate(e.multiply_plain(x, ANGLES)),
    "sum_slots": lambda e, x, y, one: e.sum_slots(x),
    "rescale": lambda e, x, y, one: e.rescale(e.linear(x, ckks.Matrix(2.0**40 * WEIGHT, bits=16))),
    "drop_to": lambda e, x, y, one: e.drop_to(x, 2),
    "assume": lambda e, x, y, one: e.assume(e.multiply(x, y), 1.0),
    "pack_slot_sums": lambda e, x, y, one: e.pack_slot_sums(x),
}


def agree(native, clear):
    assert (native.shape, native.level, native.bound, native.nbytes) == (
        clear.shape,
        clear.level,
        clear.bound,
        clear.nbytes,
    )
    assert (native.scale == clear.scale).all()
    assert native.budget() == clear.budget()


@pytest.mark.parametrize("name", set(OPERATIONS) - {"rescale", "pack_slot_sums"})
def test_an_operation_is_the_native_one(name):
    operation = OPERATIONS[name]
    native = operation(NATIVE, *map(SECRET.encrypt, (X, Y, ONE)))
    exact = operation(CLEAR, *map(CLEAR.tensor, (X, Y, ONE)))
    noisy = operation(NOISY, *map(NOISY.tensor, (X, Y, ONE)))
    for clear in (exact, noisy):
        agree(native, clear)
        assert clear.values.shape == clear.shape
        assert clear.values.dtype == (np.complex128 if "complex" in name else np.float64)
    found = SECRET.decrypt(native, complex="complex" in name)
    error = native.budget().error
    assert np.abs((found - exact.values).real).max() <= error
    assert np.abs((found - exact.values).imag).max() <= error
    assert 0 < np.abs((noisy.values - exact.values).real).max() <= error


def test_every_operation_is_covered():
    protocol = {name for name, _ in inspect.getmembers(EvaluatorProtocol, inspect.isfunction) if name[0] != "_"}
    assert protocol <= {name.split(",")[0].split()[0] for name in OPERATIONS}


def test_rescaling_divides_the_scale_alone():
    native, clear = NATIVE.rescale(SECRET.encrypt(X, scale=2.0**60)), CLEAR.rescale(CLEAR.tensor(X, scale=2.0**60))
    agree(native, clear)
    assert (clear.values == X).all()
    assert np.abs(SECRET.decrypt(native) - X).max() <= native.budget().error


@pytest.mark.parametrize("features", [1, 5, 8, 1030])
def test_packed_sums(features):
    x = RNG.uniform(-1, 1, (TOKENS, features))
    native = NATIVE.pack_slot_sums(SECRET.encrypt(x, level=1))
    exact = CLEAR.pack_slot_sums(CLEAR.tensor(x, level=1))
    noisy = NOISY.pack_slot_sums(NOISY.tensor(x, level=1))
    agree(native, exact)
    agree(native, noisy)
    np.testing.assert_allclose(exact.sums(features), x.sum(0), atol=1e-11)
    error = native.budget().error
    assert np.abs(SECRET.decrypt_sums(native, features) - x.sum(0)).max() <= error
    assert 0 < np.abs(noisy.sums(features) - x.sum(0)).max() <= error
    # The slots are those of the ciphertext: what is done to them afterwards is done to the sums.
    slots = SECRET.decrypt(NATIVE.assume(native, 1e6), complex=True)
    np.testing.assert_allclose(slots, exact.values, atol=1e-6)
    twice = CLEAR.multiply(CLEAR.assume(CLEAR.add(exact, exact), 200.0), 0.75)
    np.testing.assert_allclose(twice.sums(features), 1.5 * x.sum(0), atol=1e-11)


def test_slots_without_a_token_count_as_in_ciphertexts():
    def circuit(evaluator, x):
        return evaluator.rotate(evaluator.add(x, 1.0), -3)

    native, clear = circuit(NATIVE, SECRET.encrypt(X)), circuit(CLEAR, CLEAR.tensor(X))
    assert np.abs(SECRET.decrypt(native) - clear.values).max() <= native.budget().error
    assert (clear.values[:3] == 1.0).all()
    native = NATIVE.pack_slot_sums(NATIVE.add(SECRET.encrypt(X), 1.0))
    clear = CLEAR.pack_slot_sums(CLEAR.add(CLEAR.tensor(X), 1.0))
    np.testing.assert_allclose(clear.sums(FEATURES), X.sum(0) + SLOTS, rtol=1e-12)
    assert np.abs(SECRET.decrypt_sums(native, FEATURES) - clear.sums(FEATURES)).max() <= native.budget().error


DEEP = ckks.fit(np.tanh, (-1, 1), 31)
REFUSED = {
    "tokens": lambda e, x, new: e.add(x, new(X[:7])),
    "features": lambda e, x, new: e.multiply(x, new(X[:, :2])),
    "features of a dot product": lambda e, x, new: e.dot(x, new(X[:, :2])),
    "constants": lambda e, x, new: e.add(x, [1.0, 2.0]),
    "constants of two dimensions": lambda e, x, new: e.multiply(x, np.ones((2, 2))),
    "a constant of NaN": lambda e, x, new: e.add(x, math.nan),
    "clear values": lambda e, x, new: e.multiply_plain(x, np.ones((TOKENS, 2))),
    "scales": lambda e, x, new: e.add(x, new(X, scale=2.0**39)),
    "no level for a product": lambda e, x, new: e.square(e.drop_to(x, 0)),
    "no level for a number": lambda e, x, new: e.multiply(e.drop_to(x, 0), 0.5),
    "no level for a polynomial": lambda e, x, new: e.polynomial(x, DEEP),
    "a domain that is too small": lambda e, x, new: e.polynomial(x, ckks.approximate("tanh", (-0.5, 0.5), 3)),
    "a level upwards": lambda e, x, new: e.drop_to(e.drop_to(x, 1), 2),
    "no features": lambda e, x, new: e.select(x, slice(2, 2)),
    "features apart": lambda e, x, new: e.select(x, slice(0, 4, 2)),
    "a matrix of another width": lambda e, x, new: e.linear(x, np.ones((2, 3))),
    "weights": lambda e, x, new: e.linear_combination([x, x], [1.0]),
    "nothing to concatenate": lambda e, x, new: e.concatenate([]),
    "no bound": lambda e, x, new: e.assume(x, 0.0),
    "no room": lambda e, x, new: e.multiply(e.assume(e.drop_to(x, 1), 1e4), 1.0),
    "values above the bound": lambda e, x, new: new(X, bound=0.5),
    "values above the scale": lambda e, x, new: new(X, scale=2.0**70),
    "clear values above the scale": lambda e, x, new: e.multiply_plain(x, np.full(TOKENS, 2.0**30)),
    "clear values above the scale, each": lambda e, x, new: e.multiply_plain(x, 1e8 * X),
    "clear values of NaN": lambda e, x, new: e.multiply_plain(x, np.full((TOKENS, 1), np.nan)),
    "values of NaN": lambda e, x, new: new(np.full((2, 2), np.nan)),
    "too many tokens": lambda e, x, new: new(np.ones((SLOTS + 1, 1))),
    "no such level": lambda e, x, new: new(X, level=5),
    "a bound of text": lambda e, x, new: new(X, bound="1"),
    "a level of text": lambda e, x, new: new(X, level="1"),
    "no scale": lambda e, x, new: new(X, scale=-1.0),
    "values of three dimensions": lambda e, x, new: new(np.ones((2, 2, 2))),
    "values of text": lambda e, x, new: new(np.array(["a"])),
    "no room for a fresh tensor": lambda e, x, new: new(X, bound=1e6, level=0),
    "no count of sums": lambda e, x, new: (SECRET.decrypt_sums if e is NATIVE else ckks.ClearTensor.sums)(
        e.pack_slot_sums(x), 0
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_the_same_words(name):
    def result(evaluator, new):
        made = REFUSED[name](evaluator, new(X), new)
        return SECRET.decrypt(made) if evaluator is NATIVE else made.values

    with pytest.raises((CkksError, InputError)) as native:
        result(NATIVE, SECRET.encrypt)
    for evaluator in (CLEAR, NOISY):
        with pytest.raises((CkksError, InputError)) as clear:
            result(evaluator, evaluator.tensor)
        assert (clear.type, str(clear.value)) == (native.type, str(native.value))


@pytest.mark.parametrize("evaluator", [CLEAR, NOISY], ids=["exact", "noisy"])
def test_a_promise_that_does_not_hold(evaluator):
    x = evaluator.tensor(np.array([[0.9, 0.2], [0.4, -0.6], [0.0, 0.0]]))
    assert evaluator.assume(x, 0.91).bound == 0.91
    with pytest.raises(
        CkksError, match=r"assume: 2 of 6 values, the first of them at \[0, 0\], are beyond the bound of 0.5"
    ):
        evaluator.assume(x, 0.5)
    inverse = ckks.approximate("inverse", (0.1, 1.0), 3)
    with pytest.raises(CkksError, match=r"polynomial: 1 of 6 values, .* \[1, 1\], are outside the domain \[0.1, 1\]"):
        evaluator.polynomial(x, inverse)
    # Where a mask leaves nothing, and where there is no token, the value is zero: no domain is left by that.
    y = evaluator.polynomial(evaluator.multiply_plain(x, np.array([[1, 1], [1, 0], [1, 1]])), inverse)
    assert np.abs(y.values[2] - inverse(0.0)).max() <= y.budget().error
    with pytest.raises(CkksError, match=r"negate: 3 of 6 values, .* \[1, 1\], are beyond the bound of 9.36911"):
        evaluator.negate(y)
    assert (evaluator.negate(evaluator.assume(y, 20.0)).values == -y.values).all()
    # The prediction is of real arguments.
    turned = evaluator.multiply_plain(evaluator.tensor(np.full((3, 1), 0.5)), np.full((3, 1), 1j))
    with pytest.raises(CkksError, match="3 of 3 values"):
        evaluator.polynomial(turned, ckks.approximate("tanh", (-1.0, 1.0), 3))


def test_noise_is_what_is_predicted():
    x = NOISY.tensor(X)
    deviation = x.scale * 0 + SECRET.encrypt(X)._core.noise / x.scale
    np.testing.assert_allclose((x.values - X).std(0), deviation, rtol=0.2)  # of 300 values: 5 times 1 / sqrt(600)
    again = ckks.ClearEvaluator(PARAMETERS, noise=11)
    first, second = again.tensor(X), ckks.ClearEvaluator(PARAMETERS, noise=11).tensor(X)
    assert (first.values == second.values).all()
    assert (again.tensor(X).values != first.values).all()
    # An operation that adds no error adds no noise.
    assert (again.negate(first).values == -first.values).all()
    assert (again.assume(first, 2.0).values == first.values).all()
    assert (again.rotate(first, 1).values[:-1] != first.values[1:]).all()


def test_real_values_of_complex_tensors_have_noise_in_both_parts():
    noise = NOISY.tensor(ANGLES * 0.5).values - ANGLES * 0.5
    assert noise.real.std() == pytest.approx(noise.imag.std(), rel=0.1)


def test_tensors_of_others_are_refused():
    x = CLEAR.tensor(X)
    with pytest.raises(InputError, match=r"expected a clear tensor, got privtuner.ckks.tensor.EncryptedTensor"):
        CLEAR.add(x, SECRET.encrypt(X))
    with pytest.raises(InputError, match="expected an encrypted tensor, got privtuner.ckks.clear.ClearTensor"):
        NATIVE.negate(x)
    with pytest.raises(CkksError, match="does not fit an evaluator of"):
        ckks.ClearEvaluator(ckks.Parameters.INSECURE(3)).negate(x)


def test_sums_of_a_tensor_that_holds_none():
    with pytest.raises(InputError, match="5 packed sums do not make 5 features"):
        CLEAR.tensor(X).sums(5)
    packed = CLEAR.pack_slot_sums(CLEAR.tensor(X))
    for count in (0, SLOTS * 2 + 1):
        with pytest.raises(InputError, match=f"{count} packed sums do not make 1 features"):
            packed.sums(count)


def test_values_cannot_be_changed_and_change_nothing():
    mine = X.copy()
    x = CLEAR.tensor(mine)
    mine[:] = 0
    assert (x.values == X).all()
    with pytest.raises(ValueError, match="read-only"):
        x.values[0, 0] = 1.0
    assert repr(x) == "<clear tensor (300, 5), level 4, scale 2^40.0, |value| <= 1, 29.9 bits>"
    assert copy.deepcopy(x) is x
    with pytest.raises(InputError, match="pickle its values"):
        pickle.dumps(x)


def test_an_evaluator_can_be_pickled():
    again = pickle.loads(pickle.dumps(NOISY))
    assert (again.parameters, again.noise, again.slots, again.keys) == (PARAMETERS, 5, SLOTS, None)
    assert PARAMETERS.name in repr(again)

"""The clear evaluator: sums, promises and noise. What it shares with the native one is in the contract."""

import copy
import pickle

import numpy as np
import pytest

from privtuner import ckks
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
ANGLES = np.exp(2j * np.pi * RNG.uniform(size=(TOKENS, FEATURES)))


def agree(native, clear):
    assert (native.shape, native.level, native.bound, native.nbytes) == (
        clear.shape,
        clear.level,
        clear.bound,
        clear.nbytes,
    )
    assert (native.scale == clear.scale).all()
    assert native.budget() == clear.budget()


def test_noise_is_part_of_every_result():
    for noisy, exact in zip(*((e.square(e.tensor(X)), e.rotate(e.tensor(X), 3)) for e in (NOISY, CLEAR)), strict=True):
        assert 0 < np.abs(noisy.values - exact.values).max() <= exact.budget().error


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


@pytest.mark.parametrize("evaluator", [CLEAR, NOISY], ids=["exact", "noisy"])
def test_a_promise_that_does_not_hold(evaluator):
    x = evaluator.tensor(np.array([[0.9, 0.2], [0.4, -0.6], [0.0, 0.0]]))
    assert evaluator.assume(x, 0.91).bound == 0.91
    assert evaluator.assume(x, 0.91, 1e-12).budget().error == pytest.approx(1e-12)
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
    with pytest.raises(InputError) as native:
        SECRET.decrypt_sums(NATIVE.pack_slot_sums(SECRET.encrypt(X)), 0)
    with pytest.raises(InputError) as clear:
        packed.sums(0)
    assert str(clear.value) == str(native.value)


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

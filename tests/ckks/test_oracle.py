"""The same circuits by another library, an independent implementation of the scheme (TenSEAL on Microsoft SEAL)."""

import numpy as np
import pytest

from privtuner import ckks

tenseal = pytest.importorskip("tenseal", reason="TenSEAL is not installed: no second implementation to compare with")

SLOTS = 8192
COEFFICIENTS = (0.5, 0.3, -0.2, 0.1, 0.05, -0.04, 0.03, 0.02)


@pytest.fixture(scope="module")
def other():
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 2 * SLOTS, coeff_mod_bit_sizes=[60, 40, 40, 40, 60])
    context.global_scale = 2.0**40
    context.generate_galois_keys()
    return context


@pytest.fixture(scope="module")
def ours():
    parameters = ckks.Parameters.secure(3, 40, ring_dimension=2 * SLOTS)
    secret = ckks.SecretKey(parameters)
    return secret, ckks.Evaluator(parameters, secret.evaluation_keys(rotations=(SLOTS // 2, SLOTS // 4)))


def values(seed):
    return np.random.default_rng(seed).uniform(-1, 1, SLOTS)


def drifts(bits, count):
    """Of SEAL's primes, the largest below 2^bits that are 1 modulo 2 N: how far each is from 2^bits, relatively."""
    found, q = [], 2**bits + 1
    while len(found) < count:
        q -= 4 * SLOTS
        if all(pow(base, q - 1, q) == 1 for base in (2, 3, 5, 7, 11)):
            found.append(1 - q / 2**bits)
    return found


# Here: the worst of 8,192 slots, some 16 standard deviations of a rounding that the secret multiplies, at a scale of
# 2^40, for each of up to eight errors that add up. There as well; and scales of different levels are taken to be the
# same, so that each rescale leaves its prime's distance from 2^40, in both factors of the product that follows.
OURS = 8 * 16 * np.sqrt(SLOTS * 2 * SLOTS / 18) / 2.0**40
THEIRS = 2 * sum(drifts(40, 3)) + OURS


def compare(want, tensor, secret, found):
    mine = secret.decrypt(tensor)[:, 0]
    assert np.abs(mine - want).max() <= tensor.budget().error <= OURS
    assert np.abs(found - want).max() <= THEIRS
    assert np.abs(found - mine).max() <= OURS + THEIRS


def test_sums_and_products(ours, other):
    secret, engine = ours
    a, b = values(1), values(2)
    x, y = secret.encrypt(a), secret.encrypt(b)
    p, q = tenseal.ckks_vector(other, a), tenseal.ckks_vector(other, b)
    compare(a + b, engine.add(x, y), secret, np.array((p + q).decrypt()))
    compare(a - b, engine.subtract(x, y), secret, np.array((p - q).decrypt()))
    compare(a * b, engine.multiply(x, y), secret, np.array((p * q).decrypt()))
    compare(a * b * a, engine.multiply(engine.multiply(x, y), x), secret, np.array((p * q * p).decrypt()))
    compare(0.7 * a, engine.multiply(x, 0.7), secret, np.array((p * 0.7).decrypt()))
    compare(a * b, engine.multiply_plain(x, b), secret, np.array((p * b.tolist()).decrypt()))


def test_rotations(ours, other):
    secret, engine = ours
    a = values(3)
    # TenSEAL shows rotations through the sum of a vector.
    total = secret.encrypt(a)
    want = a
    for step in (SLOTS // 2, SLOTS // 4):
        total = engine.add(total, engine.rotate(total, step))
        want = want + np.roll(want, -step)
    assert np.abs(secret.decrypt(total)[:, 0] - want).max() <= total.budget().error <= OURS
    assert abs(tenseal.ckks_vector(other, a).sum().decrypt()[0] - want[: SLOTS // 4].sum()) <= SLOTS * THEIRS


def test_a_polynomial(ours, other):
    secret, engine = ours
    a = values(4)
    polynomial = ckks.Polynomial(COEFFICIENTS, "power")
    found = tenseal.ckks_vector(other, a).polyval(list(COEFFICIENTS))
    compare(
        np.polynomial.polynomial.polyval(a, COEFFICIENTS),
        engine.polynomial(secret.encrypt(a), polynomial),
        secret,
        np.array(found.decrypt()),
    )

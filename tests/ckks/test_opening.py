"""Openings: exact modulo q, nothing for the owner to see, one use of a mask."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scipy import stats

from loops import each
from privtuner import ckks
from privtuner.ckks.opening import Opening
from privtuner.errors import InputError, MessageError

PARAMETERS = ckks.Parameters.INSECURE(2)
Q, COUNT = PARAMETERS.primes[0], 16
EV = ckks.Evaluator(PARAMETERS)


@pytest.fixture(scope="module")
def secret():
    return ckks.SecretKey(PARAMETERS)


@pytest.fixture(scope="module")
def public_key(secret):
    return secret.public_key()


def packed(secret, numbers, level=0):
    return EV.drop_level(secret.encrypt_packed(numbers, bound=8.0), level)


def answered(secret, opening, noise):
    return secret.open(opening.masked, noise).astype("<u8").tobytes()


def test_numbers_and_noise_come_back_exactly(secret, public_key):
    numbers = np.random.default_rng(0).uniform(-8, 8, (COUNT, 3))
    tensor = packed(secret, numbers)
    noise = np.random.default_rng(1).integers(-Q // 8, Q // 8, numbers.shape)
    # What the ciphertext holds, to the unit: with no noise, and the same ciphertext opened again with some.
    first, again = (Opening(public_key, tensor, COUNT) for _ in range(2))
    plain = first.numbers(answered(secret, first, 0 * noise))
    noisy = again.numbers(answered(secret, again, noise))
    # They differ in the two encryptions of zero alone: v e + e0 + e1 s, of which none has a coefficient above 43 N.
    units = np.rint((noisy - plain) * tensor.scale - noise)
    assert np.abs(units).max() <= 2 * 43 * PARAMETERS.ring_dimension
    assert np.abs(plain - numbers).max() < 1e-6


def test_values_up_to_half_the_modulus_do_not_wrap(secret, public_key):
    tensor = packed(secret, np.zeros((COUNT, 1)))
    opening = Opening(public_key, tensor, COUNT)
    noise = np.full((COUNT, 1), Q // 2 - 2**20)  # the error is below 43 N
    noise[::2] *= -1
    found = opening.numbers(answered(secret, opening, noise)) * tensor.scale
    assert np.abs(found - noise).max() < 2**20


def test_what_the_owner_sees_is_uniform_whatever_is_opened(secret, public_key):
    """Chi-square of the top bits of 4,096 masked numbers that are all zero, and of numbers that are all eight."""
    seen = []
    for value in (0.0, 8.0):
        tensor = packed(secret, np.full((PARAMETERS.ring_dimension, 4), value))
        masked = Opening(public_key, tensor, PARAMETERS.ring_dimension).masked
        words = secret.open(masked, np.zeros((PARAMETERS.ring_dimension, 4), np.int64))
        counts = np.bincount((words.ravel() // np.uint64(Q // 64 + 1)).astype(int), minlength=64)
        assert stats.chisquare(counts).pvalue > 1e-6
        seen.append(words)
        # Both components are new: nothing of the ciphertext that was opened is left in what is sent.
        assert (masked.residues(0)[:, 1] != tensor.residues(0)[:, 1]).mean() > 0.999
    assert (seen[0] != seen[1]).all()


def test_masks_are_drawn_anew(secret, public_key):
    tensor = packed(secret, np.zeros((COUNT, 1)))
    one, two = (Opening(public_key, tensor, COUNT) for _ in range(2))
    assert (one._mask != two._mask).all()
    one.numbers(answered(secret, one, np.zeros((COUNT, 1), np.int64)))
    assert not one._mask.any()  # wiped once it was taken off


@each(
    ("answer", "message"),
    [
        (bytes(8 * COUNT - 8), "120 bytes, 128 are due"),
        (bytes(8 * COUNT + 8), "136 bytes, 128 are due"),
        (b"\xff" * 8 * COUNT, "words that are no residues"),
        (Q.to_bytes(8, "little") * COUNT, "words that are no residues"),
    ],
)
def test_answers_that_are_none(secret, public_key, answer, message):
    opening = Opening(public_key, packed(secret, np.zeros((COUNT, 1))), COUNT)
    with pytest.raises(MessageError, match=message):
        opening.numbers(answer)


def test_what_cannot_be_opened(secret, public_key):
    numbers = np.zeros((COUNT, 1))
    with pytest.raises(InputError, match="cannot be opened: numbers at level 0 can"):
        Opening(public_key, packed(secret, numbers, level=1), COUNT)
    with pytest.raises(InputError, match="cannot be opened"):
        Opening(public_key, EV.planned(EV.slots, 1, level=0), COUNT)
    with pytest.raises(InputError, match="2048 numbers do not fit"):
        Opening(public_key, packed(secret, numbers), 2 * PARAMETERS.ring_dimension)
    opening = Opening(public_key, packed(secret, numbers), COUNT)
    with pytest.raises(InputError, match=r"noise of shape \(16, 2\) for 1 ciphertexts"):
        secret.open(opening.masked, np.zeros((COUNT, 2), np.int64))
    with pytest.raises(InputError, match="at level 0"):
        secret.open(packed(secret, numbers, level=1), np.zeros((COUNT, 1), np.int64))
    with pytest.raises(InputError, match="cannot be pickled"):
        pickle.dumps(opening)

"""Clipping on ciphertexts: the formula on clear numbers, the same on real ciphertexts, and what the owner refuses."""

from __future__ import annotations

import numpy as np
import pytest

from loops import each
from privtuner import ckks
from privtuner.ckks.circuits.functions import inverse_square_root_error
from privtuner.errors import CkksError, InputError
from privtuner.sealed import clipping
from privtuner.sealed.adapters import GRADIENT_BOUND
from privtuner.sealed.clipping import GAIN, NORM_FLOOD, NORM_LEVEL, OPENED_LEVEL, WIDEST, check_norm, clip
from refreshing import Owner

PARAMETERS = ckks.Parameters.INSECURE(6)
COUNT, CIPHERTEXTS = 16, 3
RELATIVE = inverse_square_root_error(clipping._DOMAIN, clipping._DEGREE, clipping._STEPS)
"""By how much the norm is too small: the inverse root alone is not exact."""


def gradient(norm: float) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(COUNT, CIPHERTEXTS))
    return values * norm / np.linalg.norm(values)


def clipped(values: np.ndarray, limit: float) -> np.ndarray:
    u = values / limit
    return GAIN * u / np.sqrt(1 + np.linalg.norm(u) ** 2)


def unpacked(ev, tensor):
    return np.stack([ev.select(tensor, slice(i, i + 1)).sums(COUNT) for i in range(tensor.shape[1])], axis=1)


@each(limit=[0.5, 3.0], ratio=[0.0, 0.3, 31.9], noise=[None, 1])
def test_the_clear_circuit_is_the_formula_and_its_norm_stays_below_the_gain(limit, ratio, noise):
    ev = ckks.ClearEvaluator(PARAMETERS, noise)
    values = gradient(ratio * limit)
    numbers, square = clip(ev, ev.packed(values, bound=GRADIENT_BOUND, level=2), limit)
    found, exact = unpacked(ev, numbers), clipped(values, limit)
    # Noise of the refresh, divided by the limit; of the narrow factor, 2^-17 an operation.
    small = 1e-9 if noise is None else 2.0**-15 / min(limit, 1.0)
    assert np.abs(found - exact).max() <= RELATIVE * np.abs(exact).max() + small
    assert np.linalg.norm(found) <= GAIN * (1 + small)
    assert abs(square.sums(1)[0] - np.linalg.norm(found) ** 2) <= small * 4
    assert (numbers.level, square.level) == (0, NORM_LEVEL)
    assert numbers.scale == pytest.approx(PARAMETERS.scale(OPENED_LEVEL))
    assert square.scale == pytest.approx(PARAMETERS.scale(NORM_LEVEL))


def test_the_inverse_root_is_never_too_large():
    """On all of its domain, which is what bounds the norm: on a grid that is finer than the polynomial turns."""
    x = np.linspace(0, WIDEST**2, 20_001)
    inside = (1 + x) / clipping._TOP
    ev = ckks.ClearEvaluator(ckks.Parameters.INSECURE(12, ring_dimension=1 << 16))
    y = ckks.circuits.inverse_square_root(
        ev,
        ev.tensor(inside),
        clipping._DOMAIN,
        clipping._DEGREE,
        clipping._STEPS,
        GAIN / clipping._TOP**0.5,
        narrow=True,
    ).values[:, 0]
    exact = GAIN / np.sqrt(1 + x)
    assert (y <= exact * (1 + 1e-12)).all()
    assert (y >= exact * (1 - RELATIVE - 1e-12)).all()


def test_gradients_beyond_the_widest_are_not_numbers():
    ev = ckks.ClearEvaluator(PARAMETERS)
    with pytest.raises(CkksError, match="beyond the bound"):
        clip(ev, ev.packed(gradient(1.1 * WIDEST), bound=GRADIENT_BOUND, level=2), 1.0)


@pytest.fixture(scope="module")
def parties():
    """The owner's key, and the server's evaluator, whose refreshes come back at the levels that were announced."""
    secret = ckks.SecretKey(PARAMETERS)
    dry = ckks.Evaluator(PARAMETERS)
    clip(dry, planned(dry), 1.0)
    levels = [level for _, level in dry._core.refreshes()]
    rotations = ckks.keys.rotations_of(PARAMETERS, dry._core.needed_elements())
    keys = secret.evaluation_keys(rotations=rotations, conjugation=True, packing=True)

    def server():
        owner, left = Owner(secret, 0), list(levels)

        def exchange(messages):
            owner.level = left.pop(0)
            return owner.exchange(messages)

        return ckks.Evaluator(PARAMETERS, keys, ckks.Refresher(secret.public_key(), exchange))

    return secret, server


def planned(ev):
    core = ev._core.planned_packed(np.zeros((COUNT, CIPHERTEXTS)), 2, GRADIENT_BOUND, np.zeros(0))
    return ckks.EncryptedTensor(core, PARAMETERS)


def opened(parties, values, limit=1.0):
    secret, server = parties
    return secret, *clip(server(), secret.encrypt_packed(values, bound=GRADIENT_BOUND, level=2), limit)


def test_on_ciphertexts_it_is_that_of_clear_numbers(parties):
    values = gradient(2.5)
    secret, numbers, square = opened(parties, values, 2.0)
    found, exact = secret.decrypt_packed(numbers, COUNT), clipped(values, 2.0)
    assert np.abs(found - exact).max() <= RELATIVE * np.abs(exact).max() + 2.0**-15
    received = ckks.EncryptedTensor.from_bytes(PARAMETERS, square.to_bytes(), expected(square))
    told = secret.decrypt_packed(received, 1)[0, 0]
    assert abs(told - np.linalg.norm(exact) ** 2) <= NORM_FLOOD + 2.0**-8
    check_norm(secret, received)


def expected(square):
    """As `Public.square`."""
    ev = ckks.Evaluator(PARAMETERS)
    noise = NORM_FLOOD * PARAMETERS.scale(NORM_LEVEL) * PARAMETERS.slots**0.5
    return ev.planned(ev.slots, 1, bound=1.0, level=square.level, noise=noise)


@each(norm=[0.1, 1.0, 31.0])
def test_the_flood_hides_the_norm_up_to_some_bits(parties, norm):
    """What the owner is told is spread over the flood, not the square itself."""
    secret, _, square = opened(parties, gradient(norm))
    exact = np.linalg.norm(clipped(gradient(norm), 1.0)) ** 2
    coefficients = secret.decrypt_packed(square, 2 * PARAMETERS.slots)[1:, 0]  # all that is not the square is zero
    assert 0.9 * NORM_FLOOD / 2 < np.abs(coefficients).max() <= NORM_FLOOD * 1.001
    assert abs(secret.decrypt_packed(square, 1)[0, 0] - exact) <= NORM_FLOOD * 1.001 + 2.0**-8


@each(ratio=[1.5, 8.0, 1e3, 1e6])
def test_a_gradient_that_was_not_clipped_is_not_opened(parties, ratio):
    """From beyond the widest, by far, to values that wrap around the modulus."""
    secret, _, square = opened(parties, gradient(200.0), 200.0 / WIDEST / ratio)
    with pytest.raises(CkksError, match=r"cannot be clipped: it is more than 32 times the clipping norm.*--clip"):
        check_norm(secret, square)


@each(limit=[0.0, -1.0, np.inf, np.nan])
def test_norms_out_of_range_are_refused(limit):
    ev = ckks.Evaluator(PARAMETERS)
    with pytest.raises(InputError, match="the clipping norm is"):
        clip(ev, planned(ev), limit)

"""Adapters in the clear at the server: folded, their gradients, their steps, their state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from encoders import Counting, clear_gradient, clear_inputs, matrices, open_case, planned, unpacked
from loops import each
from privtuner.errors import InputError, MessageError
from privtuner.sealed import Shape
from privtuner.sealed.adapters import take_step
from privtuner.sealed.clear_adapters import ClearAdapters, lock_numbers, numbers_limit, unlock_numbers
from privtuner.sealed.locker import Locker
from privtuner.sealed.public import Public

LOCKER = Locker(bytes(32), b"run")


@pytest.fixture(scope="module")
def case():
    return open_case()


def given(case, seed=2, factor=1.0):
    numbers = case.model.public.adapter_columns(matrices(case.shape, seed)) * factor
    return ClearAdapters(numbers, np.zeros_like(numbers))


def test_passes_are_those_of_the_clear_model_and_of_the_plan(case):
    """Pooled vectors and gradients of other adapters than those that were planned with, and every refresh."""
    public, adapters = case.model.public, given(case)
    ev = Counting(case.model.parameters, 3)
    pooled, kept = case.model.forward(ev, *clear_inputs(case, ev), adapters, keep=True)
    assert ev.seen() == planned(public.forward)
    gradients = case.model.backward(ev, kept, clear_gradient(case, ev), adapters)
    numbers, square = case.model.clip(ev, gradients, 8.0)
    assert ev.seen() == planned(public.backward)
    assert (numbers.level, square.level) == (public.opened.level, public.square.level)
    assert numbers.scale == pytest.approx(public.opened.scale)
    assert square.scale == pytest.approx(public.square.scale)

    exact, slopes = case.exact(matrices(case.shape))
    n = len(case.embeddings)
    assert np.abs(public.read_pooled(pooled.values)[:n] - exact).max() < public.pooled.budget().error
    found = public.adapter_matrices(unpacked(case, gradients))
    for place, (a, b) in slopes.items():
        strength = case.shape.strength(place[1])
        for got, wanted in zip((found[place][0], found[place][1] * strength**2), (a, b), strict=True):
            assert np.abs(got - wanted).max() < 5e-3 * np.linalg.norm(wanted)


def test_a_step_is_that_of_encrypted_adapters(case):
    rng, before = np.random.default_rng(0), given(case)
    before = replace(before, velocity=rng.normal(size=before.values.shape))
    g = rng.normal(size=before.values.shape)
    after = before.step(case.shape, g, 0.01, 0.9)
    ev = Counting(case.model.parameters)

    def packed(x, bound):
        return ev.packed(x, bound=bound)

    from privtuner.sealed import EncryptedAdapters

    encrypted = EncryptedAdapters(packed(before.values, 16.0), packed(before.velocity, 256.0))
    other = take_step(ev, case.shape, encrypted, ev.packed(g, bound=256.0, level=2), 0.01, 0.9, 12)
    assert np.abs(unpacked(case, other.values) - after.values).max() < 1e-6
    assert np.abs(unpacked(case, other.velocity) - after.velocity).max() < 1e-6


def test_refusals_of_a_step(case):
    adapters = given(case)
    with pytest.raises(InputError, match="rate = -1"):
        adapters.step(case.shape, adapters.values, -1.0, 0.5)
    with pytest.raises(InputError, match=r"gradients of shape \(1, 1\)"):
        adapters.step(case.shape, np.zeros((1, 1)), 1.0, 0.5)


def test_other_adapters_than_the_shapes_are_refused(case):
    ev = Counting(case.model.parameters)
    from encoders import clear_adapters

    encrypted = clear_adapters(case, ev, matrices(case.shape))
    with pytest.raises(InputError, match="the adapters of this model are server: pass others"):
        case.model.forward(ev, *clear_inputs(case, ev), encrypted)
    with pytest.raises(InputError, match="this model takes adapters"):
        case.model.forward(ev, *clear_inputs(case, ev), None)


def test_fresh_adapters_change_nothing_and_are_drawn_anew(case):
    one, two = (ClearAdapters.fresh(case.shape) for _ in range(2))
    assert not np.array_equal(one.values, two.values)
    for adapter in one.folded(case.shape).values():
        assert not adapter.product.any()


def test_the_public_part_says_where_adapters_are(case):
    public = case.model.public
    again = Public.from_bytes(public.to_bytes())
    assert again == public
    assert again.shape.clear
    assert again.adapters == ()
    assert again.state_limit == numbers_limit(case.shape)
    with pytest.raises(InputError, match=r"adapters = 'owner': choose one of owner-encrypted, server"):
        replace(case.shape, placement="owner")
    assert not replace(case.shape, rank=0).clear


# The training state


def locked(case, step=3, adapters=None):
    return list(lock_numbers(LOCKER, step, adapters or given(case)))


def test_a_state_is_read_again(case):
    adapters = replace(given(case), velocity=given(case, 5).values)
    step, read = unlock_numbers(LOCKER, locked(case, 7, adapters), case.shape)
    assert step == 7
    assert np.array_equal(read.values, adapters.values)
    assert np.array_equal(read.velocity, adapters.velocity)
    assert sum(map(len, locked(case))) <= numbers_limit(case.shape)


def test_a_state_in_several_pieces(monkeypatch, case):
    monkeypatch.setattr("privtuner.sealed.clear_adapters._PIECE", 5)
    pieces = locked(case)
    assert len(pieces) == -(-2 * given(case).values.size // 5)
    assert sum(map(len, pieces)) <= numbers_limit(case.shape)
    assert unlock_numbers(LOCKER, pieces, case.shape)[0] == 3
    with pytest.raises(MessageError, match="was not saved by this server's model"):
        unlock_numbers(LOCKER, pieces[::-1], case.shape)
    with pytest.raises(MessageError, match="of several steps"):
        unlock_numbers(LOCKER, [locked(case, 4)[0], *pieces[1:]], case.shape)
    with pytest.raises(MessageError, match="was not saved by"):
        unlock_numbers(LOCKER, pieces[:-1], case.shape)


@each(
    ("change", "message"),
    [
        (lambda pieces: [*pieces, pieces[0]], "more pieces than are due"),
        (lambda _: [], "was not saved by"),
        (lambda pieces: [pieces[0][:-1]], "was not saved by"),
        (lambda _: [LOCKER.close(0, bytes(8 + 8))], "a piece of 16 bytes is none of this model's"),
    ],
)
def test_states_that_are_none(case, change, message):
    with pytest.raises(MessageError, match=message):
        unlock_numbers(LOCKER, change(locked(case)), case.shape)


def test_the_state_of_another_run_or_of_other_weights(case):
    with pytest.raises(MessageError, match="was not saved by"):
        unlock_numbers(Locker(bytes(32), b"another"), locked(case), case.shape)


def test_shapes_without_adapters_have_no_placement():
    shape = Shape(layers=1, width=4, heads=1, hidden=4, period=2, rank=0, targets=(), placement="server")
    assert not shape.clear

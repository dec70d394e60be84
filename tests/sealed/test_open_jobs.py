"""Jobs with adapters in the clear at the server: what is opened, what it costs, and what is refused."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from encoders import Counting, clear_gradient, clear_inputs, open_case, unpacked
from loops import each
from privtuner import wire
from privtuner.errors import CkksError, InputError, LostError, MessageError, ServiceError
from privtuner.retries import Retries
from privtuner.sealed.adapters import squares
from privtuner.sealed.clear_adapters import ClearAdapters
from privtuner.sealed.clipping import GAIN
from privtuner.sealed.messages import _BODY, Rates, Type
from privtuner.sealed.noise import discrete_gaussian
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.privacy import Privacy
from sealed_cases import Between, TinyModel, remade, served, type_of

PRIVACY = Privacy(0.1, 0.05, 1e-5)
RATE = 0.5
TARGET = {(0, "value"): (np.array([[0.5, -0.5, 0.3, 0.2]]), np.array([[0.3], [-0.2], [0.2], [0.4]]))}


@pytest.fixture(scope="module")
def case():
    return open_case()


def owner_of(case, transport, **options):
    return SealedOwner(case.model.public, transport, allow_insecure=True, **{"privacy": PRIVACY, **options})


def gradient_of(pooled, target=0.0):
    """Of half the mean square; small enough for no row to be scaled down."""
    return (pooled - target) / pooled.size


def step(case, owner, rate=RATE, target=0.0):
    """One step, and the loss before."""
    pooled = owner.forward(case.embeddings, case.lengths)
    owner.backward(gradient_of(pooled, target), rate, 0.0)
    return float(((pooled - target) ** 2).mean() / 2)


def clipped_gradient(case, values, gradient, limit):
    """What is opened but for its noise, on clear numbers, at adapters of these values."""
    ev, adapters = Counting(case.model.parameters), ClearAdapters(values, np.zeros_like(values))
    _, kept = case.model.forward(ev, *clear_inputs(case, ev), adapters, keep=True)
    sent = clear_gradient(replace(case, gradient=gradient), ev)
    u = unpacked(case, case.model.backward(ev, kept, sent, adapters)) / limit
    return GAIN * u / np.sqrt(1 + np.linalg.norm(u) ** 2)


@pytest.fixture
def known_draws(monkeypatch):
    """The same noise and the same first adapters in every run, so that a run that learns always does."""
    drawn = partial(discrete_gaussian, below=random.Random(1).randrange)
    monkeypatch.setattr("privtuner.sealed.owner.discrete_gaussian", drawn)
    monkeypatch.setattr("privtuner.sealed.clear_adapters.secrets", SimpleNamespace(randbits=lambda _: 1))


@pytest.mark.usefixtures("known_draws")
def test_training_works_and_what_is_opened_is_the_clipped_gradient_with_noise(case):
    """Towards the vectors of other adapters. A step of the server, undone, is the clipped gradient and noise."""
    target, kept, rate = case.exact(TARGET)[0], [], 5.0
    options = {"release": True, "keep": lambda run, found: kept.append((run, found))}
    with served("local", case.model, **options) as (transport, _), owner_of(case, transport) as owner:
        public, unit = owner.public, owner.gradient_bound / owner.public.gradient_bound
        limit = PRIVACY.clip / unit
        losses, noise = [step(case, owner, rate, target)], []
        for number in range(8):
            before = owner.release()
            losses.append(step(case, owner, rate, target))
            if number < 2:
                opened = (before - owner.release()) / (rate * unit * limit) / squares(case.shape)
                adapters = public.adapter_matrices(before)
                gradient = gradient_of(case.exact(adapters)[0], target) / unit
                noise.append((opened - clipped_gradient(case, before, gradient, limit)) / PRIVACY.noise_multiplier)
        assert owner.opened == owner.step == len(losses)
        assert np.allclose(public.adapter_columns(kept[-1][1]), owner.release())
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert len({run for run, _ in kept}) == 1
    assert len(kept) == len(losses)
    assert stats.kstest(np.ravel(noise), "norm").pvalue > 1e-6
    assert np.abs(noise).max() > 0.5  # there is some


def recorded(case, seed=0, **options):
    """The messages of a step on texts in another order."""
    order = np.random.default_rng(seed).permutation(len(case.lengths))[: len(case.lengths) - seed]
    with served("local", case.model) as (transport, _):
        owner = owner_of(case, between := Between(transport), **options)
        pooled = owner.forward(case.embeddings[order], case.lengths[order])
        owner.backward(pooled / pooled.size, RATE, 0.5)
        owner.close()
    return between.seen


def test_one_opening_a_step_and_the_schedule_is_the_same_for_other_data(case):
    seen = recorded(case)
    kinds = Counter((direction, type_of(message)) for direction, message in seen)
    sizes = [(direction, type_of(message), len(message)) for direction, message in seen]
    assert sizes == [(direction, type_of(message), len(message)) for direction, message in recorded(case, seed=40)]
    for what, direction in ((Type.NORM, "down"), (Type.MASKED, "down"), (Type.OPENED, "up"), (Type.FRESH, "up")):
        assert kinds[direction, what] == 1
    # The opening comes after all refreshes, and the noise is in the only words that are no ciphertext.
    order = [type_of(message) for _, message in seen]
    last = max(i for i, what in enumerate(order) if what is Type.REFRESHED)
    assert order[last + 1 :] == [Type.NORM, Type.MASKED, Type.OPENED, Type.KEPT, Type.DONE]
    payload = {
        what: message[wire.HEAD_BYTES + _BODY.size :] for what, message in zip(order, (m for _, m in seen), strict=True)
    }
    assert wire.peek(payload[Type.NORM]).features == 1
    assert wire.peek(payload[Type.MASKED]).features == case.shape.adapter_ciphertexts
    words = np.frombuffer(payload[Type.OPENED], "<u8")
    assert len(words) == case.shape.chunks.numbers * case.shape.adapter_ciphertexts
    # Under the mask they are spread over the modulus, where the numbers have 2^41 of 2^50.
    assert np.ptp(words) > case.model.parameters.primes[0] / 4
    unit = 1 / case.model.public.batch / case.model.public.gradient_bound
    assert np.frombuffer(payload[Type.BACKWARD]) == pytest.approx([RATE * unit, 0.5, PRIVACY.clip / unit])


def test_a_repeated_step_is_paid_for_twice(case):
    """The connection breaks when the noisy gradient is with the server."""
    cuts = [True]

    def cut(message):
        if cuts and type_of(message) is Type.KEPT:
            cuts.pop()
            raise LostError("the line was cut")
        return [message]

    with served("local", case.model, patience=20.0) as (transport, _):
        owner = owner_of(case, between := Between(transport, down=cut), retries=Retries(attempts=1, first=0.0))
        step(case, owner)
        owner.close()
    assert (owner.step, owner.opened) == (1, 2)
    words = [m[wire.HEAD_BYTES :] for d, m in between.seen if type_of(m) is Type.OPENED]
    assert len(set(words)) == 2


def test_openings_outlive_the_process_and_the_adapters_are_gone_on_with(case, tmp_path):
    state = tmp_path / "state"
    with served("local", case.model, release=True) as (transport, _):
        with owner_of(case, transport, state=state) as owner:
            step(case, owner)
            first = owner.release()
        with owner_of(case, transport, state=state) as again:
            assert (again.step, again.opened) == (1, 1)
            step(case, again)
            assert not np.array_equal(again.release(), first)
        assert (again.step, again.opened) == (2, 2)


def test_the_server_keeps_the_state_too(case, tmp_path):
    options = {"release": True, "state": tmp_path}
    with served("local", case.model, **options) as (transport, _), owner_of(case, transport) as owner:
        step(case, owner)
        released = owner.release()
        owner.close()
        between = owner._transport = Between(transport)
        assert np.array_equal(owner.release(), released)
    assert Type.STORED in {type_of(message) for _, message in between.seen}


def test_the_budget_ends_the_training(case):
    budget = PRIVACY.epsilon(2)
    with served("local", case.model) as (transport, _):
        owner = owner_of(case, transport, privacy=Privacy(0.1, 0.05, 1e-5, budget))
        step(case, owner)
        step(case, owner)
        owner.forward(case.embeddings, case.lengths)
        sent = owner.spent.bytes_up
        with pytest.raises(InputError, match="the budget of epsilon .* is spent after 2 steps"):
            owner.backward(np.zeros((len(case.lengths), case.shape.width)), RATE)
        assert (owner.opened, owner.spent.bytes_up) == (2, sent)
        owner.close()


def test_a_gradient_too_large_to_be_clipped_is_not_opened(case):
    """The norm is some hundred times the clipping norm: nothing goes back, and the step is not taken."""
    with served("local", case.model, patience=20.0) as (transport, _):
        owner = owner_of(case, between := Between(transport), privacy=Privacy(25.0, 2e-4, 1e-5))
        pooled = owner.forward(case.embeddings, case.lengths)
        with pytest.raises(CkksError, match="cannot be clipped"):
            owner.backward(np.ones_like(pooled) * [1, -1, 1, -1] * owner.gradient_bound, RATE, 0.0)
        owner.close()
    assert owner.opened == owner.step == 0
    assert Type.OPENED not in {type_of(message) for _, message in between.seen}


def test_what_is_not_agreed_is_refused_before_anything_is_sent(case):
    with served("local", case.model) as (transport, _):
        owner = owner_of(case, transport, privacy=None)
        pooled = owner.forward(case.embeddings, case.lengths)  # pooled vectors take no agreement
        sent = owner.spent.bytes_up
        with pytest.raises(InputError, match="reads a clipped, noisy gradient of every step. Pass privacy"):
            owner.backward(pooled / pooled.size, RATE)
        assert owner.spent.bytes_up == sent
        owner.close()
        owner = owner_of(case, transport, privacy=Privacy(0.01, 0.05, 1e-5))
        owner.forward(case.embeddings, case.lengths)
        with pytest.raises(InputError, match="does not drown the errors of encryption"):
            owner.backward(pooled / pooled.size, RATE)
        owner.close()
    with pytest.raises(InputError, match="no adapters in the clear: no gradient is opened, leave privacy out"):
        SealedOwner(TinyModel().public, transport, allow_insecure=True, privacy=PRIVACY)
    other = copy.copy(case.model)
    other.shape = replace(case.shape, placement="owner-encrypted")
    with pytest.raises(InputError, match="encrypted under the owner's key: no gradient is opened"):
        other.clip(None, None, 1.0)


@each(
    ("type", "change", "message"),
    [
        (Type.OPENED, lambda m: [remade(m, bytes(_payload(m))[:-8])], "bytes of opened, 64 are due|refused"),
        (Type.OPENED, lambda m: [remade(m, b"\xff" * len(_payload(m)))], "words that are no residues|refused"),
        (Type.FRESH, lambda m: [remade(m, b"x")], "draws its adapters itself|refused"),
        (Type.BACKWARD, lambda m: [remade(m, bytes(_payload(m))[:16])], "16 bytes of rates, 24 are due|refused"),
    ],
)
def test_a_hostile_owner_is_refused(case, type, change, message):
    def up(sent):
        return change(sent) if type_of(sent) is type else [sent]

    with served("local", case.model, patience=20.0) as (transport, _):
        owner = owner_of(case, Between(transport, up=up))
        with pytest.raises((MessageError, ServiceError), match=message):
            step(case, owner)
        owner.close()


def _payload(message):
    return message[wire.HEAD_BYTES + _BODY.size :]


@each(clip=[0.0, -1.0, 1e7, float("nan")])
def test_clipping_norms_that_no_owner_sends(clip):
    with pytest.raises(MessageError, match="a clipping norm of"):
        Rates.from_bytes(Rates(1.0, 0.5, clip).to_bytes(), clipped=True)
    with pytest.raises(MessageError, match="24 bytes of rates, 16 are due"):
        Rates.from_bytes(Rates(1.0, 0.5, clip).to_bytes(), clipped=False)


def test_adapters_are_released_only_if_the_server_was_started_so(case):
    with served("local", case.model) as (transport, _):
        owner = owner_of(case, transport)
        with pytest.raises((MessageError, ServiceError), match="keeps adapters to itself"):
            owner.release()

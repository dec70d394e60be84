"""What passes between owner and server in a training step, and that it does not depend on the model's weights."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from privtuner import wire
from privtuner.errors import MessageError
from privtuner.sealed.locker import Locker
from privtuner.sealed.messages import _BODY, Type
from privtuner.sealed.owner import SealedOwner
from sealed_cases import PARAMETERS, WIDTH, Between, G, TinyModel, batch, remade, served, type_of


def recorded(model, seed=1):
    with served("local", model) as (transport, _):
        owner = SealedOwner(model.public, between := Between(transport), allow_insecure=True)
        owner.forward(*batch(seed=seed))
        owner.backward(G, 8.0)
        owner.close()
    return between.seen


def test_a_step_is_pads_ciphertexts_and_counts():
    """Every message is named here with what its payload is: a nonce, a key, a ciphertext, locked bytes or a number."""
    model = TinyModel()
    seen, kinds = recorded(model), Counter()
    numbers = {"up": 0, "down": 0}
    for direction, message in seen:
        payload = memoryview(message)[wire.HEAD_BYTES + _BODY.size :]
        what = type_of(message)
        number = _BODY.unpack_from(message, wire.HEAD_BYTES)[3]
        assert number == numbers[direction]
        numbers[direction] += 1
        kinds[direction, what] += 1
        match what:
            case Type.OPEN:
                assert len(payload) == 32
            case Type.WELCOME:
                assert len(payload) == 64  # a nonce, and a digest of locked bytes
                assert payload[32:] == bytes(32)
            case Type.READY:
                assert payload == bytes(8)
            case Type.DONE:
                assert payload == (1).to_bytes(8, "little")
            case Type.FORWARD:
                assert len(payload) == 0
            case Type.BACKWARD:
                assert np.frombuffer(payload).tolist() == [8.0 / model.public.batch, 0.9]
            case Type.PUBLIC_KEY | Type.KEYS:
                assert wire.peek(payload).kind == {Type.PUBLIC_KEY: "public_key", Type.KEYS: "evaluation_keys"}[what]
            case Type.KEPT:
                with pytest.raises(MessageError):
                    wire.peek(payload)
                opened = Locker(model.secret, model.public.id + wire.peek(message).request).open(
                    kinds[direction, what] - 1, payload
                )
                assert wire.peek(opened[8:]).kind == "tensor"
            case Type.FRESH | Type.INPUTS | Type.MASK | Type.GRADIENT | Type.REFRESH | Type.REFRESHED | Type.POOLED:
                head = wire.peek(payload)
                assert head.parameters == PARAMETERS._core.hash
                looks_uniform(payload)
    assert kinds == {
        ("up", Type.OPEN): 1,
        ("down", Type.WELCOME): 1,
        ("up", Type.PUBLIC_KEY): 1,
        ("up", Type.KEYS): 1,
        ("up", Type.FRESH): 2,
        ("down", Type.READY): 1,
        ("up", Type.FORWARD): 1,
        ("up", Type.INPUTS): 1,
        ("up", Type.MASK): 1,
        ("down", Type.REFRESH): 4,
        ("up", Type.REFRESHED): 4,
        ("down", Type.POOLED): 1,
        ("up", Type.BACKWARD): 1,
        ("up", Type.GRADIENT): 1,
        ("down", Type.KEPT): 2,
        ("down", Type.DONE): 1,
    }


def looks_uniform(payload):
    """The lowest bytes of the last row's words: 255 degrees of freedom, eight standard deviations above their mean."""
    width = (PARAMETERS.primes[1].bit_length() + 7) // 8
    low = np.frombuffer(payload[-width * PARAMETERS.ring_dimension :], np.uint8)[::width]
    expected = len(low) / 256
    assert ((np.bincount(low, minlength=256) - expected) ** 2 / expected).sum() < 255 + 8 * np.sqrt(2 * 255)


def test_sizes_and_schedule_are_the_same_for_other_weights_and_data():
    """The owner of a model whose weights are smaller by ten, and the server of another batch, see the same lengths."""

    def shape(seen):
        return [(direction, type_of(message), len(message)) for direction, message in seen]

    first = shape(recorded(TinyModel()))
    assert first == shape(recorded(TinyModel(seed=5, scale=0.05), seed=2))
    assert len(first) == 24


def test_nothing_is_sent_twice_and_every_job_is_another():
    model = TinyModel()
    one, two = recorded(model), recorded(model)
    assert not {m for _, m in one} & {m for _, m in two}
    heads = [wire.peek(message) for _, message in one + two]
    assert len({head.request for head in heads}) == 2
    assert {head.subject for head in heads} == {model.public.id}
    assert remade(one[0][1]) == one[0][1]
    assert sum(wire.peek(m[wire.HEAD_BYTES + _BODY.size :]).features for _, m in one if type_of(m) == 10) == WIDTH

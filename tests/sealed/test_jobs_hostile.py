"""Messages that are not what is due, in either direction: each is refused, before memory is taken for it."""

from __future__ import annotations

import numpy as np
import pytest

from privtuner import ckks
from privtuner.errors import MessageError, ServiceError
from privtuner.sealed.messages import Rates, Type, largest_message
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.server import SealedService
from sealed_cases import (
    PARAMETERS,
    SLOTS,
    WIDTH,
    Between,
    G,
    TinyModel,
    batch,
    inner,
    remade,
    served,
    type_of,
)

SECRET = ckks.SecretKey(PARAMETERS)


def tensor(features=WIDTH, level=6, tokens=SLOTS):
    return SECRET.encrypt(np.zeros((tokens, features)), level=level).to_bytes()


def on(wanted, change, which=0):
    """What changes message ``which`` of a type, and passes on all others."""
    left = [which]

    def passing(message):
        if type_of(message) != wanted:
            return [message]
        left[0] -= 1
        return [message] if left[0] != -1 else change(message)

    return passing


def step(up=None, down=None, transport=None, model=None):
    """A step over a transport that changes messages; what it raises is the owner's or the server's refusal."""
    model = model or TinyModel()
    with served("local", model, patience=1.0) as (local, _):
        between = Between(local if transport is None else transport(local), up, down)
        owner = SealedOwner(model.public, between, allow_insecure=True, patience=5.0)
        try:
            owner.forward(*batch())
            owner.backward(G, 8.0)
        finally:
            owner.close()


def test_the_step_is_fine_when_nothing_is_changed():
    step(on(Type.INPUTS, lambda m: [remade(m)]), on(Type.POOLED, lambda m: [remade(m)]))


TO_SERVER = {
    "open with a short nonce": (Type.OPEN, lambda m: [remade(m, bytes(31))], "31 bytes"),
    "another model": (Type.OPEN, lambda m: [remade(m, subject=bytes(16))], "other weights"),
    "other parameters": (Type.OPEN, lambda m: [remade(m, parameters=1)], "other weights"),
    "another run": (Type.FRESH, lambda m: [remade(m, request=bytes(16))], "another run"),
    "a field it does not use": (Type.FORWARD, lambda m: [remade(m, tokens=1)], "not zero"),
    "truncated": (Type.INPUTS, lambda m: [m[:-1]], "truncated"),
    "truncated within": (Type.INPUTS, lambda m: [remade(m, tensor()[:-1])], "truncated"),
    "changed on its way": (Type.INPUTS, lambda m: [m[:-1] + bytes([m[-1] ^ 1])], "checksum"),
    "too short": (Type.FORWARD, lambda m: [m[:72]], "announces"),
    "not a message": (Type.FORWARD, lambda _: [b"hello"], "shorter than its head"),
    "repeated": (Type.INPUTS, lambda m: [m, m], "repeated or out of order"),
    "left out": (Type.INPUTS, lambda _: [], "repeated or out of order"),
    "of another type": (Type.INPUTS, lambda m: [remade(m, type=Type.GRADIENT)], "type 12 where inputs is due"),
    "of no type": (Type.INPUTS, lambda m: [remade(m, type=99)], "type 99 where inputs is due"),
    "of the server's types": (Type.REFRESHED, lambda m: [remade(m, type=Type.REFRESH)], "where refreshed is due"),
    "no end of a tensor": (Type.INPUTS, lambda m: [remade(m, last=0)], "4 features, 4 are due"),
    "two ends": (Type.INPUTS, lambda m: [remade(m, tensor(2))], "2 features at its end, 4 are due"),
    "too many features": (Type.INPUTS, lambda m: [remade(m, tensor(5))], "5 features at its end, 4 are due"),
    "another level": (Type.INPUTS, lambda m: [remade(m, tensor(level=5))], "level"),
    "fewer tokens": (Type.INPUTS, lambda m: [remade(m, tensor(tokens=SLOTS - 1))], "shape"),
    "a mask of two features": (Type.MASK, lambda m: [remade(m, tensor(2))], "1 are due"),
    "a gradient at a low level": (Type.GRADIENT, lambda m: [remade(m, tensor(level=1))], "level"),
    "fresh adapters of another shape": (Type.FRESH, lambda m: [remade(m, tensor(3))], "3 features at its end, 1"),
    "another public key": (Type.PUBLIC_KEY, lambda m: [remade(m, bytes(100))], "100 bytes of public_key"),
    "a longer public key": (Type.PUBLIC_KEY, lambda m: [remade(m, bytes(1 << 20))], "1048576 bytes of public_key"),
    "keys without end": (Type.KEYS, lambda m: [remade(m, bytes(1 << 20), last=0)] * 40, "of keys, .* are due"),
    "keys in empty pieces": (Type.KEYS, lambda m: [remade(m, b"", last=0)], "an empty piece of keys"),
    "more keys": (Type.KEYS, lambda m: [remade(m, bytes(7 << 20))], "7340032 bytes of keys"),
    "fewer keys": (Type.KEYS, lambda m: [remade(m, bytes(1000))], "1000 bytes of keys"),
    "a rate that is none": (Type.BACKWARD, lambda m: [remade(m, Rates(np.nan, 0.5).to_bytes())], "rate nan"),
    "a rate below zero": (Type.BACKWARD, lambda m: [remade(m, Rates(-1.0, 0.5).to_bytes())], "rate -1"),
    "a momentum of one": (Type.BACKWARD, lambda m: [remade(m, Rates(1.0, 1.0).to_bytes())], "momentum 1"),
    "rates of another length": (Type.BACKWARD, lambda m: [remade(m, bytes(15))], "15 bytes of rates"),
    "a refreshed one of another number": (Type.REFRESHED, lambda m: [inner(m, features=1)], "refreshed"),
    "a refreshed one that is cut": (Type.REFRESHED, lambda m: [inner(m, cut=8)], "refreshed"),
    "a refreshed one of other parameters": (Type.REFRESHED, lambda m: [inner(m, parameters=1)], "parameters"),
    "an answer to another refresh": (Type.REFRESHED, lambda m: [inner(m, request=b"x" * 16)], "refreshed"),
    "an answer of another kind": (Type.REFRESHED, lambda m: [remade(m, tensor(2))], "kind refreshed"),
    "stored with a payload": (Type.FRESH, lambda m: [remade(m, b"x", type=Type.STORED)], "1 bytes where none"),
    "stored where nothing is": (Type.FRESH, lambda m: [remade(m, b"", type=Type.STORED)], "has saved no state"),
    "resumed by garbage": (Type.FRESH, lambda m: [remade(m, bytes(100), type=Type.RESUME)], "not saved by this"),
    "resumed by nothing": (Type.FRESH, lambda m: [remade(m, b"", type=Type.RESUME)], "not saved by this"),
    "a task before adapters": (Type.FRESH, lambda m: [remade(m, b"", type=Type.FORWARD)], "no adapters yet"),
    "a step without a pass": (
        Type.FORWARD,
        lambda m: [remade(m, Rates(1.0, 0.5).to_bytes(), type=Type.BACKWARD)],
        "no forward pass was kept",
    ),
    "too long": (Type.INPUTS, lambda m: [m + bytes(largest_message(PARAMETERS))], "at most"),
}


@pytest.mark.parametrize("case", TO_SERVER)
def test_the_server_refuses(case):
    wanted, change, match = TO_SERVER[case]
    with pytest.raises(MessageError, match=match):
        step(up=on(wanted, change))


TO_OWNER = {
    "a short welcome": (Type.WELCOME, 0, lambda m: [remade(m, bytes(39))], "39 bytes"),
    "another step": (Type.READY, 0, lambda m: [remade(m, b"\1" + bytes(7))], "not those of step 0"),
    "another step at the end": (Type.DONE, 0, lambda m: [remade(m, bytes(8))], "not those of step 1"),
    "a refresh again": (Type.REFRESH, 0, lambda m: [m, m], "repeated or out of order"),
    "a refresh more": (
        Type.POOLED,
        0,
        lambda m: [remade(m, tensor(2, 2), type=Type.REFRESH)],
        "type 34 where pooled is due",
    ),
    "more in a refresh": (Type.REFRESH, 0, lambda m: [inner(m, features=3)], "3"),
    "fewer in a refresh": (Type.REFRESH, 0, lambda m: [inner(m, features=1)], "1"),
    "a refresh that is cut": (Type.REFRESH, 0, lambda m: [inner(m, cut=8)], "refresh"),
    "a refresh of other parameters": (Type.REFRESH, 0, lambda m: [inner(m, parameters=1)], "parameters"),
    "none in a refresh": (Type.REFRESH, 0, lambda m: [remade(m, b"")], "shorter than its head"),
    "a refresh of another kind": (Type.REFRESH, 0, lambda m: [remade(m, tensor(2, 2))], "kind refresh"),
    "an end before all refreshes": (
        Type.REFRESH,
        2,
        lambda m: [remade(m, bytes(100), type=Type.KEPT)],
        "after 1 of 3 refreshes",
    ),
    "an end of another task": (Type.POOLED, 0, lambda m: [remade(m, type=Type.KEPT)], "where pooled is due"),
    "pooled vectors of another level": (Type.POOLED, 0, lambda m: [remade(m, tensor(level=3))], "level"),
    "pooled vectors of another width": (Type.POOLED, 0, lambda m: [remade(m, tensor(5, 4))], "4 are due"),
    "state without end": (Type.KEPT, 1, lambda m: [remade(m, bytes(8 << 20), last=0)], "at most"),
    "another run": (Type.POOLED, 0, lambda m: [remade(m, request=bytes(16))], "another run"),
    "too long": (Type.POOLED, 0, lambda m: [m + bytes(largest_message(PARAMETERS))], "at most"),
}


@pytest.mark.parametrize("case", TO_OWNER)
def test_the_owner_refuses(case):
    wanted, which, change, match = TO_OWNER[case]
    with pytest.raises(MessageError, match=match):
        step(down=on(wanted, change, which))


def test_a_stream_that_the_server_ends_early():
    class Ending:
        closed = False

        def __init__(self, transport):
            self.transport = transport

        def job(self, messages):
            for message in self.transport.job(messages):
                if type_of(message) == Type.POOLED:
                    return
                yield message

    with pytest.raises(ServiceError, match="ended in the middle"):
        step(transport=Ending)


def test_a_second_pass_drops_the_first():
    """One forward pass is kept at a time, and none after an embedding or a step."""
    model = TinyModel()
    with served("local", model, patience=1.0) as (transport, _):
        owner = SealedOwner(model.public, transport, allow_insecure=True)
        owner.forward(*batch())
        kept = owner._batch
        owner.embed(*batch())
        assert not owner._connection.kept
        owner._batch = kept
        owner.backward(G, 8.0)  # repeats the pass
        assert owner.step == 1
        owner.close()


def test_the_state_is_of_one_run_and_one_step():
    model, other = TinyModel(), TinyModel()
    with served("local", model, patience=1.0) as (transport, _), served("local", other, patience=1.0) as (second, _):
        owner = SealedOwner(model.public, transport, allow_insecure=True)
        foreign = SealedOwner(model.public, second, allow_insecure=True)
        states = []
        for _ in range(2):
            owner.forward(*batch())
            owner.backward(G, 8.0)
            states.append(owner._kept)
        foreign.forward(*batch())
        foreign.backward(G, 8.0)
        for kept, match in (
            (foreign._kept, "not saved by this"),
            (states[0], "not those of step 2"),
            ([states[0][0], states[1][1]], "several steps"),
            (states[1][::-1], "not saved by this"),
            (states[1][:1], "not saved by this"),
            ([*states[1], states[1][0]], "more pieces than are due"),
            ([states[1][0], states[1][1][:-1]], "not saved by this"),
        ):
            owner.close()
            owner._kept = kept
            with pytest.raises((MessageError, ServiceError), match=match):
                owner.embed(*batch())
        owner._kept = states[1]
        owner.embed(*batch())
        owner.close()
        foreign.close()


def test_service_arguments():
    from privtuner.errors import InputError
    from privtuner.schemes import LocalTransport

    for options in ({"sessions": 0}, {"runs": 0}, {"patience": 0}, {"idle": 0}, {"days": 0}):
        with pytest.raises(InputError):
            SealedService(TinyModel(), **options)
    with pytest.raises(InputError, match="no sealed model"):
        LocalTransport({}).job([])

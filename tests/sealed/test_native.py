"""The sealed model on ciphertexts, with an owner who answers what its schedule says and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from encoders import SHAPE, case_of, clear_adapters, clear_gradient, clear_inputs, matrices, unpacked
from privtuner import ckks, wire
from privtuner.sealed import EncryptedAdapters
from privtuner.sealed.adapters import BOUND, GRADIENT_BOUND


class Owner:
    """Walks through a schedule, ciphertext by ciphertext."""

    def __init__(self, secret: ckks.SecretKey, schedule) -> None:
        self.secret = secret
        self.left = [(refresh.ciphertexts, refresh.level) for refresh in schedule]

    def exchange(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        count, level = self.left.pop(0)
        for message in messages:
            here = min(count, self.secret.parameters.refresh_batch(level))
            assert wire.peek(message).features == here
            yield self.secret.refresh(message, level, here)
            count -= here
        assert count == 0


def test_a_step_on_ciphertexts_is_that_on_clear_numbers():
    """One layer, forward, backward and step: equal within the predicted errors, and every refresh was announced."""
    case = case_of(replace(SHAPE, layers=1))
    model, public, chosen = case.model, case.model.public, matrices(replace(SHAPE, layers=1))
    clear = ckks.ClearEvaluator(model.parameters)
    adapters = clear_adapters(case, clear, chosen)
    x, mask = clear_inputs(case, clear)
    pooled, kept = model.forward(clear, x, mask, adapters, keep=True)
    g = clear_gradient(case, clear)
    gradients = model.backward(clear, kept, g, adapters)
    stepped = model.step(clear, adapters, gradients, 2e-3, 0.9)

    secret = ckks.SecretKey(model.parameters)
    owner = Owner(secret, public.schedule("forward") + public.schedule("backward"))
    keys = secret.evaluation_keys(**public.keys._asdict())
    ev = ckks.Evaluator(model.parameters, keys, ckks.Refresher(secret.public_key(), owner.exchange))

    def encrypt(values, layout):
        return secret.encrypt(values, bound=layout.bound, level=layout.level)

    numbers = public.adapter_columns(chosen)
    sealed = EncryptedAdapters(
        secret.encrypt_packed(numbers, bound=BOUND), secret.encrypt_packed(0 * numbers, bound=GRADIENT_BOUND)
    )
    got, kept = model.forward(
        ev, encrypt(x.values, public.inputs), encrypt(mask.values, public.mask), sealed, keep=True
    )
    message = ckks.EncryptedTensor.from_bytes(model.parameters, got.to_bytes(), public.pooled)
    assert np.abs(secret.decrypt(message) - pooled.values).max() < public.pooled.budget().error
    found = model.backward(ev, kept, encrypt(g.values, public.gradient), sealed)
    count = public.adapter_numbers
    difference = secret.decrypt_packed(found, count) - unpacked(case, gradients)
    assert np.abs(difference).max() < 1e-3 * np.abs(unpacked(case, gradients)).max()
    after = model.step(ev, sealed, found, 2e-3, 0.9)
    for tensor, expected in zip(after.tensors, stepped.tensors, strict=True):
        exact = unpacked(case, expected)
        assert np.abs(secret.decrypt_packed(tensor, count) - exact).max() < 1e-3 * np.abs(exact).max()
    assert owner.left == []

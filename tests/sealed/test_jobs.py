"""Jobs of a sealed model: what owner and server do together, over both transports."""

from __future__ import annotations

import numpy as np
import pytest

from sealed_cases import PERIOD, WIDTH, StandInEvaluator, TinyModel, stand_in
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.server import SealedService


@pytest.fixture(autouse=True)
def _standing_in(monkeypatch):
    stand_in(monkeypatch)


def batch(count=3, seed=1):
    draw = np.random.default_rng(seed)
    return draw.uniform(-1, 1, (count, PERIOD, WIDTH)), draw.integers(1, PERIOD + 1, count)


def test_a_step(tmp_path):
    model = TinyModel()
    service = SealedService(model, evaluator=StandInEvaluator, state=tmp_path)
    told = []
    with SealedOwner(model.public, service, allow_insecure=True, progress=told.append) as owner:
        x, lengths = batch()
        a = np.ones(WIDTH)
        velocity = 0
        for step in range(1, 3):
            pooled = owner.forward(x, lengths)
            assert np.abs(pooled - model.pooled(x, a)).max() < 1e-4
            g = np.full((3, WIDTH), 2.0**-8)
            owner.backward(g, 4.0, 0.5)
            velocity = 0.5 * velocity + model.gradient(x, a, g)
            a = a - 4.0 * velocity
            assert owner.step == step
        assert np.abs(owner.embed(x, lengths) - model.pooled(x, a)).max() < 1e-4
    print(told[-1], owner.spent)

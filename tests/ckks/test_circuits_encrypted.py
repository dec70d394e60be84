"""Softmax, layer norm and an activation on ciphertexts: what clear numbers give, within the predicted errors."""

from __future__ import annotations

import numpy as np
import pytest

from circuit_cases import SLOTS, Array, attended, by_diagonals, random
from privtuner import ckks
from privtuner.ckks.circuits import Activation, LayerNorm, Normed, SquaringSoftmax, softmax_backward

PARAMETERS = ckks.Parameters.INSECURE(12)
PERIOD, HEADS, WIDTH = 4, 2, 8
TOKENS = np.arange(PERIOD) < (np.arange(SLOTS // PERIOD) % (PERIOD + 1))[:, None]
MASK = TOKENS.T.reshape(-1, 1).astype(float)
PAIRS = by_diagonals((TOKENS[:, :, None] & TOKENS[:, None, :])[:, None]).astype(float)

SECRET = ckks.SecretKey(PARAMETERS)
DRY = ckks.Evaluator(PARAMETERS)
CLEAR = ckks.ClearEvaluator(PARAMETERS)

SOFTMAX = SquaringSoftmax.choose(PERIOD, 8.0, unit=8.0)
NORM = LayerNorm.choose(WIDTH, (0.3, 2.0))
GELU = Activation.choose("gelu", (-4.0, 4.0), 15, unit=4.0)
WEIGHT, BIAS = random(WIDTH, seed=1, low=0.5, high=1.5), random(WIDTH, seed=2)


def softmax(evaluator, scores, pairs, mask, dp):
    def stage(name, x):
        return evaluator.refresh(x) if x.level < 4 else x

    p = SOFTMAX.forward(evaluator, scores, pairs, mask, HEADS, stage)
    return p, softmax_backward(evaluator, evaluator.refresh(p) if p.level < 3 else p, dp, HEADS)


def norm(evaluator, x, mask, dy):
    y, saved = NORM.forward(evaluator, x, mask, WEIGHT, BIAS)
    return y, NORM.backward(evaluator, Normed(saved.centred, saved.root), dy, WEIGHT)


def gelu(evaluator, x, dy):
    y, slope = GELU.forward_with_slope(evaluator, x)
    return y, evaluator.multiply(dy, slope)


def of_deviation(low: float, high: float) -> Array:
    x = random(SLOTS, WIDTH, seed=4)
    return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) * random(SLOTS, 1, low=low, high=high)


SCORES = random(SLOTS, HEADS * PERIOD) * np.tile(PAIRS, HEADS)
CASES = {
    "softmax": (softmax, [(SCORES, 9), (PAIRS, 12), (MASK, 12), (random(SLOTS, HEADS * PERIOD, seed=6), 5)]),
    "norm": (norm, [(of_deviation(0.6, 1.3) * MASK, 6), (MASK, 12), (random(SLOTS, WIDTH, seed=5) * MASK, 5)]),
    "gelu": (gelu, [(random(SLOTS, WIDTH), 8), (random(SLOTS, WIDTH, seed=7), 3)]),
}
"""Circuits, and their inputs with levels."""


@pytest.mark.parametrize("name", CASES)
def test_ciphertexts_agree_with_clear_numbers(name):
    circuit, inputs = CASES[name]
    given = [(x, max(1.0, float(np.abs(x).max())), level) for x, level in inputs]
    planned = (DRY.planned(*x.shape, bound=bound, level=level) for x, bound, level in given)
    plan = ckks.plan(circuit, *planned, parameters=PARAMETERS)
    assert not plan.rotations
    native = attended(SECRET, plan)
    encrypted = circuit(native, *(SECRET.encrypt(x, bound=bound, level=level) for x, bound, level in given))
    clear = circuit(CLEAR, *(CLEAR.tensor(x, bound=bound, level=level) for x, bound, level in given))
    for y, z, dry in zip(encrypted, clear, plan.outputs, strict=True):
        assert (y.shape, y.level, y.bound) == (z.shape, z.level, z.bound) == (dry.shape, dry.level, dry.bound)
        assert y.budget() == z.budget() == dry.budget()
        off = np.abs(SECRET.decrypt(y) - z.values).max()
        assert off <= min(y.budget().error, 1e-4)

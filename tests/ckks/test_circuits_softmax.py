"""Softmax by normalising and squaring, and its gradient: on clear numbers; once on ciphertexts."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from circuit_cases import SLOTS, Array, Renewing, by_diagonals, random
from privtuner import ckks
from privtuner.ckks.circuits import SquaringSoftmax, softmax_backward
from privtuner.errors import CkksError, InputError

PARAMETERS = ckks.Parameters.INSECURE(12)
"""As many levels as a secure set of the ring of the sealed model has."""


def lengths_of(period: int) -> Array:
    """Tokens of every sequence: all lengths there are, and sequences that are not in use."""
    return np.arange(SLOTS // period) % (period + 1)


def masks(period: int) -> tuple[Array, Array]:
    """The mask (slots, 1), and that of pairs (slots, period)."""
    tokens = np.arange(period) < lengths_of(period)[:, None]
    pairs = tokens[:, None, :, None] & tokens[:, None, None, :]
    return tokens.T.reshape(-1, 1).astype(float), by_diagonals(pairs).astype(float)


def scores_of(period: int, heads: int, bound: float, pairs: Array) -> Array:
    """Rows at both ends of every range, and random ones; 0 where a token is hidden."""
    scores = random(SLOTS, heads * period, seed=period, low=-bound, high=bound)
    scores[::7], scores[1::7] = bound, -bound
    scores[2::7] = -bound
    scores[2::7, 0] = bound
    scores[3::7] = bound
    scores[3::7, 0] = -bound
    return scores * np.tile(pairs, heads)


def softmax(scores: Array, pairs: Array, heads: int) -> Array:
    e = np.exp(scores) * np.tile(pairs, heads)
    parts = np.split(e, heads, axis=1)
    return np.concatenate([part / np.maximum(part.sum(1, keepdims=True), 1e-300) for part in parts], axis=1)


class Stages:
    """Names and levels of the stages; refreshes what has too few levels for what comes next."""

    def __init__(self, evaluator: Renewing, levels: int) -> None:
        self.evaluator, self.levels = evaluator, levels
        self.names: list[str] = []
        self.wide: list[int] = []

    def __call__(self, name: str, x: ckks.ClearTensor) -> ckks.ClearTensor:
        self.names.append(name)
        self.wide.append(x.level)
        return self.evaluator.refresh(x, self.levels) if x.level < 4 else x


CASES = [  # period, heads, bound, unit, accuracy
    (4, 2, 3.0, 1.0, 1e-2),
    (8, 1, 8.0, 8.0, 1e-3),
    (16, 2, 24.0, 24.0, 1e-2),
    (32, 1, 48.0, 48.0, 1e-2),
    (1, 2, 2.0, 2.0, 1e-4),
    (32, 1, 1.0, 1.0, 1e-6),
]


@pytest.mark.parametrize("noise", [None, 5])
@pytest.mark.parametrize(("period", "heads", "bound", "unit", "accuracy"), CASES)
def test_softmax(period, heads, bound, unit, accuracy, noise):
    plan = SquaringSoftmax.choose(period, bound, unit=unit, accuracy=accuracy)
    assert plan.error <= accuracy
    clear = Renewing(PARAMETERS, noise)
    mask, pairs = masks(period)
    scores = scores_of(period, heads, bound, pairs)
    stages = Stages(clear, 11)
    y = plan.forward(
        clear,
        clear.tensor(scores / unit, bound=bound / unit, level=10),
        clear.tensor(pairs),
        clear.tensor(mask),
        heads,
        stages,
    )
    assert stages.names[0] == "softmax.exp"
    assert stages.names[-1] == f"softmax.divide{plan.squarings}"
    assert len(stages.names) == 2 + 2 * plan.squarings
    exact = softmax(scores, pairs, heads)
    promised = plan.noise_error(plan.squarings, clear.tensor(scores, bound=bound).budget().error / unit)
    assert y.budget().error <= promised * 1.01
    off = 0.0 if noise is None else y.budget().error
    assert np.abs(y.values - exact).max() <= plan.error + off
    assert np.abs(y.values[np.tile(pairs, heads) == 0]).max(initial=0) <= min(off, 2.0**-20)
    assert y.bound <= 1.02


@pytest.mark.parametrize(("period", "heads", "bound", "unit", "accuracy"), CASES)
def test_levels_products_and_refreshes(period, heads, bound, unit, accuracy):
    plan = SquaringSoftmax.choose(period, bound, unit=unit, accuracy=accuracy)
    clear = Renewing(ckks.Parameters.INSECURE(24))
    mask, pairs = masks(period)
    x = clear.tensor(scores_of(period, heads, bound, pairs) / unit, bound=bound / unit, level=22)
    stages = Stages(clear, 24)
    y = plan.forward(clear, x, clear.tensor(pairs), clear.tensor(mask), heads, stages)
    assert x.level - y.level == plan.depth
    assert [a - b for a, b in pairwise(stages.wide)] == [1] * (1 + 2 * plan.squarings)
    assert stages.wide[0] == x.level - (plan.depth - 1 - 2 * plan.squarings)
    assert {features for features, _ in clear.renewed} == {heads}
    assert not clear.rotated


def test_bounds_stay_moderate():
    # What travels in a refresh is within 2^10: more would leave the masks too little room.
    for period, bound in ((32, 48.0), (64, 24.0), (16, 10.0)):
        plan = SquaringSoftmax.choose(period, bound, unit=bound)
        clear = Renewing(PARAMETERS)
        mask, pairs = masks(period)
        scores = scores_of(period, 1, bound, pairs)
        stages = Stages(clear, 11)
        plan.forward(clear, clear.tensor(scores / bound, level=10), clear.tensor(pairs), clear.tensor(mask), 1, stages)
        assert max(bound for _, bound in clear.renewed) <= 2**10


def test_plans():
    """What the sealed model's layers take; fewer levels are better."""
    plans = [SquaringSoftmax.choose(32, b, unit=b) for b in (48.0, 24.0, 18.0, 15.0, 17.0, 10.0)]
    assert [plan.squarings for plan in plans] == [4, 3, 3, 3, 3, 2]
    assert [plan.exponential.degree for plan in plans] == [7] * 6
    assert [plan.depth for plan in plans] == [12, 10, 10, 10, 10, 8]
    assert all(plan.error <= 1e-2 for plan in plans)


def test_measured_sums_are_used():
    wide = SquaringSoftmax.choose(32, 24.0)
    plan = SquaringSoftmax.choose(
        32, 24.0, squarings=3, first=(2.0, 90.0), squares=[(0.03, 1.0), (0.03, 1.0), (0.1, 1.0)]
    )
    assert plan.domains == ((2.0, 90.0), (0.03, 1.0), (0.03, 1.0), (0.1, 1.0))
    assert sum(d + s for d, s in plan.inverses) < sum(d + s for d, s in wide.inverses)


@pytest.mark.parametrize(("period", "heads"), [(4, 2), (8, 1), (16, 3), (1, 1)])
def test_backward(period, heads):
    clear = Renewing(PARAMETERS)
    _, pairs = masks(period)
    p = softmax(scores_of(period, heads, 2.0, pairs), pairs, heads)
    dp = random(*p.shape, seed=8)
    y = softmax_backward(clear, clear.tensor(p, level=6), clear.tensor(dp, level=4), heads)
    parts = [
        a * (b - (a * b).sum(1, keepdims=True))
        for a, b in zip(np.split(p, heads, 1), np.split(dp, heads, 1), strict=True)
    ]
    np.testing.assert_allclose(y.values, np.concatenate(parts, 1), atol=1e-13)
    assert y.level == 3
    assert y.bound <= 2.1
    assert [features for features, _ in clear.renewed] == [heads]
    assert clear.work()["relinearise"] == heads * (period + 1)


def test_backward_is_the_gradient():
    scores, step = random(SLOTS, 8, seed=2), 1e-6
    pairs, weights = masks(8)[1], random(SLOTS, 8, seed=3)
    clear = Renewing(PARAMETERS)
    p = softmax(scores, pairs, 1)
    ds = softmax_backward(clear, clear.tensor(p), clear.tensor(weights)).values
    for d in range(8):
        moved = [softmax(scores + sign * step * (np.arange(8) == d), pairs, 1) for sign in (1, -1)]
        slope = ((moved[0] - moved[1]) * weights).sum(1) / (2 * step)
        np.testing.assert_allclose(ds[:, d], slope, atol=1e-8)


CLEAR = Renewing(PARAMETERS)
X, PAIRS, MASK = (CLEAR.tensor(np.zeros((SLOTS, n)), bound=1.0) for n in (8, 4, 1))
PLAN = SquaringSoftmax.choose(4, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SquaringSoftmax.choose(0, 1.0), "period = 0"),
        (lambda: SquaringSoftmax.choose(8192, 1.0), "period = 8192"),
        (lambda: SquaringSoftmax.choose(4, -1.0), "bound = -1.0"),
        (lambda: SquaringSoftmax.choose(4, math.inf), "bound = inf"),
        (lambda: SquaringSoftmax.choose(4, 1.0, unit=0.0), "unit = 0.0"),
        (lambda: SquaringSoftmax.choose(4, 1.0, accuracy=0.5), "accuracy = 0.5"),
        (lambda: SquaringSoftmax.choose(4, 1.0, squarings=9), "squarings = 9"),
        (lambda: SquaringSoftmax.choose(4, 1.0, first=(1.0, 2.0)), "give it too"),
        (lambda: SquaringSoftmax.choose(4, 1.0, squarings=1, squares=[]), "squares has 0 domains"),
        (lambda: SquaringSoftmax.choose(4, 1.0, squarings=0, first=(0.0, 2.0)), "low > 0"),
        (lambda: SquaringSoftmax.choose(4, 1e4), "scale the scores down"),
        (lambda: PLAN.forward(CLEAR, X, PAIRS, MASK), "scores has shape"),
        (lambda: PLAN.forward(CLEAR, X, X, MASK, 2), "pairs has shape"),
        (lambda: PLAN.forward(CLEAR, X, PAIRS, PAIRS, 2), "mask has shape"),
        (lambda: softmax_backward(CLEAR, X, PAIRS), "must agree"),
        (lambda: softmax_backward(CLEAR, X, X, 3), "heads = 3"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_levels_run_out():
    x = CLEAR.tensor(np.zeros((SLOTS, 4)), bound=1.0, level=2)
    with pytest.raises(CkksError, match="level"):
        PLAN.forward(CLEAR, x, PAIRS, MASK)

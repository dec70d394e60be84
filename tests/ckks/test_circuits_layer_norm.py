"""Layer norm under an encrypted mask, and its gradient, on clear numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from circuit_cases import SLOTS, Array, Renewing, random
from privtuner import ckks
from privtuner.ckks.circuits import LayerNorm, Normed
from privtuner.errors import CkksError, InputError

PARAMETERS = ckks.Parameters.INSECURE(12)
MASK = (np.arange(SLOTS) % 5 != 3).astype(float)[:, None]


class Problem:
    """Tokens whose variances fill a domain, hidden ones 0; and what is exact, by NumPy."""

    def __init__(self, features: int, low: float, high: float, eps: float) -> None:
        self.domain, self.eps = (low, high), eps
        x = random(SLOTS, features, seed=features)
        x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        self.deviation = np.sqrt(np.geomspace(low, high, SLOTS))[:, None]
        self.x = (x * self.deviation + random(SLOTS, 1, seed=9)) * MASK
        self.weight, self.bias = random(features, seed=1, low=0.5, high=1.5), random(features, seed=2)
        self.dy = random(SLOTS, features, seed=3) * MASK
        self.centred = self.x - self.x.mean(1, keepdims=True)
        self.root = MASK / np.sqrt(self.x.var(1, keepdims=True) + eps)
        self.normal = self.centred * self.root * self.weight
        self.y = self.normal + MASK * self.bias
        g, hat = self.dy * self.weight, self.centred * self.root
        self.dx = self.root * (g - g.mean(1, keepdims=True) - hat * (g * hat).mean(1, keepdims=True))

    def forward(self, clear: Renewing, norm: LayerNorm, level: int = 5) -> tuple[ckks.ClearTensor, Normed]:
        x = clear.tensor(self.x, bound=np.abs(self.x).max(), level=level)
        return norm.forward(clear, x, clear.tensor(MASK), self.weight, self.bias)


CASES = [  # features, variances, eps, accuracy
    (8, 0.3, 0.9, 1e-5, 1e-6),
    (24, 0.36, 130.0, 1e-12, 1e-4),
    (5, 0.14, 0.5, 1e-3, 1e-3),
    (33, 0.0, 1.0, 1e-1, 1e-4),
]


@pytest.mark.parametrize("level", [4, 5, 11])
@pytest.mark.parametrize(("features", "low", "high", "eps", "accuracy"), CASES)
def test_forward(features, low, high, eps, accuracy, level):
    norm = LayerNorm.choose(features, (low, high), eps, accuracy)
    assert norm.error <= accuracy
    problem, clear = Problem(features, max(low, 1e-3), high, eps), Renewing(PARAMETERS)
    y, saved = problem.forward(clear, norm, level)
    assert (y.level, saved.centred.level) == (level - 1, level)
    assert y.scale == pytest.approx(PARAMETERS.scale(level - 1))
    assert np.abs(y.values - problem.y).max() <= norm.error * np.abs(problem.normal).max() + 1e-12
    assert np.abs(saved.root.values - problem.root).max() <= norm.error * problem.root.max() + 1e-12
    assert not y.values[MASK[:, 0] == 0].any()
    assert not saved.root.values[MASK[:, 0] == 0].any()
    np.testing.assert_allclose(saved.centred.values, problem.centred, atol=1e-12)
    assert y.bound <= 1.1 * (np.sqrt(features) * problem.weight.max() + np.abs(problem.bias).max())
    assert {width for width, _ in clear.renewed} == {1}
    assert max(bound for _, bound in clear.renewed) <= 2**10
    assert clear.work()["relinearise"] <= features + 1 + 40  # the root's products do not grow with the features
    assert not clear.rotated


@pytest.mark.parametrize(("levels", "left"), [((5, 4), 3), ((4, 4), 3), ((4, 3), 2), ((4, 8), 3)])
@pytest.mark.parametrize(("features", "low", "high", "eps", "accuracy"), CASES)
def test_backward(features, low, high, eps, accuracy, levels, left):
    norm = LayerNorm.choose(features, (low, high), eps, accuracy)
    problem, clear = Problem(features, max(low, 1e-3), high, eps), Renewing(PARAMETERS)
    # The root as it should be: its error has its own test.
    saved = Normed(
        clear.tensor(problem.centred, bound=np.abs(problem.centred).max(), level=levels[0]),
        clear.tensor(problem.root, bound=problem.root.max()),
    )
    dx = norm.backward(clear, saved, clear.tensor(problem.dy, level=levels[1]), problem.weight)
    assert dx.level == left
    np.testing.assert_allclose(dx.values, problem.dx, atol=1e-11 * problem.root.max())
    assert not dx.values[MASK[:, 0] == 0].any()
    assert clear.work()["relinearise"] == 2 * features + 1 + 4
    assert [width for width, _ in clear.renewed] in ([2], [2, 1], [2, 1, 1])
    assert max(bound for _, bound in clear.renewed) <= 2**10


def test_backward_is_the_gradient_of_forward():
    features, step = 6, 1e-5
    norm = LayerNorm.choose(features, (0.2, 2.0), 1e-5, 1e-9)
    problem, clear = Problem(features, 0.3, 1.5, 1e-5), Renewing(PARAMETERS)
    _, saved = problem.forward(clear, norm)
    dx = norm.backward(clear, saved, clear.tensor(problem.dy), problem.weight).values

    def loss(x: Array) -> Array:
        tensor = clear.tensor(x * MASK, bound=4.0)
        y, _ = norm.forward(clear, tensor, clear.tensor(MASK), problem.weight, problem.bias)
        return (y.values * problem.dy).sum(1)

    for f in range(features):
        moved = step * (np.arange(features) == f)
        slope = (loss(problem.x + moved) - loss(problem.x - moved)) / (2 * step)
        np.testing.assert_allclose(dx[:, f], slope, atol=1e-7)


def test_bears_noise():
    problem, norm = Problem(24, 0.36, 130.0, 1e-12), LayerNorm.choose(24, (0.36, 130.0), 1e-12)
    clear = Renewing(PARAMETERS, noise=4)
    y, saved = problem.forward(clear, norm)
    dx = norm.backward(clear, saved, clear.tensor(problem.dy), problem.weight)
    for made, exact in ((y, problem.y), (dx, problem.dx)):
        off = np.abs(made.values - exact).max()
        assert off <= norm.error * np.abs(problem.normal).max() + made.budget().error
        assert off <= 1e-2
    assert y.budget().error < 0.1


CLEAR = Renewing(PARAMETERS)
NORM = LayerNorm.choose(4, (0.1, 1.0))
X, ONE = (CLEAR.tensor(np.zeros((SLOTS, n)), bound=1.0) for n in (4, 1))
SAVED = Normed(X, ONE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayerNorm.choose(0, (0.1, 1.0)), "features = 0"),
        (lambda: LayerNorm.choose(4, (1.0, 0.1)), "low < high"),
        (lambda: LayerNorm.choose(4, (-0.1, 1.0)), "low >= 0"),
        (lambda: LayerNorm.choose(4, (0.0, 1.0), 0.0), r"low \+ eps > 0"),
        (lambda: LayerNorm.choose(4, (0.1, 1.0), -1.0), "eps = -1.0"),
        (lambda: LayerNorm.choose(4, (0.1, 1.0), math.nan), "eps = nan"),
        (lambda: LayerNorm.choose(4, (0.1, 1.0), accuracy=1.0), "accuracy = 1.0"),
        (lambda: LayerNorm.choose(4, (0.1, 1.0), noise=0.0), "noise = 0.0"),
        (lambda: LayerNorm.choose(4, (1e-9, 1.0), 0.0), "too wide"),
        (lambda: NORM.forward(CLEAR, ONE, ONE, np.ones(4), np.ones(4)), "x has shape"),
        (lambda: NORM.forward(CLEAR, X, X, np.ones(4), np.ones(4)), "mask has shape"),
        (lambda: NORM.forward(CLEAR, X, ONE, np.ones(3), np.ones(4)), "weight has shape"),
        (lambda: NORM.forward(CLEAR, X, ONE, np.ones(4), np.full(4, np.nan)), "bias holds"),
        (lambda: NORM.backward(CLEAR, SAVED, ONE, np.ones(4)), "must agree"),
        (lambda: NORM.backward(CLEAR, SAVED, X, np.ones(5)), "weight has shape"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_levels_run_out():
    with pytest.raises(CkksError, match="level"):
        NORM.forward(CLEAR, CLEAR.drop_level(X, 3), ONE, np.ones(4), np.ones(4))

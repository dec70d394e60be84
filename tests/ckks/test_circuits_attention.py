"""Attention by diagonals: values, gradients, levels, keys and counts on clear numbers; once on ciphertexts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from circuit_cases import PARAMETERS, SLOTS, Array, Watched, arrange, by_diagonals, random, tensor
from privtuner import ckks
from privtuner.ckks import circuits
from privtuner.errors import InputError

CASES = [(1, 1, 2), (2, 1, 3), (4, 2, 3), (8, 2, 2), (16, 1, 2), (SLOTS, 1, 1)]  # period, heads, features of a head


class Problem:
    """Random attention of every sequence: operands (sequence, head, token, ...) and all results, by NumPy."""

    def __init__(self, period: int, heads: int, width: int) -> None:
        self.period, self.heads = period, heads
        sequences = SLOTS // period
        self.q, self.k, self.v, self.do = (random(sequences, heads, period, width, seed=s) for s in range(4))
        self.p, self.ds = (random(sequences, heads, period, period, seed=s) for s in (4, 5))
        self.s = self.q @ self.k.swapaxes(2, 3)
        self.o = self.p @ self.v
        self.dq, self.dk = self.ds @ self.k, self.ds.swapaxes(2, 3) @ self.q
        self.dp, self.dv = self.do @ self.v.swapaxes(2, 3), self.p.swapaxes(2, 3) @ self.do

    def slots(self, name: str) -> Array:
        """What goes by a name in slots."""
        values = getattr(self, name)
        if name in ("s", "p", "ds", "dp"):
            return by_diagonals(values)
        sequences, heads, period, width = values.shape
        return arrange(values.transpose(0, 2, 1, 3).reshape(sequences, period, heads * width))


CIRCUITS: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "scores": (circuits.attention_scores, ("q", "k"), ("s",)),
    "values": (circuits.attention_values, ("p", "v"), ("o",)),
    "scores_backward": (circuits.attention_scores_backward, ("ds", "q", "k"), ("dq", "dk")),
    "values_backward": (circuits.attention_values_backward, ("do", "p", "v"), ("dp", "dv")),
}


@pytest.mark.parametrize("name", CIRCUITS)
@pytest.mark.parametrize(("period", "heads", "width"), CASES)
def test_is_attention(name, period, heads, width):
    circuit, inputs, outputs = CIRCUITS[name]
    problem, clear = Problem(period, heads, width), Watched()
    made = circuit(clear, *(tensor(clear, problem.slots(x)) for x in inputs), period, heads)
    for y, output in zip(made if isinstance(made, tuple) else (made,), outputs, strict=True):
        np.testing.assert_allclose(y.values, problem.slots(output), atol=1e-12)
        assert PARAMETERS.depth - y.level == circuits.ATTENTION_DEPTH
    assert set(clear.rotated) == set(circuits.attention_steps(SLOTS, period))


def counts(name: str, period: int, heads: int, width: int, chunk: int) -> tuple[int, int]:
    """Rotations and relinearisations, by the formulas of the documentation."""
    b = {1: 1, 2: 2, 4: 2, 8: 4, 16: 4}[period]
    features, giants = heads * width, period // b
    steps = features * (b + giants - 2)
    scores = (steps + heads * (period - b), heads * period * -(-width // chunk))
    values = (steps + heads * (period - b), features * giants)
    transposed = (steps + heads * (period - giants), features * giants)
    parts = {
        "scores": [scores],
        "values": [values],
        "scores_backward": [values, transposed],
        "values_backward": [scores, transposed],
    }[name]
    return sum(r for r, _ in parts), sum(m for _, m in parts)


@pytest.mark.parametrize("name", CIRCUITS)
@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize(("period", "heads", "width"), [(4, 2, 3), (8, 1, 7), (16, 3, 2)])
def test_counts_are_as_stated(name, period, heads, width, chunk):
    circuit, inputs, _ = CIRCUITS[name]
    problem, clear = Problem(period, heads, width), Watched()
    circuit(clear, *(tensor(clear, problem.slots(x)) for x in inputs), period, heads, chunk)
    work = clear.work()
    assert (work["rotate"], work["relinearise"]) == counts(name, period, heads, width, chunk)
    babies = circuits.attention_steps(SLOTS, period)
    assert max(clear.held) <= min(chunk, width) * len(babies)


def test_few_keys():
    for period in (1, 2, 4, 16, 32, 64, 128):
        steps = circuits.attention_steps(SLOTS, period)
        assert len(set(steps)) == len(steps) <= max(0.0, 3 * np.sqrt(period / 2) - 2)
        assert all(0 < step < SLOTS and step % (SLOTS // period) == 0 for step in steps)


@pytest.mark.parametrize("period", [1, 2, 8, 32, SLOTS])
def test_pair_mask(period):
    clear, sequences = Watched(), SLOTS // period
    tokens = np.arange(period) < 1 + np.random.default_rng(7).integers(0, period, sequences)[:, None]
    tokens[0] &= sequences == 1  # a sequence that is not in use
    mask = tensor(clear, arrange(tokens[:, :, None].astype(float)), bound=1.0)
    y = circuits.pair_mask(clear, mask, period)
    pairs = (tokens[:, :, None] & tokens[:, None, :])[:, None]
    np.testing.assert_allclose(y.values, by_diagonals(pairs.astype(float)), atol=1e-12)
    assert PARAMETERS.depth - y.level == circuits.ATTENTION_DEPTH
    assert y.bound == 1
    assert set(clear.rotated) == set(circuits.attention_steps(SLOTS, period))
    assert clear.work()["relinearise"] == period
    assert len(clear.rotated) == period - 1


@pytest.mark.parametrize("name", CIRCUITS)
def test_ciphertexts_agree(name):
    circuit, inputs, outputs = CIRCUITS[name]
    period, heads = 4, 2
    problem, parameters = Problem(period, heads, 4), ckks.Parameters.INSECURE(2)

    def run(evaluator, *tensors):
        return circuit(evaluator, *tensors, period, heads)

    plan = ckks.plan(run, *(problem.slots(x).shape for x in inputs), parameters=parameters)
    assert plan.rotations == tuple(sorted(circuits.attention_steps(SLOTS, period)))
    assert (plan.levels, plan.conjugation, plan.packing) == (circuits.ATTENTION_DEPTH, False, False)
    secret = ckks.SecretKey(parameters)
    evaluator = ckks.Evaluator(parameters, plan.keys(secret))
    made = run(evaluator, *(secret.encrypt(problem.slots(x)) for x in inputs))
    for y, output, dry in zip(made if isinstance(made, tuple) else (made,), outputs, plan.outputs, strict=True):
        assert (y.budget(), y.bound) == (dry.budget(), dry.bound)
        assert np.abs(secret.decrypt(y) - problem.slots(output)).max() <= y.budget().error < 1e-6


CLEAR = ckks.ClearEvaluator(PARAMETERS)
X, P, ONE = (CLEAR.tensor(np.ones((SLOTS, n))) for n in (4, 8, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: circuits.attention_steps(SLOTS, 3), "period = 3"),
        (lambda: circuits.attention_steps(SLOTS, 0), "period = 0"),
        (lambda: circuits.attention_steps(SLOTS, 2 * SLOTS), "power of two that divides"),
        (lambda: circuits.pair_mask(CLEAR, X, 4), "mask has shape"),
        (lambda: circuits.pair_mask(CLEAR, ONE, 5), "period = 5"),
        (lambda: circuits.attention_scores(CLEAR, X, P, 4), "must agree"),
        (lambda: circuits.attention_scores(CLEAR, X, X, 4, 3), "heads = 3"),
        (lambda: circuits.attention_scores(CLEAR, X, X, 4, 0), "heads = 0"),
        (lambda: circuits.attention_scores(CLEAR, X, X, 4, 1, 0), "chunk = 0"),
        (lambda: circuits.attention_values(CLEAR, P, X, 4), "by diagonals has shape"),
        (lambda: circuits.attention_values(CLEAR, P, X, 4, 2, 0), "chunk = 0"),
        (lambda: circuits.attention_scores_backward(CLEAR, P, X, P, 4, 2), "must agree"),
        (lambda: circuits.attention_scores_backward(CLEAR, X, X, X, 8), "by diagonals has shape"),
        (lambda: circuits.attention_values_backward(CLEAR, X, P, P, 4, 2), "must agree"),
        (lambda: circuits.attention_values_backward(CLEAR, X, X, X, 8), "by diagonals has shape"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()

"""Attention by diagonals, with baby steps and giant steps: scores, values, and the gradients of both.

Token i of sequence s sits in slot ``i * stride + s``, ``stride = slots / period``, so that a rotation by ``d * stride``
is a cyclic one over the tokens of every sequence at once. What belongs to a pair of tokens is kept by diagonals:
feature ``head * period + d`` at token i is of query i and key ``(i + d) mod period``. A head has ``features / heads``
neighbouring features.

With ``d = i b + j``, b about sqrt(period), one operand is rotated by the b - 1 baby steps, the other by the
period / b - 1 giant steps (both hoisted), and results are rotated once more by a giant step: the method of Halevi and
Shoup ("Algorithms in HElib", CRYPTO 2014; "Bootstrapping for HElib", EUROCRYPT 2015) with a matrix that is encrypted.
Every sum of products is relinearised once. A giant step back is another giant step, period - i b, and sums over earlier
tokens are written as sums over later ones, so that `attention_steps` are all the rotation keys there are, backward
included.
"""

from __future__ import annotations

from dataclasses import dataclass

from privtuner.ckks.circuits.common import baby_steps, heads_of, rotations
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError

ATTENTION_DEPTH = 1
"""Levels of every circuit here."""


def attention_steps(slots: int, period: int) -> tuple[int, ...]:
    """Rotations of all circuits of this module: the baby steps and the giant steps, about 2 sqrt(period).

    Raises:
        InputError: ``period`` is no power of two, or does not divide ``slots``.
    """
    grid = _Grid.of(slots, period)
    return tuple(grid.babies[1:] + grid.giants[1:])


def pair_mask(evaluator: EvaluatorProtocol[Tensor], mask: Tensor, period: int) -> Tensor:
    """Which keys a query may see, from which tokens there are: ``mask[i] mask[(i + d) mod period]`` as feature d.

    period - 1 rotations of one ciphertext, and ``period`` products.

    Args:
        evaluator: computes.
        mask: (slots, 1), 1 where a token is, else 0.
        period: tokens of a sequence, padding included; a power of two that divides the slots.

    Returns:
        (slots, period), after `ATTENTION_DEPTH` levels. Rotations: `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    grid = _Grid.of(evaluator.slots, period)
    if mask.shape != (evaluator.slots, 1):
        raise InputError(f"mask has shape {mask.shape}: expected {(evaluator.slots, 1)}")
    moved = [y for x in rotations(evaluator, mask, grid.giants) for y in rotations(evaluator, x, grid.babies)]
    return evaluator.multiply(evaluator.concatenate(moved), mask)


def attention_scores(
    evaluator: EvaluatorProtocol[Tensor], q: Tensor, k: Tensor, period: int, heads: int = 1, chunk: int = 32
) -> Tensor:
    """Scores of every query with every key of its sequence: ``sum_f q[i, f] k[(i + d) mod period, f]``, by diagonals.

    With b baby steps: ``features (b + period / b - 2) + heads (period - b)`` rotations, and ``heads * period``
    relinearisations for every ``chunk`` features of a head. Scaling by 1 / sqrt(features of a head) is left to the
    weights that made q.

    Args:
        evaluator: computes.
        q: queries (slots, features).
        k: keys, the same shape.
        period: tokens of a sequence, padding included; a power of two that divides the slots.
        heads: divides the features.
        chunk: features of a head that are taken at a time: ``chunk (b + period / b)`` ciphertexts are held.

    Returns:
        (slots, heads * period), after `ATTENTION_DEPTH` levels. Rotations: `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    grid = _Grid.of(evaluator.slots, period)
    if q.shape != k.shape:
        raise InputError(f"q has shape {q.shape}, k {k.shape}: they must agree")
    scores: list[Tensor] = []
    for head in heads_of(q, heads):
        totals: list[Tensor] = []
        for some in _chunks(head, chunk):
            keys = rotations(evaluator, evaluator.select(k, some), grid.babies)
            queries = rotations(evaluator, evaluator.select(q, some), grid.back)
            parts = [evaluator.concatenate([evaluator.dot(x, y) for y in keys]) for x in queries]
            totals = [evaluator.add(x, y) for x, y in zip(totals, parts, strict=True)] if totals else parts
        scores.extend(_rotate_each(evaluator, totals, grid.giants))
    return evaluator.concatenate(scores)


def attention_values(
    evaluator: EvaluatorProtocol[Tensor], p: Tensor, v: Tensor, period: int, heads: int = 1, chunk: int = 32
) -> Tensor:
    """Values weighed by probabilities: ``sum_d p[i, d] v[(i + d) mod period, f]``, p by diagonals.

    With b baby steps: ``features (b + period / b - 2) + heads (period - b)`` rotations, and
    ``features * period / b`` relinearisations.

    Args:
        evaluator: computes.
        p: probabilities (slots, heads * period), laid out as the result of `attention_scores`.
        v: values (slots, features).
        period: as for `attention_scores`.
        heads: as there.
        chunk: features of a head that are taken at a time: ``chunk (b + period / b) + period`` ciphertexts are held.

    Returns:
        (slots, features), after `ATTENTION_DEPTH` levels. Rotations: `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    grid = _Grid.of(evaluator.slots, period)
    _check_diagonals(p, v, period, heads)
    mixed = []
    for head, features in enumerate(heads_of(v, heads)):
        ours = [
            slice(head * period + i, head * period + i + len(grid.babies)) for i in range(0, period, len(grid.babies))
        ]
        weights = _rotate_each(evaluator, [evaluator.select(p, some) for some in ours], grid.back)
        mixed.extend(_mix(evaluator, grid, weights, v, features, chunk))
    return evaluator.concatenate(mixed)


def attention_scores_backward(
    evaluator: EvaluatorProtocol[Tensor],
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    period: int,
    heads: int = 1,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """Gradients of queries and keys from that of `attention_scores`: ``dS K`` and ``dS^T Q``, head by head.

    Args:
        evaluator: computes.
        ds: gradient of the scores (slots, heads * period).
        q: queries as they were (slots, features).
        k: keys as they were, the same shape.
        period: as for `attention_scores`.
        heads: as there.
        chunk: as for `attention_values`.

    Returns:
        (dq, dk), each (slots, features), after `ATTENTION_DEPTH` levels. Rotations: `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    if q.shape != k.shape:
        raise InputError(f"q has shape {q.shape}, k {k.shape}: they must agree")
    dq = attention_values(evaluator, ds, k, period, heads, chunk)
    return dq, attention_values_transposed(evaluator, ds, q, period, heads, chunk)


def attention_values_backward(
    evaluator: EvaluatorProtocol[Tensor],
    do: Tensor,
    p: Tensor,
    v: Tensor,
    period: int,
    heads: int = 1,
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """Gradients of probabilities and values from that of `attention_values`: ``dO V^T`` and ``P^T dO``, head by head.

    Args:
        evaluator: computes.
        do: gradient of the mixed values (slots, features).
        p: probabilities as they were (slots, heads * period).
        v: values as they were (slots, features).
        period: as for `attention_scores`.
        heads: as there.
        chunk: as there.

    Returns:
        (dp, dv), (slots, heads * period) and (slots, features), after `ATTENTION_DEPTH` levels. Rotations:
        `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    dp = attention_scores(evaluator, do, v, period, heads, chunk)
    return dp, attention_values_transposed(evaluator, p, do, period, heads, chunk)


def attention_values_transposed(
    evaluator: EvaluatorProtocol[Tensor], p: Tensor, v: Tensor, period: int, heads: int = 1, chunk: int = 32
) -> Tensor:
    """The sum ``sum_d p[i - d, d] v[i - d, f]``: as `attention_values` of the transposed matrices of pairs.

    With gradients in place of one of the two it is the gradient by values, or by keys. Written as
    ``sum_e p[i + e, -e] v[i + e, f]``, which takes the same steps; p is rotated by baby steps here,
    ``heads (period - period / b)`` rotations. Arguments, result and errors are those of `attention_values`.
    """
    grid = _Grid.of(evaluator.slots, period)
    _check_diagonals(p, v, period, heads)
    babies, giants = len(grid.babies), len(grid.giants)
    mixed = []
    for head, features in enumerate(heads_of(v, heads)):
        columns = []
        for j in range(babies):
            diagonals = [head * period + (-i - j) % period for i in range(0, period, babies)]
            columns.append(evaluator.concatenate([evaluator.select(p, slice(d, d + 1)) for d in diagonals]))
        columns = _rotate_each(evaluator, columns, grid.babies)
        weights = [
            evaluator.concatenate([evaluator.select(column, slice(i, i + 1)) for column in columns])
            for i in range(giants)
        ]
        mixed.extend(_mix(evaluator, grid, weights, v, features, chunk))
    return evaluator.concatenate(mixed)


def _mix(
    evaluator: EvaluatorProtocol[Tensor],
    grid: _Grid,
    weights: list[Tensor],
    v: Tensor,
    features: slice,
    chunk: int,
) -> list[Tensor]:
    """For some features f of v the sum over i of ``sum_j weights[i][t, j] v[t + j, f]`` rotated by i giant steps.

    A tensor a chunk of features. The weights are (slots, b) each.
    """
    mixed = []
    for some in _chunks(features, chunk):
        turned = rotations(evaluator, evaluator.select(v, some), grid.babies)
        sums: list[list[Tensor]] = [[] for _ in grid.giants]
        for f in range(some.stop - some.start):
            moved = evaluator.concatenate([evaluator.select(x, slice(f, f + 1)) for x in turned])
            for row, weight in zip(sums, weights, strict=True):
                row.append(evaluator.dot(weight, moved))
        first, *others = _rotate_each(evaluator, [evaluator.concatenate(row) for row in sums], grid.giants)
        for part in others:
            first = evaluator.add(first, part)
        mixed.append(first)
    return mixed


@dataclass(frozen=True)
class _Grid:
    """The steps in slots: ``babies`` and ``giants``, both from 0, and ``back``, the giants' inverses."""

    babies: list[int]
    giants: list[int]
    back: list[int]

    @classmethod
    def of(cls, slots: int, period: int) -> _Grid:
        count = baby_steps(slots, period)
        stride = slots // period
        giants = range(0, period, count)
        return cls(
            [stride * j for j in range(count)], [stride * i for i in giants], [stride * (-i % period) for i in giants]
        )


def _rotate_each(evaluator: EvaluatorProtocol[Tensor], tensors: list[Tensor], steps: list[int]) -> list[Tensor]:
    return [rotations(evaluator, x, [step])[0] for x, step in zip(tensors, steps, strict=True)]


def _chunks(features: slice, chunk: int) -> list[slice]:
    if chunk < 1:
        raise InputError(f"chunk = {chunk}: must be positive")
    return [slice(begin, min(begin + chunk, features.stop)) for begin in range(features.start, features.stop, chunk)]


def _check_diagonals(p: Tensor, v: Tensor, period: int, heads: int) -> None:
    expected = (v.shape[0], heads * period)
    if p.shape != expected:
        raise InputError(f"a tensor by diagonals has shape {p.shape}: expected {expected}")

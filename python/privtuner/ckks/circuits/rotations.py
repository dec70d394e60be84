"""Circuits that mix tokens: attention, and the product of a matrix with a vector in slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner.ckks.polynomial import Array
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError

ATTENTION_DEPTH = 1
"""Levels of `attention_scores`, and of `attention_values`."""

MATRIX_VECTOR_DEPTH = 1
"""Levels of `matrix_vector`."""


def attention_steps(slots: int, period: int) -> tuple[int, ...]:
    """Rotations of `attention_scores` and `attention_values`: the multiples of slots / period.

    Raises:
        InputError: ``period`` does not divide ``slots``.
    """
    stride = _stride(slots, period)
    return tuple(stride * d for d in range(1, period))


def attention_mask(slots: int, allowed: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Which keys a query may see, in the layout of `attention_scores`: the mask for `softmax`.

    Args:
        slots: the slots of the evaluator.
        allowed: (period, period), ``allowed[i, j]`` true where token i may see token j: for causal attention
            ``numpy.tri(period)``. Or one for each sequence, (slots / period, period, period).

    Returns:
        float64 (slots, period) of 0 and 1.

    Raises:
        InputError: another shape, or a period that does not divide ``slots``.
    """
    table = np.asarray(allowed).astype(bool)
    if table.ndim not in (2, 3) or table.shape[-1] != table.shape[-2]:
        raise InputError(f"allowed has shape {table.shape}: expected (period, period), with sequences before or not")
    period = table.shape[-1]
    stride = _stride(slots, period)
    if table.ndim == 3 and table.shape[0] != stride:
        raise InputError(f"allowed holds {table.shape[0]} sequences: {slots} slots of period {period} hold {stride}")
    table = np.broadcast_to(table, (stride, period, period))
    token = np.arange(slots) // stride
    key = (token[:, None] + np.arange(period)) % period
    mask: Array = table[(np.arange(slots) % stride)[:, None], token[:, None], key].astype(np.float64)
    return mask


def attention_scores(evaluator: EvaluatorProtocol[Tensor], q: Tensor, k: Tensor, period: int, chunk: int = 8) -> Tensor:
    """Scores of every query with every key of its sequence: ``sum_f q[i, f] k[(i + d) mod period, f]`` as feature d.

    Token i of sequence s sits in slot ``i * stride + s``, ``stride = slots / period``, so that one rotation by
    ``d * stride`` is a cyclic one over the tokens of every sequence at once. One relinearisation a score. Scaling by
    1 / sqrt(features) is left to the weights that made q.

    Args:
        evaluator: computes.
        q: queries (tokens, features).
        k: keys, the same shape.
        period: tokens of a sequence, padding included; divides the slots.
        chunk: rotations of k that are hoisted together, and held at a time: ``chunk * features`` ciphertexts.

    Returns:
        (tokens, period), after `ATTENTION_DEPTH` levels. Rotations: `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    stride = _stride(evaluator.slots, period)
    if q.shape != k.shape:
        raise InputError(f"q has shape {q.shape}, k {k.shape}: they must agree")
    if chunk < 1:
        raise InputError(f"chunk = {chunk}: must be positive")
    scores: list[Tensor] = []
    for begin in range(0, period, chunk):
        steps = [d * stride for d in range(begin, min(begin + chunk, period))]
        scores.extend(evaluator.dot(q, rotated) for rotated in _rotations(evaluator, k, steps))
    return evaluator.concatenate(scores)


def attention_values(evaluator: EvaluatorProtocol[Tensor], probabilities: Tensor, v: Tensor, period: int) -> Tensor:
    """Values weighed by probabilities: ``out[i, f] = sum_d probabilities[i, d] v[(i + d) mod period, f]``.

    Feature by feature: the rotations of one feature of v, hoisted (its decomposition is computed once), and their
    dot product with the probabilities, one relinearisation an output. ``period`` ciphertexts are held at a time.

    Args:
        evaluator: computes.
        probabilities: (tokens, period), laid out as the result of `attention_scores`.
        v: values (tokens, features).
        period: as for `attention_scores`.

    Returns:
        (tokens, features), after `ATTENTION_DEPTH` levels. Rotations: `attention_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    stride = _stride(evaluator.slots, period)
    tokens, features = v.shape
    if probabilities.shape != (tokens, period):
        raise InputError(f"probabilities has shape {probabilities.shape}: expected {(tokens, period)}")
    steps = [d * stride for d in range(period)]
    return evaluator.concatenate(
        [
            evaluator.dot(
                probabilities,
                evaluator.concatenate(list(_rotations(evaluator, evaluator.select(v, slice(f, f + 1)), steps))),
            )
            for f in range(features)
        ]
    )


# Matrix-vector product


def matrix_vector_steps(slots: int, period: int) -> tuple[int, ...]:
    """Rotations of `matrix_vector`: about 2 sqrt(period) of them.

    Raises:
        InputError: ``period`` is no power of two, or does not divide ``slots``.
    """
    babies = _babies(slots, period)
    return tuple(range(1, babies)) + tuple(range(babies, period, babies))


def matrix_vector(
    evaluator: EvaluatorProtocol[Tensor], x: Tensor, matrix: npt.ArrayLike, period: int | None = None
) -> Tensor:
    """A clear matrix times one encrypted vector that fills the slots, repeated with a period n.

    The diagonal method of Halevi and Shoup ("Algorithms in HElib", CRYPTO 2014) with baby steps and giant steps, as in
    their "Bootstrapping for HElib" (EUROCRYPT 2015): with b about sqrt(n), the b - 1 rotations of x are hoisted, and
    n / b - 1 sums of products with rotated diagonals are rotated in turn.

    Args:
        evaluator: computes.
        x: (slots, 1), slot i holding ``vector[i % n]``.
        matrix: (rows, columns), finite, both at most n; zeros are added up to (n, n).
        period: n, a power of two that divides the slots; by default the least that holds the matrix.

    Returns:
        (slots, 1), slot i holding ``(matrix @ vector)[i % n]``, after `MATRIX_VECTOR_DEPTH` levels. Rotations:
        `matrix_vector_steps`.

    Raises:
        InputError: an argument out of range.
        CkksError: not enough levels, or a rotation without its key.
    """
    entries = np.asarray(matrix, np.float64)
    if entries.ndim != 2 or 0 in entries.shape:
        raise InputError(f"matrix has shape {entries.shape}: expected (rows, columns), neither zero")
    if not np.isfinite(entries).all():
        raise InputError("matrix holds values that are not finite: every value must be")
    n = 1 << (max(entries.shape) - 1).bit_length() if period is None else period
    babies = _babies(evaluator.slots, n)
    if max(entries.shape) > n:
        raise InputError(f"matrix has shape {entries.shape}: at most {n} rows and columns fit the period")
    if x.shape != (evaluator.slots, 1):
        raise InputError(f"x has shape {x.shape}: expected {(evaluator.slots, 1)}, the vector repeated over all slots")
    square = np.zeros((n, n))
    square[: entries.shape[0], : entries.shape[1]] = entries
    row = np.arange(n)
    turned = evaluator.concatenate(list(_rotations(evaluator, x, list(range(babies)))))
    total: Tensor | None = None
    for giant in range(0, n, babies):
        # Rotated back by `giant`: the sum is rotated forward afterwards.
        back = (row - giant) % n
        diagonals = np.stack([square[back, (back + giant + baby) % n] for baby in range(babies)], axis=1)
        products = evaluator.multiply_plain(turned, np.tile(diagonals, (evaluator.slots // n, 1)))
        part = next(_rotations(evaluator, evaluator.sum_features(products), [giant]))
        total = part if total is None else evaluator.add(total, part)
    assert total is not None  # noqa: S101 - n is at least 1
    return total


def _babies(slots: int, period: int) -> int:
    if period < 1 or period & (period - 1) or slots % period:
        raise InputError(f"period = {period}: must be a power of two that divides the {slots} slots")
    return 1 << ((period.bit_length()) // 2)


def _rotations(evaluator: EvaluatorProtocol[Tensor], x: Tensor, steps: Sequence[int]) -> Iterator[Tensor]:
    """Rotate by each of the steps, hoisted; a step of 0 is x itself and needs no key."""
    nonzero = [step for step in steps if step]
    rotated: Any = evaluator.rotate(x, nonzero) if nonzero else []
    for step in steps:
        yield rotated.pop(0) if step else x


def _stride(slots: int, period: int) -> int:
    if period < 1 or slots % period:
        raise InputError(f"period = {period}: must divide the {slots} slots")
    return slots // period

"""The product of a clear matrix with a vector in slots."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from privtuner.ckks.circuits.common import baby_steps, rotations
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError

MATRIX_VECTOR_DEPTH = 1
"""Levels of `matrix_vector`."""


def matrix_vector_steps(slots: int, period: int) -> tuple[int, ...]:
    """Rotations of `matrix_vector`: about 2 sqrt(period) of them.

    Raises:
        InputError: ``period`` is no power of two, or does not divide ``slots``.
    """
    babies = baby_steps(slots, period)
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
    babies = baby_steps(evaluator.slots, n)
    if max(entries.shape) > n:
        raise InputError(f"matrix has shape {entries.shape}: at most {n} rows and columns fit the period")
    if x.shape != (evaluator.slots, 1):
        raise InputError(f"x has shape {x.shape}: expected {(evaluator.slots, 1)}, the vector repeated over all slots")
    square = np.zeros((n, n))
    square[: entries.shape[0], : entries.shape[1]] = entries
    row = np.arange(n)
    turned = evaluator.concatenate(rotations(evaluator, x, range(babies)))
    total: Tensor | None = None
    for giant in range(0, n, babies):
        # Rotated back by `giant`: the sum is rotated forward afterwards.
        back = (row - giant) % n
        diagonals = np.stack([square[back, (back + giant + baby) % n] for baby in range(babies)], axis=1)
        products = evaluator.multiply_plain(turned, np.tile(diagonals, (evaluator.slots // n, 1)))
        part = rotations(evaluator, evaluator.sum_features(products), [giant])[0]
        total = part if total is None else evaluator.add(total, part)
    assert total is not None  # noqa: S101 - n is at least 1
    return total

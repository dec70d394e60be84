"""The checks of clear arguments that every evaluator makes."""

import numpy as np
import pytest

from privtuner import ckks
from privtuner.ckks.arguments import as_numbers, as_span, as_steps, as_weights, whole
from privtuner.errors import CkksError, InputError


def test_numbers():
    for given, expected in ((2, [2.0]), (True, [1.0]), ([1, 2], [1.0, 2.0]), (np.float32(0.5), [0.5])):
        found = as_numbers(given)
        assert (found.dtype, found.tolist()) == (np.float64, expected)
    for given in ("1", 1j, [[1.0]], object()):
        with pytest.raises(InputError, match=r"expected a number or numbers of shape \(features,\)"):
            as_numbers(given)
    for given in (np.nan, [1.0, np.inf]):
        with pytest.raises(CkksError, match="a constant is NaN or infinity"):
            as_numbers(given)


def test_weights():
    assert as_weights([1, 2], 2).tolist() == [[1.0], [2.0]]
    assert as_weights([[1, 2, 3]], 1).shape == (1, 3)
    for given, tensors in (([1.0], 2), ([], 0), (1.0, 1), ([[[1.0]]], 1), (["1"], 1), ([1j], 1)):
        with pytest.raises(InputError, match=rf"weights of shape .* for {tensors} tensors; pass \(t,\) or"):
            as_weights(given, tensors)
    with pytest.raises(CkksError, match="weights hold NaN or infinity"):
        as_weights([[1.0, np.nan]], 1)


def test_spans():
    assert as_span(slice(1, 3), 4) == (1, 3)
    assert as_span(slice(-2, None), 4) == (2, 4)
    assert as_span(slice(None), 4) == (0, 4)
    with pytest.raises(InputError, match="choose neighbouring ones, step 1"):
        as_span(slice(0, 4, 2), 4)
    for empty in (slice(2, 2), slice(4, 9)):
        with pytest.raises(CkksError, match="of 4: there are none"):
            as_span(empty, 4)


def test_steps():
    assert as_steps(np.int64(-3)) == ([-3], False)
    assert as_steps((1, 2)) == ([1, 2], True)
    assert as_steps(range(2)) == ([0, 1], True)
    assert as_steps([]) == ([], True)
    for given in (1.5, "1", [1, 2.0], None):
        with pytest.raises(InputError, match="a rotation is .*; give a whole number"):
            as_steps(given)
    with pytest.raises(InputError, match=r"give a number below 2\^31 in size"):
        whole("a rotation", 1 << 31)


def test_matrices():
    matrix = ckks.Matrix(np.eye(2), bits=16)
    assert ckks.Matrix.of(matrix) is matrix
    assert ckks.Matrix.of(np.eye(2)).integers.dtype == np.int8

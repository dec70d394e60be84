"""Products of int8 and int16 matrices with residues modulo primes up to 60 bits, against Python's own integers."""

import gc
import sys

import numpy as np
import pytest

from privtuner import _core, system
from privtuner.errors import InputError

# The largest primes of these bits: around every number of digits of every path.
PRIMES = {
    20: 1048573,
    32: 4294967291,
    33: 8589934583,
    44: 17592186044399,
    48: 281474976710597,
    50: 1125899906842597,
    52: 4503599627370449,
    54: 18014398509481951,
    55: 36028797018963913,
    56: 72057594037927931,
    57: 144115188075855859,
    60: 1152921504606846883,
}
LIMITS = {np.int8: (-128, 127), np.int16: (-32639, 32639)}
USABLE = [path["name"] for path in _core.isa_paths() if path["usable"]]


@pytest.fixture(params=USABLE)
def isa(request):
    before = system.active_isa()
    system.set_isa(request.param)
    yield request.param
    system.set_isa(before)


def matrix(weights):
    return _core.CkksMatrix(np.ascontiguousarray(weights), np.ones(len(weights)))


def operands(seed, kind, transpose, rows, depth, columns, modulus):
    """Random weights and residues of which every seventh or so is an end of its range."""
    rng = np.random.default_rng(seed)
    low, high = LIMITS[kind]
    weights = rng.integers(low, high, (depth, rows) if transpose else (rows, depth), kind, endpoint=True)
    weights[rng.random(weights.shape) < 0.15] = high
    weights[rng.random(weights.shape) < 0.15] = low
    residues = rng.integers(0, modulus, (depth, columns), np.uint64)
    residues[rng.random(residues.shape) < 0.15] = modulus - 1
    return weights, residues


def schoolbook(weights, transpose, residues, modulus):
    """In Python's integers."""
    left = weights.astype(object)
    return ((left.T if transpose else left) @ residues.astype(object) % modulus).astype(np.uint64)


def test_a_product_by_hand(isa):
    # [[1, -2], [127, -128]] [[q - 1, 5], [3, 0]] = [[-1 - 6, 5], [-127 - 384, 635]], and [[1, 127], [-2, -128]] times
    # it = [[-1 + 381, 5], [2 - 384, -10]].
    held = matrix(np.array([[1, -2], [127, -128]], np.int8))
    for q in PRIMES.values():
        residues = np.array([[q - 1, 5], [3, 0]], np.uint64)
        product = _core.ResidueProduct(held, False, residues, q)
        assert (product.rows, product.columns) == (2, 2)
        assert product.multiply(0, 2).tolist() == [[q - 7, 5], [q - 511, 635]]
        assert _core.ResidueProduct(held, True, residues, q).multiply(0, 2).tolist() == [[380, 5], [q - 382, q - 10]]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("kind", [np.int8, np.int16])
@pytest.mark.parametrize("bits", PRIMES)
def test_matches_python_integers(isa, bits, kind, transpose):
    weights, residues = operands(bits, kind, transpose, 37, 131, 35, PRIMES[bits])
    product = _core.ResidueProduct(matrix(weights), transpose, residues, PRIMES[bits])
    assert (product.rows, product.columns) == (37, 35)
    got = product.multiply(0, 37)
    assert got.dtype == np.uint64
    np.testing.assert_array_equal(got, schoolbook(weights, transpose, residues, PRIMES[bits]), strict=True)


@pytest.mark.parametrize(("preset", "kind", "limit"), [("linear-w8", np.int8, 127), ("linear-w16", np.int16, 32639)])
def test_takes_the_weights_of_a_prepared_layer(isa, preset, kind, limit):
    weights, residues = operands(1, kind, False, 33, 20, 18, PRIMES[60])
    weights = np.maximum(weights, -limit)
    prepared = _core.QuantisedWeight(preset, bytes(16), weights, np.ones(33))
    got = _core.ResidueProduct(prepared, False, residues, PRIMES[60]).multiply(0, 33)
    np.testing.assert_array_equal(got, schoolbook(weights, False, residues, PRIMES[60]), strict=True)
    turned = _core.ResidueProduct(prepared, True, np.ascontiguousarray(got), PRIMES[60]).multiply(0, 20)
    np.testing.assert_array_equal(turned, schoolbook(weights, True, got, PRIMES[60]), strict=True)


@pytest.mark.parametrize("kind", [np.int8, np.int16])
@pytest.mark.parametrize("bits", [50, 54, 60])
def test_the_longest_sums_of_one_sign(isa, bits, kind):
    q, depth = PRIMES[bits], 65536
    weights = np.repeat(np.array(LIMITS[kind], kind)[:, None], depth, 1)
    product = _core.ResidueProduct(matrix(weights), False, np.full((depth, 3), q - 1, np.uint64), q)
    want = [[depth * int(w) * (q - 1) % q] * 3 for w in LIMITS[kind]]
    assert product.multiply(0, 2).tolist() == want


def test_row_ranges(isa):
    weights, residues = operands(2, np.int8, True, 131, 70, 33, PRIMES[60])
    product = _core.ResidueProduct(matrix(weights), True, residues, PRIMES[60])
    want = schoolbook(weights, True, residues, PRIMES[60])
    for begin in range(0, 131, 32):
        for count in (0, 1, 3, 17, 32, 35, 131 - begin):
            if begin + count <= 131:
                np.testing.assert_array_equal(product.multiply(begin, count), want[begin : begin + count], strict=True)


def test_threads_change_no_word():
    weights, residues = operands(3, np.int16, False, 97, 200, 300, PRIMES[60])
    want, before = schoolbook(weights, False, residues, PRIMES[60]), system.get_num_threads()
    try:
        for threads in (1, 2, 5):
            system.set_num_threads(threads)
            got = _core.ResidueProduct(matrix(weights), False, residues, PRIMES[60]).multiply(0, 97)
            np.testing.assert_array_equal(got, want, strict=True)
    finally:
        system.set_num_threads(before)


def test_keeps_the_weights_and_lets_go_of_the_residues():
    weights, residues = operands(4, np.int8, False, 8, 9, 10, PRIMES[54])
    want, references = schoolbook(weights, False, residues, PRIMES[54]), sys.getrefcount(residues)
    product = _core.ResidueProduct(matrix(weights), False, residues, PRIMES[54])
    assert sys.getrefcount(residues) == references
    residues[:] = 0
    gc.collect()
    np.testing.assert_array_equal(product.multiply(0, 8), want, strict=True)


# Preconditions

HELD = matrix(np.ones((3, 2), np.int8))
GOOD = np.zeros((2, 5), np.uint64)
Q = PRIMES[60]


def changed(place, value, shape=(2, 5)):
    array = np.zeros(shape, np.uint64)
    array[place] = value
    return array


def unaligned(shape):
    return np.frombuffer(bytearray(8 * np.prod(shape) + 1), np.uint64, offset=1).reshape(shape)


@pytest.mark.parametrize(
    ("residues", "message"),
    [
        (np.zeros((2, 5), np.int64), "C-contiguous, aligned array of uint64, not one of int64"),
        (np.zeros((2, 5), np.uint32), "not one of uint32"),
        (np.zeros((2, 5), np.float64), "not one of float64; numpy.require"),
        (np.zeros((2, 5), ">u8"), "not one of >u8"),
        (np.zeros((5, 2), np.uint64).T, "must be a C-contiguous, aligned array"),
        (np.zeros((2, 10), np.uint64)[:, ::2], "must be a C-contiguous, aligned array"),
        (np.zeros((4, 5), np.uint64)[::2], "must be a C-contiguous, aligned array"),
        (unaligned((2, 5)), "must be a C-contiguous, aligned array"),
        (
            np.zeros(2, np.uint64),
            r"residues of shape \(2,\) for weights of shape \(3, 2\): must be \(2, columns\)",
        ),
        (np.zeros((2, 5, 1), np.uint64), r"residues of shape \(2, 5, 1\) for"),
        (np.zeros((), np.uint64), r"residues of shape \(\) for"),
        (np.zeros((3, 5), np.uint64), r"residues of shape \(3, 5\) for weights of shape \(3, 2\): must be \(2, col"),
        (np.zeros((2, 0), np.uint64), r"residues of shape \(2, 0\) for"),
        (changed((1, 4), Q), rf"the residue at \(1, 4\) is not below the modulus {Q}; reduce it"),
        (changed((0, 2), Q + 1), r"the residue at \(0, 2\)"),
        (changed((0, 0), 2**63 - 1), r"the residue at \(0, 0\)"),
        (changed((1, 0), 2**63), r"the residue at \(1, 0\)"),
        (changed((1, 1), 2**63 + Q - 1), r"the residue at \(1, 1\)"),
        (changed((1, 1), 2**63 + Q), r"the residue at \(1, 1\)"),
        (changed((0, 3), 2**64 - 1), r"the residue at \(0, 3\)"),
    ],
)
def test_residues_are_refused(residues, message):
    with pytest.raises(InputError, match=message):
        _core.ResidueProduct(HELD, False, residues, Q)


def test_a_depth_for_the_other_operand_is_refused():
    with pytest.raises(InputError, match=r"\(2, 5\) for the transpose of weights of shape \(3, 2\): must be \(3, col"):
        _core.ResidueProduct(HELD, True, GOOD, Q)


def test_the_first_word_that_is_too_large_is_named():
    depth = 1000
    residues = changed((slice(517, None), 3), 97, (depth, 5))
    residues[517, 2] = 96
    held = matrix(np.ones((1, depth), np.int8))
    for _ in range(20):  # whichever thread meets its word first
        with pytest.raises(InputError, match=r"the residue at \(517, 3\) is not below the modulus 97"):
            _core.ResidueProduct(held, False, residues, 97)


@pytest.mark.parametrize(
    ("modulus", "message"),
    [
        (2**59 - 1, f"modulus {2**59 - 1} is not an odd prime"),  # 179951 * 3203431780337
        (2, "modulus 2 is not an odd prime"),
        (1, "modulus 1 is not an odd prime"),
        (0, "modulus 0 is not an odd prime"),
        (2**60, rf"modulus {2**60} is not below 2\^60; choose a smaller prime"),
        (2**60 + 33, rf"modulus {2**60 + 33} is not below 2\^60"),  # a prime
        (2**64 - 1, rf"modulus {2**64 - 1} is not below 2\^60"),
    ],
)
def test_moduli_are_refused(modulus, message):
    with pytest.raises(InputError, match=message):
        _core.ResidueProduct(HELD, False, GOOD, modulus)


@pytest.mark.parametrize(
    ("weights", "residues", "modulus"),
    [
        (None, GOOD, Q),
        (np.ones((3, 2), np.int8), GOOD, Q),
        (HELD, GOOD.tolist(), Q),
        (HELD, GOOD, 97.0),
        (HELD, GOOD, -3),
        (HELD, GOOD, 2**64 + 13),
    ],
)
def test_other_types_are_refused(weights, residues, modulus):
    with pytest.raises(TypeError):
        _core.ResidueProduct(weights, False, residues, modulus)


@pytest.mark.parametrize(
    ("begin", "count", "message"),
    [
        (1, 1, r"rows \[1, 2\) must start at a multiple of 32"),
        (48, 2, r"rows \[48, 50\) must start at a multiple of 32"),
        (0, 101, "101 rows from 0: there are 100"),
        (96, 5, "5 rows from 96: there are 100"),
        (128, 0, "0 rows from 128: there are 100"),
        (64, 2**64 - 32, f"{2**64 - 32} rows from 64: there are 100"),
    ],
)
def test_row_ranges_are_refused(begin, count, message):
    product = _core.ResidueProduct(matrix(np.ones((100, 2), np.int8)), False, GOOD, Q)
    with pytest.raises(InputError, match=message):
        product.multiply(begin, count)
    with pytest.raises(TypeError):
        product.multiply(-32, 1)

"""One contract of every evaluator: the same circuits on the same inputs, each within the error it predicts itself.

They differ in precision: OpenFHE adds noise when it decrypts, and its key switching is off by more; clear numbers are
off by nothing. What they have in common is the protocol, the values, and which misuse is which exception.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evaluators import ALL, ENCRYPTED, NEEDS_OPENFHE, Case, make
from privtuner import ckks, openfhe
from privtuner.ckks import circuits
from privtuner.errors import CkksError, InputError, MessageError, SecretError
from privtuner.openfhe.estimate import Estimate

DEPTH, FEATURES = 5, 4
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=ALL)
def case(request) -> Case:
    return make(request.param, DEPTH, rotations="sums", conjugation=True)


@pytest.fixture(scope="module")
def values(case) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.uniform(-1, 1, (case.slots, FEATURES)), rng.uniform(-1, 1, (case.slots, FEATURES))


@pytest.fixture(scope="module")
def tensors(case, values):
    x, y = values
    return case.encrypt(x), case.encrypt(y, with_public_key=True)


def expect(case: Case, tensor, want, level: int | None = None) -> None:
    """The decrypted values are as near as predicted, and the prediction is of use."""
    found, budget = case.decrypt(tensor), tensor.budget()
    error = np.abs(found - want).max()
    assert error <= budget.error, f"off by {error:.3g}, predicted {budget.error:.3g}"
    assert budget.error < 2.0**-8 * max(1.0, np.abs(want).max())
    assert np.abs(want).max() <= tensor.bound * (1 + 1e-9)
    assert tensor.shape == want.shape
    if level is not None:
        assert tensor.level == level


MATRIX = ckks.Matrix(np.random.default_rng(2).standard_normal((6, FEATURES)))
SQUARE = ckks.Matrix(np.random.default_rng(3).standard_normal((FEATURES, 5)), per_row=False)
SKEWED = ckks.Matrix(np.diag([1.0, 2.0, 3.0, 4.0]))
NUMBERS = np.array([0.5, -2.0, 3.0, 0.25])

# name: (what the evaluator does, the same in clear, levels it takes)
OPERATIONS: dict[str, tuple[Callable, Callable, int]] = {
    "encrypt": (lambda e, x, y: x, lambda x, y: x, 0),
    "encrypt with the public key": (lambda e, x, y: y, lambda x, y: y, 0),
    "add": (lambda e, x, y: e.add(x, y), lambda x, y: x + y, 0),
    "add numbers": (lambda e, x, y: e.add(x, NUMBERS), lambda x, y: x + NUMBERS, 0),
    "subtract": (lambda e, x, y: e.subtract(x, y), lambda x, y: x - y, 0),
    "subtract a number": (lambda e, x, y: e.subtract(x, 0.75), lambda x, y: x - 0.75, 0),
    "negate": (lambda e, x, y: e.negate(x), lambda x, y: -x, 0),
    "multiply": (lambda e, x, y: e.multiply(x, y), lambda x, y: x * y, 1),
    "square": (lambda e, x, y: e.square(x), lambda x, y: x * x, 1),
    "multiply by numbers": (lambda e, x, y: e.multiply(x, NUMBERS), lambda x, y: x * NUMBERS, 1),
    "multiply by clear values": (lambda e, x, y: e.multiply_plain(x, 0.5 * np.ones(x.shape)), lambda x, y: x / 2, 1),
    "one feature with all": (lambda e, x, y: e.multiply(x, e.select(y, slice(1, 2))), lambda x, y: x * y[:, 1:2], 1),
    "products of products": (
        lambda e, x, y: e.multiply(e.multiply(e.multiply(x, y), x), y),
        lambda x, y: x * y * x * y,
        3,
    ),
    "tensors of two levels": (lambda e, x, y: e.add(e.multiply(x, y), x), lambda x, y: x * y + x, 1),
    "products of two levels": (lambda e, x, y: e.multiply(e.multiply(x, y), x), lambda x, y: x * y * x, 2),
    "dot": (lambda e, x, y: e.dot(x, y), lambda x, y: (x * y).sum(1, keepdims=True), 1),
    "sum_features": (lambda e, x, y: e.sum_features(x), lambda x, y: x.sum(1, keepdims=True), 0),
    "concatenate": (lambda e, x, y: e.concatenate([x, e.multiply(x, y)]), lambda x, y: np.hstack([x, x * y]), 1),
    "select": (lambda e, x, y: e.select(x, slice(1, 3)), lambda x, y: x[:, 1:3], 0),
    "linear": (lambda e, x, y: e.linear(x, MATRIX), lambda x, y: x @ MATRIX.dequantised().T, 0),
    "linear, transposed": (
        lambda e, x, y: e.linear(x, SQUARE, transpose=True),
        lambda x, y: x @ SQUARE.dequantised(),
        0,
    ),
    "add to a matrix product": (
        lambda e, x, y: e.add(e.linear(x, MATRIX), 0.5),
        lambda x, y: x @ MATRIX.dequantised().T + 0.5,
        0,
    ),
    "square a matrix product": (
        lambda e, x, y: e.square(e.linear(x, MATRIX)),
        lambda x, y: (x @ MATRIX.dequantised().T) ** 2,
        1,
    ),
    "matrix product of a product": (
        lambda e, x, y: e.linear(e.multiply(x, y), MATRIX),
        lambda x, y: (x * y) @ MATRIX.dequantised().T,
        1,
    ),
    "linear_combination": (
        lambda e, x, y: e.linear_combination([x, y], [2.0, 0.5], 1.0),
        lambda x, y: 2 * x + 0.5 * y + 1,
        1,
    ),
    "rotate": (lambda e, x, y: e.rotate(x, 4), lambda x, y: np.roll(x, -4, 0), 0),
    "rotate by nothing": (lambda e, x, y: e.rotate(x, 0), lambda x, y: x, 0),
    "rotate by all slots": (lambda e, x, y: e.rotate(x, e.slots), lambda x, y: x, 0),
    "rotate, hoisted": (lambda e, x, y: e.rotate(x, [1, 16])[1], lambda x, y: np.roll(x, -16, 0), 0),
    "conjugate": (lambda e, x, y: e.conjugate(x), lambda x, y: x, 0),
    "sum_slots": (lambda e, x, y: e.sum_slots(x), lambda x, y: np.broadcast_to(x.sum(0), x.shape), 0),
    "drop_level": (lambda e, x, y: e.drop_level(x, 1), lambda x, y: x, 4),
    "drop a product": (lambda e, x, y: e.drop_level(e.multiply(x, y), 2), lambda x, y: x * y, 3),
    "assume": (lambda e, x, y: e.assume(x, 1.5), lambda x, y: x, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(case, values, tensors, name):
    run, clear, levels = OPERATIONS[name]
    expect(case, run(case.evaluator, *tensors), clear(*values), DEPTH - levels)


POLYNOMIALS = {
    "degree 0": ckks.Polynomial((0.25,)),
    "degree 1": ckks.Polynomial((0.25, 0.5)),
    "power": ckks.Polynomial((0.5, 1.0, -0.3, 0.2, 0.1), basis="power"),
    "Chebyshev": ckks.fit(np.tanh, (-1, 1), 7),
    "a domain that is not symmetric": ckks.fit(np.exp, (-1.5, 1), 7),
    "a long one": ckks.fit(np.tanh, (-2, 2), 13),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("which", POLYNOMIALS)
def test_polynomials(name, which):
    case = make(name, 8)
    polynomial = POLYNOMIALS[which]
    x = np.random.default_rng(4).uniform(-1, 1, (case.slots, 2))
    result = case.evaluator.polynomial(case.encrypt(x), polynomial)
    expect(case, result, polynomial(x))
    # OpenFHE: one level more for most degrees, one to map the domain.
    assert 0 <= 8 - result.level - polynomial.depth <= (3 if name == "openfhe" else 1)


@pytest.mark.parametrize("name", ALL)
def test_polynomials_at_shared_powers(name):
    case = make(name, 8)
    value = POLYNOMIALS["a long one"]
    x = np.random.default_rng(4).uniform(-1, 1, (case.slots, 2))
    encrypted = case.encrypt(x)
    results = case.evaluator.polynomials(encrypted, [value, value.derivative()])
    for result, polynomial in zip(results, (value, value.derivative()), strict=True):
        expect(case, result, polynomial(x))
        assert result.level == case.evaluator.polynomial(encrypted, polynomial).level


def test_a_polynomial_of_a_matrix_product(case, values, tensors):
    matrix = ckks.Matrix(np.random.default_rng(5).uniform(-0.25, 0.25, (3, FEATURES)))
    inner = values[0] @ matrix.dequantised().T
    product = case.evaluator.assume(case.evaluator.linear(tensors[0], matrix), 1.0)
    polynomial = ckks.fit(np.tanh, (-1, 1), 3)
    expect(case, case.evaluator.polynomial(product, polynomial), polynomial(inner))


@pytest.mark.parametrize("name", ALL)
def test_circuits(name):
    case = make(name, 14)
    rng = np.random.default_rng(6)
    x = rng.uniform(-4, 0, (case.slots, 2))
    error = circuits.exponential_error(-4.0, 0, 7) * np.exp(x)
    result = circuits.exponential(case.evaluator, case.encrypt(x, bound=4.0), -4.0, 0, 7)
    found = case.decrypt(result)
    assert (np.abs(found - np.exp(x)) <= error + result.budget().error).all()
    y = rng.uniform(0.5, 4, (case.slots, 2))
    result = circuits.reciprocal(case.evaluator, case.encrypt(y, bound=4.0), (0.5, 4.0), 7, 1)
    found = case.decrypt(result)
    wanted = circuits.reciprocal_error((0.5, 4.0), 7, 1) / y + result.budget().error
    assert (np.abs(found - 1 / y) <= wanted).all()


@pytest.mark.parametrize("name", ALL)
def test_a_matrix_times_one_packed_vector(name):
    period = 16
    case = make(name, 2, rotations=circuits.matrix_vector_steps(512, period))
    rng = np.random.default_rng(7)
    matrix, x = rng.uniform(-1, 1, (period, period)), rng.uniform(-1, 1, period)
    repeated = np.tile(x, case.slots // period)[:, None]
    result = circuits.matrix_vector(case.evaluator, case.encrypt(repeated), matrix, period)
    found = case.decrypt(result)[:period, 0]
    assert np.abs(found - matrix @ x).max() <= result.budget().error < 1e-3


# The same misuse is the same exception.


def _other(case: Case) -> Case:
    return make(case.name, 2)


ENCRYPTION = {
    "more tokens than slots": (CkksError, lambda c: c.encrypt(np.zeros((c.slots + 1, 1)))),
    "above the bound": (CkksError, lambda c: c.encrypt([1.5])),
    "not a number": (CkksError, lambda c: c.encrypt([np.nan])),
    "infinite": (CkksError, lambda c: c.encrypt([np.inf], bound=2.0)),
    "a level below zero": (CkksError, lambda c: c.encrypt([0.5], level=-1)),
    "a level that does not exist": (CkksError, lambda c: c.encrypt([0.5], level=DEPTH + 1)),
    "a bound of zero": (InputError, lambda c: c.encrypt([0.0], bound=0.0)),
    "an infinite bound": (InputError, lambda c: c.encrypt([0.0], bound=np.inf)),
    "no tokens": (InputError, lambda c: c.encrypt(np.zeros((0, 2)))),
    "three dimensions": (InputError, lambda c: c.encrypt(np.zeros((2, 2, 2)))),
    "text": (InputError, lambda c: c.encrypt(["a"])),
}

MISUSE = {
    "no level for a product": (CkksError, lambda c, x: c.evaluator.multiply(c.evaluator.drop_level(x, 0), x)),
    "no level for a number": (CkksError, lambda c, x: c.evaluator.multiply(c.evaluator.drop_level(x, 0), 0.5)),
    "no level for clear values": (
        CkksError,
        lambda c, x: c.evaluator.multiply_plain(c.evaluator.drop_level(x, 0), [[0.5]]),
    ),
    "no level for a polynomial": (
        CkksError,
        lambda c, x: c.evaluator.polynomial(c.evaluator.drop_level(x, 1), ckks.approximate("gelu")),
    ),
    "a domain that is too small": (
        CkksError,
        lambda c, x: c.evaluator.polynomial(x, ckks.fit(np.tanh, (-0.5, 0.5), 3)),
    ),
    "no level for a combination": (
        CkksError,
        lambda c, x: c.evaluator.linear_combination([c.evaluator.drop_level(x, 0)], [1]),
    ),
    "an engine of other parameters": (CkksError, lambda c, x: _other(c).evaluator.add(x, x)),
    "a tensor of other parameters": (CkksError, lambda c, x: c.evaluator.add(x, _other(c).encrypt([0.5]))),
    "features that do not fit": (CkksError, lambda c, x: c.evaluator.add(x, c.evaluator.select(x, slice(0, 3)))),
    "features of a product": (CkksError, lambda c, x: c.evaluator.multiply(x, c.evaluator.select(x, slice(0, 3)))),
    "features of a dot product": (CkksError, lambda c, x: c.evaluator.dot(x, c.evaluator.select(x, slice(0, 1)))),
    "tokens that do not fit": (CkksError, lambda c, x: c.evaluator.add(x, c.encrypt(np.zeros((3, FEATURES))))),
    "nothing to concatenate": (CkksError, lambda c, x: c.evaluator.concatenate([])),
    "numbers that do not fit": (CkksError, lambda c, x: c.evaluator.add(x, [1.0, 2.0, 3.0])),
    "a number that is none": (CkksError, lambda c, x: c.evaluator.multiply(x, np.nan)),
    "clear values that do not fit": (CkksError, lambda c, x: c.evaluator.multiply_plain(x, np.zeros((3, 1)))),
    "clear values that are none": (CkksError, lambda c, x: c.evaluator.multiply_plain(x, np.full(x.shape, np.inf))),
    "weights that do not fit": (CkksError, lambda c, x: c.evaluator.linear(x, np.ones((2, FEATURES + 1)))),
    "weights that are none": (InputError, lambda c, x: c.evaluator.linear(x, np.full((2, FEATURES), np.nan))),
    "scales that do not fit": (
        CkksError,
        lambda c, x: c.evaluator.linear(c.evaluator.linear(x, MATRIX), np.ones((2, 6))),
    ),
    "row scales of a transpose": (CkksError, lambda c, x: c.evaluator.linear(x, SKEWED, transpose=True)),
    "two widths behind a single feature": (
        CkksError,
        lambda c, x: c.evaluator.linear_combination(
            [c.evaluator.select(x, slice(0, 1)), c.evaluator.select(x, slice(0, 2)), x], [1.0, 1.0, 1.0]
        ),
    ),
    "one weight for two tensors": (InputError, lambda c, x: c.evaluator.linear_combination([x, x], [1.0])),
    "features with a step": (InputError, lambda c, x: c.evaluator.select(x, slice(0, 4, 2))),
    "a level above": (CkksError, lambda c, x: c.evaluator.drop_level(c.evaluator.drop_level(x, 1), 2)),
    "a level below zero": (CkksError, lambda c, x: c.evaluator.drop_level(x, -1)),
    "a promise of nothing": (CkksError, lambda c, x: c.evaluator.assume(x, 0.0)),
    "a broken promise": (CkksError, lambda c, x: c.decrypt(c.evaluator.assume(x, 0.1))),
}


KEYS = {
    "no relinearisation key": (CkksError, lambda c, x: c.evaluator_with(None).multiply(x, x)),
    "no relinearisation key for a dot product": (CkksError, lambda c, x: c.evaluator_with(None).dot(x, x)),
    "no key for a rotation": (CkksError, lambda c, x: c.evaluator.rotate(x, 3)),
    "no key for one of several rotations": (CkksError, lambda c, x: c.evaluator.rotate(x, [1, 3])),
    "no key for a conjugation": (CkksError, lambda c, x: c.evaluator_with(None).conjugate(x)),
    "no keys for a sum": (CkksError, lambda c, x: c.evaluator_with(None).sum_slots(x)),
    "keys of other parameters": (CkksError, lambda c, x: c.evaluator_with(_other(c).keys)),
}

OWNERS = {
    "another key": (CkksError, lambda c, x: type(c.secret)(c.parameters).decrypt(x)),
    "a key of other parameters": (CkksError, lambda c, x: _other(c).secret.decrypt(x)),
    "bytes of nothing": (MessageError, lambda c, x: type(x).from_bytes(c.parameters, b"")),
    "bytes that end early": (MessageError, lambda c, x: type(x).from_bytes(c.parameters, x.to_bytes()[:-1])),
    "bytes too many": (MessageError, lambda c, x: type(x).from_bytes(c.parameters, x.to_bytes() + b"x")),
    "bytes of other parameters": (MessageError, lambda c, x: type(x).from_bytes(_other(c).parameters, x.to_bytes())),
    "a copied secret": (SecretError, lambda c, x: __import__("copy").deepcopy(c.secret)),
    "a pickled secret": (SecretError, lambda c, x: __import__("pickle").dumps(c.secret)),
}


@pytest.mark.parametrize("name", ENCRYPTION)
def test_what_encryption_refuses(case, name):
    error, run = ENCRYPTION[name]
    with pytest.raises(error):
        run(case)


@pytest.mark.parametrize("name", MISUSE)
def test_misuse(case, tensors, name):
    error, run = MISUSE[name]
    with pytest.raises(error):
        run(case, tensors[0])


@pytest.fixture(scope="module", params=ENCRYPTED)
def encrypted(request) -> tuple[Case, Any]:
    case = make(request.param, DEPTH, rotations=[1])
    return case, case.encrypt(np.full((4, FEATURES), 0.5))


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_are_missing(encrypted, name):
    error, run = KEYS[name]
    with pytest.raises(error):
        run(*encrypted)


@pytest.fixture(scope="module", params=["native", pytest.param("openfhe", marks=NEEDS_OPENFHE)])
def owned(request) -> tuple[Case, Any]:
    case = make(request.param, DEPTH)
    return case, case.encrypt(np.full((4, FEATURES), 0.5))


@pytest.mark.parametrize("name", OWNERS)
def test_secrets_and_bytes(owned, name):
    error, run = OWNERS[name]
    with pytest.raises(error):
        run(*owned)


# Residues: the same ciphertext times the same integer matrix, in both libraries.


@NEEDS_OPENFHE
@pytest.mark.parametrize("weights", [MATRIX, ckks.Matrix(RNG.standard_normal((6, FEATURES)), bits=16)])
@pytest.mark.parametrize("transpose", [False, True])
def test_openfhe_ciphertexts_multiplied_by_both(weights, transpose):
    case = make("openfhe", 2)
    features = weights.shape[0 if transpose else 1]
    matrix = ckks.Matrix.of_integers(weights.integers, 0.01)
    x = case.encrypt(RNG.uniform(-1, 1, (case.slots, features)))
    ours = case.evaluator.linear(x, matrix, transpose=transpose)
    theirs = case.evaluator.textbook_linear(x, matrix, transpose=transpose)
    assert ours.moduli == theirs.moduli == case.parameters.moduli
    for tower in range(len(ours.moduli)):
        assert (ours.residues(tower) == theirs.residues(tower)).all()
    assert ours.budget() == theirs.budget()


@NEEDS_OPENFHE
def test_native_ciphertexts_multiplied_by_both():
    native = make("native", 2)
    context = openfhe.Context.INSECURE(native.parameters)
    secret = openfhe.SecretKey(context)
    x = native.encrypt(RNG.uniform(-1, 1, (native.slots, FEATURES)))
    product = native.evaluator.linear(x, MATRIX)
    like = secret.encrypt(np.zeros((1, FEATURES)))
    lib = openfhe.library.library()
    builder = lib.Builder(like._core, FEATURES, list(native.parameters.primes[:3]))
    for tower in range(3):
        for component in range(2):
            builder.set(tower, component, 0, np.ascontiguousarray(x.residues(tower)[:, component]))
    theirs = lib.textbook_integers(builder.finish(), MATRIX.integers.astype(np.int64))
    product_of_theirs = openfhe.EncryptedTensor(theirs, context, 1, Estimate.of_slots(1.0, len(MATRIX.scale), 0.0))
    for tower in range(3):
        assert (product_of_theirs.residues(tower) == product.residues(tower)).all()

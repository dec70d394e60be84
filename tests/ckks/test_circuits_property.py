"""Whatever circuit is drawn: results within the predicted error, the dry run and the clear run equal to the run."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtuner import ckks
from privtuner.errors import CkksError, MessageError

PARAMETERS = ckks.Parameters.INSECURE(6)
SECRET = ckks.SecretKey(PARAMETERS)
STEPS = (1, 7, -2, 100)
ENGINE = ckks.Evaluator(PARAMETERS, SECRET.evaluation_keys(rotations=STEPS, conjugation=True))
DRY = ckks.Evaluator(PARAMETERS)
CLEAR = ckks.ClearEvaluator(PARAMETERS)
NOISY = ckks.ClearEvaluator(PARAMETERS, noise=1)
SLOTS = PARAMETERS.slots
LARGEST = 100.0  # bounds stay below it, so that values times the scale fit the ten bits beyond it at level 0

MESSAGE = SECRET.encrypt(np.linspace(-1, 1, 5), level=1).to_bytes()
EXPECTED = ckks.Evaluator(PARAMETERS).planned(5, 1, level=1)

NUMBERS = st.floats(-2, 2).map(lambda x: round(x, 6))


class Value:
    """One tensor by every evaluator, and in clear as NumPy has it (complex, all slots)."""

    def __init__(self, real, planned, exact, noisy, clear):
        self.real, self.planned, self.exact, self.noisy, self.clear = real, planned, exact, noisy, clear

    @property
    def features(self):
        return self.clear.shape[1]


def apply(operation, clear, *values):
    results, refusals = [], []
    for engine, kind in ((ENGINE, "real"), (DRY, "planned"), (CLEAR, "exact"), (NOISY, "noisy")):
        try:
            results.append(operation(engine, *(getattr(value, kind) for value in values)))
        except CkksError as refusal:
            refusals.append(str(refusal))
    if refusals:
        assert len(refusals) == 4
        assert len(set(refusals)) == 1
        raise CkksError(refusals[0])
    return Value(*results, clear)


def fresh(data, rng):
    features = data.draw(st.integers(1, 3), "features")
    level = data.draw(st.integers(2, 6), "level")
    bound = data.draw(st.sampled_from([0.5, 1.0, 2.0]), "bound")
    clear = rng.uniform(-bound, bound, (SLOTS, features)).astype(complex)
    if data.draw(st.booleans(), "complex"):
        clear = bound * np.exp(2j * np.pi * rng.uniform(size=(SLOTS, features))) * 0.999
    return Value(
        SECRET.encrypt(clear, bound=bound, level=level),
        DRY.planned(SLOTS, features, bound=bound, level=level),
        CLEAR.tensor(clear, bound=bound, level=level),
        NOISY.tensor(clear, bound=bound, level=level),
        clear,
    )


def combine(data, x, y):
    kind = data.draw(st.sampled_from(["add", "subtract", "multiply"]))
    clear = {"add": np.add, "subtract": np.subtract, "multiply": np.multiply}[kind](x.clear, y.clear)
    return apply(lambda e, a, b: getattr(e, kind)(a, b), clear, x, y)


def one_operand(data, x, rng):
    kind = data.draw(
        st.sampled_from(
            [
                "negate",
                "shift",
                "scale",
                "plain",
                "rotate",
                "conjugate",
                "sum",
                "select",
                "linear",
                "polynomial",
                "dot",
                "drop",
            ]
        )
    )
    if kind == "negate":
        return apply(lambda e, a: e.negate(a), -x.clear, x)
    if kind == "shift":
        number = data.draw(st.lists(NUMBERS, min_size=x.features, max_size=x.features))
        return apply(lambda e, a: e.add(a, number), x.clear + number, x)
    if kind == "scale":
        number = data.draw(NUMBERS)
        return apply(lambda e, a: e.multiply(a, number), x.clear * number, x)
    if kind == "plain":
        values = rng.uniform(-1, 1, (SLOTS, x.features)) + 1j * rng.uniform(-1, 1, (SLOTS, x.features))
        return apply(lambda e, a: e.multiply_plain(a, values), x.clear * values, x)
    if kind == "rotate":
        step = data.draw(st.sampled_from(STEPS))
        return apply(lambda e, a: e.rotate(a, [1, step])[1], np.roll(x.clear, -step, 0), x)
    if kind == "conjugate":
        return apply(lambda e, a: e.conjugate(a), x.clear.conj(), x)
    if kind == "sum":
        return apply(lambda e, a: e.sum_features(a), x.clear.sum(1, keepdims=True), x)
    if kind == "select":
        begin = data.draw(st.integers(0, x.features - 1))
        return apply(lambda e, a: e.select(a, slice(begin, x.features)), x.clear[:, begin:], x)
    if kind == "linear":
        matrix = ckks.Matrix(rng.uniform(-1, 1, (2, x.features)), per_row=False)
        # A level later the scale is the chain's again.
        return apply(lambda e, a: e.multiply(e.linear(a, matrix), 1.0), x.clear @ matrix.dequantised().T, x)
    if kind == "polynomial":
        degree = data.draw(st.integers(1, 5))
        coefficients = (*data.draw(st.lists(st.floats(-1, 1), min_size=degree, max_size=degree)), 0.5)
        bound = max(x.real.bound, 1e-3)
        basis = data.draw(st.sampled_from(["power", "chebyshev"]))
        polynomial = ckks.Polynomial(coefficients, basis, (-bound, bound))
        clear = x.clear.real
        if np.abs(x.clear.imag).max() > 0:  # the prediction is of real arguments
            return apply(lambda e, a: e.negate(a), -x.clear, x)
        return apply(lambda e, a: e.polynomial(a, polynomial), polynomial(clear).astype(complex), x)
    if kind == "dot":
        return apply(lambda e, a: e.dot(a, a), (x.clear**2).sum(1, keepdims=True), x)
    level = data.draw(st.integers(0, x.real.level))
    return apply(lambda e, a: e.drop_level(a, level), x.clear, x)


def check(value):
    real = value.real
    assert not real.planned
    assert value.planned.planned
    for other in (value.planned, value.exact, value.noisy):
        assert (real.shape, real.level, real.bound) == (other.shape, other.level, other.bound)
        assert (real.scale == other.scale).all()
        assert real.budget() == other.budget()
    assert real.level >= 0
    assert real.shape == value.clear.shape
    assert np.abs(value.clear).max() <= real.bound * (1 + 1e-9)
    found = SECRET.decrypt(real, complex=True)
    allowed = real.budget().error
    assert np.abs((found - value.clear).real).max() <= allowed
    assert np.abs((found - value.clear).imag).max() <= allowed
    np.testing.assert_allclose(value.exact.values, value.clear, rtol=1e-9, atol=1e-12 * max(1.0, real.bound))
    assert np.abs((value.noisy.values - value.clear).real).max() <= allowed


@given(st.data(), st.integers(0, 2**32 - 1))
def test_random_circuits(data, seed):
    rng = np.random.default_rng(seed)
    values = [fresh(data, rng) for _ in range(2)]
    for _ in range(data.draw(st.integers(1, 8), "operations")):
        x = data.draw(st.sampled_from(values))
        y = data.draw(st.sampled_from(values))
        try:
            if data.draw(st.booleans()):
                if data.draw(st.integers(0, 3)) == 0:
                    made = apply(lambda e, a, b: e.concatenate([a, b]), np.concatenate([x.clear, y.clear], 1), x, y)
                else:
                    if 1 not in (x.features, y.features) and x.features != y.features:
                        continue
                    made = combine(data, x, y)
            else:
                made = one_operand(data, x, rng)
        except CkksError as refusal:
            if "level" not in str(refusal) and "scale" not in str(refusal):
                raise  # nothing else may be wrong with these
            continue
        if made.real.bound > LARGEST or made.features > 8:
            continue
        check(made)
        values.append(made)


@pytest.mark.parametrize("basis", ["power", "chebyshev"])
@given(data=st.data())
def test_random_polynomials(basis, data):
    degree = data.draw(st.integers(0, 40))
    sparse = data.draw(st.lists(st.booleans(), min_size=degree + 1, max_size=degree + 1))
    size = data.draw(st.lists(st.floats(-1, 1), min_size=degree + 1, max_size=degree + 1))
    coefficients = [c * keep for c, keep in zip(size, sparse, strict=True)]
    low = data.draw(st.floats(-4, 3)) if basis == "chebyshev" else -1.0
    high = low + data.draw(st.floats(0.1, 6)) if basis == "chebyshev" else 1.0
    polynomial = ckks.Polynomial(tuple(coefficients), basis, (low, high))
    bound, scale = max(abs(low), abs(high)), PARAMETERS.scale(6) / max(1.0, (high - low) / 2)
    x = np.linspace(low, high, SLOTS)
    y = ENGINE.polynomial(SECRET.encrypt(x, bound=bound, scale=scale), polynomial)
    planned = DRY.polynomial(DRY.planned(SLOTS, 1, bound=bound, scale=scale), polynomial)
    assert y.level == planned.level == 6 - max(1, polynomial.depth)
    assert y.budget() == planned.budget()
    assert np.abs(SECRET.decrypt(y)[:, 0] - polynomial(x)).max() <= y.budget().error


@given(st.data())
def test_damaged_messages(data):
    message = bytearray(MESSAGE)
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    if message != MESSAGE:
        with pytest.raises(MessageError):
            ckks.EncryptedTensor.from_bytes(PARAMETERS, message, EXPECTED)
    begin = data.draw(st.integers(0, len(message) - 1))
    cut = MESSAGE[:begin] + MESSAGE[begin + data.draw(st.integers(1, 99)) :]
    with pytest.raises(MessageError):
        ckks.EncryptedTensor.from_bytes(PARAMETERS, cut, EXPECTED)
    with pytest.raises(MessageError):
        ckks.EncryptedTensor.from_bytes(PARAMETERS, data.draw(st.binary(max_size=200)), EXPECTED)

"""Whatever is refused: no message shows a clear value, a decrypted one or a weight, to whom it is printed or logged."""

import numpy as np
import pytest

from cuda_host import HostDevice
from evaluators import NEEDS_OPENFHE
from loops import each
from privtuner import _core, ckks, linear, openfhe
from privtuner.cuda import gemm as device_gemm
from privtuner.cuda import linear as device_linear

DIGITS = ("7351", "32735")
"""Of every value, in whatever way it is written: 7351.25, 0.7351, 7.351e+39; a weight of 16 bits that is too large."""

NATIVE = ckks.Parameters.INSECURE(6)
PREPARED = linear.prepare(np.random.default_rng(0).standard_normal((4, 3)))
PUBLIC = PREPARED.spec


def spoilt(value, dtype=np.float64, other=7351.25):
    x = np.full((2, 3), other, dtype)
    x[1, 2] = value
    return x


def integers(value, dtype):
    return np.array([[1, value]], dtype)


LINEAR = {
    "NaN": lambda encrypt: encrypt(spoilt(np.nan, np.float32), PUBLIC),
    "infinity": lambda encrypt: encrypt(spoilt(-np.inf), PUBLIC),
    "above float32": lambda encrypt: encrypt(spoilt(7.351e39), PUBLIC),
    "dtype": lambda encrypt: encrypt(np.full((2, 3), 7351), PUBLIC),
    "strings": lambda encrypt: encrypt([["7351", "7351", "7351"]], PUBLIC),
    "objects": lambda encrypt: encrypt(np.full((2, 3), 7351.25, object), PUBLIC),
    "ragged": lambda encrypt: encrypt([[7351.25], [7351.25, 7351.25]], PUBLIC),
    "width": lambda encrypt: encrypt(np.full((2, 4), 7351.25), PUBLIC),
    "direction": lambda encrypt: encrypt(spoilt(1), PUBLIC, "sideways"),
    "direction's type": lambda encrypt: encrypt(spoilt(1), PUBLIC, 5),
    "masks": lambda encrypt: encrypt(spoilt(1), PUBLIC, masks=PREPARED),
    "public": lambda encrypt: encrypt(spoilt(1), PREPARED),
}

WEIGHTS = {
    "above float32": lambda: linear.prepare(np.full((2, 3), 7.351e39)),
    "NaN": lambda: linear.prepare(spoilt(np.nan)),
    "preset": lambda: linear.prepare(spoilt(1), "linear"),
    "scale": lambda: _core.QuantisedWeight("linear-w8", bytes(16), integers(1, np.int8), np.array([-7351.25])),
    "bytes": lambda: _core.QuantisedWeight("linear-w8", bytes(16), integers(7351, np.int16), np.ones(1)),
    "beyond": lambda: _core.QuantisedWeight("linear-w16", bytes(16), integers(32735, np.int16), np.ones(1)),
    "beyond, on a device": lambda: device_gemm.Weights(HostDevice(), integers(32735, np.int16)),
    "a matrix of NaN": lambda: ckks.Matrix(spoilt(np.nan)),
}

# Of both engines' keys.
CKKS = {
    "above the bound": lambda k: k.secret.encrypt(spoilt(1)),
    "NaN": lambda k: k.secret.encrypt(spoilt(np.nan)),
    "bound's type": lambda k: k.secret.encrypt(spoilt(1), bound="7"),
    "no bound": lambda k: k.secret.encrypt(spoilt(1), bound=None),
    "level's type": lambda k: k.secret.encrypt(spoilt(1), bound=1e4, level="1"),
    "level": lambda k: k.secret.encrypt(spoilt(1), bound=1e4, level=10**12),
    "negative level": lambda k: k.secret.encrypt(spoilt(1), bound=1e4, level=-1),
    "by the public key": lambda k: k.secret.public_key().encrypt(spoilt(1)),
    "tokens": lambda k: k.secret.encrypt(np.full((10**5, 1), 0.7351)),
    "dimensions": lambda k: k.secret.encrypt(np.full((1, 1, 1), 0.7351)),
    "strings": lambda k: k.secret.encrypt([["0.7351"]]),
    "ragged": lambda k: k.secret.encrypt([[7351.25], [7351.25, 7351.25]]),
    "beyond a promise": lambda k: k.secret.decrypt(k.engine.assume(k.secret.encrypt([7351.25], bound=1e4), 0.1)),
    "clear factors": lambda k: k.engine.multiply_plain(k.tensor, np.full((3, 3), 7351.25)),
    "clear factors that are NaN": lambda k: k.engine.multiply_plain(k.tensor, spoilt(np.nan)),
    "constants": lambda k: k.engine.add(k.tensor, [7351.25] * 5),
    "weights": lambda k: k.engine.linear(k.tensor, np.full((2, 5), 7351.25)),
    "no tensor, clear factors": lambda k: k.engine.multiply_plain(k, spoilt(1)),
    "no tensor, constants": lambda k: k.engine.multiply(k, [7351.25] * 3),
    "no tensor, weights": lambda k: k.engine.linear_combination([k], [7351.25]),
}


def assert_refused_without_values(use):
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is
        use()
    error, texts = raised.value, []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    assert all(texts)
    assert not [text for text in texts for digits in DIGITS if digits in text.replace(".", "")]


class Keys:
    def __init__(self, native):
        if native:
            self.secret = ckks.SecretKey(NATIVE)
            self.engine = ckks.Evaluator(NATIVE, self.secret.evaluation_keys())
        else:
            context = openfhe.Context.INSECURE(NATIVE)
            self.secret = openfhe.SecretKey(context)
            self.engine = openfhe.Evaluator(context, self.secret.evaluation_keys())
        self.tensor = self.secret.encrypt(np.zeros((2, 3)))


@pytest.fixture(scope="module", params=["native", pytest.param("openfhe", marks=NEEDS_OPENFHE)])
def keys(request):
    return Keys(request.param == "native")


@each(case=LINEAR)
def test_batches(case):
    assert_refused_without_values(lambda: LINEAR[case](linear.encrypt))


@each(case=LINEAR)
def test_batches_on_a_device(case):
    device = HostDevice()
    assert_refused_without_values(lambda: LINEAR[case](lambda *a, **k: device_linear.encrypt(device, *a, **k)))


@NEEDS_OPENFHE
@each(case=[case for case in LINEAR if case != "masks"])
def test_batches_of_openfhe(case):
    owner = openfhe.OpenFheClient()
    assert_refused_without_values(lambda: LINEAR[case](owner.encrypt))


@each(case=WEIGHTS)
def test_weights(case):
    assert_refused_without_values(WEIGHTS[case])


@each(case=CKKS)
def test_values_of_ckks(case, keys):
    assert_refused_without_values(lambda: CKKS[case](keys))

"""The public interface of the encrypted engine: shapes, what it refuses, keys, messages."""

import copy
import pickle

import numpy as np
import pytest

from privtuner import ckks, system
from privtuner.ckks.parameters import require_secure
from privtuner.errors import CkksError, InputError, MessageError, SecretError

PARAMETERS = ckks.Parameters.INSECURE(3)
OTHER = ckks.Parameters.INSECURE(2)
SECRET = ckks.SecretKey(PARAMETERS)
KEYS = SECRET.evaluation_keys(rotations=(1, -2), conjugation=True)
ENGINE = ckks.Evaluator(PARAMETERS, KEYS)
BARE = ckks.Evaluator(PARAMETERS)
TOKENS = 6


def encrypt(features=2, value=0.5, **arguments):
    return SECRET.encrypt(np.full((TOKENS, features), value), **arguments)


X, LOW = encrypt(), encrypt(level=0)
LINE = ckks.Polynomial((0.0, 0.5), "power")


# Parameters


def test_a_secure_set():
    parameters = ckks.Parameters.secure(2, 35)
    assert parameters.name == "ckks-n8192-depth2-scale35"
    assert (parameters.security_bits, parameters.ring_dimension, parameters.slots) == (128, 8192, 4096)
    assert (parameters.depth, parameters.scale_bits) == (2, 35)
    assert len(parameters.primes) >= 4
    assert parameters.log_qp <= 214
    assert parameters.log_q == pytest.approx(sum(np.log2(np.array(parameters.primes[:3], np.float64))), abs=1e-9)
    assert "128 bits of security" in repr(parameters)
    secret = ckks.SecretKey(parameters)
    engine = ckks.Evaluator(parameters, secret.evaluation_keys(rotations=[4095]))
    x = np.random.default_rng(0).uniform(-1, 1, (4096, 2))
    y = engine.rotate(engine.square(secret.encrypt(x)), 4095)
    assert np.abs(secret.decrypt(y) - np.roll(x**2, -4095, 0)).max() < y.budget().error < 1e-4


def test_an_insecure_set_says_so():
    parameters = ckks.Parameters.INSECURE(2, 30, ring_dimension=2048)
    assert parameters.name == "INSECURE-ckks-n2048-depth2-scale30"
    assert parameters.security_bits == 0
    assert "no bits of security" in repr(parameters)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": -1}, "depth -1 is outside \\[0, 40\\]"),
        ({"depth": 41}, "depth 41 is outside \\[0, 40\\]"),
        ({"depth": 2, "scale_bits": 19}, "scale_bits 19 is outside \\[20, 49\\]"),
        ({"depth": 2, "scale_bits": 50}, "scale_bits 50 is outside \\[20, 49\\]"),
        ({"depth": 2, "first_bits": 51}, "first_bits 51 is outside \\[40, 50\\]"),
        ({"depth": 2, "ring_dimension": 512}, "ring_dimension 512 is not a power of two from 1024 to 65536"),
        ({"depth": 2, "ring_dimension": 3000}, "ring_dimension 3000 is not a power of two"),
        ({"depth": 2, "ring_dimension": 131072}, "ring_dimension 131072 is not a power of two"),
    ],
)
def test_wishes_out_of_range(arguments, message):
    for make in (ckks.Parameters.secure, ckks.Parameters.INSECURE):
        with pytest.raises(InputError, match=message):
            make(**arguments)


@pytest.mark.parametrize(("depth", "ring"), [(2, 4096), (8, 8192), (1, 1024), (40, None)])
def test_no_secure_set(depth, ring):
    with pytest.raises(InputError, match="no 128-bit secure set of depth .*lower depth or scale_bits"):
        ckks.Parameters.secure(depth, 49 if depth == 40 else 40, ring_dimension=ring)


def test_parameters_travel():
    for parameters in (PARAMETERS, ckks.Parameters.secure(1, 30)):
        for again in (ckks.Parameters.from_bytes(parameters.to_bytes()), pickle.loads(pickle.dumps(parameters))):
            assert again == parameters
            assert hash(again) == hash(parameters)
            assert (again.name, again.primes) == (parameters.name, parameters.primes)
    assert PARAMETERS != OTHER
    assert PARAMETERS != "parameters"
    with pytest.raises(MessageError, match="checksum"):
        ckks.Parameters.from_bytes(PARAMETERS.to_bytes()[:-1] + b"x")


def test_scales_of_levels():
    for level in range(4):
        assert abs(np.log2(PARAMETERS.scale(level)) - 40) < 2**-8
    for level in (-1, 4):
        with pytest.raises(InputError, match=f"no level {level}"):
            PARAMETERS.scale(level)


# Encryption and decryption


def test_shapes_and_dtypes():
    x = np.random.default_rng(1).uniform(-1, 1, (TOKENS, 3))
    for values in (x, x.astype(np.float32), x[:, ::-1], np.asfortranarray(x), x.tolist()):
        y = SECRET.decrypt(SECRET.encrypt(values))
        assert y.shape == (TOKENS, 3)
        assert y.dtype == np.float64
        assert np.abs(y - np.asarray(values)).max() < 1e-7
    assert SECRET.decrypt(SECRET.encrypt(x[:, 0])).shape == (TOKENS, 1)
    assert np.abs(SECRET.decrypt(SECRET.encrypt(np.arange(3), bound=2))[:, 0] - [0, 1, 2]).max() < 1e-7
    z = x + 1j * x[::-1]
    found = SECRET.decrypt(SECRET.encrypt(z, bound=2), complex=True)
    assert found.dtype == np.complex128
    assert np.abs(found - z).max() < 1e-7
    assert np.abs(SECRET.decrypt(SECRET.encrypt(z, bound=2)) - x).max() < 1e-7


def test_attributes_of_a_tensor():
    x = SECRET.encrypt(np.zeros((TOKENS, 2)), bound=4, level=2, scale=[2.0**30, 2.0**31])
    assert (x.shape, x.level, x.bound, x.planned) == ((TOKENS, 2), 2, 4.0, False)
    assert x.scale.tolist() == [2.0**30, 2.0**31]
    assert x.nbytes == 2 * 2 * 3 * 1024 * 8
    assert x.parameters is PARAMETERS
    assert repr(x).startswith("<encrypted tensor (6, 2), level 2, scale 2^31.0, |value| <= 4, ")
    budget = x.budget()
    assert budget.level == 2
    assert budget.scale_bits == 31
    # 23 standard deviations of sqrt(N / 2 * 10.6) at most, at the smaller scale.
    assert 0 < budget.error < 23 * np.sqrt(512 * 10.6) / 2**30
    # Two logarithms, of C++ and of NumPy, which says of its own that they are right to four units in the last place.
    assert budget.bits == pytest.approx(np.log2(4 / budget.error), rel=0, abs=5 * np.spacing(budget.bits))


def test_what_encryption_refuses():
    spec = SECRET.public_key()
    for encrypt in (SECRET.encrypt, spec.encrypt):
        with pytest.raises(CkksError, match="513 tokens do not fit the 512 slots of .*at most that many"):
            encrypt(np.zeros((513, 1)))
        with pytest.raises(CkksError, match="above the declared bound 1.0.*larger bound"):
            encrypt([1.5])
        with pytest.raises(CkksError, match="above the declared bound"):
            encrypt([0.9 + 0.9j])
        for wrong in (np.nan, np.inf, complex(0, np.nan)):
            with pytest.raises(CkksError, match="NaN or infinity"):
                encrypt([wrong])
        for level in (-1, 4):
            with pytest.raises(CkksError, match=f"level {level} is outside \\[0, 3\\]"):
                encrypt([0.5], level=level)
        for bound in (0.0, -1.0, np.nan, np.inf):
            with pytest.raises(InputError, match="bound .* is not a positive number"):
                encrypt([0.0], bound=bound)
        for shape in ((0, 2), (2, 0), (2, 2, 2), ()):
            with pytest.raises(InputError, match="pass \\(tokens, features\\)"):
                encrypt(np.zeros(shape))
        with pytest.raises(InputError, match="values of dtype <U1; pass real or complex"):
            encrypt(["a"])
        for scale in (0.5, -1.0, np.nan, np.inf):
            with pytest.raises(InputError, match="scale .* is not a number from 1 on"):
                encrypt([0.5], scale=scale)
        with pytest.raises(InputError, match="3 scales for 2 features"):
            encrypt(np.zeros((4, 2)), scale=[1e9, 1e9, 1e9])
        with pytest.raises(CkksError, match="pass 2\\^62; encrypt smaller values or choose a smaller scale"):
            encrypt(np.full(512, 0.9), scale=2.0**63)


def test_a_bound_that_does_not_hold_is_told():
    for wrong in (ENGINE.assume(X, 0.1), ENGINE.multiply(ENGINE.assume(X, 0.1), X)):
        with pytest.raises(CkksError, match="beyond the tensor's bound of 0.1.*declare larger bounds"):
            SECRET.decrypt(wrong)
    turned = ENGINE.assume(SECRET.encrypt([0.5j]), 0.1)
    with pytest.raises(CkksError, match="beyond the tensor's bound"):
        SECRET.decrypt(turned, complex=True)
    with pytest.raises(CkksError, match="beyond the tensor's bound"):
        ckks.SecretKey(PARAMETERS).decrypt(X)


def test_what_decryption_refuses():
    with pytest.raises(CkksError, match="a planned tensor holds no ciphertext"):
        SECRET.decrypt(ENGINE.planned(3, 1))
    with pytest.raises(CkksError, match=f"cannot be decrypted with a key of {OTHER.name}"):
        ckks.SecretKey(OTHER).decrypt(X)


def test_revealed_values_drown_the_error():
    exact = np.full((512, 1), 0.5)
    x = SECRET.encrypt(exact)
    error = x.budget().error
    for bits in (1, 12, 20):
        noise = SECRET.decrypt_flooded(x, flood_bits=bits) - exact
        # Of 512 uniform draws, one is in the upper half of the range, unless with probability 2^-512.
        assert error * 2.0**bits / 2 - error < np.abs(noise).max() < error * (2.0**bits + 1)
    assert (SECRET.decrypt_flooded(x) != SECRET.decrypt_flooded(x)).any()
    for bits in (0, 41):
        with pytest.raises(InputError, match=f"flood_bits {bits} is outside \\[1, 40\\]"):
            SECRET.decrypt_flooded(x, flood_bits=bits)


# Keys


def test_a_secret_key_never_leaves():
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(SecretError, match="never copied or pickled"):
            leave(SECRET)
    assert repr(SECRET) == f"<secret key of {PARAMETERS.name}>"
    assert not hasattr(SECRET, "to_bytes")


def test_evaluation_keys_say_what_they_hold():
    assert KEYS.rotations == (1, 510)
    assert KEYS.relinearisation
    assert KEYS.conjugation
    assert "2 rotations" in repr(KEYS)
    none = SECRET.evaluation_keys(relinearisation=False)
    assert (none.rotations, none.relinearisation, none.conjugation, none.nbytes) == ((), False, False, 0)
    # Steps that are the same automorphism are one key, a rotation by nothing none.
    assert SECRET.evaluation_keys(rotations=(1, 513, -511, 0, 512), relinearisation=False).rotations == (1,)
    for keys in (KEYS, none):
        again = ckks.EvaluationKeys.from_bytes(PARAMETERS, keys.to_bytes())
        assert again.to_bytes() == keys.to_bytes()
        assert (again.rotations, again.relinearisation, again.conjugation, again.nbytes) == (
            keys.rotations,
            keys.relinearisation,
            keys.conjugation,
            keys.nbytes,
        )
    assert len(KEYS.to_bytes()) == PARAMETERS.key_bytes(4)
    assert len(none.to_bytes()) == PARAMETERS.key_bytes(0)


def test_keys_that_are_missing():
    with pytest.raises(CkksError, match="needs the relinearisation key"):
        BARE.multiply(X, X)
    with pytest.raises(CkksError, match="a rotation by 3 needs its key; make evaluation keys with 3 among"):
        ENGINE.rotate(X, 3)
    with pytest.raises(CkksError, match="a rotation by 505 needs its key"):
        ENGINE.rotate(X, [1, -7])
    with pytest.raises(CkksError, match="conjugation needs its key"):
        BARE.conjugate(X)
    with pytest.raises(CkksError, match="a rotation by 2 needs its key"):
        ENGINE.sum_slots(X)
    with pytest.raises(CkksError, match=f"evaluation keys of {PARAMETERS.name} do not fit {OTHER.name}"):
        ckks.Evaluator(OTHER, KEYS)


def test_received_keys_compute():
    keys = ckks.EvaluationKeys.from_bytes(PARAMETERS, KEYS.to_bytes())
    spec = ckks.PublicKey.from_bytes(PARAMETERS, SECRET.public_key().to_bytes())
    x = np.linspace(-1, 1, 512)
    engine = ckks.Evaluator(PARAMETERS, keys)
    y = engine.rotate(engine.square(spec.encrypt(x)), 1)
    assert np.abs(SECRET.decrypt(y)[:, 0] - np.roll(x**2, -1)).max() < y.budget().error < 1e-5


# Messages


def test_tensors_travel():
    for x in (
        X,
        LOW,
        ENGINE.add(X, X),
        ENGINE.multiply(X, 0.0),
        ENGINE.linear(X, np.eye(2)),
        ENGINE.select(X, slice(1, 2)),
    ):
        data, expected = x.to_bytes(), planned(x)
        assert len(data) == x.message_bytes
        for kind in (bytes, bytearray, memoryview):
            y = ckks.EncryptedTensor.from_bytes(PARAMETERS, kind(data), expected)
            assert (y.shape, y.level, y.bound, y.planned) == (x.shape, x.level, x.bound, False)
            assert (y.scale == x.scale).all()
            assert y.budget() == x.budget()
            assert y.to_bytes() == data
        assert (SECRET.decrypt(y) == SECRET.decrypt(x)).all()
    # 50 bits in 7 bytes, 40 in 5; a fresh tensor carries one component and a seed.
    assert len(X.to_bytes()) == 72 + 8 + 32 + 2 * 1024 * (7 + 3 * 5)
    assert len(ENGINE.add(X, X).to_bytes()) == 72 + 8 + 2 * 2 * 1024 * (7 + 3 * 5)


def planned(x):
    """What a reader expects who knows all about this tensor."""
    return ckks.EncryptedTensor(x._core.as_planned(), PARAMETERS)


def test_a_reader_expects_what_a_dry_run_gives():
    x = np.linspace(-1, 1, 2 * TOKENS).reshape(TOKENS, 2)

    def circuit(engine, a):
        return engine.square(engine.linear(a, np.array([[0.5, -1.0], [2.0, 0.25], [0.0, 1.0]])))

    dry = ckks.plan(circuit, (TOKENS, 2), parameters=PARAMETERS)
    request = SECRET.encrypt(x).to_bytes()
    reply = circuit(ENGINE, ckks.EncryptedTensor.from_bytes(PARAMETERS, request)).to_bytes()
    y = ckks.EncryptedTensor.from_bytes(PARAMETERS, reply, dry.outputs[0])
    want = circuit(ENGINE, SECRET.encrypt(x))
    assert (y.budget(), y.bound) == (want.budget(), want.bound)
    exact = (x @ np.array([[0.5, -1.0], [2.0, 0.25], [0.0, 1.0]]).T) ** 2
    assert np.abs(SECRET.decrypt(y) - exact).max() < 0.05  # 8-bit weights
    for wrong in (
        ENGINE.planned(TOKENS, 3),
        ENGINE.planned(TOKENS, 2, level=2),
        ENGINE.planned(TOKENS - 1, 3, level=2),
    ):
        with pytest.raises(MessageError, match=r"shape \(6, 3\) at level 2 where .* is expected"):
            ckks.EncryptedTensor.from_bytes(PARAMETERS, reply, wrong)
    with pytest.raises(MessageError, match="its reader must say what it expects"):
        ckks.EncryptedTensor.from_bytes(PARAMETERS, reply)
    with pytest.raises(CkksError, match="not a planned tensor of"):
        ckks.EncryptedTensor.from_bytes(PARAMETERS, reply, want)


def test_by_default_a_default_encryption_is_expected():
    y = ckks.EncryptedTensor.from_bytes(PARAMETERS, SECRET.encrypt(np.ones((2, 3))).to_bytes())
    default = SECRET.encrypt(np.ones((2, 3)))
    assert (y.shape, y.level, y.bound, y.budget()) == (default.shape, default.level, 1.0, default.budget())
    with pytest.raises(MessageError, match=r"shape \(2, 3\) at level 1 where \(2, 3\) at level 3 is expected"):
        ckks.EncryptedTensor.from_bytes(PARAMETERS, SECRET.encrypt(np.ones((2, 3)), level=1).to_bytes())
    spec = SECRET.public_key().encrypt(np.ones((2, 3)))
    with pytest.raises(MessageError, match="encrypted with a public key"):
        ckks.EncryptedTensor.from_bytes(PARAMETERS, spec.to_bytes())
    expected = ENGINE.planned(2, 3, public_key=True)
    assert ckks.EncryptedTensor.from_bytes(PARAMETERS, spec.to_bytes(), expected).budget() == spec.budget()


def test_expected_errors_may_be_given():
    expected = ENGINE.planned(2, 3, level=1, bound=4.0, scale=2.0**30, noise=2.0**12)
    assert (expected.noise == 2.0**12).all()
    assert expected.budget().error > 2.0**-18
    for noise in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="noise must be finite, not negative"):
            ENGINE.planned(2, 3, noise=noise)


def test_what_is_kept_is_kept_whole():
    """A pickle is for oneself and holds scale, bound and predicted error; a message is for others and does not."""
    tensor = ENGINE.select(ENGINE.concatenate([ENGINE.add(X, X), ENGINE.assume(ENGINE.add(X, X), 3.0)]), slice(1, 4))
    again = pickle.loads(pickle.dumps(tensor))
    assert again.budget() == tensor.budget()
    assert (again.level, again.bound, again.shape) == (tensor.level, 3.0, tensor.shape)
    for name in ("scale", "noise"):
        assert (getattr(again, name) == getattr(tensor, name)).all()
    assert (again._core.shared == tensor._core.shared).all()
    assert ENGINE.assume(tensor, 5.0).to_bytes() == tensor.to_bytes() == again.to_bytes()


@pytest.mark.parametrize("read", [ckks.EncryptedTensor, ckks.EvaluationKeys, ckks.PublicKey])
def test_wrong_bytes(read):
    for data in (b"", b"PVCK", bytes(100), X.to_bytes()[:-1], X.to_bytes() + b"x", PARAMETERS.to_bytes()):
        with pytest.raises(MessageError):
            read.from_bytes(PARAMETERS, data)
    message = {ckks.EncryptedTensor: X, ckks.EvaluationKeys: KEYS, ckks.PublicKey: SECRET.public_key()}[read].to_bytes()
    changed = bytearray(message)
    changed[len(message) // 2] ^= 1
    with pytest.raises(MessageError, match="checksum mismatch"):
        read.from_bytes(PARAMETERS, changed)
    same_size = ckks.Parameters.INSECURE(3, 39, first_bits=50)
    with pytest.raises(MessageError, match=f"made with other parameters than {same_size.name}"):
        read.from_bytes(same_size, message)


def test_a_planned_tensor_has_no_message():
    with pytest.raises(CkksError, match="a planned tensor holds no ciphertext to send"):
        ENGINE.planned(4, 2).to_bytes()


# Operations


def test_tensors_that_do_not_fit():
    wide, short = encrypt(3), SECRET.encrypt(np.zeros((TOKENS - 1, 2)))
    for operation in (ENGINE.add, ENGINE.subtract, ENGINE.multiply):
        with pytest.raises(CkksError, match="shapes \\(6, 2\\) and \\(6, 3\\) cannot be combined"):
            operation(X, wide)
        with pytest.raises(CkksError, match="shapes \\(6, 2\\) and \\(5, 2\\) cannot be combined"):
            operation(X, short)
        with pytest.raises(CkksError, match="a planned tensor cannot be combined with an encrypted one"):
            operation(X, ENGINE.planned(TOKENS, 2))
        with pytest.raises(CkksError, match=f"does not fit an evaluator of {OTHER.name}"):
            operation.__func__(ckks.Evaluator(OTHER), X, X)
    with pytest.raises(CkksError, match="a dot product of 2 and 1 features"):
        ENGINE.dot(X, encrypt(1))
    with pytest.raises(CkksError, match="tokens cannot be concatenated"):
        ENGINE.concatenate([X, short])
    with pytest.raises(CkksError, match="no tensors to concatenate"):
        ENGINE.concatenate([])


def test_sums_that_are_too_long():
    many = ENGINE.planned(TOKENS, 1025)
    with pytest.raises(CkksError, match="a dot product of 1025 features; take at most 1024 at once"):
        ENGINE.dot(many, many)
    assert ENGINE.dot(ENGINE.select(many, slice(0, 1024)), ENGINE.select(many, slice(0, 1024))).shape == (TOKENS, 1)
    with pytest.raises(CkksError, match="a combination of 2048 tensors; take fewer than 2048 at once"):
        ENGINE.linear_combination([X] * 2048, [1.0] * 2048)
    assert ENGINE.linear_combination([X] * 2047, [1.0] * 2047).shape == X.shape


def test_scales_that_do_not_agree():
    skewed = ENGINE.linear(X, ckks.Matrix([[1.0, 0.5], [0.25, 0.1]]))
    with pytest.raises(CkksError, match="do not agree at level 3; multiply one of them by 1.0 first"):
        ENGINE.add(skewed, X)
    with pytest.raises(CkksError, match="the input's scales do not agree"):
        ENGINE.linear(skewed, np.eye(2))
    with pytest.raises(CkksError, match="with the transposed matrix's row scales"):
        ENGINE.linear(X, ckks.Matrix([[1.0, 0.5], [0.25, 0.1]]), transpose=True)
    with pytest.raises(CkksError, match="features of a dot product have different scales"):
        ENGINE.dot(skewed, skewed)
    assert ENGINE.add(ENGINE.multiply(skewed, 1.0), X).level == 2


def test_levels_that_are_used_up():
    for operation in (
        lambda: ENGINE.multiply(LOW, LOW),
        lambda: ENGINE.multiply(LOW, 2.0),
        lambda: ENGINE.dot(LOW, LOW),
        lambda: ENGINE.multiply_plain(LOW, np.zeros((TOKENS, 2))),
        lambda: ENGINE.linear_combination([LOW, X], [1.0, 2.0]),
        lambda: ENGINE.rescale(LOW),
    ):
        with pytest.raises(CkksError, match="level"):
            operation()
    with pytest.raises(
        CkksError, match="degree 8 takes 4 levels here and the tensor has 3; choose parameters of larger"
    ):
        ENGINE.polynomial(X, ckks.Polynomial((0.0,) * 8 + (1.0,), "power"))
    with pytest.raises(CkksError, match="a tensor at level 0 cannot be brought to level 2"):
        ENGINE.drop_level(LOW, 2)
    assert ENGINE.drop_level(X, 1).level == 1


def test_numbers_that_are_unusable():
    for operation in (ENGINE.add, ENGINE.subtract, ENGINE.multiply):
        for wrong in (np.nan, np.inf, [0.0, np.nan]):
            with pytest.raises(CkksError, match="a constant is NaN or infinity"):
                operation(X, wrong)
        with pytest.raises(InputError, match="expected a number or numbers of shape \\(features,\\)"):
            operation(X, np.zeros((2, 2)))
        with pytest.raises(InputError, match="expected a number"):
            operation(X, 1j)
        with pytest.raises(CkksError, match="3 .* for 2 features; pass one, or one a feature"):
            operation(X, [1.0, 2.0, 3.0])
    with pytest.raises(CkksError, match="clear values of shape \\(5, 2\\) do not fit a tensor of shape \\(6, 2\\)"):
        ENGINE.multiply_plain(X, np.zeros((5, 2)))
    with pytest.raises(CkksError, match="clear values hold NaN"):
        ENGINE.multiply_plain(X, np.full((TOKENS, 2), np.nan))
    with pytest.raises(InputError, match="weights of shape \\(3, 1\\) for 2 tensors"):
        ENGINE.linear_combination([X, X], [1, 2, 3])
    with pytest.raises(CkksError, match="hold NaN"):
        ENGINE.linear_combination([X], [np.nan])


def test_selections():
    for wrong in (slice(0, 2, 2), slice(None, None, -1)):
        with pytest.raises(InputError, match="choose neighbouring ones, step 1"):
            ENGINE.select(X, wrong)
    for wrong in (slice(1, 1), slice(2, 3)):
        with pytest.raises(CkksError, match="choose a range inside"):
            ENGINE.select(X, wrong)
    assert ENGINE.select(encrypt(5), slice(-2, None)).shape == (TOKENS, 2)


def test_bounds_that_are_assumed():
    for wrong in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(CkksError, match="bound .* is not a positive number"):
            ENGINE.assume(X, wrong)
    assert ENGINE.assume(X, 0.75).bound == 0.75
    assert X.bound == 1.0


def test_errors_that_are_assumed():
    for wrong in (0.0, -1.0, np.nan):
        with pytest.raises(CkksError, match="error .* is not a positive number"):
            ENGINE.assume(X, 1.0, wrong)
    y = ENGINE.assume(X, 1.0, 1e-12)
    assert y.budget().error == pytest.approx(1e-12)
    assert ENGINE.sum_features(y).budget().error <= y.shape[1] * 1e-12
    assert ENGINE.assume(X, 1.0, 1e-2).budget() == X.budget()  # a promise makes nothing worse
    assert ENGINE.assume(X, 1.0).budget() == X.budget()


def test_the_domain_of_a_polynomial():
    narrow = ckks.Polynomial((1.0, 1.0), domain=(-0.5, 0.5))
    with pytest.raises(CkksError, match="values up to 1.0.* may leave the domain .*declare a smaller bound"):
        ENGINE.polynomial(X, narrow)
    assert ENGINE.polynomial(ENGINE.assume(X, 0.5), narrow).level == 2


def test_bounds_are_derived():
    y = encrypt(bound=3)
    assert ENGINE.add(X, y).bound == ENGINE.subtract(X, y).bound == 4
    assert ENGINE.multiply(X, y).bound == 3
    assert ENGINE.dot(X, y).bound == 6
    assert ENGINE.sum_features(y).bound == 6
    assert ENGINE.negate(y).bound == ENGINE.rotate(y, 1).bound == ENGINE.conjugate(y).bound == 3
    assert ENGINE.add(y, [-2.0, 1.0]).bound == 5
    assert ENGINE.multiply(y, [-2.0, 1.0]).bound == 6
    assert ENGINE.concatenate([X, y]).bound == 3
    assert ENGINE.linear(y, np.ones((4, 2))).bound == pytest.approx(6)


def test_zero_times_a_tensor():
    y = ENGINE.multiply(X, 0.0)
    assert y.bound == 0
    assert y.budget().bits == -np.inf
    assert np.abs(SECRET.decrypt(y)).max() < y.budget().error
    assert "bits" in repr(y)


def test_rotations_come_alone_or_together():
    x = np.random.default_rng(3).uniform(-1, 1, 512)
    y = SECRET.encrypt(x)
    assert isinstance(ENGINE.rotate(y, np.int64(1)), ckks.EncryptedTensor)
    many = ENGINE.rotate(y, (1, -2, 0, 513))
    assert len(many) == 4
    for step, z in zip((1, -2, 0, 1), many, strict=True):
        assert np.abs(SECRET.decrypt(z)[:, 0] - np.roll(x, -step)).max() < z.budget().error
    assert ENGINE.rotate(y, []) == []


@pytest.mark.parametrize("operation", ["add", "multiply", "subtract"])
def test_one_feature_combines_with_many(operation):
    rng = np.random.default_rng(4)
    x, one = rng.uniform(-1, 1, (TOKENS, 3)), rng.uniform(-1, 1, (TOKENS, 1))
    apply = {"add": np.add, "multiply": np.multiply, "subtract": np.subtract}[operation]
    for upper, lower in ((3, 3), (3, 2), (2, 3)):
        a, b = SECRET.encrypt(x, level=upper), SECRET.encrypt(one, level=lower)
        for left, right, want in ((a, b, apply(x, one)), (b, a, apply(one, x))):
            y = getattr(ENGINE, operation)(left, right)
            assert y.shape == (TOKENS, 3)
            assert np.abs(SECRET.decrypt(y) - want).max() < y.budget().error < 1e-6


# Matrices


def test_matrices():
    weight = np.random.default_rng(5).standard_normal((3, 4))
    for bits, largest, dtype in ((8, 127, np.int8), (16, 32639, np.int16)):
        for per_row in (True, False):
            matrix = ckks.Matrix(weight, bits=bits, per_row=per_row)
            assert matrix.shape == (3, 4)
            assert matrix.integers.dtype == dtype
            assert np.abs(matrix.integers).max() == largest
            assert (np.abs(matrix.dequantised() - weight) <= matrix.scale[:, None] * 0.5 * (1 + 1e-9)).all()
            assert (len(set(matrix.scale)) == 1) == (not per_row)
            assert repr(matrix) == f"Matrix(shape=(3, 4), bits={bits})"
    zero = ckks.Matrix(np.zeros((2, 2)))
    y = ENGINE.linear(X, zero)
    assert np.abs(SECRET.decrypt(y)).max() <= y.budget().error


def test_products_with_a_matrix():
    rng = np.random.default_rng(6)
    x, weight = rng.uniform(-1, 1, (TOKENS, 4)), rng.standard_normal((3, 4))
    y = SECRET.encrypt(x)
    for bits in (8, 16):
        matrix = ckks.Matrix(weight, bits=bits)
        z = ENGINE.linear(y, matrix)
        assert z.level == y.level
        assert np.abs(SECRET.decrypt(z) - x @ matrix.dequantised().T).max() < z.budget().error < 1e-6
        square = ckks.Matrix(weight, bits=bits, per_row=False)
        back = ENGINE.linear(ENGINE.linear(y, square), square, transpose=True)
        assert (
            np.abs(SECRET.decrypt(back) - x @ square.dequantised().T @ square.dequantised()).max() < back.budget().error
        )
    assert np.abs(SECRET.decrypt(ENGINE.linear(y, weight)) - x @ ckks.Matrix(weight).dequantised().T).max() < 1e-6


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (np.zeros(3), 8, "weight of shape \\(3,\\)"),
        (np.zeros((0, 3)), 8, "weight of shape \\(0, 3\\)"),
        (np.zeros((2, 2, 2)), 8, "weight of shape \\(2, 2, 2\\)"),
        (np.full((2, 2), np.nan), 8, "NaN or infinity"),
        (np.ones((2, 2), complex), 8, "dtype complex128; pass real numbers"),
        (np.array([["a"]]), 8, "dtype <U1; pass real numbers"),
        (np.ones((2, 2)), 12, "bits 12; choose 8 or 16"),
    ],
)
def test_matrices_that_are_unusable(weight, bits, message):
    with pytest.raises(InputError, match=message):
        ckks.Matrix(weight, bits=bits)


def test_a_matrix_that_does_not_fit():
    with pytest.raises(CkksError, match="a matrix of shape \\(2, 3\\) cannot be applied to a tensor of 2 features"):
        ENGINE.linear(X, np.ones((2, 3)))
    with pytest.raises(CkksError, match="a matrix of shape \\(2, 3\\) cannot be applied"):
        ENGINE.linear(X, ckks.Matrix(np.ones((3, 2))), transpose=True)


# Threads and paths


def test_threads_and_paths_change_no_byte():
    rng = np.random.default_rng(7)
    x, y = SECRET.encrypt(rng.uniform(-1, 1, (512, 3))), SECRET.encrypt(rng.uniform(-1, 1, (512, 3)), level=2)
    matrix, cubic = ckks.Matrix(rng.standard_normal((5, 3))), ckks.Polynomial((0.1, 0.2, 0.3, 0.4))

    def run():
        outs = [ENGINE.multiply(x, y), ENGINE.dot(x, x), ENGINE.linear(x, matrix), ENGINE.polynomial(x, cubic)]
        outs += [*ENGINE.rotate(x, (1, -2)), ENGINE.conjugate(y), ENGINE.multiply(x, 0.3), ENGINE.add(x, y)]
        return [out.to_bytes() for out in outs]

    threads, isa = system.get_num_threads(), system.active_isa()
    try:
        system.set_num_threads(1)
        want = run()
        for count in (2, 3):
            system.set_num_threads(count)
            assert run() == want
        system.set_isa("portable")
        assert run() == want
    finally:
        system.set_num_threads(threads)
        system.set_isa(isa)


# Room in the modulus, and errors that features share


def test_values_that_do_not_fit_the_modulus_are_refused_on_both_sides():
    with pytest.raises(CkksError, match="values up to 1000.* do not fit the modulus of level 0.*keep a level more"):
        SECRET.encrypt(np.full(4, 1000.0), bound=1000.0, level=0)
    grown = ENGINE.multiply(SECRET.encrypt(np.full(4, 1.0), level=1), 3000.0)
    with pytest.raises(CkksError, match="values up to 3000.* do not fit the modulus of level 0"):
        SECRET.decrypt(grown)
    small = ENGINE.multiply(SECRET.encrypt(np.full(4, 0.001), level=1), 3000.0)
    assert np.allclose(SECRET.decrypt(ENGINE.assume(small, 4.0)), 3.0, atol=1e-3)


def test_errors_of_copies_add_up():
    zero, copies = SECRET.encrypt(np.zeros(PARAMETERS.slots)), 128
    many = ENGINE.concatenate([zero] * copies)
    for total in (ENGINE.sum_features(many), ENGINE.linear(many, ckks.Matrix(np.ones((1, copies))))):
        assert np.abs(SECRET.decrypt(total)).max() < total.budget().error
        # In step: the prediction of independent errors would be sqrt(copies) times less.
        assert np.abs(SECRET.decrypt(total)).max() > total.budget().error / 16
    ones = SECRET.encrypt(np.ones((PARAMETERS.slots, copies)))
    spread = ENGINE.sum_features(ENGINE.multiply(ones, zero))
    assert np.abs(SECRET.decrypt(spread)).max() < spread.budget().error


def test_fresh_features_have_errors_of_their_own():
    x = SECRET.encrypt(np.zeros((PARAMETERS.slots, 128)))
    total = ENGINE.sum_features(x)
    one = ENGINE.select(x, slice(0, 1))
    assert total.budget().error / one.budget().error == pytest.approx(np.sqrt(128))


def test_constants_beyond_every_modulus_are_refused():
    with pytest.raises(CkksError, match="constants times their scale pass 2\\^900"):
        ENGINE.add(X, 1e308)
    with pytest.raises(CkksError, match="weights times their scale pass 2\\^900"):
        ENGINE.multiply(X, 1e300)


def test_a_rescale_that_leaves_nothing_is_refused():
    with pytest.raises(CkksError, match="below the prime that a rescale divides by"):
        ENGINE.rescale(ENGINE.rescale(X))


def test_depth_zero_sets_of_other_scales_differ():
    assert ckks.Parameters.INSECURE(0, 30, first_bits=40) != ckks.Parameters.INSECURE(0, 35, first_bits=40)


def test_insecure_parameters_of_the_other_side_are_refused():
    with pytest.raises(InputError, match="the server asks for INSECURE-ckks.*refuse that server"):
        require_secure(PARAMETERS, allow_insecure=False)
    assert require_secure(PARAMETERS, allow_insecure=True) is PARAMETERS

"""OpenFHE's engine: what belongs to it alone. What both engines do is in tests/ckks/test_contract_evaluators.py."""

import copy
import gc
import os
import pickle
import resource
import signal
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from evaluators import NEEDS_OPENFHE
from privtuner import ckks, openfhe
from privtuner.errors import CkksError, EngineError, InputError, MessageError, SecretError
from privtuner.openfhe import library

pytestmark = NEEDS_OPENFHE

PARAMETERS = ckks.Parameters.INSECURE(2)
TECHNIQUES = ["FIXEDMANUAL", "FIXEDAUTO", "FLEXIBLEAUTO", "FLEXIBLEAUTOEXT"]


@pytest.fixture(scope="module")
def context():
    return openfhe.Context.INSECURE(PARAMETERS)


@pytest.fixture(scope="module")
def secret(context):
    return openfhe.SecretKey(context)


def counts() -> tuple[int, int, int]:
    """Contexts, multiplication keys and automorphism keys in OpenFHE's tables."""
    gc.collect()
    return library.library().counts()


def values(context, features=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (context.slots, features))


# Contexts


def test_a_secure_context_like_a_native_set():
    native = ckks.Parameters.secure(depth=2)
    context = openfhe.Context(native)
    assert context.security_bits == 128
    assert (context.ring_dimension, context.slots) == (native.ring_dimension, native.slots)
    assert (context.depth, context.scale_bits) == (2, 40)
    assert len(context.moduli) == 3
    assert [q.bit_length() for q in context.moduli[1:]] == [41, 41] or all(
        abs(np.log2(q) - 40) < 2**-8 for q in context.moduli[1:]
    )
    assert all(q % (2 * context.ring_dimension) == 1 for q in context.moduli + context.special_moduli)
    assert "128 bits of security" in repr(context)
    # OpenFHE's table: 218 bits for 2^13, ternary secrets, 128 bits classical.
    total = sum(np.log2(q) for q in context.moduli + context.special_moduli)
    assert total <= {8192: 218, 16384: 438}[context.ring_dimension]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_users_own_settings(technique):
    context = openfhe.Context.from_settings(
        2, scaling_mod_size=45, first_mod_size=60, scaling_technique=technique, num_large_digits=2
    )
    assert (context.depth, context.scale_bits, context.security_bits) == (2, 45, 128)
    assert context.scaling_technique == technique
    assert context.num_large_digits == 2
    assert max(q.bit_length() for q in context.moduli) == 60
    secret = openfhe.SecretKey(context)
    engine = openfhe.Evaluator(context, secret.evaluation_keys(rotations=[1]))
    x, y = values(context), values(context, seed=1)
    a, b = secret.encrypt(x), secret.encrypt(y)
    matrix = ckks.Matrix(np.random.default_rng(2).standard_normal((3, 2)))
    cases = [
        (engine.multiply(a, b), x * y, 1),
        (engine.multiply(engine.multiply(a, b), a), x * y * x, 0),
        (engine.add(engine.multiply(a, b), a), x * y + x, 1),
        (engine.multiply(a, 0.5), x / 2, 1),
        (engine.multiply_plain(a, y), x * y, 1),
        (engine.linear(a, matrix), x @ matrix.dequantised().T, 2),
        (engine.linear(engine.multiply(a, b), matrix), (x * y) @ matrix.dequantised().T, 1),
        (engine.rotate(a, 1), np.roll(x, -1, 0), 2),
        (engine.drop_level(a, 0), x, 0),
        (engine.drop_level(engine.multiply(a, b), 0), x * y, 0),
        (engine.concatenate([a, engine.multiply(a, b)]), np.hstack([x, x * y]), 1),
        (engine.polynomial(a, ckks.Polynomial((0.5, 0.25), "power")), 0.5 + 0.25 * x, 1),
    ]
    for tensor, want, level in cases:
        assert tensor.level == level
        assert np.abs(secret.decrypt(tensor) - want).max() <= tensor.budget().error < 1e-3
    # A product of residues equals OpenFHE's own with primes of 60 bits too.
    ours, theirs = engine.linear(a, matrix), engine.textbook_linear(a, matrix)
    for tower in range(len(ours.moduli)):
        assert (ours.residues(tower) == theirs.residues(tower)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling_mod_size": 70}, "OpenFHE refuses these settings: "),
        ({"ring_dim": 2048}, "OpenFHE refuses these settings: .*does not comply with HE standards"),
        ({"ring_dim": 3000}, "ring_dim 3000 is not a power of two from 16 on"),
        ({"ring_dim": 1}, "ring_dim 1 is not a power of two"),
        ({"batch_size": 3}, "OpenFHE refuses"),
        ({"scaling_technique": "EXACT"}, "scaling_technique 'EXACT': choose FIXEDMANUAL"),
        ({"key_switch_technique": "GHS"}, "key_switch_technique 'GHS': choose HYBRID or BV"),
        ({"ckks_data_type": "QUATERNION"}, "ckks_data_type 'QUATERNION': choose REAL or COMPLEX"),
        ({"security_level": "HEStd_NotSet"}, "unknown settings \\['security_level'\\]; known: scaling_mod_size"),
        ({"first_mod_size": -1}, "first_mod_size is -1; give a whole number"),
        ({"first_mod_size": 1.5}, "first_mod_size is 1.5; give a whole number"),
    ],
)
def test_settings_that_are_refused(settings, message):
    before = counts()
    with pytest.raises(InputError, match=message):
        openfhe.Context.from_settings(2, **settings)
    assert counts() == before


def test_a_refusal_leaves_nothing_behind():
    with pytest.raises(InputError, match="does not comply"):
        openfhe.Context.from_settings(8, ring_dim=4096)
    assert openfhe.Context.INSECURE(ckks.Parameters.INSECURE(1)).depth == 1


def test_insecure_contexts_say_so(context):
    assert context.security_bits == 0
    assert "no bits of security" in repr(context)
    with pytest.raises(InputError, match="INSECURE-ckks.* is not secure; for tests pass it to Context.INSECURE"):
        openfhe.Context(PARAMETERS)
    with pytest.raises(InputError, match="give ring_dim"):
        openfhe.Context.INSECURE(multiplicative_depth=1)


def test_a_native_set_whose_ring_is_too_small_for_openfhe():
    # Special primes of 60 bits do not fit beside 49 + 50 bits at N = 4096 where the native ones do.
    tight = ckks.Parameters.secure(0, 40, ring_dimension=4096)
    with pytest.raises(InputError, match=f"{tight.name}: .*give parameters a ring_dimension of 8192"):
        openfhe.Context(tight)


def test_settings_beside_parameters_are_refused():
    with pytest.raises(InputError, match="settings \\['scaling_technique'\\] beside parameters"):
        openfhe.Context.INSECURE(PARAMETERS, scaling_technique="FIXEDMANUAL")


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_operands_of_levels_far_apart(technique):
    context = openfhe.Context.INSECURE(
        multiplicative_depth=4, ring_dim=2048, scaling_mod_size=40, first_mod_size=60, scaling_technique=technique
    )
    secret = openfhe.SecretKey(context)
    engine = openfhe.Evaluator(context, secret.evaluation_keys())
    x, y = values(context), 100 * values(context, seed=1)
    high, low = secret.encrypt(x), secret.encrypt(y, bound=100.0, level=2)
    square = engine.square(high)
    for tensor, want in (
        (engine.multiply(high, low), x * y),
        (engine.multiply(low, high), x * y),
        (engine.add(high, low), x + y),
        (engine.subtract(low, high), y - x),
        (engine.add(square, low), x * x + y),
        (engine.multiply(high, engine.drop_level(square, 1)), x**3),
        (engine.dot(high, low), (x * y).sum(1, keepdims=True)),
        (engine.linear_combination([high, low], [2.0, 0.5]), 2 * x + 0.5 * y),
    ):
        assert np.abs(secret.decrypt(tensor) - want).max() <= tensor.budget().error < 0.05


def test_errors_of_one_feature_made_many(context, secret):
    engine = openfhe.Evaluator(context)
    x = values(context, features=1)
    tensor = secret.encrypt(x)
    for many, factor in ((engine.add(tensor, np.zeros(256)), 1.0), (engine.multiply(tensor, np.ones(256)), 1.0)):
        total = engine.sum_features(many)
        assert np.abs(secret.decrypt(total) - 256 * factor * x).max() <= total.budget().error


def test_small_clear_values(context, secret):
    x = np.full((context.slots, 1), 60.0)
    small = np.zeros_like(x)
    small[3] = 0.24 * context.ring_dimension / 2.0**40
    product = openfhe.Evaluator(context).multiply_plain(secret.encrypt(x, bound=64.0), small)
    assert np.abs(secret.decrypt(product) - x * small).max() <= product.budget().error


@pytest.mark.parametrize("bits", [10, 20])
def test_rotations_by_bv_key_switching(bits):
    context = openfhe.Context.INSECURE(
        multiplicative_depth=1,
        ring_dim=4096,
        scaling_mod_size=40,
        first_mod_size=50,
        scaling_technique="FLEXIBLEAUTO",
        key_switch_technique="BV",
        digit_size=bits,
    )
    secret = openfhe.SecretKey(context)
    x = values(context)
    turned = openfhe.Evaluator(context, secret.evaluation_keys(rotations=[1])).rotate(secret.encrypt(x), 1)
    assert np.abs(secret.decrypt(turned) - np.roll(x, -1, 0)).max() <= turned.budget().error


def test_two_rings_with_a_common_prime():
    """OpenFHE has one transform table a prime, whatever the ring: operations of both must not disturb each other."""
    rings = [
        openfhe.Context.INSECURE(multiplicative_depth=1, ring_dim=n, scaling_mod_size=40, first_mod_size=60)
        for n in (1024, 2048)
    ]
    assert set(rings[0].moduli + rings[0].special_moduli) & set(rings[1].moduli + rings[1].special_moduli)
    secrets = [openfhe.SecretKey(context) for context in rings]
    before, faults = openfhe.num_threads(), []

    def work(secret: openfhe.SecretKey) -> None:
        x = values(secret.context, features=8)
        for _ in range(40):
            try:
                error = np.abs(secret.decrypt(secret.encrypt(x)) - x).max()
            except CkksError as fault:
                faults.append(fault)
                return
            if error > 1e-6:
                faults.append(error)

    try:
        openfhe.set_num_threads(4)
        for count in (1, 2):
            threads = [threading.Thread(target=work, args=(secret,)) for secret in secrets * count]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        openfhe.set_num_threads(before)
    assert faults == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_process_computes(context, secret):
    tensor = secret.encrypt(values(context, features=8))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            secret.decrypt(openfhe.Evaluator(context).add(tensor, tensor))
            status = 0
        finally:
            os._exit(status)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


# Keys and OpenFHE's tables


def test_keys_are_in_no_table(context, secret):
    before = counts()
    assert before[1:] == (0, 0)
    keys = secret.evaluation_keys(rotations=[1, 2], conjugation=True)
    engine = openfhe.Evaluator(context, keys)
    x = secret.encrypt(values(context))
    engine.multiply(x, engine.rotate(x, 1))
    assert counts() == before


def test_two_keys_of_one_context_do_not_meet(context):
    first, second = openfhe.SecretKey(context), openfhe.SecretKey(context)
    engine = openfhe.Evaluator(context, first.evaluation_keys())
    x = second.encrypt(values(context))
    assert first.tag != second.tag
    with pytest.raises(CkksError, match="another secret key"):
        engine.multiply(x, x)
    with pytest.raises(CkksError, match="another secret key"):
        first.decrypt(x)
    with pytest.raises(CkksError, match="different secret keys"):
        openfhe.Evaluator(context).add(x, first.encrypt(values(context)))


def test_objects_with_few_keys_do_not_see_those_of_others(context, secret):
    rich, poor = secret.evaluation_keys(rotations=[1]), secret.evaluation_keys(rotations=[2], relinearisation=False)
    x = secret.encrypt(values(context))
    openfhe.Evaluator(context, rich).multiply(x, x)
    with pytest.raises(CkksError, match="relinearisation key"):
        openfhe.Evaluator(context, poor).multiply(x, x)
    with pytest.raises(CkksError, match="a rotation by 1 needs a key"):
        openfhe.Evaluator(context, poor).rotate(x, 1)


def test_two_contexts_do_not_meet(context, secret):
    other = openfhe.Context.INSECURE(ckks.Parameters.INSECURE(3))
    stranger = openfhe.SecretKey(other)
    keys = stranger.evaluation_keys()
    x = secret.encrypt(values(context))
    for run in (
        lambda: openfhe.Evaluator(context, keys),
        lambda: openfhe.Evaluator(other, keys).multiply(x, x),
        lambda: stranger.decrypt(x),
    ):
        with pytest.raises(CkksError, match="another context"):
            run()


def test_contexts_leave_the_table_with_their_last_object():
    before = counts()
    context = openfhe.Context.INSECURE(ckks.Parameters.INSECURE(4))
    again = openfhe.Context.INSECURE(ckks.Parameters.INSECURE(4))  # OpenFHE finds the same one
    assert counts()[0] == before[0] + 1
    del context
    assert counts()[0] == before[0] + 1
    secret = openfhe.SecretKey(again)
    tensor = secret.encrypt([0.5])
    del again, secret
    assert counts()[0] == before[0] + 1  # the tensor still needs it
    assert tensor.context.depth == 4
    del tensor
    assert counts() == before


def test_memory_returns():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def round_trip() -> int:
        context = openfhe.Context.INSECURE(ckks.Parameters.INSECURE(6, ring_dimension=8192))
        secret = openfhe.SecretKey(context)
        keys = secret.evaluation_keys(rotations=range(1, 9), conjugation=True)
        x = secret.encrypt(values(context))
        openfhe.Evaluator(context, keys).multiply(x, x)
        return keys.nbytes

    before = counts()
    for _ in range(2):
        size = round_trip()
    settled = resident()
    for _ in range(6):
        round_trip()
    assert size > 30e6
    assert counts() == before
    assert resident() < settled + size  # six times as much was made since


def test_operations_of_several_threads(context, secret):
    engines = [openfhe.Evaluator(context, secret.evaluation_keys(rotations=[step])) for step in (1, 2, 3)]
    x = values(context)
    tensor = secret.encrypt(x)
    faults = []

    def work(step: int) -> None:
        for _ in range(10):
            result = engines[step - 1].rotate(engines[step - 1].multiply(tensor, tensor), step)
            error = np.abs(secret.decrypt(result) - np.roll(x * x, -step, 0)).max()
            if error > result.budget().error:
                faults.append((step, error))

    threads = [threading.Thread(target=work, args=(step,)) for step in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert counts()[1:] == (0, 0)


def test_threads_of_openfhe():
    before = openfhe.num_threads()
    try:
        for n in (1, 3):
            openfhe.set_num_threads(n)
            assert openfhe.num_threads() == n
    finally:
        openfhe.set_num_threads(before)
    for wrong in (0, 1025, 1.5, 2**40):
        with pytest.raises(InputError, match="num_threads is "):
            openfhe.set_num_threads(wrong)


# Serialisation


def test_everything_travels(context, secret, tmp_path):
    keys = secret.evaluation_keys(rotations=[1], conjugation=True)
    x = values(context)
    tensor = openfhe.Evaluator(context, keys).linear(secret.encrypt(x), np.eye(2) / 2)
    secret.public_key().save(tmp_path / "public")
    secret.save(tmp_path / "secret")
    context.save(tmp_path / "context")
    keys.save(tmp_path / "mult", tmp_path / "rot")
    tensor.save(tmp_path / "tensor")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600

    again = openfhe.Context.load(tmp_path / "context")
    assert (again.ring_dimension, again.moduli, again.depth) == (context.ring_dimension, context.moduli, context.depth)
    assert pickle.loads(pickle.dumps(context)).moduli == context.moduli
    spec = openfhe.PublicKey.load(again, tmp_path / "public")
    private = openfhe.SecretKey.load(again, tmp_path / "secret")
    loaded = openfhe.EvaluationKeys.load(again, tmp_path / "mult", tmp_path / "rot")
    assert (private.tag, spec.tag, loaded.tag) == (secret.tag,) * 3
    assert (loaded.elements, loaded.relinearisation, loaded.conjugation) == (keys.elements, True, True)
    received = openfhe.EncryptedTensor.load(again, tmp_path / "tensor")
    assert (received.shape, received.level, received.bound) == (tensor.shape, tensor.level, tensor.bound)
    assert received.budget() == tensor.budget()
    engine = openfhe.Evaluator(again, loaded)
    result = engine.rotate(engine.multiply(spec.encrypt(x), received), 1)
    assert np.abs(private.decrypt(result) - np.roll(x * x / 2, -1, 0)).max() < result.budget().error < 1e-3
    with pytest.raises(SecretError, match="load the public key"):
        private.public_key()
    assert counts()[1:] == (0, 0)


def test_ciphertexts_of_other_programs(context, secret, tmp_path):
    x = values(context)
    tensor = secret.encrypt(x)
    tensor.save_openfhe(tmp_path / "ciphertexts")
    data = (tmp_path / "ciphertexts").read_bytes()
    assert data == tensor.to_openfhe()
    received = openfhe.EncryptedTensor.from_openfhe(context, data, bound=1.0, error=1e-6, tokens=10)
    assert received.shape == (10, 2)
    assert received.budget().error >= 1e-6
    assert np.abs(secret.decrypt(received) - x[:10]).max() < 1e-6
    matrix = ckks.Matrix([[1.0, -1.0]])
    found = secret.decrypt(openfhe.Evaluator(context).linear(received, matrix))
    assert np.abs(found - x[:10] @ matrix.dequantised().T).max() < 1e-5
    for wrong in ({"bound": 0.0}, {"bound": np.nan}, {"error": -1.0}, {"tokens": 0}, {"tokens": context.slots + 1}):
        with pytest.raises(InputError):
            openfhe.EncryptedTensor.from_openfhe(context, data, **wrong)


def test_parts_of_keys_travel_alone(context, secret):
    keys = secret.evaluation_keys(rotations=[1])
    multiplication, automorphisms = keys.to_bytes()
    only = openfhe.EvaluationKeys.from_bytes(context, multiplication)
    assert (only.relinearisation, only.elements) == (True, frozenset())
    only = openfhe.EvaluationKeys.from_bytes(context, automorphisms=automorphisms)
    assert (only.relinearisation, only.elements) == (False, keys.elements)
    assert secret.evaluation_keys(relinearisation=False, rotations=[1]).to_bytes()[0] == b""
    other = openfhe.SecretKey(context).evaluation_keys().to_bytes()[0]
    with pytest.raises(MessageError, match="evaluation keys of 2 secret keys"):
        openfhe.EvaluationKeys.from_bytes(context, other, automorphisms)
    with pytest.raises(MessageError, match="evaluation keys of 0 secret keys"):
        openfhe.EvaluationKeys.from_bytes(context)


def readers(context, secret):
    """Name, how to read, and right bytes of every object."""
    keys = secret.evaluation_keys(rotations=[1])
    multiplication, automorphisms = keys.to_bytes()
    return {
        "context": (openfhe.Context.from_bytes, context.to_bytes()),
        "public key": (lambda d: openfhe.PublicKey.from_bytes(context, d), secret.public_key().to_bytes()),
        "secret key": (lambda d: openfhe.SecretKey.from_bytes(context, d), secret.to_bytes()),
        "multiplication key": (lambda d: openfhe.EvaluationKeys.from_bytes(context, d), multiplication),
        "automorphism keys": (lambda d: openfhe.EvaluationKeys.from_bytes(context, automorphisms=d), automorphisms),
        "tensor": (lambda d: openfhe.EncryptedTensor.from_bytes(context, d), secret.encrypt([0.5]).to_bytes()),
        "ciphertexts": (lambda d: openfhe.EncryptedTensor.from_openfhe(context, d), secret.encrypt([0.5]).to_openfhe()),
    }


OBJECTS = ("context", "public key", "secret key", "multiplication key", "automorphism keys", "tensor", "ciphertexts")


@pytest.mark.parametrize("what", OBJECTS)
def test_damaged_bytes(context, secret, what):
    read, data = readers(context, secret)[what]
    read(data)
    before = counts()
    for size in (1, 2, 9, len(data) // 2, len(data) - 1):
        with pytest.raises(MessageError):
            read(data[:size])
    with pytest.raises(MessageError):
        read(data + b"x")
    for wrong in (b"hello, world", bytes(8), bytes(100)):
        with pytest.raises(MessageError):
            read(wrong)
    with pytest.raises((InputError, TypeError)):
        read(10)
    assert counts() == before


def test_a_flipped_bit_of_a_tensor_is_seen(context, secret):
    data = secret.encrypt([0.5]).to_bytes()
    for at in [*range(90), *range(90, len(data), 997)]:
        changed = bytearray(data)
        changed[at] ^= 4
        with pytest.raises(MessageError):
            openfhe.EncryptedTensor.from_bytes(context, changed)


@pytest.mark.parametrize("what", ["public key", "secret key", "multiplication key", "automorphism keys", "ciphertexts"])
def test_bytes_of_another_context(context, secret, what):
    stranger = openfhe.Context.INSECURE(ckks.Parameters.INSECURE(3))
    _, data = readers(stranger, openfhe.SecretKey(stranger))[what]
    read, _ = readers(context, secret)[what]
    del stranger
    before = counts()
    with pytest.raises(MessageError, match="another context"):
        read(data)
    assert counts() == before


def test_files_that_cannot_be_used(context, tmp_path):
    with pytest.raises(InputError, match="cannot read .*missing"):
        openfhe.Context.load(tmp_path / "missing")
    with pytest.raises(InputError, match="cannot write .*nowhere"):
        context.save(tmp_path / "nowhere" / "context")
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(InputError, match="cannot write"):
        context.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_files_get_their_mode_whatever_was_there(context, secret, tmp_path):
    path = tmp_path / "key"
    context.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    secret.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_what_is_public_is_copied_and_pickled(context, secret):
    keys = secret.evaluation_keys(rotations=[1])
    tensor = secret.encrypt(np.linspace(-1, 1, 6).reshape(3, 2))
    for thing in (context, tensor, keys, secret.public_key()):
        assert copy.deepcopy([thing])[0] is thing
        assert type(pickle.loads(pickle.dumps(thing))) is type(thing)
    assert pickle.loads(pickle.dumps(secret.public_key())).tag == secret.tag
    ours = openfhe.Evaluator(context, keys)
    theirs, received = pickle.loads(pickle.dumps((ours, tensor)))
    assert np.array_equal(received.residues(0), tensor.residues(0))
    assert (theirs.keys.tag, theirs.keys.elements) == (keys.tag, keys.elements)
    want = secret.decrypt(ours.square(tensor))
    assert np.abs(secret.decrypt(theirs.square(received)) - want).max() < 2**-20


def test_secrets_stay(secret):
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(SecretError, match="never copied or pickled"):
            leave(secret)
    assert repr(secret) == f"<OpenFHE secret key, tag {secret.tag}>"


# Operations of its own


def test_values_that_round_to_nothing(context, secret):
    # OpenFHE refuses polynomials whose coefficients are all below one.
    x = np.zeros((context.slots, 3))
    x[0, 1], x[:, 2] = 1e-14, 1e-300
    tensor = secret.encrypt(x)
    assert np.abs(secret.decrypt(tensor) - x).max() < tensor.budget().error < 1e-7
    product = openfhe.Evaluator(context).multiply_plain(secret.encrypt(np.ones_like(x)), x)
    assert np.abs(secret.decrypt(product) - x).max() < product.budget().error < 1e-6


def test_complex_values():
    context = openfhe.Context.INSECURE(
        multiplicative_depth=2, ring_dim=1024, scaling_mod_size=45, ckks_data_type="COMPLEX"
    )
    secret = openfhe.SecretKey(context)
    engine = openfhe.Evaluator(context, secret.evaluation_keys(conjugation=True, rotations=[1]))
    z = values(context) / 2 + 1j * values(context, seed=1) / 2
    x = secret.encrypt(z)
    assert np.abs(secret.decrypt(x, complex=True) - z).max() < 1e-9
    assert np.abs(secret.decrypt(engine.conjugate(x), complex=True) - z.conj()).max() < 1e-6
    assert np.abs(secret.decrypt(engine.multiply(x, x), complex=True) - z * z).max() < 1e-6
    assert np.abs(secret.decrypt(engine.multiply_plain(x, z), complex=True) - z * z).max() < 1e-6
    assert np.abs(secret.decrypt(x) - z.real).max() < 1e-9


def test_real_contexts_have_no_complex_values(context, secret):
    x = secret.encrypt([0.5])
    for run in (
        lambda: secret.encrypt([0.5j]),
        lambda: secret.decrypt(x, complex=True),
        lambda: openfhe.Evaluator(context).multiply_plain(x, [[0.5j]]),
    ):
        with pytest.raises(InputError, match="ckks_data_type='COMPLEX'"):
            run()


def test_values_that_outgrow_the_modulus():
    context = openfhe.Context.INSECURE(multiplicative_depth=1, ring_dim=1024, scaling_mod_size=40, first_mod_size=45)
    secret = openfhe.SecretKey(context)
    engine = openfhe.Evaluator(context)
    low = engine.drop_level(secret.encrypt(np.ones((4, 8))), 0)
    with pytest.raises(CkksError, match="outgrow the modulus left at level 0"):
        engine.linear(low, np.ones((2, 8)))
    with pytest.raises(CkksError, match="outgrow the modulus"):
        engine.assume(low, 1e6)


def test_sums_are_not_packed(context, secret):
    with pytest.raises(EngineError, match="use sum_slots"):
        openfhe.Evaluator(context).pack_slot_sums(secret.encrypt([0.5]))


def test_bootstrapping():
    context = openfhe.Context.INSECURE(
        multiplicative_depth=25,
        ring_dim=2048,
        batch_size=8,
        scaling_mod_size=50,
        first_mod_size=60,
        scaling_technique="FLEXIBLEAUTO",
    )
    secret = openfhe.SecretKey(context)
    with pytest.raises(InputError, match="enable_bootstrapping"):
        secret.evaluation_keys(bootstrapping=True)
    context.enable_bootstrapping((3, 3))
    keys = secret.evaluation_keys(bootstrapping=True)
    engine = openfhe.Evaluator(context, keys)
    x = np.random.default_rng(3).uniform(-0.5, 0.5, (8, 1))
    low = engine.drop_level(secret.encrypt(x), 1)
    result = engine.bootstrap(low, precision_bits=8)
    assert result.level > low.level + 2
    assert np.abs(secret.decrypt(result) - x).max() < result.budget().error < 2**-7
    square = engine.square(result)
    assert np.abs(secret.decrypt(square) - x * x).max() < square.budget().error
    with pytest.raises(CkksError, match="lack some that bootstrapping needs"):
        openfhe.Evaluator(context, secret.evaluation_keys()).bootstrap(low, precision_bits=8)
    with pytest.raises(CkksError, match="lack some that bootstrapping needs"):
        openfhe.Evaluator(context, secret.evaluation_keys(conjugation=True)).bootstrap(low, precision_bits=8)
    with pytest.raises(InputError, match="another level_budget"):
        context.enable_bootstrapping((2, 2))


def test_bootstrapping_needs_preparation(context, secret):
    with pytest.raises(CkksError, match="enable_bootstrapping"):
        openfhe.Evaluator(context, secret.evaluation_keys()).bootstrap(secret.encrypt([0.5]), precision_bits=8)
    with pytest.raises(InputError, match="bootstrapping takes [0-9]+ levels and this context has 1; choose a larger"):
        openfhe.Context.INSECURE(ckks.Parameters.INSECURE(1)).enable_bootstrapping()
    for budget in ((), (1,), (0, 3), (3, 0), (1, 2, 3)):
        with pytest.raises(InputError, match="level_budget: give two numbers"):
            context.enable_bootstrapping(budget)

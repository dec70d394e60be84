"""Masked refresh: values, what the owner of the key sees of them, and how the weights would be read out."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evaluators import DEVICES, Case
from privtuner import ckks, wire
from privtuner.errors import CkksError, InputError, MessageError
from refreshing import Owner, masked_words, owner_sees

PARAMETERS = ckks.Parameters.INSECURE(4)
SECRET = ckks.SecretKey(PARAMETERS)
PUBLIC = SECRET.public_key()
KEYS = SECRET.evaluation_keys(conjugation=True, packing=True)
SLOTS, N = PARAMETERS.slots, PARAMETERS.ring_dimension
RNG = np.random.default_rng(7)
VALUES = RNG.uniform(-1, 1, (SLOTS, 5))
CLEAR = ckks.ClearEvaluator(PARAMETERS)


def parties(level: int = 4, **options: Any) -> tuple[ckks.Evaluator, Owner]:
    owner = Owner(SECRET, level)
    return ckks.Evaluator(PARAMETERS, KEYS, ckks.Refresher(PUBLIC, owner.exchange, **options)), owner


@pytest.fixture(scope="module", params=["native", *DEVICES, "clear"])
def case(request) -> Case:
    case = Case(request.param, PARAMETERS, conjugation=True)
    if request.param != "clear":
        case.evaluator.refresher = ckks.Refresher(case.secret.public_key(), Owner(case.secret, 3).exchange)
    return case


@pytest.mark.parametrize("start", [2, 3, 4])
@pytest.mark.parametrize("features", [1, 4, 5])
def test_the_values_come_back_at_the_level_asked_for(case, start, features):
    x = VALUES[:, :features]
    fresh = case.evaluator.refresh(case.evaluator.drop_level(case.encrypt(x), start), 3)
    assert (fresh.shape, fresh.level, fresh.bound) == (x.shape, 3, 1.0)
    scale = PARAMETERS.scale(3) if start > 2 else PARAMETERS.scale(4)
    np.testing.assert_allclose(fresh.scale, scale, rtol=1e-12)
    error = np.abs(case.decrypt(fresh) - x).max()
    assert error <= fresh.budget().error < 2.0**-20
    planned = ckks.Evaluator(PARAMETERS)
    dry = planned.refresh(planned.drop_level(planned.planned(SLOTS, features), start), 3)
    assert (dry.budget(), dry.nbytes) == (fresh.budget(), fresh.nbytes)


@pytest.mark.parametrize("start", [2, 4])
def test_errors_are_as_large_as_predicted(start):
    evaluator, _ = parties()
    fresh = evaluator.refresh(evaluator.drop_level(SECRET.encrypt(VALUES), start))
    deviation = (SECRET.decrypt(fresh) - VALUES).std(0)
    np.testing.assert_allclose(
        deviation, fresh.noise / fresh.scale, rtol=0.25
    )  # of 512 values: 5 times 1 / sqrt(1024) and more


def test_packed_numbers_come_back():
    evaluator, _ = parties()
    numbers = RNG.uniform(-3, 3, (37, 2))
    x = SECRET.encrypt_packed(numbers, bound=3.0)
    fresh = evaluator.refresh(evaluator.drop_level(x, 3), packed=True)
    found = SECRET.decrypt_packed(fresh, 37)
    assert np.abs(found - numbers).max() <= fresh.budget().error
    np.testing.assert_allclose((found - numbers).std(), fresh.noise[0] / fresh.scale[0], rtol=0.5)
    clear = CLEAR.refresh(CLEAR.drop_level(CLEAR.packed(numbers, bound=3.0), 3), packed=True)
    assert clear.budget() == fresh.budget()
    np.testing.assert_allclose(CLEAR.select(clear, slice(1, 2)).sums(37), numbers[:, 1], atol=1e-12)


def test_numbers_expand_to_all_slots():
    evaluator = ckks.Evaluator(PARAMETERS, KEYS)
    numbers = RNG.uniform(-1, 1, 300)
    x = SECRET.encrypt_packed(numbers, level=1)
    for some in (slice(5, None, 32), slice(7, 11), slice(290, None)):
        y = evaluator.expand(x, 300, some)
        clear = CLEAR.expand(CLEAR.packed(numbers, level=1), 300, some)
        want = np.broadcast_to(numbers[some], (SLOTS, len(numbers[some])))
        np.testing.assert_allclose(clear.values, want, atol=1e-12)
        assert clear.budget() == y.budget()
        off = SECRET.decrypt(y) - want
        assert np.abs(off).max() <= y.budget().error
        assert 0.5 < np.sqrt((off**2).mean()) / (y.noise / y.scale).mean() < 2
        np.testing.assert_allclose(y.scale, x.scale[0] * 512, rtol=1e-12)
    # Sums as they are packed are what is expanded.
    sums = evaluator.expand(evaluator.pack_slot_sums(SECRET.encrypt(VALUES)), 5)
    assert np.abs(SECRET.decrypt(sums) - VALUES.sum(0)).max() <= sums.budget().error


def test_a_flood_hides_the_error():
    evaluator, _ = parties()
    x = evaluator.multiply(SECRET.encrypt(VALUES), 0.5)
    shown = evaluator.reveal(x, 10, error=0.01)
    off = SECRET.decrypt(shown) - VALUES / 2
    np.testing.assert_allclose(off.std(0), shown.noise / shown.scale, rtol=0.25)
    assert np.abs(off).max() <= shown.budget().error <= 0.01
    # The flood is uniform in every coefficient, 2^10 times what the error of any of them stays below.
    message = SECRET.decrypt_packed(shown, N) - SECRET.decrypt_packed(x, N)
    most = np.abs(message).max() * shown.scale[0]
    predicted = 2**10 * x.noise[0] / np.sqrt(SLOTS) * np.log(5 * N * 1e6) / np.sqrt(2)
    assert 0.99 * predicted < most < 1.01 * predicted
    assert CLEAR.reveal(CLEAR.multiply(CLEAR.tensor(VALUES), 0.5), 10, error=0.01).budget() == shown.budget()
    packed = evaluator.reveal(SECRET.encrypt_packed(VALUES), 10, error=0.01, packed=True)
    assert np.abs(SECRET.decrypt_packed(packed, SLOTS) - VALUES).max() <= packed.budget().error


# What the owner of the key sees


def solve(matrix: np.ndarray, right: np.ndarray, prime: int) -> np.ndarray:
    """The solution of a square system modulo a prime, by elimination on whole numbers of Python."""
    size = len(matrix)
    rows = [[int(v) for v in row] + [int(v) for v in rest] for row, rest in zip(matrix, right, strict=True)]
    for i in range(size):
        pivot = next(r for r in range(i, size) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        inverse = pow(rows[i][i], -1, prime)
        rows[i] = [v * inverse % prime for v in rows[i]]
        for r in range(size):
            if r != i:
                rows[r] = [(a - rows[r][i] * b) % prime for a, b in zip(rows[r], rows[i], strict=True)]
    return np.array([row[size:] for row in rows], dtype=object)


def read_weights(x: ckks.EncryptedTensor, second: np.ndarray) -> np.ndarray:
    """What an owner makes of second components (d_out, N) modulo the second prime, of a product of its own input."""
    known, prime = x.residues(1)[:, 1], PARAMETERS.primes[1]  # (d_in, N)
    found = solve(known[:, : len(known)].T, second[:, : len(known)].T, prime).T
    return np.where(found > prime // 2, found - prime, found)


def test_weights_are_read_from_what_is_not_rerandomised():
    matrix = ckks.Matrix(RNG.normal(size=(4, 6)))
    x = SECRET.encrypt(RNG.uniform(-1, 1, (SLOTS, 6)), level=2)
    evaluator, owner = parties()
    product = evaluator.linear(x, matrix)
    # A mask on the first component alone leaves the second one as it is: linear in the weights.
    assert (read_weights(x, product.residues(1)[:, 1]) == matrix.integers).all()
    evaluator.refresh(product)
    second = np.concatenate([masked_words(PARAMETERS, message)[1][:, 1] for message in owner.messages])
    assert second.shape == (4, N)
    found = read_weights(x, second)
    assert (np.abs(found) > 2**20).mean() > 0.99  # numbers of 40 bits
    # Neither are the weights a part of it: other equations give other solutions.
    shifted = x.residues(1)[:, 1, 6:12].T
    assert (solve(shifted, second[:, 6:12].T, PARAMETERS.primes[1]).T % PARAMETERS.primes[1] != found).mean() > 0.99


def chi_square(values: np.ndarray, low: float, high: float, bins: int = 64) -> float:
    """How far a histogram of values in [low, high) is from uniform, in standard deviations of chi-square."""
    counts, _ = np.histogram(values, bins, (low, high))
    expected = values.size / bins
    return float(((counts - expected) ** 2 / expected).sum() - (bins - 1)) / np.sqrt(2 * (bins - 1))


MESSAGES: dict[str, Callable[[], np.ndarray]] = {
    "zeros": lambda: np.zeros((SLOTS, 40)),
    "as large as the bound": lambda: np.full((SLOTS, 40), 500.0),
    "random": lambda: RNG.uniform(-500, 500, (SLOTS, 40)),
}


@pytest.mark.parametrize("which", MESSAGES)
@pytest.mark.parametrize("start", [2, 4])
def test_the_owner_sees_uniform_numbers(which, start):
    evaluator, owner = parties()
    x = SECRET.encrypt(MESSAGES[which](), bound=500.0, level=start)
    evaluator.refresh(x)
    (message,) = owner.messages
    seen = owner_sees(SECRET, message)
    assert seen.shape == (20 if start == 4 else 40, N)
    # 80,000 numbers in all; six standard deviations.
    assert chi_square(seen, -0.5, 0.5) < 6
    assert chi_square(seen * 2.0**20 % 1.0, 0.0, 1.0) < 6
    for limb, words in enumerate(masked_words(PARAMETERS, message)):
        for component in range(2):
            assert chi_square(words[:, component].astype(float), 0.0, PARAMETERS.primes[limb]) < 6
    if which == "random" and start == 2:
        inside = SECRET.decrypt_packed(x, N).T
        correlation = np.corrcoef(inside.ravel(), seen.ravel())[0, 1]
        assert abs(correlation) < 6 / np.sqrt(seen.size)


def test_the_same_tensor_twice_looks_like_two():
    evaluator, owner = parties()
    x = SECRET.encrypt(VALUES[:, :1], level=2)
    for _ in range(2):
        evaluator.refresh(x)
    first, second = (np.stack(masked_words(PARAMETERS, message)) for message in owner.messages)
    assert (first == second).mean() < 0.001
    difference = np.stack([(a + p - b) % p for a, b, p in zip(first, second, PARAMETERS.primes[:3], strict=True)])
    assert chi_square(difference[0].astype(float), 0.0, PARAMETERS.primes[0]) < 6


def test_messages_tell_counts_alone():
    evaluator, owner = parties()
    batch = PARAMETERS.refresh_batch(4)
    many = batch + 3
    evaluator.refresh(evaluator.concatenate([SECRET.encrypt(VALUES[:, :1], level=2)] * many))
    evaluator.refresh(SECRET.encrypt(VALUES, level=4))
    heads = [wire.peek(message) for message in owner.messages]
    assert [head.features for head in heads] == [batch, 3, 3]
    assert [int.from_bytes(head.request, "little") for head in heads] == [0, 1, 2]
    assert {(head.kind, head.tokens, head.subject) for head in heads} == {
        ("refresh", SLOTS, evaluator.refresher.session)
    }
    assert evaluator.refresher.refreshed == many + 3
    for message, answer in zip(owner.messages, owner.answers, strict=True):
        head = wire.peek(answer)
        assert (head.kind, head.request) == ("refreshed", wire.peek(message).request)


def test_many_refreshes_and_not_one_wraps():
    """A million with PRIVTUNER_REFRESHES=1000000: the number that keys are good for is 16 times that."""
    wanted = int(os.environ.get("PRIVTUNER_REFRESHES", "500"))
    parameters = ckks.Parameters.INSECURE(2)  # the smallest ring
    secret = ckks.SecretKey(parameters)
    owner = Owner(secret, 2)
    evaluator = ckks.Evaluator(parameters, None, ckks.Refresher(secret.public_key(), owner.exchange))
    bound = 2.0**13  # log2 q = 130 = 1 + 10 + 24 + 40 + 55
    values = RNG.uniform(-bound, bound, (parameters.slots, 500))
    x, done = secret.encrypt(values, bound=bound), 0
    while done < wanted:
        fresh = evaluator.refresh(x)
        assert np.abs(secret.decrypt(fresh) - values).max() <= fresh.budget().error
        done += 500
        owner.messages.clear()
        owner.answers.clear()
    assert evaluator.refresher.refreshed == done


# What is refused


def test_what_cannot_be_refreshed():
    evaluator, _ = parties()
    x = SECRET.encrypt(VALUES)
    for bad in (1, 5, -1):
        with pytest.raises(CkksError, match=f"a refresh to level {bad}: choose one from 2 to the depth, 4"):
            evaluator.refresh(x, bad)
    with pytest.raises(InputError, match="level is 2.5"):
        evaluator.refresh(x, 2.5)
    with pytest.raises(CkksError, match="at level 1 cannot be refreshed: the masks need level 2"):
        evaluator.refresh(evaluator.drop_level(x, 1))
    with pytest.raises(CkksError, match="cannot be masked"):
        evaluator.refresh(evaluator.assume(x, 2.0**16))
    with pytest.raises(CkksError, match="make the evaluator with a refresher"):
        ckks.Evaluator(PARAMETERS, KEYS).refresh(x)
    with pytest.raises(CkksError, match="make the evaluator with a refresher"):
        ckks.Evaluator(PARAMETERS, KEYS).reveal(x, error=0.1)
    with pytest.raises(CkksError, match="conjugation needs its key"):
        ckks.Evaluator(PARAMETERS, None, evaluator.refresher).refresh(x)
    shallow = ckks.Evaluator(ckks.Parameters.INSECURE(1))
    with pytest.raises(CkksError, match="has no three primes"):
        shallow.refresh(shallow.planned(3, 1))


def test_what_cannot_be_revealed_or_expanded():
    evaluator, _ = parties()
    x = SECRET.encrypt(VALUES)
    for bad in (0, 41):
        with pytest.raises(CkksError, match=f"flood_bits {bad} is outside"):
            evaluator.reveal(x, bad, error=0.1)
    with pytest.raises(CkksError, match="leaves errors up to .* where 0.000001 are allowed"):
        evaluator.reveal(x, error=1e-6)
    packed = SECRET.encrypt_packed(VALUES[:, :1])
    with pytest.raises(CkksError, match="pass one ciphertext"):
        evaluator.expand(x, 4)
    with pytest.raises(CkksError, match="not among the 4"):
        evaluator.expand(packed, 4, slice(4, None))
    with pytest.raises(InputError, match="choose rising ones"):
        evaluator.expand(packed, 4, slice(None, None, -1))
    with pytest.raises(CkksError, match="needs its key; make evaluation keys with packing"):
        ckks.Evaluator(PARAMETERS, SECRET.evaluation_keys()).expand(SECRET.encrypt_packed([0.5, 1.0]), 2)


def test_clear_values_that_are_not_what_is_said():
    packed, x = CLEAR.packed(VALUES), CLEAR.tensor(VALUES)
    with pytest.raises(CkksError, match="refresh: the tensor holds packed numbers"):
        CLEAR.refresh(packed)
    with pytest.raises(CkksError, match="refresh: the tensor holds slots"):
        CLEAR.refresh(x, packed=True)
    with pytest.raises(CkksError, match="reveal: the tensor holds packed numbers"):
        CLEAR.reveal(packed, error=0.1)
    with pytest.raises(CkksError, match="expand: the tensor holds slots"):
        CLEAR.expand(CLEAR.select(x, slice(0, 1)), 4)
    with pytest.raises(CkksError, match="the values are not real"):
        CLEAR.refresh(CLEAR.tensor(VALUES * 1j))
    with pytest.raises(CkksError, match="refresh: .* beyond the bound"):
        CLEAR.refresh(ckks.ClearTensor(CLEAR.assume(x, 1.0)._core, PARAMETERS, x._slots * 2, False))


def test_packed_numbers_that_cannot_be_encrypted():
    for make in (SECRET.encrypt_packed, CLEAR.packed):
        with pytest.raises(CkksError, match="above the declared bound"):
            make([2.0])
        with pytest.raises(CkksError, match="NaN or infinity"):
            make([np.nan])
        with pytest.raises(InputError, match=f"{N + 1} numbers do not fit the {N} coefficients"):
            make(np.zeros(N + 1))
        with pytest.raises(InputError, match="packed numbers are real"):
            make([1j])
    with pytest.raises(CkksError, match=r"pass 2\^62"):
        SECRET.encrypt_packed([1.0], bound=2.0**30)
    with pytest.raises(InputError, match="numbers do not fit"):
        SECRET.decrypt_packed(SECRET.encrypt_packed([0.5]), N + 1)


def test_an_owner_that_does_not_answer():
    def cut(messages):
        yield from (SECRET.refresh(message, 4, 1) for message, _ in zip(messages, range(0), strict=False))

    with pytest.raises(MessageError, match="answered 0 of 1 messages"):
        ckks.Evaluator(PARAMETERS, KEYS, ckks.Refresher(PUBLIC, cut)).refresh(SECRET.encrypt(VALUES[:, :1]))
    evaluator, owner = parties()
    owner.level = 3
    with pytest.raises(MessageError, match="of the wrong length"):
        evaluator.refresh(SECRET.encrypt(VALUES))


def test_a_key_is_good_for_so_many_refreshes():
    evaluator, owner = parties(refreshed=ckks.Refresher.LIMIT - 5)
    evaluator.refresh(SECRET.encrypt(VALUES))
    with pytest.raises(CkksError, match=f"{ckks.Refresher.LIMIT - 2} ciphertexts were refreshed under this key"):
        evaluator.refresh(SECRET.encrypt(VALUES))
    assert evaluator.refresher.refreshed == ckks.Refresher.LIMIT - 2
    assert len(owner.messages) == 1
    for bad in (-1, ckks.Refresher.LIMIT + 1):
        with pytest.raises(InputError, match=f"refreshed {bad} is outside"):
            parties(refreshed=bad)


def test_messages_that_are_refused_by_the_owner():
    evaluator, owner = parties()
    evaluator.refresh(SECRET.encrypt(VALUES))
    (message,) = owner.messages
    with pytest.raises(MessageError, match="of 3 ciphertexts where 2 are due"):
        SECRET.refresh(message, 4, 2)
    with pytest.raises(CkksError, match="a refresh to level 1"):
        SECRET.refresh(message, 1, 3)
    for bad in (0, 65):
        with pytest.raises(InputError, match=f"{bad} ciphertexts in a message"):
            SECRET.refresh(message, 4, bad)
    for damaged in (message[:-1], message[:100] + bytes([message[100] ^ 1]) + message[101:]):
        with pytest.raises(MessageError):
            SECRET.refresh(damaged, 4, 3)
    with pytest.raises(MessageError, match="made with other parameters"):
        ckks.SecretKey(ckks.Parameters.INSECURE(3)).refresh(message, 3, 3)
    assert len(SECRET.refresh(message, 4, 3)) == PARAMETERS._core.refreshed_bytes(3, 4)


def test_keys_of_randomness_of_both_sides():
    secret, common = ckks.SecretKey(PARAMETERS), bytes(range(32))
    other = bytes(32)
    public, keys = secret.public_key(common), secret.evaluation_keys(rotations=(1,), common=common)
    for key in (public, keys):
        assert type(key).from_bytes(PARAMETERS, key.to_bytes(), common).to_bytes() == key.to_bytes()
        with pytest.raises(MessageError, match="not derived from the randomness that both sides agreed on"):
            type(key).from_bytes(PARAMETERS, key.to_bytes(), other)
        with pytest.raises(InputError, match="common randomness"):
            type(key).from_bytes(PARAMETERS, key.to_bytes(), common[:31])
    with pytest.raises(MessageError, match="not derived"):
        ckks.PublicKey.from_bytes(PARAMETERS, secret.public_key().to_bytes(), common)
    with pytest.raises(CkksError, match="a key of this kind was made of this common randomness"):
        secret.public_key(common)
    with pytest.raises(CkksError, match="a key of this kind was made of this common randomness"):
        secret.evaluation_keys(common=common)
    x = secret.encrypt(VALUES)
    evaluator = ckks.Evaluator(PARAMETERS, ckks.EvaluationKeys.from_bytes(PARAMETERS, keys.to_bytes(), common))
    assert np.abs(secret.decrypt(evaluator.square(evaluator.rotate(x, 1))) - np.roll(VALUES, -1, 0) ** 2).max() < 1e-5


# Plans


def test_a_plan_lists_refreshes():
    def circuit(engine, x):
        y = engine.refresh(engine.square(x), 3)
        return engine.refresh(engine.select(y, slice(0, 1)))

    plan = ckks.plan(circuit, (SLOTS, 5), parameters=PARAMETERS)
    assert plan.refreshes == (ckks.Refresh(3, 3), ckks.Refresh(1, 4))
    owner = Owner(SECRET, 3)

    def exchange(messages):
        owner.level = 3 if not owner.messages else 4
        return owner.exchange(messages)

    evaluator = ckks.Evaluator(PARAMETERS, plan.keys(SECRET), ckks.Refresher(PUBLIC, exchange))
    result, _ = plan.run(circuit, evaluator, SECRET.encrypt(VALUES))
    assert np.abs(SECRET.decrypt(result) - VALUES[:, :1] ** 2).max() <= plan.outputs[0].budget().error
    assert (sum(map(len, owner.messages)), sum(map(len, owner.answers))) == (plan.masked_bytes, plan.fresh_bytes)
    assert "refreshes   2, of 4 ciphertexts" in str(plan)
    assert "refreshes" not in str(ckks.plan(lambda engine, x: engine.square(x), (1, 1), parameters=PARAMETERS))


def test_timings_predict_refreshes():
    timings = ckks.measure_timings(PARAMETERS, repeats=1)
    plan = ckks.plan(lambda e, x: e.refresh(x), (SLOTS, 5), parameters=PARAMETERS, timings=timings)
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert {kind for kind, _ in plan.work} >= {"mask", "unmask", "refresh"}

"""What other engines build on: recorded steps, words, constants.

The steps recorded from planned tensors are replayed with whole numbers of any size and must give the words of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod

import numpy as np
import numpy.typing as npt
import pytest

from privtuner import _core, ckks
from privtuner._core import steps
from privtuner.errors import CkksError, InputError

PARAMETERS = ckks.Parameters.INSECURE(3, 35)._core
N, PRIMES, LIMBS = PARAMETERS.ring_dimension, PARAMETERS.primes, PARAMETERS.max_limbs
SPECIALS = list(range(LIMBS, len(PRIMES)))
SECRET = _core.CkksSecretKey(PARAMETERS, None)
ROTATIONS = [PARAMETERS.galois_element(1 << i) for i in range(9)]
KEYS = SECRET.evaluation_keys(True, sorted({*PARAMETERS.packing_elements, 2 * N - 1, *ROTATIONS}), None)
TOKENS = 6
Rows = npt.NDArray[np.object_]  # of Python's whole numbers: no overflow, no reduction to trust
Tensor = _core.CkksTensor
Circuit = Callable[[_core.CkksEvaluator, dict[str, Tensor]], list[Tensor]]


# The ring, with Python's whole numbers


def brv(k: int, n: int = N) -> int:
    return int(f"{k:b}".zfill(n.bit_length() - 1)[::-1], 2)


PSI = [int(_core.ntt_tables(N, q, 8)[0][N // 2]) for q in PRIMES]
ROOTS = [np.array([pow(psi, brv(k), q) for k in range(N)], object) for psi, q in zip(PSI, PRIMES, strict=True)]
INVERSES = [np.array([pow(psi, -brv(k), q) for k in range(N)], object) for psi, q in zip(PSI, PRIMES, strict=True)]


def forward(row: Rows, i: int) -> Rows:
    row, q, m = row % PRIMES[i], PRIMES[i], 1
    while m < N:
        pairs = row.reshape(m, 2, -1)
        u, v = pairs[:, 0], pairs[:, 1] * ROOTS[i][m : 2 * m, None] % q
        row, m = np.stack([(u + v) % q, (u - v) % q], 1).reshape(N), 2 * m
    return row


def inverse(row: Rows, i: int) -> Rows:
    q, m = PRIMES[i], N // 2
    while m:
        pairs = row.reshape(m, 2, -1)
        u, v = pairs[:, 0], pairs[:, 1]
        row, m = np.stack([(u + v) % q, (u - v) * INVERSES[i][m : 2 * m, None] % q], 1).reshape(N), m // 2
    return row * pow(N, -1, q) % q


def centred(rows: Rows, primes: list[int]) -> Rows:
    """The coefficients in [-D/2, D/2] with these residues, given in the NTT domain."""
    whole = prod(PRIMES[i] for i in primes)
    total = np.zeros(N, object)
    for row, i in zip(rows, primes, strict=True):
        rest = whole // PRIMES[i]
        total += inverse(row, i) * (rest * pow(rest, -1, PRIMES[i]))
    total %= whole
    return np.where(total > whole // 2, total - whole, total)


def divide(rows: dict[int, Rows], by: list[int], keep: int) -> Rows:
    """Rows of primes, divided by the product of some and rounded: the first ``keep`` rows of the quotient."""
    rest = centred([rows[i] for i in by], by)
    whole = prod(PRIMES[i] for i in by)
    return np.stack([(rows[i] - forward(rest, i)) * pow(whole, -1, PRIMES[i]) % PRIMES[i] for i in range(keep)])


def switched(rows: Rows, element: int | None) -> list[dict[int, Rows]]:
    """Both components of a key switch, before P is divided out."""
    limbs, width = len(rows), PARAMETERS.digit_limbs
    key = KEYS.words(element).astype(object)
    primes = [*range(limbs), *SPECIALS]
    sums = [{i: np.zeros(N, object) for i in primes} for _ in range(2)]
    for d, begin in enumerate(range(0, limbs, width)):
        own = list(range(begin, min(begin + width, limbs)))
        digit = centred(rows[own], own)
        for i in primes:
            row = rows[i] if i in own else forward(digit, i)
            for c in range(2):
                sums[c][i] = (sums[c][i] + row * key[d, c, i]) % PRIMES[i]
    return sums


def raise_and_add(sums: dict[int, Rows], rows: Rows) -> dict[int, Rows]:
    whole = prod(PRIMES[i] for i in SPECIALS)
    return sums | {i: (sums[i] + whole * row) % PRIMES[i] for i, row in enumerate(rows)}


class Replay:
    """Runs steps on words [feature][component][limb][N] by storage, and checks what every step names."""

    def __init__(self, inputs: dict[str, Tensor], planned: dict[str, Tensor]) -> None:
        self.words = {planned[name].ref.storage: inputs[name].words().astype(object) for name in inputs}

    def get(self, ref: steps.TensorRef) -> Rows:
        words = self.words[ref.storage]
        assert ref.features >= 1
        assert ref.first + ref.features <= len(words)
        assert words.shape[2] == ref.level + 1
        return words[ref.first : ref.first + ref.features]

    def put(self, ref: steps.TensorRef, words: Rows) -> None:
        assert (ref.first, ref.features, ref.level) == (0, len(words), words.shape[2] - 1)
        assert ref.storage not in self.words
        self.words[ref.storage] = words

    def run(self, recorded: list[steps._Step]) -> Replay:
        for step in recorded:
            getattr(self, type(step).__name__.lower())(step)
        return self

    def sum_of(self, step: steps.Combine | steps.Product, features: int) -> Rows:
        limbs = step.limbs
        total = np.zeros((features, 2, limbs, N), object)
        for t, ref in enumerate(step.terms):
            assert ref.features in (1, features)
            assert step.weights.shape == (limbs, len(step.terms), features)
            weights = step.weights[:, t].T.astype(object)
            total += self.get(ref)[:, :, :limbs] * weights[:, None, :, None]
        if step.constants is not None:
            assert step.constants.shape == (limbs, features)
            total[:, 0] += step.constants.T.astype(object)[:, :, None]
        return self.reduced(total)

    @staticmethod
    def reduced(words: Rows) -> Rows:
        return words % np.array(PRIMES[: words.shape[2]], object)[:, None]

    @staticmethod
    def rescaled(words: Rows) -> Rows:
        last = words.shape[2] - 1
        rows = [[divide(dict(enumerate(component)), [last], last) for component in feature] for feature in words]
        return np.array(rows, object)

    def combine(self, step: steps.Combine) -> None:
        words = self.sum_of(step, step.out.features)
        self.put(step.out, self.rescaled(words) if step.rescaled else words)

    def add(self, step: steps.Add) -> None:
        x, y = self.get(step.x), self.get(step.y)
        assert len(x) == len(y) or 1 in (len(x), len(y))
        self.put(step.out, self.reduced(x - y if step.minus else x + y))

    def sum(self, step: steps.Sum) -> None:
        self.put(step.out, self.reduced(self.get(step.x).sum(0, keepdims=True)))

    def copy(self, step: steps.Copy) -> None:
        self.put(step.out, np.concatenate([self.get(part)[:, :, : step.out.level + 1] for part in step.parts]))

    def plain(self, step: steps.Plain) -> None:
        x, limbs = self.get(step.x), step.limbs
        assert step.coefficients.dtype == np.int64
        rows = [[forward(c, i) for i in range(limbs)] for c in step.coefficients.astype(object)]
        self.put(step.out, self.rescaled(self.reduced(x[:, :, :limbs] * np.array(rows, object)[:, None])))

    def product(self, step: steps.Product) -> None:
        limbs = step.limbs
        x, y = self.get(step.x)[:, :, :limbs], self.get(step.y)[:, :, :limbs]
        d = np.stack([x[:, 0] * y[:, 0], x[:, 0] * y[:, 1] + x[:, 1] * y[:, 0], x[:, 1] * y[:, 1]], 1)
        if step.summed:
            d = d.sum(0, keepdims=True)
        if step.multipliers is not None:
            assert step.multipliers.shape == (limbs, len(d))
            d = d * step.multipliers.T.astype(object)[:, None, :, None]
        d[:, :2] += self.sum_of(step, len(d))
        out = []
        for feature in self.reduced(d):
            sums = switched(feature[2], None)
            by = [*SPECIALS, limbs - 1]
            out.append([divide(raise_and_add(sums[c], feature[c]), by, limbs - 1) for c in range(2)])
        self.put(step.out, np.array(out, object))

    def matrix(self, step: steps.Matrix) -> None:
        weights = (INTEGERS.T if step.transpose else INTEGERS).astype(object)
        self.put(step.out, self.reduced(np.tensordot(weights, self.get(step.x), 1)))

    def galois(self, step: steps.Galois) -> None:
        x = self.get(step.x)
        assert len(step.outs) == len(step.elements) > 0
        for ref, element in zip(step.outs, step.elements, strict=True):
            if element == 1:
                self.put(ref, x)
                continue
            index = PARAMETERS.galois_permutation(element)
            out = []
            for feature in x:
                sums = switched(feature[1], element)
                sums[0] = raise_and_add(sums[0], feature[0])
                out.append([divide(sums[c], SPECIALS, x.shape[2])[:, index] for c in range(2)])
            self.put(ref, np.array(out, object))

    def monomial(self, step: steps.Monomial) -> None:
        x = self.get(step.x)
        power = np.zeros(N, object)
        power[step.power] = 1
        self.put(step.out, self.reduced(x * np.stack([forward(power, i) for i in range(x.shape[2])])))


# Circuits: every operation once, and those in which noise depends on what tensors have in common

RNG = np.random.default_rng(7)
INTEGERS = RNG.integers(-127, 128, (4, 3)).astype(np.int8)
MATRIX = _core.CkksMatrix(INTEGERS, np.full(4, 0.01))
VALUES, IMAGINARY = RNG.uniform(-1, 1, (2, TOKENS, 3))


def encrypted(features: int, level: int = 3, bound: float = 1.0) -> Tensor:
    return SECRET.encrypt(RNG.uniform(-bound, bound, (TOKENS, features)), None, level, bound, np.empty(0))


INPUTS = {"x": encrypted(3), "y": encrypted(3), "one": encrypted(1), "low": encrypted(3, 2), "many": encrypted(5, 1)}


def chain(e: _core.CkksEvaluator, t: dict[str, Tensor]) -> list[Tensor]:
    z = e.multiply(t["x"], t["y"])
    return [e.sum_features(e.add(z, e.linear_combination([t["low"]], [[2.0]], []))), e.rescale(e.multiply(z, z))]


def crosswise(e: _core.CkksEvaluator, t: dict[str, Tensor]) -> list[Tensor]:
    a, b = e.select(t["x"], 0, 2), e.select(t["x"], 1, 3)
    c = e.select(a, 1, 2)  # a view of a view
    sums = [e.add(a, b), e.multiply(a, b), e.linear_combination([a, b], [[0.5], [0.25]], []), e.subtract(b, c)]
    return [e.sum_features(x) for x in sums] + [e.add(e.select(t["x"], 1, 3), b)]


CIRCUITS: dict[str, Circuit] = {
    "add": lambda e, t: [e.add(t["x"], t["y"]), e.add(t["one"], t["x"]), e.add(t["low"], t["x"])],
    "subtract": lambda e, t: [e.subtract(t["x"], t["one"]), e.subtract(t["x"], t["low"])],
    "negate": lambda e, t: [e.negate(t["x"])],
    "add_constant": lambda e, t: [e.add_constant(t["x"], np.array([0.25, 0.0, -0.5]))],
    "multiply_constant": lambda e, t: [e.multiply_constant(t["x"], np.array([0.25, 0.0, -0.5]))],
    "linear_combination": lambda e, t: [
        e.linear_combination([t["x"], t["one"], t["low"]], [[0.5], [1.0, -2.0, 0.0], [-0.25]], [0.1, 0.0, -3.0])
    ],
    "multiply_plain": lambda e, t: [
        e.multiply_plain(t["x"], VALUES, IMAGINARY),
        e.multiply_plain(t["low"], VALUES[:, :1], None),
    ],
    "multiply": lambda e, t: [e.multiply(t["x"], t["y"]), e.multiply(t["one"], t["x"]), e.multiply(t["low"], t["y"])],
    "dot": lambda e, t: [e.dot(t["x"], t["y"])],
    "sum_features": lambda e, t: [e.sum_features(t["many"])],
    "concatenate": lambda e, t: [e.concatenate([t["x"], t["low"], e.select(t["many"], 1, 4)])],
    "select": lambda e, t: [e.select(t["many"], 2, 4)],
    "linear": lambda e, t: [e.linear(t["x"], MATRIX, False), e.linear(e.select(t["many"], 1, 5), MATRIX, True)],
    "drop": lambda e, t: [e.drop(t["x"], 1), e.drop(t["x"], 3)],
    "rotate": lambda e, t: e.rotate(t["low"], [1, 0, 4]) + e.rotate(t["many"], [2]) + e.rotate(t["many"], []),
    "conjugate": lambda e, t: [e.conjugate(t["low"])],
    "assume": lambda e, t: [e.multiply(e.assume(t["x"], 0.5, np.inf), t["y"])],
    "chain": chain,
    "crosswise": crosswise,
    "sum_slots": lambda e, t: [e.sum_slots(e.select(t["many"], 3, 5))],
    "pack_slot_sums": lambda e, t: [e.pack_slot_sums(t["many"]), e.pack_slot_sums(e.select(t["many"], 4, 5))],
    "power": lambda e, t: [e.polynomial(t["x"], "power", np.array([0.5, -1.0, 0.25, 0.0, 2.0, 0.125]), -1.0, 1.0)],
    "chebyshev": lambda e, t: [
        e.polynomial(t["x"], "chebyshev", np.array([0.5, -1.0, 0.25, 0.3, 0.1, -0.2, 0.05]), -1.0, 1.2),
        e.polynomial(t["one"], "chebyshev", np.array([0.5, 0.0, 0.25]), -3.0, 3.0),  # a level for the wide domain
    ],
    "constant": lambda e, t: [e.polynomial(t["x"], "power", np.array([0.5]), -1.0, 1.0)],
}


def planned_inputs() -> dict[str, Tensor]:
    return {name: x.as_planned() for name, x in INPUTS.items()}


def assert_same_metadata(planned: Tensor, real: Tensor) -> None:
    assert (planned.planned, real.planned) == (True, False)
    for name in ("tokens", "features", "level", "bound", "nbytes", "error", "worst_error"):
        assert getattr(planned, name) == getattr(real, name), name
    np.testing.assert_array_equal(planned.scale, real.scale)
    np.testing.assert_array_equal(planned.noise, real.noise)


BATCHED = ("pack_slot_sums", "power", "chebyshev")


@pytest.mark.parametrize(
    ("name", "batch"), [(name, 1) for name in CIRCUITS] + [(name, batch) for name in BATCHED for batch in (2, 100)]
)
def test_replayed_steps_give_the_words_of_the_run(name, batch):
    results = CIRCUITS[name](_core.CkksEvaluator(PARAMETERS, KEYS), INPUTS)
    engine, inputs = _core.CkksEvaluator(PARAMETERS, KEYS, True, batch), planned_inputs()
    outs = CIRCUITS[name](engine, inputs)
    recorded = engine.take_steps()
    assert engine.take_steps() == []
    run = Replay(INPUTS, inputs).run(recorded)
    assert len(outs) == len(results)
    for planned, result in zip(outs, results, strict=True):
        assert_same_metadata(planned, result)
        np.testing.assert_array_equal(run.get(planned.ref).astype(np.uint64), result.words())


def test_work_does_not_depend_on_the_batch():
    for name in BATCHED:
        engines = [_core.CkksEvaluator(PARAMETERS, KEYS, True, batch) for batch in (1, 2, 100)]
        for engine in engines:
            CIRCUITS[name](engine, planned_inputs())
        assert engines[0].work() == engines[1].work() == engines[2].work()
        assert len(engines[0].take_steps()) > len(engines[2].take_steps())


def fields(x: Tensor) -> tuple[int, int, int, int]:
    return x.ref.storage, x.ref.first, x.ref.features, x.ref.level


def test_views_record_nothing_and_share_the_storage():
    engine, x = _core.CkksEvaluator(PARAMETERS, KEYS, True), INPUTS["many"].as_planned()
    storage = x.ref.storage
    assert fields(x) == (storage, 0, 5, 1)
    assert fields(engine.select(engine.select(x, 1, 5), 1, 3)) == (storage, 2, 2, 1)
    assert fields(engine.assume(x, 3.0, np.inf)) == fields(x)
    assert fields(engine.drop(x, 1)) == fields(x)
    assert engine.take_steps() == []


@pytest.mark.parametrize("planned", [False, True])
def test_errors_of_overlapping_views_meet_crosswise(planned):
    engine, inputs = _core.CkksEvaluator(PARAMETERS, KEYS), planned_inputs() if planned else INPUTS
    first = engine.select(inputs["x"], 0, 2)
    x, y = (engine.sum_features(engine.add(first, engine.select(inputs[name], 1, 3))) for name in ("x", "y"))
    assert x.noise[0] == pytest.approx(np.sqrt(2) * y.noise[0])  # (a + b) + (b + c), not four errors of their own


def test_storages_have_numbers_of_their_own():
    numbers = [INPUTS["x"].as_planned().ref.storage for _ in range(100)]  # each dies before the next is made
    assert numbers == sorted(set(numbers))
    assert INPUTS["x"].ref.storage != INPUTS["y"].ref.storage


def test_nothing_is_recorded_unasked():
    for engine in (_core.CkksEvaluator(PARAMETERS, KEYS), _core.CkksEvaluator(PARAMETERS, None)):
        for circuit in CIRCUITS.values():
            circuit(engine, planned_inputs())
        assert engine.take_steps() == []
    engine = _core.CkksEvaluator(PARAMETERS, KEYS, True)
    engine.add(INPUTS["x"], INPUTS["y"])  # computed, not recorded
    assert engine.take_steps() == []


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda e, x: e.multiply(x, x), "a product of ciphertexts needs the relinearisation key"),
        (lambda e, x: e.dot(x, x), "a product of ciphertexts needs the relinearisation key"),
        (lambda e, x: e.polynomial(x, "power", np.array([0.0, 0.0, 1.0]), -1.0, 1.0), "needs the relinearisation key"),
        (lambda e, x: e.rotate(x, [0, 3]), "a rotation by 3 needs its key"),
        (lambda e, x: e.conjugate(x), "conjugation needs its key"),
        (lambda e, x: e.sum_slots(x), "a rotation by 1 needs its key"),
        (lambda e, x: e.pack_slot_sums(x), "make evaluation keys with packing"),
    ],
)
@pytest.mark.parametrize("keys", [None, SECRET.evaluation_keys(False, [5**7 % (2 * N)], None)])
def test_missing_keys_are_named_as_by_the_run(operation, message, keys):
    with pytest.raises(CkksError, match=message) as run:
        operation(_core.CkksEvaluator(PARAMETERS, keys), INPUTS["x"])
    recording = _core.CkksEvaluator(PARAMETERS, keys, True)
    with pytest.raises(CkksError) as recorded:
        operation(recording, INPUTS["x"].as_planned())
    assert str(recorded.value) == str(run.value)
    assert not any(isinstance(step, steps.Product | steps.Galois) for step in recording.take_steps())


def test_clear_values_too_large_are_refused_as_by_the_run():
    texts = []
    for x in (INPUTS["x"], INPUTS["x"].as_planned()):
        with pytest.raises(CkksError, match=r"pass 2\^62") as error:
            _core.CkksEvaluator(PARAMETERS, KEYS, True).multiply_plain(x, 1e12 * VALUES, None)
        texts.append(str(error.value))
    assert texts[0] == texts[1]


def test_steps_of_threads_stand_behind_those_they_need():
    engine, inputs = _core.CkksEvaluator(PARAMETERS, KEYS, True), planned_inputs()
    names = ["pack_slot_sums", "crosswise", "chain", "rotate"]
    outs: dict[str, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda n=name: outs.update({n: CIRCUITS[n](engine, inputs)})) for name in names]
    before = _core.num_threads()
    _core.set_num_threads(4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run = Replay(INPUTS, inputs).run(engine.take_steps())
        for name in names:
            results = CIRCUITS[name](_core.CkksEvaluator(PARAMETERS, KEYS), INPUTS)
            for planned, result in zip(outs[name], results, strict=True):
                np.testing.assert_array_equal(run.get(planned.ref).astype(np.uint64), result.words())
    finally:
        _core.set_num_threads(before)


def test_arrays_of_steps_outlive_the_evaluator():
    engine = _core.CkksEvaluator(PARAMETERS, KEYS, True)
    engine.multiply_plain(INPUTS["x"].as_planned(), VALUES, None)
    (step,) = engine.take_steps()
    coefficients = step.coefficients
    before = coefficients.copy()
    del engine, step
    np.testing.assert_array_equal(coefficients, before)
    assert (coefficients.shape, coefficients.flags.writeable) == ((3, N), False)


def test_a_batch_of_no_features():
    with pytest.raises(InputError, match="a batch of 0 features"):
        _core.CkksEvaluator(PARAMETERS, KEYS, True, 0)


# Words in and out


def test_words_are_the_residues_where_they_lie():
    x = INPUTS["x"]
    words = x.words()
    assert (words.dtype, words.shape, words.flags.writeable) == (np.uint64, (3, 2, LIMBS, N), False)
    for limb in range(LIMBS):
        np.testing.assert_array_equal(words[:, :, limb], x.residues(limb))
    assert x.words().ctypes.data == words.ctypes.data
    with pytest.raises(ValueError, match="WRITEABLE"):
        words.setflags(write=True)
    part = _core.CkksEvaluator(PARAMETERS, None).select(x, 1, 3)
    np.testing.assert_array_equal(part.words(), words[1:])
    kept = encrypted(2).words()  # keeps what it shows alive
    assert kept.max() < max(PRIMES)


def test_words_go_through_a_planned_tensor_unchanged():
    x = INPUTS["x"]
    planned = x.as_planned()
    assert (planned.planned, planned.nbytes) == (True, x.nbytes)
    back = planned.with_words(x.words())
    assert_same_metadata(planned, back)
    np.testing.assert_array_equal(back.words(), x.words())
    assert len({x.ref.storage, planned.ref.storage, back.ref.storage}) == 3
    np.testing.assert_array_equal(SECRET.decrypt(back, False), SECRET.decrypt(x, False))
    # The seed stands for component 1 of the fresh tensor only.
    assert back.message_bytes > 1.5 * x.message_bytes
    other = planned.with_words(np.zeros_like(x.words()))
    for tensor in (back, other):
        again = Tensor.from_bytes(PARAMETERS, tensor.to_bytes(), planned)
        np.testing.assert_array_equal(again.words(), tensor.words())
    for words in (planned.words, planned.to_bytes, lambda: planned.residues(0)):
        with pytest.raises(CkksError, match="planned tensor holds no"):
            words()


def test_copies_keep_what_noise_is_shared():
    engine = _core.CkksEvaluator(PARAMETERS, KEYS)
    y = engine.linear(INPUTS["x"], MATRIX, False)  # all outputs have the inputs' errors
    sums = [engine.sum_features(t).noise for t in (y, y.as_planned(), y.as_planned().with_words(y.words()))]
    np.testing.assert_array_equal(sums[1], sums[0])
    np.testing.assert_array_equal(sums[2], sums[0])


def test_wrong_words():
    x = INPUTS["x"]
    planned, words = x.as_planned(), x.words().copy()
    for limb in (0, LIMBS - 1):
        bad = words.copy()
        bad[2, 1, limb, N - 1] = PRIMES[limb]
        with pytest.raises(InputError, match=f"not below its prime {PRIMES[limb]}"):
            planned.with_words(bad)
        bad[2, 1, limb, N - 1] = PRIMES[limb] - 1
        planned.with_words(bad)
    for array in (words[:2], words[:, :, :-1].copy(), words.reshape(3, 2, -1), words[..., :-1].copy()):
        with pytest.raises(InputError, match=r"for a tensor of shape \(3, 2, 4, 1024\)|C-contiguous"):
            planned.with_words(array)
    for array in (words.astype(np.int64), words.astype(np.float64), words.astype(">u8"), words[..., ::-1]):
        with pytest.raises(InputError, match="C-contiguous, aligned array of uint64"):
            planned.with_words(array)
    with pytest.raises(CkksError, match="only a planned tensor takes words"):
        x.with_words(words)


def test_planned_and_encrypted_tensors_do_not_mix():
    engine = _core.CkksEvaluator(PARAMETERS, KEYS, True)
    with pytest.raises(CkksError, match="a planned tensor cannot be combined with an encrypted one"):
        engine.add(INPUTS["x"], INPUTS["y"].as_planned())
    with pytest.raises(CkksError, match="cannot be concatenated"):
        engine.concatenate([INPUTS["x"], INPUTS["y"].as_planned()])
    with pytest.raises(CkksError, match="a planned tensor holds no ciphertext"):
        SECRET.decrypt(INPUTS["x"].as_planned(), False)
    assert engine.take_steps() == []


# Constants that another engine works with


def test_words_of_keys():
    for element in (None, 3, 2 * N - 1):
        words = KEYS.words(element)
        assert (words.dtype, words.flags.writeable) == (np.uint64, False)
        assert words.shape == (-(-LIMBS // PARAMETERS.digit_limbs), 2, len(PRIMES), N)
        assert (words < np.array(PRIMES, np.uint64)[:, None]).all()
    keys = SECRET.evaluation_keys(True, [3], None)
    before, words = keys.words(3).copy(), keys.words(3)
    del keys
    np.testing.assert_array_equal(words, before)
    bare = SECRET.evaluation_keys(False, [], None)
    for element, message in [
        (None, "needs the relinearisation key"),
        (PARAMETERS.galois_element(3), "a rotation by 3 needs its key"),
        (2 * N - 1, "conjugation needs its key"),
        (3, "the automorphism X -> X\\^3 needs its key"),
    ]:
        with pytest.raises(CkksError, match=message):
            bare.words(element)
    with pytest.raises(InputError, match="0 is no automorphism"):
        KEYS.words(0)


@pytest.mark.parametrize(
    ("conversion", "expected"),
    [
        (PARAMETERS.digit_conversion(0, 4), [0, 1]),
        (PARAMETERS.digit_conversion(1, 4), [2, 3]),
        (PARAMETERS.digit_conversion(1, 3), [2]),
        (PARAMETERS.special_conversion(3, False), SPECIALS),
        (PARAMETERS.special_conversion(3, True), [*SPECIALS, 2]),
        (PARAMETERS.last_conversion(2), [1]),
    ],
)
def test_conversions(conversion, expected):
    c, whole = conversion, prod(PRIMES[i] for i in expected)
    assert c.sources == expected
    assert c.inverse_cofactor.tolist() == [pow(whole // PRIMES[i], -1, PRIMES[i]) for i in expected]
    assert c.inverse_prime.tolist() == [1 / PRIMES[i] for i in expected]
    rows = [[whole // PRIMES[i] % q for i in expected] + [-whole % q] for q in PRIMES]
    assert c.weights.tolist() == rows
    assert c.inverse_product.tolist() == [pow(whole, -1, q) if whole % q else 0 for q in PRIMES]


@pytest.mark.parametrize(
    ("convert", "arguments", "message"),
    [
        (PARAMETERS.digit_conversion, (2, 4), "digit 2 of 2"),
        (PARAMETERS.digit_conversion, (0, 0), "0 limbs; choose 1 to 4"),
        (PARAMETERS.special_conversion, (5, False), "5 limbs; choose 1 to 4"),
        (PARAMETERS.last_conversion, (0,), "0 limbs"),
    ],
)
def test_no_such_conversion(convert, arguments, message):
    with pytest.raises(InputError, match=message):
        convert(*arguments)


def test_conversions_outlive_what_gave_them():
    conversion = ckks.Parameters.INSECURE(2)._core.last_conversion(2)
    assert conversion.sources == [1]


def test_special_products():
    assert PARAMETERS.special_count == len(SPECIALS) == len(PRIMES) - PARAMETERS.max_limbs
    assert PARAMETERS.special_products == [prod(PRIMES[i] for i in SPECIALS) % q for q in PRIMES[:LIMBS]]


@pytest.mark.parametrize("element", [1, 3, 5, N + 1, 2 * N - 1])
def test_galois_permutations(element):
    index = PARAMETERS.galois_permutation(element)
    assert index.dtype == np.uint32
    coefficients = np.array(RNG.integers(0, PRIMES[0], N), object)
    turned = np.zeros(N, object)
    for k, c in enumerate(coefficients):  # X^k becomes X^(k element), X^N = -1
        turned[k * element % N] += -c if k * element // N % 2 else c
    np.testing.assert_array_equal(forward(coefficients, 0)[index], forward(turned, 0))


@pytest.mark.parametrize("element", [0, 4, 2 * N, 2 * N + 1])
def test_no_automorphism(element):
    with pytest.raises(InputError, match=f"{element} is no automorphism"):
        PARAMETERS.galois_permutation(element)


@pytest.mark.parametrize(
    ("n", "q", "word_bytes"),
    [(16, 4293918721, 4), (2048, 4293918721, 4), (16, 97, 8), (1024, PRIMES[0], 8), (2048, 1125899903827969, 8)],
)
def test_tables_of_the_transform(n, q, word_bytes):
    roots, companions, inverses, inverse_companions, last = _core.ntt_tables(n, q, word_bytes)
    kind = {4: np.uint32, 8: np.uint64}[word_bytes]
    radix = 2 ** (8 * word_bytes)
    stored = 2**32 if word_bytes == 4 else 1  # 32-bit words are in Montgomery form
    plain = [int(w) * pow(stored, -1, q) % q for w in roots]
    psi = plain[n // 2]
    assert pow(psi, n, q) == q - 1
    assert plain == [pow(psi, brv(k, n), q) for k in range(n)]

    def companion(word: int) -> int:
        return word * pow(q, -1, radix) % radix if word_bytes == 4 else word * radix // q

    factors = [pow(psi, -brv(k, n), q) * stored % q for k in range(n)]
    tail = [pow(n, -1, q) * stored % q, pow(n, -1, q) * pow(psi, -(n // 2), q) * stored % q]
    assert inverses.tolist() == factors
    for words, beside in [(roots, companions), (inverses, inverse_companions), (last[::2], last[1::2])]:
        assert (words.dtype, beside.dtype) == (kind, kind)
        assert beside.tolist() == [companion(int(word)) for word in words]
    assert last[::2].tolist() == tail


def test_tables_give_the_transform():
    for limb in (0, len(PRIMES) - 1):
        words = RNG.integers(0, PRIMES[limb], N).astype(np.uint64)
        expected = forward(words.astype(object), limb)
        np.testing.assert_array_equal(inverse(expected, limb), words.astype(object))
        PARAMETERS.transform(limb, words)
        np.testing.assert_array_equal(words, expected.astype(np.uint64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1024, 97, 8), "q must be 1 modulo 2 N"),
        ((48, 97, 8), "N must be a power of two"),
        ((16, 2**32 + 97, 4), "below 2\\^32"),
        ((16, 33, 8), "q must be prime"),
        ((16, 97, 2), "words of 2 bytes; choose 4 or 8"),
    ],
)
def test_no_tables(arguments, message):
    with pytest.raises(InputError, match=message):
        _core.ntt_tables(*arguments)

"""The kernels of CKKS against integers of any size, on the host."""

import math

import numpy as np
import pytest

from cuda_host import NumpyDevice

N = 1024
PRIMES = [65537, (1 << 50) - 27, (1 << 40) - 87, (1 << 61) - 1]
"""The smallest and the largest that rows may have, one between, and the largest the arithmetic is written for."""
MODULI = np.array(
    [(q, (1 << 64) % q, (((1 << 64) % q) << 64) // q, (1 << 64) // q) for q in PRIMES],
    np.uint64,
)
LIMBS = len(PRIMES)


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def device(request):
    return NumpyDevice(backwards=request.param)


def rows(rng, *shape, primes=None):
    """Words (..., limbs, N) below the limb's prime; the first ones are 0, 1, q - 1 and so on."""
    primes = PRIMES if primes is None else primes
    out = np.empty((*shape, len(primes), N), np.uint64)
    for limb, q in enumerate(primes):
        out[..., limb, :] = rng.integers(0, q, (*shape, N), np.uint64)
        out[..., limb, :4] = [0, q - 1, 1, q - 1]
        out[..., limb, 8:24] = rng.choice(np.array([0, 1, q - 2, q - 1], np.uint64), (*shape, 16))
    return out


def scalars(rng, *shape):
    """Residues (limbs, ...), with q - 1 among them."""
    out = np.stack([rng.integers(0, q, shape, np.uint64) for q in PRIMES])
    out.reshape(LIMBS, -1)[:, 0] = [q - 1 for q in PRIMES]
    return out


def wide(array):
    return array.astype(object)


def modulo(array, primes=None):
    """Reduce (..., limbs, N) of integers."""
    q = np.array(PRIMES if primes is None else primes, object)[:, None]
    return (array % q).astype(np.uint64)


def pairs(factors, primes):
    return np.array([(w, (w << 64) // q) for w, q in zip(factors, primes, strict=True)], np.uint64)


@pytest.mark.parametrize("minus", [False, True])
@pytest.mark.parametrize(("x_features", "y_features"), [(3, 3), (1, 3), (3, 1), (1, 1)])
def test_add(device, minus, x_features, y_features):
    rng = np.random.default_rng(1)
    x, y = rows(rng, x_features, 2), rows(rng, y_features, 2)
    features = max(x_features, y_features)
    out = device.empty((features, 2, LIMBS, N), np.uint64)
    steps = [0 if count == 1 else 2 * LIMBS for count in (x_features, y_features)]
    grid = (features, LIMBS, 2)
    device.launch("residues_add", grid, 256, out, x, y, MODULI, N, features, LIMBS, *steps, int(minus))
    expected = modulo(np.broadcast_to(wide(x) - wide(y) if minus else wide(x) + wide(y), out.shape))
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("terms", [0, 1, 3, 4])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_combine(device, terms, constant, accumulate):
    rng = np.random.default_rng(2)
    features, kept = 2, LIMBS - 1
    # One feature for all, a limb more than wanted, and neither.
    operands = [rows(rng, 1, 2), rows(rng, 2, 2, primes=[*PRIMES, 97]), rows(rng, 2, 2), rows(rng, 2, 2)][:terms]
    weights, constants = scalars(rng, terms or 1, features)[:, :terms], scalars(rng, features)
    before, last = rows(rng, features, 2, primes=PRIMES[:kept]), rows(rng, features, 2, primes=PRIMES[kept:])
    out, divided = before.copy(), last.copy()
    given = operands + [MODULI] * (4 - terms)
    steps = [0 if len(x) == 1 else 2 * x.shape[2] for x in operands] + [0] * (4 - terms)
    limbs = [x.shape[2] for x in operands] + [0] * (4 - terms)
    device.launch(
        "residues_combine",
        (features * 2, LIMBS, 2),
        256,
        *(out, divided, *given, np.ascontiguousarray(weights) if terms else MODULI, constants, MODULI),
        *(N, features, kept, 2 * kept, 1, terms, *steps, *limbs, int(constant), int(accumulate)),
    )
    expected = wide(np.concatenate([before, last], 2)) * int(accumulate)
    for t, x in enumerate(operands):
        factors = wide(weights[:, t].T)[:, None, :, None]
        expected = expected + np.broadcast_to(wide(x[:, :, :LIMBS]), expected.shape) * factors
    if constant:
        expected[:, 0] += wide(constants.T)[:, :, None]
    assert np.array_equal(np.concatenate([out, divided], 2), modulo(expected))


def test_combine_between_other_rows(device):
    """What lies between the features of the output stays as it is."""
    rng = np.random.default_rng(3)
    x, weights = rows(rng, 2, 2), scalars(rng, 1, 2)
    out = rows(rng, 2, 3)
    before = out.copy()
    device.launch(
        "residues_combine",
        (4, LIMBS, 2),
        256,
        *(out, out, x, x, x, x, weights, MODULI, MODULI, N, 2, LIMBS, 3 * LIMBS, 0, 1),
        *([2 * LIMBS] * 4 + [LIMBS] * 4 + [0, 1]),
    )
    expected = wide(before[:, :2]) + wide(x) * wide(weights[:, 0].T)[:, None, :, None]
    assert np.array_equal(out[:, :2], modulo(expected))
    assert np.array_equal(out[:, 2], before[:, 2])


@pytest.mark.parametrize("features", [1, 7, 300])
def test_sum(device, features):
    rng = np.random.default_rng(4)
    x = rows(rng, features, 2)
    x[..., 1] = np.array(PRIMES, np.uint64) - np.uint64(1)  # the largest sum there is
    out = device.empty((1, 2, LIMBS, N), np.uint64)
    device.launch("residues_sum", (N // 256, LIMBS, 2), 256, out, x, MODULI, N, features, LIMBS)
    assert np.array_equal(out[0], modulo(wide(x).sum(0)))


@pytest.mark.parametrize("multiplied", [False, True])
@pytest.mark.parametrize(
    ("x_features", "y_features", "summed"),
    [(3, 3, False), (1, 3, False), (3, 1, False), (1, 1, False), (3, 3, True), (1, 1, True)],
)
def test_tensor(device, x_features, y_features, summed, multiplied):
    rng = np.random.default_rng(5)
    x, y = rows(rng, x_features, 2), rows(rng, y_features, 2, primes=[*PRIMES, 97])
    features, terms = (1, x_features) if summed else (max(x_features, y_features), 1)
    multipliers = scalars(rng, features)
    degree, scaled = (device.empty((features, count, LIMBS, N), np.uint64) for count in (3, 1))
    steps = [0 if len(z) == 1 else 2 * z.shape[2] for z in (x, y)]
    device.launch(
        "residues_tensor",
        (features * 2, LIMBS),
        256,
        *(degree, scaled, x, y, multipliers, MODULI, N, features, terms, LIMBS, *steps, LIMBS, LIMBS + 1),
        int(multiplied),
    )
    a, b = wide(x), wide(y[:, :, :LIMBS])
    products = [a[:, 0] * b[:, 0], a[:, 0] * b[:, 1] + a[:, 1] * b[:, 0], a[:, 1] * b[:, 1]]
    expected = np.stack(np.broadcast_arrays(*products), 1)
    if summed:
        expected = expected.sum(0, keepdims=True)
    if multiplied:
        expected = expected * wide(multipliers.T)[:, None, :, None]
    expected = modulo(expected)
    assert np.array_equal(degree, expected)
    assert np.array_equal(scaled[:, 0], expected[:, 2])


def conversion(y, sources, targets, weights):
    """Rows (sources, N) to rows (targets, N): `residues_convert` for one group, in integers and Python's doubles."""
    out = np.empty((len(targets), N), object)
    for i in range(N):
        words = [int(word) for word in y[:, i]]
        quotient = 0.0
        for word, q in zip(words, sources, strict=True):
            quotient += float(word) * (1.0 / q)
        words.append(math.floor(0.5 + quotient))
        for t, q in enumerate(targets):
            out[t, i] = sum(word * w for word, w in zip(words, weights[t], strict=True)) % q
    return out.astype(np.uint64)


def test_convert(device):
    """Two groups of unlike size, the second of a single source and as many targets as one block makes."""
    rng = np.random.default_rng(6)
    primes = [65537, (1 << 50) - 27, (1 << 40) - 87, (1 << 61) - 1, *[(1 << 50) - d for d in (35, 51, 71, 113, 117)]]
    moduli = np.array([(q, (1 << 64) % q, (((1 << 64) % q) << 64) // q, (1 << 64) // q) for q in primes], np.uint64)
    parts = [([1, 0, 2], [3, 1]), ([2], [0, 1, 3, 4, 5, 6, 7, 8])]  # indices of primes
    vectors, rows_in, width = 2, 4, 4
    source_rows = [0, 2, 1, 3]
    flat = [source for sources, _ in parts for source in sources]
    y = np.empty((vectors, rows_in, N), np.uint64)
    for row, source in zip(source_rows, flat, strict=True):
        y[:, row] = rows(rng, vectors, primes=[primes[source]])[:, 0]
    targets = [target for _, made in parts for target in made]
    weights = np.zeros((len(targets), width), np.uint64)
    groups, expected, first, row = [], [], 0, 0
    for sources, made in parts:
        count = len(sources)
        for i, target in enumerate(made):
            weights[row + i, : count + 1] = rng.integers(0, primes[target], count + 1, np.uint64)
            weights[row + i, 0] = primes[target] - 1
        groups.append((first, count, row, len(made)))
        mine, q_out = source_rows[first : first + count], [primes[target] for target in made]
        factors = wide(weights[row : row + len(made), : count + 1])
        q_in = [primes[source] for source in sources]
        expected.append(np.stack([conversion(y[v][mine], q_in, q_out, factors) for v in range(vectors)]))
        first, row = first + count, row + len(made)
    out = device.empty((vectors, row, N), np.uint64)
    device.launch(
        "residues_convert",
        (vectors * N // 256, len(groups)),
        256,
        *(out, y, np.array(groups, np.uint32), np.array(source_rows, np.uint32)),
        *(np.array([1.0 / primes[source] for source in flat]), np.array(targets, np.uint32), weights, moduli),
        *(N, vectors, rows_in, row, width),
        shared=8 * 8 * (width + 1),
    )
    assert np.array_equal(out, np.concatenate(expected, 1))


@pytest.mark.parametrize("components", [2, 3])
@pytest.mark.parametrize(("limbs", "digit_limbs", "kept"), [(3, 2, 3), (3, 1, 2), (2, 2, 1), (1, 2, 1)])
def test_switch(device, components, limbs, digit_limbs, kept):
    rng = np.random.default_rng(7)
    max_limbs, specials, features = 3, 1, 2
    digits, max_digits, all_rows = -(-limbs // digit_limbs), -(-max_limbs // digit_limbs), limbs + specials
    targets = [*range(limbs), *range(max_limbs, max_limbs + specials)]
    x = rows(rng, features, components, primes=PRIMES[:limbs])
    key = rows(rng, max_digits, 2)
    raised = [q - 1 if i == 0 else q // 3 for i, q in enumerate(PRIMES[:limbs])]
    own = [[t < limbs and t // digit_limbs == d for t in range(all_rows)] for d in range(digits)]
    others = [(d, t) for d in range(digits) for t in range(all_rows) if not own[d][t]]
    extended = np.concatenate([rows(rng, features, primes=[PRIMES[targets[t]]]) for _, t in others], 1)
    expected = np.zeros((features, 2, all_rows, N), object)
    for d in range(digits):
        for t, prime in enumerate(targets):
            words = x[:, -1, t] if own[d][t] else extended[:, others.index((d, t))]
            for c in range(2):
                expected[:, c, t] += wide(words) * wide(key[d, c, prime])
    for c in range(components - 1):
        expected[:, c, :limbs] += wide(x[:, c]) * np.array(raised, object)[:, None]
    out = device.empty((features, 2, kept, N), np.uint64)
    divided = device.empty((features, 2, all_rows - kept, N), np.uint64)
    device.launch(
        "residues_switch",
        (features * 2, all_rows),
        256,
        *(out, divided, x, extended, key, np.array(raised, np.uint64), MODULI, N, features, components, limbs),
        *(specials, max_limbs, digits, digit_limbs, kept),
    )
    assert np.array_equal(np.concatenate([out, divided], 2), modulo(expected, [PRIMES[t] for t in targets]))


@pytest.mark.parametrize("permuted", [False, True])
def test_divide(device, permuted):
    rng = np.random.default_rng(8)
    features = 2
    kept, rest = rows(rng, features, 2), rows(rng, features, 2)
    rest[0, 0, :, :4] = kept[0, 0, :, 3::-1]  # 0 - (q - 1) and so on
    factors = [q - 1 if i == 0 else q // 5 for i, q in enumerate(PRIMES)]
    expected = modulo((wide(kept) - wide(rest)) * np.array(factors, object)[:, None])
    grid, tables = (features, LIMBS, 2), pairs(factors, PRIMES)
    if permuted:
        index = rng.permutation(N).astype(np.uint32)
        out = device.empty(kept.shape, np.uint64)
        arguments = (out, kept, rest, tables, index, MODULI, N, features, LIMBS)
        device.launch("residues_divide_permuted", grid, 256, *arguments)
        expected = expected[..., index]
    else:
        out = kept  # in place
        device.launch("residues_divide", grid, 256, out, kept, rest, tables, MODULI, N, features, LIMBS)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(("kept", "shared"), [(LIMBS, True), (LIMBS - 1, False)])
def test_multiply(device, kept, shared):
    rng = np.random.default_rng(9)
    features = 2
    x, plain = rows(rng, features, 2), rows(rng, 1 if shared else features)
    out = device.empty((features, 2, kept, N), np.uint64)
    divided = device.empty((features, 2, LIMBS - kept, N), np.uint64) if kept < LIMBS else out
    device.launch(
        "residues_multiply",
        (features, LIMBS, 2),
        256,
        *(out, divided, x, plain, MODULI, N, features, LIMBS, kept, 0 if shared else LIMBS),
    )
    found = out if kept == LIMBS else np.concatenate([out, divided], 2)
    assert np.array_equal(found, modulo(wide(x) * wide(plain)[:, None]))


def test_reduce(device):
    rng = np.random.default_rng(10)
    x = rng.integers(-(1 << 63), (1 << 63) - 1, (2, N), np.int64, endpoint=True)
    ends = [0, -1, 1, (1 << 63) - 1, -(1 << 63)]
    near = [sign * q + d for q in PRIMES for sign in (-1, 1) for d in (-1, 0, 1)]
    x[0, : len(ends + near)] = ends + near
    out = device.empty((2, LIMBS, N), np.uint64)
    device.launch("residues_reduce", (2, LIMBS), 256, out, x, MODULI, N, 2, LIMBS)
    assert np.array_equal(out, modulo(np.repeat(wide(x)[:, None], LIMBS, 1)))

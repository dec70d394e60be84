"""Transforms on a device against Python's integers, products of polynomials and the native library."""

from functools import cache

import numpy as np
import pytest

from cuda_host import NumpyDevice
from privtuner import _core
from privtuner.cuda.ntt import Transforms
from privtuner.errors import EngineError, InputError

SIZES = [1 << log for log in range(10, 17)]
DTYPES = {4: np.uint32, 8: np.uint64}
STEP = 1 << 17  # every prime is 1 modulo it, for all sizes


def is_prime(n):
    """Miller-Rabin with bases that settle every 64-bit number."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        x = pow(base, odd, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True


@cache
def primes_below(bound, count):
    found, q = [], (bound - 2) // STEP * STEP + 1
    while len(found) < count:
        if is_prime(q):
            found.append(q)
        q -= STEP
    return tuple(found)


def primes_of(word_bytes):
    """The largest there are, so that the lazy ranges are used to their ends, and small ones."""
    if word_bytes == 4:
        return (*primes_below(1 << 32, 2), *primes_below(1 << 28, 1))
    return (*primes_below(1 << 61, 2), *primes_below(1 << 50, 1), *primes_below(1 << 31, 1))


@cache
def powers(n, q):
    """psi^brv(k), psi the root that the smallest base gives."""
    psi = next(r for base in range(2, 200) if pow(r := pow(base, (q - 1) // (2 * n), q), n, q) == q - 1)
    natural, power = [], 1
    for _ in range(n):
        natural.append(power)
        power = power * psi % q
    bits = n.bit_length() - 1
    return np.array([natural[int(f"{k:0{bits}b}"[::-1], 2)] for k in range(n)], object)


def forward(row, q):
    """The loops of the native library on Python's integers."""
    n, roots = len(row), powers(len(row), q)
    a = np.array([int(word) for word in row], object)
    blocks = 1
    while blocks < n:
        a = a.reshape(blocks, 2, -1)
        u, v = a[:, 0], a[:, 1] * roots[blocks : 2 * blocks, None] % q
        a = np.stack([(u + v) % q, (u - v) % q], axis=1)
        blocks *= 2
    return a.reshape(n)


def random_rows(rng, moduli, n, word_bytes):
    return np.stack([rng.integers(0, q, n, DTYPES[word_bytes]) for q in moduli])


def device_of(backwards):
    return NumpyDevice(backwards=backwards)


@pytest.mark.parametrize("word_bytes", [4, 8])
@pytest.mark.parametrize("n", SIZES)
def test_forward_and_inverse(n, word_bytes):
    """Every size; rows of several primes, in an order that repeats and skips; both ways to run the threads."""
    primes = primes_of(word_bytes)
    order = [2, 0] if n <= 1 << 13 else [0]
    moduli = [primes[index] for index in order] * (2 if n <= 1 << 12 else 1)
    rows = random_rows(np.random.default_rng(n), moduli, n, word_bytes)
    rows[0] = moduli[0] - 1
    rows[-1, :3] = 0, 1, moduli[-1] - 1
    expected = np.stack([forward(row, q) for row, q in zip(rows, moduli, strict=True)]).astype(DTYPES[word_bytes])
    for backwards in (False, True):
        device = device_of(backwards)
        transforms = Transforms(device, n, primes, word_bytes)
        words, on_device = device.upload(rows), device.upload(np.array(order, np.uint32))
        transforms.forward(words, on_device)
        assert np.array_equal(words, expected)
        transforms.inverse(words, on_device)
        assert np.array_equal(words, rows)
        passes = 1 if n <= 1 << 12 else 2
        assert len(device.launched) == 2 * passes


@pytest.mark.parametrize("word_bytes", [4, 8])
@pytest.mark.parametrize("n", [1 << 10, 1 << 11, 1 << 13])
def test_extreme_words(n, word_bytes):
    """All q - 1 is the largest that enters a lazy range; one and X have transforms that are known."""
    device = device_of(False)
    primes = primes_of(word_bytes)
    transforms = Transforms(device, n, primes, word_bytes)
    for index, q in enumerate(primes):
        order = device.upload(np.array([index], np.uint32))
        rows = np.zeros((4, n), DTYPES[word_bytes])
        rows[0], rows[2, 0], rows[3, 1] = q - 1, 1, 1
        words = device.upload(rows)
        transforms.forward(words, order)
        assert np.array_equal(words[0], forward(rows[0], q).astype(words.dtype))
        assert not words[1].any()
        assert (words[2] == 1).all()
        # X itself, at the odd powers of psi: word 2k is root number n / 2 + k, word 2k + 1 its negative.
        roots = powers(n, q)[n // 2 :]
        assert np.array_equal(words[3].reshape(-1, 2), np.stack([roots, q - roots], axis=1).astype(words.dtype))
        top = np.full((1, n), q - 1, DTYPES[word_bytes])
        inverted = device.upload(top)
        transforms.inverse(inverted, order)
        assert inverted[0, 0] == q - 1
        assert not inverted[0, 1:].any()
        assert words.max() < q


def negacyclic(a, b, q):
    """a b modulo X^n + 1, both given as {exponent: coefficient}."""
    return lambda n: _reduced(((i + j, x * y) for i, x in a.items() for j, y in b.items()), n, q)


def _reduced(terms, n, q):
    out = [0] * n
    for exponent, value in terms:
        sign = -1 if exponent >= n else 1
        out[exponent % n] = (out[exponent % n] + sign * value) % q
    return out


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("word_bytes", [4, 8])
def test_products_of_polynomials(word_bytes, backwards):
    """Sparse polynomials, term by term: 3 products of each of 2 primes by one prepared row a prime."""
    n, rng = 1 << 10, np.random.default_rng(7)
    device = device_of(backwards)
    primes = primes_of(word_bytes)[:2]
    transforms = Transforms(device, n, primes, word_bytes)
    order = device.upload(np.array([1, 0], np.uint32))

    def sparse(q):
        exponents = [0, n - 1, *rng.integers(0, n, 30)]
        return {int(e): int(rng.integers(0, q, dtype=np.uint64)) for e in exponents} | {n // 2: q - 1}

    moduli = [primes[1], primes[0]]
    left = [sparse(q) for q in moduli * 3]
    right = [sparse(q) for q in moduli]

    def dense(polynomials):
        rows = np.zeros((len(polynomials), n), DTYPES[word_bytes])
        for row, polynomial in zip(rows, polynomials, strict=True):
            for exponent, value in polynomial.items():
                row[exponent] = value
        return device.upload(rows)

    a, b = dense(left), dense(right)
    transforms.forward(a, order)
    transforms.forward(b, order)
    out = device.empty(a.shape, a.dtype)
    transforms.multiply(a, *transforms.prepare(b, order), order, out)
    transforms.inverse(out, order)
    for r, (row, polynomial) in enumerate(zip(out, left, strict=True)):
        expected = negacyclic(polynomial, right[r % 2], moduli[r % 2])(n)
        assert row.tolist() == expected


@pytest.mark.parametrize("word_bytes", [4, 8])
def test_prepare_and_multiply(word_bytes):
    """Factors and words at the ends of their ranges; one prepared row for all, one for each; out may be the words."""
    n, rng = 1 << 11, np.random.default_rng(8)
    primes, dtype = primes_of(word_bytes), DTYPES[word_bytes]
    radix = 1 << 8 * word_bytes
    for backwards in (False, True):
        device = device_of(backwards)
        transforms = Transforms(device, n, primes, word_bytes)
        for index, q in enumerate(primes):
            order = device.upload(np.array([index], np.uint32))
            factors = random_rows(rng, [q] * 3, n, word_bytes)
            factors[:, :4] = 0, 1, q - 1, q // 2
            values, companions = transforms.prepare(device.upload(factors), order)
            plain = factors.astype(object)
            if word_bytes == 4:
                assert np.array_equal(values, (plain * radix % q).astype(dtype))
                assert np.array_equal(companions, (plain * radix % q * pow(q, -1, radix) % radix).astype(dtype))
            else:
                assert np.array_equal(values, factors)
                assert np.array_equal(companions, ((plain * radix) // q).astype(dtype))
            words = rng.integers(0, radix, (3, n), dtype)  # any words
            words[:, :8] = [0, 1, q - 1, radix - 1, radix - 1, radix - 1, q - 1, q]
            words[1:, :8] = np.roll(words[1:, :8], 3, axis=1)
            out = device.empty((3, n), dtype)
            transforms.multiply(words, values, companions, order, out)
            assert np.array_equal(out, (words.astype(object) * plain % q).astype(dtype))
            expected = (words.astype(object) * plain[1] % q).astype(dtype)
            in_place = device.upload(words)
            transforms.multiply(in_place, values[1], companions[1], order, in_place)
            assert np.array_equal(in_place, expected)


@pytest.mark.parametrize("word_bytes", [4, 8])
@pytest.mark.parametrize("n", [1 << 10, 1 << 13])
def test_inverse_times_factors(n, word_bytes):
    """A factor for each entry of the order, the same prime twice among them."""
    primes, order = primes_of(word_bytes), [1, 0, 1]
    moduli = [primes[index] for index in order] * 2
    rows = random_rows(np.random.default_rng(9), moduli, n, word_bytes)
    factors = [3, primes[0] - 1, 12345678901234567890123]
    for backwards in (False, True):
        device = device_of(backwards)
        transforms = Transforms(device, n, primes, word_bytes)
        on_device = device.upload(np.array(order, np.uint32))
        plain, scaled = device.upload(rows), device.upload(rows)
        transforms.inverse(plain, on_device)
        transforms.inverse(scaled, on_device, transforms.scales(order, factors))
        for r, q in enumerate(moduli):
            expected = plain[r].astype(object) * factors[r % 3] % q
            assert np.array_equal(scaled[r], expected.astype(scaled.dtype))


@pytest.mark.parametrize("log_n", [11, 14])
def test_native_library(log_n):
    """The transform of CKKS, whichever path this processor takes: dense words of every prime of a chain."""
    parameters = _core.CkksParameters(3, 40, 50, log_n, True)
    n, primes = parameters.ring_dimension, [int(q) for q in parameters.primes]
    rows = random_rows(np.random.default_rng(10), primes, n, 8)
    device = device_of(False)
    words = device.upload(rows)
    Transforms(device, n, primes, 8).forward(words, device.upload(np.arange(len(primes), dtype=np.uint32)))
    for limb, row in enumerate(rows):
        parameters.transform(limb, row)
        assert np.array_equal(words[limb], row)


def test_shapes():
    """Leading axes count as rows; no rows is no work; neighbours of the rows are left alone."""
    n, primes = 1 << 10, primes_of(4)
    device = device_of(True)
    transforms = Transforms(device, n, primes, 4)
    order = device.upload(np.array([0, 2], np.uint32))
    rows = random_rows(np.random.default_rng(11), [primes[0], primes[2]] * 3, n, 4)
    flat, nested = device.upload(rows), device.upload(rows.reshape(3, 1, 2, n))
    transforms.forward(flat, order)
    transforms.forward(nested, order)
    assert np.array_equal(nested.reshape(6, n), flat)
    framed = device.upload(np.concatenate([rows, rows]))
    transforms.forward(framed[2:4], order)
    assert np.array_equal(framed[:2], rows[:2])
    assert np.array_equal(framed[2:4], flat[2:4])
    assert np.array_equal(framed[4:6], rows[4:6])
    empty = device.empty((0, n), np.uint32)
    launched = len(device.launched)
    transforms.forward(empty, order)
    transforms.inverse(empty, order)
    transforms.multiply(empty, *transforms.prepare(empty, order), order, empty)
    assert len(device.launched) == launched


def test_refused():
    device, n, q = device_of(False), 1 << 10, primes_of(4)[0]
    for arguments, words in [
        ((1 << 9, [q], 4), "n is 512"),
        ((1 << 17, [q], 4), "n is 131072"),
        ((1000, [q], 4), "n is 1000"),
        ((0, [q], 4), "n is 0"),
        ((n, [], 4), "no primes"),
        ((n, [q], 2), "words of 2 bytes"),
        ((n, [q + 2], 4), "q must be 1 modulo 2 N"),
        ((n, [primes_of(8)[0]], 4), "below 2\\^32"),
        ((n, [1 << 70], 8), "prime 1180591620717411303424"),
    ]:
        with pytest.raises(InputError, match=words):
            Transforms(device, *arguments)
    with pytest.raises(EngineError, match="tables"):
        Transforms(NumpyDevice(memory_bytes=1000), n, [q], 4)

    transforms = Transforms(device, n, [q], 4)
    order = device.upload(np.zeros(2, np.uint32))
    words = device.upload(np.zeros((2, n), np.uint32))
    for method in (transforms.forward, transforms.inverse, transforms.prepare):
        for bad, message in [
            (np.zeros((2, n), np.uint64), "uint64"),
            (np.zeros((2, n + 1), np.uint32), "rows of 1024"),
            (np.uint32(0), "rows of 1024"),
            (np.zeros((2, 2 * n), np.uint32)[:, ::2], "contiguous"),
            (np.zeros((3, n), np.uint32), "3 rows for an order of 2"),
        ]:
            with pytest.raises(InputError, match=message):
                method(bad, order)
        for bad in (np.zeros(2, np.int64), np.zeros((1, 2), np.uint32), np.zeros(0, np.uint32)):
            with pytest.raises(InputError, match="order"):
                method(words, bad)
    values, companions = transforms.prepare(words, order)
    with pytest.raises(InputError, match="companions as many"):
        transforms.multiply(words, values, companions[:1], order, words)
    with pytest.raises(InputError, match="out as many"):
        transforms.multiply(words, values, companions, order, words[:1])
    with pytest.raises(InputError, match="must divide"):
        transforms.multiply(words[:1], values, companions, order[:1], words[:1])
    with pytest.raises(InputError, match="uint64"):
        transforms.multiply(words, values.astype(np.uint64), companions, order, words)
    with pytest.raises(InputError, match="factors for an order"):
        transforms.scales([0], [1, 2])
    for index in (1, -1):
        with pytest.raises(InputError, match="there are 1 primes"):
            transforms.scales([index], [1])
    with pytest.raises(InputError, match="scales"):
        transforms.inverse(words, order, transforms.scales([0], [1]))

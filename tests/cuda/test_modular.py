"""The kernels' arithmetic modulo a prime, compiled for the host, against Python's integers."""

import ctypes
import os
import random
import shutil
import subprocess

import pytest

from privtuner.cuda import sources

# Every function on plain words; the unit only lends its headers.
_CALLS = r"""
#define CALL extern "C" __attribute__((visibility("default")))
CALL pt::u64 high64(pt::u64 a, pt::u64 b) { return pt::mul_high(a, b); }
CALL unsigned high32(unsigned a, unsigned b) { return pt::mul_high(a, b); }
CALL unsigned add32(unsigned q, unsigned a, unsigned b) { return pt::Mod32{q}.add(a, b); }
CALL unsigned sub32(unsigned q, unsigned a, unsigned b) { return pt::Mod32{q}.sub(a, b); }
CALL unsigned neg32(unsigned q, unsigned a) { return pt::Mod32{q}.neg(a); }
CALL unsigned mul32(unsigned q, unsigned a, unsigned w, unsigned c) { return pt::Mod32{q}.mul(a, w, c); }
CALL pt::u64 subtract_once(pt::u64 x, pt::u64 bound) { return pt::Mod64::subtract_once(x, bound); }
CALL pt::u64 mul_lazy(pt::u64 q, pt::u64 a, pt::u64 w, pt::u64 c) { return pt::Mod64{q}.mul_lazy(a, w, c); }
CALL pt::u64 mul64(pt::u64 q, pt::u64 a, pt::u64 w, pt::u64 c) { return pt::Mod64{q}.mul(a, w, c); }
CALL pt::u64 modulus(const pt::u64* m, int what, pt::u64 a, pt::u64 b) {
  const pt::Modulus modulus = pt::load_modulus(m, 1);
  switch (what) {
    case 0: return modulus.add(a, b);
    case 1: return modulus.sub(a, b);
    case 2: return modulus.neg(a);
    case 3: return modulus.mul(a, b);
    case 4: return modulus.reduce(a);
    case 5: return modulus.reduce_signed(static_cast<pt::i64>(a));
    case 6: return modulus.reduce_wide(pt::Wide{a, b});
    default: return modulus.mul_shoup(a, modulus.two64, modulus.two64_shoup);
  }
}
CALL pt::u64 sum(const pt::u64* m, const pt::u64* a, const pt::u64* b, unsigned n, pt::u64* low, pt::u64* high) {
  pt::Wide total{*low, *high};
  for (unsigned i = 0; i < n; ++i) total = pt::add_product(total, a[i], b[i]);
  *low = total.low;
  *high = total.high;
  return pt::load_modulus(m, 0).reduce_wide(total);
}
"""
U32, U64 = ctypes.c_uint32, ctypes.c_uint64
MAX32, MAX64 = (1 << 32) - 1, (1 << 64) - 1
PRIMES_32 = (3, 12289, 2147352577, 4293918721)
PRIMES_64 = (3, 12289, 4293918721, (1 << 50) - 27, (1 << 59) - 55, (1 << 61) - 1)  # odd primes, the largest there is


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
    folder = tmp_path_factory.mktemp("modular")
    (folder / "modular.cpp").write_text(sources.source("ntt") + _CALLS)
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    command = [compiler, *flags, "-Wno-unknown-pragmas", folder / "modular.cpp", "-o", folder / "modular.so"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "modular.so"))
    for name in ("high32", "add32", "sub32", "neg32", "mul32"):
        function = getattr(library, name)
        function.restype, function.argtypes = U32, [U32] * {"high32": 2, "neg32": 2, "mul32": 4}.get(name, 3)
    for name in ("high64", "subtract_once", "mul_lazy", "mul64"):
        function = getattr(library, name)
        function.restype, function.argtypes = U64, [U64] * (2 if name in ("high64", "subtract_once") else 4)
    library.modulus.restype, library.modulus.argtypes = U64, [ctypes.c_void_p, ctypes.c_int, U64, U64]
    library.sum.restype = U64
    library.sum.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_uint, *[ctypes.POINTER(U64)] * 2]
    return library


def words(rng, bound, count=12):
    """The ends of [0, bound), its middle, and others."""
    ends = {0, 1, 2, bound // 2, bound // 2 + 1, bound - 2, bound - 1}
    return sorted(x for x in ends if 0 <= x < bound) + [rng.randrange(bound) for _ in range(count)]


def constants(q):
    two64 = (1 << 64) % q
    return q, two64, (two64 << 64) // q, (1 << 64) // q


def table(*moduli):
    rows = [word for q in moduli for word in constants(q)]
    return (U64 * len(rows))(*rows)


def test_high_half(calls):
    rng = random.Random(1)
    for a in words(rng, 1 << 64):
        for b in words(rng, 1 << 64):
            assert calls.high64(a, b) == a * b >> 64
            assert calls.high32(a & MAX32, b & MAX32) == (a & MAX32) * (b & MAX32) >> 32


@pytest.mark.parametrize("q", PRIMES_32)
def test_32_bits(calls, q):
    rng = random.Random(q)
    inverse = pow(q, -1, 1 << 32)
    for a in words(rng, q):
        assert calls.neg32(q, a) == -a % q
        for b in words(rng, q):
            assert calls.add32(q, a, b) == (a + b) % q
            assert calls.sub32(q, a, b) == (a - b) % q
            form = (b << 32) % q
            for x in (a, a ^ MAX32, MAX32, rng.randrange(1 << 32)):
                assert calls.mul32(q, x, form, form * inverse & MAX32) == x * b % q
        assert calls.sub32(q, a, q) == a  # q stands for zero


@pytest.mark.parametrize("q", PRIMES_64)
def test_64_bits(calls, q):
    rng = random.Random(q)
    for bound in (q, 2 * q, 4 * q):
        for x in words(rng, 2 * bound, 40):
            assert calls.subtract_once(x, bound) == x % bound
    for w in words(rng, q):
        companion = (w << 64) // q
        for x in (*words(rng, min(8 * q, 1 << 64)), MAX64):
            lazy = calls.mul_lazy(q, x, w, companion)
            assert lazy < 2 * q
            assert lazy % q == x * w % q
            assert calls.mul64(q, x, w, companion) == x * w % q


@pytest.mark.parametrize("q", PRIMES_64)
def test_modulus(calls, q):
    rng = random.Random(q)
    moduli = table(5, q)  # the second of the table
    for a in words(rng, q):
        assert calls.modulus(moduli, 2, a, 0) == -a % q
        for b in words(rng, q):
            assert calls.modulus(moduli, 0, a, b) == (a + b) % q
            assert calls.modulus(moduli, 1, a, b) == (a - b) % q
            assert calls.modulus(moduli, 3, a, b) == a * b % q
    multiples = [k * q + d for k in (1, (1 << 64) // q) for d in (-1, 0, 1)]
    for x in [*words(rng, 1 << 64, 40), 1 << 63, (1 << 63) - 1, (1 << 63) + 1, *(m for m in multiples if m <= MAX64)]:
        assert calls.modulus(moduli, 4, x, 0) == x % q
        signed = x - (1 << 64) if x >> 63 else x
        assert calls.modulus(moduli, 5, x, 0) == signed % q
        assert calls.modulus(moduli, 7, x, 0) == (x << 64) % q
        for high in words(rng, 1 << 64, 2):
            assert calls.modulus(moduli, 6, x, high) == (high << 64 | x) % q


@pytest.mark.parametrize("q", PRIMES_64)
def test_sums_of_products(calls, q):
    """2,048 products at their largest, with carries into the high word, reduced once."""
    rng = random.Random(q)
    largest = [(1 << 52) - 1] * 2048, [(1 << 50) - 1] * 2048
    carries = [MAX64] * 3 + [1], [MAX64] * 3 + [MAX64]  # beyond 2^128: the sum is modulo that
    mixed = [rng.randrange(1 << 52) for _ in range(2048)], [rng.randrange(1 << 50) for _ in range(2048)]
    for start in (0, MAX64, 1 << 64, rng.randrange(1 << 100)):
        for a, b in (largest, carries, mixed, ([], [])):
            total = (start + sum(x * y for x, y in zip(a, b, strict=True))) % (1 << 128)
            low, high = U64(start & MAX64), U64(start >> 64)
            first, second = (U64 * len(a))(*a), (U64 * len(b))(*b)
            reduced = calls.sum(table(q), first, second, len(a), ctypes.byref(low), ctypes.byref(high))
            assert (high.value << 64 | low.value) == total
            assert reduced == total % q

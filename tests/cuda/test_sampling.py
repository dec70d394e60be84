"""The device draws what the core draws: known answers, the core's tensors, the definition word by word."""

import numpy as np
import pytest

from cuda_host import NumpyDevice
from privtuner import ckks
from privtuner.cuda import sampling
from privtuner.cuda.sampling import ERROR, MASK, MAX_SAMPLES, SECRET
from privtuner.errors import EngineError, InputError

COUNTING = bytes(range(32))
SEED = bytes((37 * i + 11) % 256 for i in range(32))
Q32 = 4293918721
Q50 = 1125899903827969
# Moduli that refuse nearly half of all words (2^k + 1 and the like), none, or few.
MODULI = {
    4: (Q32, 2**31 + 11, 2**31, 2**32 - 1, 2**16 + 1, 97, 2, 3),
    8: (Q50, 2**63 + 29, 2**64 - 1, 2**40 + 1, 2**61 - 1, 2**32, 2**16 + 1, 2, 3),
}
COUNTS = (1, 15, 16, 17, 48, 49, 2048, 2049, 4103)


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def device(request):
    return NumpyDevice(backwards=request.param)


# The definition again, word by word from an endless keystream: ChaCha20 by NumPy, many blocks at once.


def quarter_round(x, a, b, c, d):
    for target, other, mixed, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x[target] += x[other]
        x[mixed] ^= x[target]
        x[mixed] = x[mixed] << np.uint32(bits) | x[mixed] >> np.uint32(32 - bits)


def keystream(seed, nonce, blocks):
    """Bytes of the first blocks (RFC 8439, section 2.4, from counter 0); nonce: three words."""
    first = [*np.frombuffer(b"expand 32-byte k" + seed, "<u4"), 0, *nonce]
    state = np.array([np.full(blocks, word, np.uint32) for word in first])
    state[12] = np.arange(blocks)
    x = state.copy()
    for _ in range(10):
        for i in range(4):
            quarter_round(x, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter_round(x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return (x + state).T.astype("<u4").tobytes()


def naive_uniform(seed, stream, q, n, word_bytes):
    block = 64 // word_bytes
    behind = -(-n // block) * block
    words = np.frombuffer(keystream(seed, stream, 4 * (behind // block) + 64), f"<u{word_bytes}")
    masked = [int(word) & ((1 << q.bit_length()) - 1) for word in words]
    replacements = (word for word in masked[behind:] if word < q)
    return [word if word < q else next(replacements) for word in masked[:n]]


def naive_ternary(seed, stream, n):
    behind = -(-n // 64) * 64
    words = keystream(seed, stream, behind // 64 + 64)
    replacements = (byte for byte in words[behind:] if byte != 255)
    return [(byte if byte != 255 else next(replacements)) % 3 - 1 for byte in words[:n]]


def naive_binomial(seed, stream, n):
    groups = -(-n // 48)
    words = np.frombuffer(keystream(seed, stream, 4 * groups), "<u4").reshape(groups, 4, 16)
    out = []
    for group in words.tolist():
        for k in range(3):
            for lane in range(16):
                tenth = group[3][lane] >> 10 * k & 1023
                out.append(group[k][lane].bit_count() + tenth.bit_count() - 21)
    return out[:n]


def digest(values, size):
    """FNV-1a over the values' bytes, low byte first."""
    result = 0xCBF29CE484222325
    for byte in np.array(values).astype(f"<i{size}" if size == 1 else f"<u{size}").tobytes():
        result = (result ^ byte) * 0x100000001B3 % 2**64
    return result


def drawn(device, seed, stream, q, n, word_bytes):
    domain, index, sub_index = stream
    out = sampling.uniform(device, seed, domain, index, 1, n, q, word_bytes, sub_indices=[sub_index])
    return out[0, 0].tolist()


# Known answers


def test_the_definition_written_here_is_the_one_that_is_frozen():
    # The core's own tests hold the same four numbers.
    assert digest(naive_uniform(COUNTING, (0, 0, 0), Q32, 2048, 4), 4) == 0xFE738639C31CB2B2
    assert digest(naive_uniform(COUNTING, (0, 0, 0), Q50, 2048, 8), 8) == 0x783316867E1E0D1D
    assert digest(naive_ternary(COUNTING, (1, 1, 2), 2048), 1) == 0xB9F9744CD97D7B0E
    assert digest(naive_binomial(COUNTING, (2, 3, 4), 2048), 1) == 0x440C5E71A3197242


def test_frozen_answers(device):
    assert digest(drawn(device, COUNTING, (MASK, 0, 0), Q32, 2048, 4), 4) == 0xFE738639C31CB2B2
    assert digest(drawn(device, COUNTING, (MASK, 0, 0), Q50, 2048, 8), 8) == 0x783316867E1E0D1D
    seed = sampling.seed_words(device, COUNTING)
    assert digest(sampling.binomial(device, seed, 3, 1, [4], 2048), 1) == 0x440C5E71A3197242


# q = 2^32 - 1 shows the keystream itself, but for words of 2^32 - 1, which these vectors have none of.
VECTORS = [
    # RFC 8439, section 2.3.2; then appendix A.1, vectors 1 to 5: key, nonce, block, keystream.
    (
        COUNTING.hex(),
        "000000090000004a00000000",
        1,
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        "00" * 32,
        "00" * 12,
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        "00" * 32,
        "00" * 12,
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        "00" * 31 + "01",
        "00" * 12,
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        "00ff" + "00" * 30,
        "00" * 12,
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        "00" * 32,
        "00" * 11 + "02",
        0,
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


def launched_keystream(device, key, nonce, blocks):
    """As `uniform` does it, for nonces that are no stream's."""
    domain, index, sub_index = (int(word) for word in np.frombuffer(nonce, "<u4"))
    out = device.empty((16 * blocks,), np.uint32)
    subs, q = np.array([sub_index], np.uint32), np.array([2**32 - 1], np.uint32)
    seed = sampling.seed_words(device, key)
    device.launch("uniform32", (1,), 128, out, seed, subs, q, 1, 1, domain, index, len(out), shared=17920)
    return out.astype("<u4").tobytes()


@pytest.mark.parametrize(("key", "nonce", "block", "expected"), VECTORS)
def test_rfc8439_keystreams(device, key, nonce, block, expected):
    got = launched_keystream(device, bytes.fromhex(key), bytes.fromhex(nonce), block + 1)
    assert got[64 * block :].hex() == expected


def test_rfc8439_section_2_4_2_encryption(device):
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen "
    text += b"would be it."
    got = launched_keystream(device, COUNTING, bytes.fromhex("000000000000004a00000000"), 3)[64:]
    assert bytes(a ^ b for a, b in zip(text, got, strict=False)).hex() == (
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
        "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )


# What the core drew


@pytest.mark.parametrize("level", [0, 3])
def test_a_fresh_tensor_s_second_component(device, level):
    parameters = ckks.Parameters.INSECURE(3)
    tensor = ckks.SecretKey(parameters).encrypt(np.full((2, 3), 0.5), level=level)
    seed = tensor.to_bytes()[80:112]  # behind the head, level and kind
    primes = parameters.primes[: level + 1]
    got = sampling.uniform(
        device, seed, MASK, 0, 3, parameters.ring_dimension, primes, 8, sub_indices=range(len(primes))
    )
    assert got.shape == (3, len(primes), parameters.ring_dimension)
    for limb in range(len(primes)):
        assert np.array_equal(got[:, limb], tensor._core.residues(limb)[:, 1])


# The definition


@pytest.mark.parametrize("word_bytes", [4, 8])
@pytest.mark.parametrize("n", COUNTS)
def test_uniform_follows_its_definition(device, n, word_bytes):
    moduli = MODULI[word_bytes]
    got = sampling.uniform(device, SEED, MASK, 5, len(moduli), n, moduli, word_bytes)
    assert got.shape == (len(moduli), n)
    assert got.dtype == f"u{word_bytes}"
    for row, q in enumerate(moduli):
        assert got[row].tolist() == naive_uniform(SEED, (0, 5 + row, 0), q, n, word_bytes), q


@pytest.mark.parametrize(("word_bytes", "q"), [(4, Q32), (8, 2**49 + 1)])
def test_the_longest_rows(word_bytes, q):
    got = drawn(NumpyDevice(), SEED, (ERROR, 2**32 - 1, 2**32 - 1), q, MAX_SAMPLES, word_bytes)
    assert got == naive_uniform(SEED, (2, 2**32 - 1, 2**32 - 1), q, MAX_SAMPLES, word_bytes)


def test_one_modulus_for_many_rows(device):
    got = sampling.uniform(device, SEED, MASK, 2**32 - 3, 3, 100, Q32, 4)
    for row in range(3):
        assert got[row].tolist() == naive_uniform(SEED, (0, 2**32 - 3 + row, 0), Q32, 100, 4)


def test_every_pair_of_index_and_sub_index(device):
    subs, moduli = [3, 0, 2**32 - 1], [2**31 + 11, 97, Q32]
    got = sampling.uniform(device, SEED, SECRET, 7, 2, 70, moduli, 4, sub_indices=subs)
    alike = sampling.uniform(device, SEED, SECRET, 7, 2, 70, 97, 4, sub_indices=subs)
    assert got.shape == alike.shape == (2, 3, 70)
    for row in range(2):
        for place, (sub, q) in enumerate(zip(subs, moduli, strict=True)):
            assert got[row, place].tolist() == naive_uniform(SEED, (1, 7 + row, sub), q, 70, 4)
            assert alike[row, place].tolist() == naive_uniform(SEED, (1, 7 + row, sub), 97, 70, 4)


@pytest.mark.parametrize("threads", [32, 64, 96])
@pytest.mark.parametrize("q", [Q32, 2**31 + 11])
def test_the_size_of_a_block_changes_nothing(device, threads, q):
    n = 5 * 16 * threads + 3  # tiles that begin with replacements left over from the one before
    out, subs, moduli = device.empty((n,), np.uint32), np.zeros(1, np.uint32), np.array([q], np.uint32)
    seed = sampling.seed_words(device, SEED)
    device.launch("uniform32", (1,), threads, out, seed, subs, moduli, 1, 1, 0, 9, n, shared=140 * threads)
    assert out.tolist() == naive_uniform(SEED, (0, 9, 0), q, n, 4)


@pytest.mark.parametrize("n", [*COUNTS, 8191, 8193, MAX_SAMPLES])
def test_ternary_follows_its_definition(device, n):
    seed = sampling.seed_words(device, SEED)
    got = sampling.ternary(device, seed, 4, 2, n)
    assert got.dtype == np.int8
    assert got.shape == (2, n)
    for row in range(2):
        assert got[row].tolist() == naive_ternary(SEED, (1, 4 + row, 0), n)
    assert np.array_equal(seed, np.frombuffer(SEED, "<u4"))


@pytest.mark.parametrize("n", [*COUNTS, 3071, 3072, 3073, MAX_SAMPLES])
def test_binomial_follows_its_definition(device, n):
    subs = [5, 0, 2**32 - 1]
    got = sampling.binomial(device, sampling.seed_words(device, SEED), 4, 2, subs, n)
    assert got.dtype == np.int8
    assert got.shape == (2, 3, n)
    for row in range(2):
        for place, sub in enumerate(subs):
            assert got[row, place].tolist() == naive_binomial(SEED, (2, 4 + row, sub), n)


def test_a_shorter_draw_of_errors_begins_the_longer_one(device):
    seed = sampling.seed_words(device, SEED)
    longer = sampling.binomial(device, seed, 0, 1, range(3), 2048)
    for n in (1, 47, 48, 49, 1000):
        assert np.array_equal(sampling.binomial(device, seed, 0, 1, range(3), n), longer[..., :n])


@pytest.mark.parametrize("n", [1, 15, 49, 770])
def test_nothing_is_written_around_the_rows(device, n):
    seed = sampling.seed_words(device, SEED)

    def guarded(shape, dtype):
        size = int(np.prod(shape))
        whole = np.full(size + 140, 77, dtype)
        return whole, whole[70 : 70 + size].reshape(shape)

    for dtype, q in ((np.uint32, 2**31 + 11), (np.uint64, 2**40 + 1)):
        whole, out = guarded((3, n), dtype)
        assert sampling.uniform(device, SEED, MASK, 0, 3, n, q, out.itemsize, out=out) is out
        assert (whole[:70] == 77).all()
        assert (whole[-70:] == 77).all()
        assert (out < q).all()
    whole, out = guarded((3, n), np.int8)
    assert sampling.ternary(device, seed, 0, 3, n, out) is out
    assert (whole[:70] == 77).all()
    assert (whole[-70:] == 77).all()
    assert (np.abs(out) <= 1).all()
    whole, out = guarded((2, 2, n), np.int8)
    assert sampling.binomial(device, seed, 0, 2, [0, 1], n, out) is out
    assert (whole[:70] == 77).all()
    assert (whole[-70:] == 77).all()
    assert (np.abs(out) <= 21).all()


def test_no_rows(device):
    seed = sampling.seed_words(device, SEED)
    assert sampling.uniform(device, seed, MASK, 2**32, 0, 5, 97, 4).shape == (0, 5)
    assert sampling.uniform(device, seed, MASK, 0, 2, 5, 97, 4, sub_indices=[]).shape == (2, 0, 5)
    assert sampling.ternary(device, seed, 0, 0, 5).shape == (0, 5)
    assert sampling.binomial(device, seed, 0, 0, [1], 5).shape == (0, 1, 5)
    assert device.launched == []


# Seeds and wiping


def test_seeds_are_little_endian_words(device):
    words = sampling.seed_words(device, bytearray(COUNTING))
    assert words.dtype == np.uint32
    assert [hex(word) for word in words.tolist()[:2]] == ["0x3020100", "0x7060504"]
    assert len(words) == 8


@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.uint64, np.float64])
def test_wiping(device, dtype):
    array = np.full((4, 6), 7, dtype)
    sampling.wipe(device, array[1:3, ::2])
    assert np.count_nonzero(array) == 24 - 6
    sampling.wipe(device, array)
    assert not array.view(np.uint8).any()


# What is refused


def refused(message, call, *arguments, **named):
    with pytest.raises(InputError, match=message):
        call(NumpyDevice(), *arguments, **named)


def test_seeds_that_are_none():
    refused("31 bytes; pass 32", sampling.seed_words, bytes(31))
    refused("33 bytes; pass 32", sampling.uniform, bytes(33), MASK, 0, 1, 8, 97, 4)
    refused(r"shape \(9,\); pass 8 words", sampling.ternary, np.zeros(9, np.uint32), 0, 1, 8)
    refused("argument seed: expected an array of uint32", sampling.ternary, np.zeros(8, np.uint64), 0, 1, 8)
    refused("argument seed: the array is not cont", sampling.ternary, np.zeros(16, np.uint32)[::2], 0, 1, 8)


@pytest.mark.parametrize("n", [0, -1, MAX_SAMPLES + 1])
def test_counts_out_of_range(n):
    words = np.zeros(8, np.uint32)
    refused(f"{n} samples in one row; draw 1 to 131072", sampling.uniform, SEED, MASK, 0, 1, n, 97, 4)
    refused(f"{n} samples in one row", sampling.ternary, words, 0, 1, n)
    refused(f"{n} samples in one row", sampling.binomial, words, 0, 1, [0], n)


@pytest.mark.parametrize(("first", "rows"), [(-1, 1), (0, -1), (2**32, 1), (2**32 - 2, 3)])
def test_indices_out_of_range(first, rows):
    words = np.zeros(8, np.uint32)
    message = f"{rows} rows from stream index {first} on"
    refused(message, sampling.uniform, SEED, MASK, first, rows, 8, 97, 4)
    refused(message, sampling.ternary, words, first, rows, 8)
    refused(message, sampling.binomial, words, first, rows, [0], 8)


@pytest.mark.parametrize("sub", [-1, 2**32])
def test_sub_indices_out_of_range(sub):
    refused(f"sub-index {sub} is not in", sampling.uniform, SEED, MASK, 0, 1, 8, 97, 4, sub_indices=[0, sub])
    refused(f"sub-index {sub} is not in", sampling.binomial, np.zeros(8, np.uint32), 0, 1, [sub], 8)


def test_moduli_that_do_not_fit():
    for q, word_bytes in ((1, 4), (0, 8), (-3, 4), (2**32, 4), (2**64, 8)):
        refused(f"q = {q} is not in", sampling.uniform, SEED, MASK, 0, 1, 8, q, word_bytes)
        refused(f"q = {q} is not in", sampling.uniform, SEED, MASK, 0, 2, 8, [97, q], word_bytes)
    refused("2 moduli for 3 rows", sampling.uniform, SEED, MASK, 0, 3, 8, [97, 97], 4)
    refused("1 moduli for 2 sub-indices", sampling.uniform, SEED, MASK, 0, 1, 8, [97], 4, sub_indices=[0, 1])


def test_other_words_and_domains():
    refused("word_bytes is 2; choose 4 or 8", sampling.uniform, SEED, MASK, 0, 1, 8, 97, 2)
    refused("domain 3 is none of", sampling.uniform, SEED, 3, 0, 1, 8, 97, 4)


def test_targets_of_another_shape():
    words = np.zeros(8, np.uint32)
    refused(
        r"out is uint32 \(8,\); it must be uint32 \(1, 8\)",
        sampling.uniform,
        SEED,
        MASK,
        0,
        1,
        8,
        97,
        4,
        np.zeros(8, np.uint32),
    )
    refused("out is uint64", sampling.uniform, SEED, MASK, 0, 1, 8, 97, 4, np.zeros((1, 8), np.uint64))
    refused("out is uint8", sampling.ternary, words, 0, 1, 8, np.zeros((1, 8), np.uint8))
    refused(r"it must be int8 \(1, 2, 8\)", sampling.binomial, words, 0, 1, [0, 1], 8, np.zeros((1, 8), np.int8))
    refused("argument out: the array is not cont", sampling.ternary, words, 0, 2, 8, np.zeros((8, 2), np.int8).T)


def test_more_rows_than_a_launch_has_blocks():
    out = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), (2**31, 1), (0, 0))
    refused("2147483648 blocks of threads in one launch", sampling.ternary, np.zeros(8, np.uint32), 0, 2**31, 1, out)


def test_memory_that_does_not_suffice():
    with pytest.raises(EngineError, match="random polynomials takes 400 bytes"):
        sampling.uniform(NumpyDevice(memory_bytes=399), SEED, MASK, 0, 1, 100, 97, 4)

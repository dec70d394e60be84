"""Products on the tensor cores, instruction by instruction on the host, against Python's integers and native ones."""

import numpy as np
import pytest

from cuda_host import NumpyDevice
from privtuner import _core
from privtuner.cuda import gemm, sources
from privtuner.errors import EngineError, InputError

Q32 = 4293918721  # of the linear scheme
# Odd moduli around every number of planes: 20, 32, 32, 33, 40, 48, 50, 56 and 60 bits.
WORDS = {np.uint32: (1048573, Q32, 4294967291), np.uint64: (1048573, 8589934583, (1 << 40) - 87, 281474976710597)}
WORDS[np.uint64] += (1125899906842597, 72057594037927931, 1152921504606846883)
LIMITS = {np.int8: (-128, 127), np.int16: (-32639, 32639)}


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def device(request):
    return NumpyDevice(backwards=request.param)


def operands(seed, kind, word, transpose, rows, depth, moduli, columns):
    """Random weights and residues of which every seventh or so is an end of its range."""
    rng = np.random.default_rng(seed)
    low, high = LIMITS[kind]
    weights = rng.integers(low, high, (depth, rows) if transpose else (rows, depth), kind, endpoint=True)
    weights[rng.random(weights.shape) < 0.15] = high
    weights[rng.random(weights.shape) < 0.15] = low
    residues = np.stack([rng.integers(0, q, (depth, columns), word) for q in moduli], axis=1)
    ends = np.array(moduli, word)[:, None] - word(1)
    residues = np.where(rng.random(residues.shape) < 0.15, ends, residues)
    residues[rng.random(residues.shape) < 0.05] = 0
    return weights, np.ascontiguousarray(residues)


def schoolbook(weights, transpose, residues, moduli):
    """In Python's integers."""
    left = weights.astype(object)
    left = left.T if transpose else left
    return np.stack([left @ residues[:, b].astype(object) % q for b, q in enumerate(moduli)], axis=1)


def product(device, weights, transpose, residues, moduli, *rows, **out):
    held = gemm.Weights(device, weights)
    packed = gemm.pack(device, device.upload(residues), max(moduli).bit_length())
    return device.download(gemm.multiply(held, transpose, packed, moduli, *rows, **out))


def test_by_hand(device):
    # [[1, -2], [127, -128]] [[q - 1, 5], [3, 0]] = [[-1 - 6, 5], [-127 - 384, 635]], and [[1, 127], [-2, -128]] times
    # it = [[-1 + 381, 5], [2 - 384, -10]].
    weights = np.array([[1, -2], [127, -128]], np.int8)
    for word, q in ((np.uint32, Q32), (np.uint64, WORDS[np.uint64][-1])):
        residues = np.array([[[q - 1, 5]], [[3, 0]]], word)
        assert product(device, weights, False, residues, [q]).tolist() == [[[q - 7, 5]], [[q - 511, 635]]]
        assert product(device, weights, True, residues, [q]).tolist() == [[[380, 5]], [[q - 382, q - 10]]]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("kind", [np.int8, np.int16])
@pytest.mark.parametrize(("word", "q"), [(word, q) for word, moduli in WORDS.items() for q in moduli])
def test_every_modulus(device, word, q, kind, transpose):
    weights, residues = operands(q % 1000, kind, word, transpose, 37, 131, [q], 35)
    got = product(device, weights, transpose, residues, [q])
    assert got.dtype == word
    np.testing.assert_array_equal(got, schoolbook(weights, transpose, residues, [q]))
    matrix = _core.CkksMatrix(weights, np.ones(len(weights)))
    native = _core.ResidueProduct(matrix, transpose, residues[:, 0].astype(np.uint64), q)
    np.testing.assert_array_equal(got[:, 0], native.multiply(0, native.rows))


# Around the instruction's 16 x 8 x 32, the step of 64 and the tile of 128 rows and 64 (32) columns.
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [
        *((1, 1, 1), (7, 3, 7), (16, 31, 8), (17, 32, 9), (127, 33, 15), (128, 63, 16), (129, 64, 32), (8, 65, 33)),
        *((3, 100, 63), (130, 128, 64), (9, 129, 65), (2, 320, 129), (257, 7, 1)),
    ],
)
def test_ragged_shapes(device, rows, depth, columns, transpose):
    for word in WORDS:
        kind, q = (np.int8, Q32) if word == np.uint32 else (np.int16, WORDS[word][-2])
        weights, residues = operands(rows + depth, kind, word, transpose, rows, depth, [q], columns)
        got = product(device, weights, transpose, residues, [q])
        np.testing.assert_array_equal(got, schoolbook(weights, transpose, residues, [q]))


def test_order_of_tiles(device):
    """More row tiles than take turns at once, in a band that is not full, and several column tiles."""
    weights, residues = operands(5, np.int8, np.uint32, False, 17 * 128 + 1, 2, [Q32], 130)
    got = product(device, weights, False, residues, [Q32])
    expected = weights.astype(np.int64) @ residues[:, 0].astype(np.int64) % Q32
    np.testing.assert_array_equal(got[:, 0], expected)


@pytest.mark.parametrize("word", WORDS)
def test_a_batch_of_moduli(device, word):
    """Each with its own: the longest decides how the residues are laid out."""
    moduli = list(WORDS[word])
    weights, residues = operands(9, np.int16, word, True, 20, 70, moduli, 34)
    got = product(device, weights, True, residues, moduli)
    np.testing.assert_array_equal(got, schoolbook(weights, True, residues, moduli))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("begin", "count"), [(0, 1), (5, 130), (129, 171), (299, 1), (200, None)])
def test_some_rows(device, begin, count, transpose):
    moduli = [Q32, 1048573]
    weights, residues = operands(3, np.int16, np.uint32, transpose, 300, 40, moduli, 5)
    expected = schoolbook(weights, transpose, residues, moduli)
    got = product(device, weights, transpose, residues, moduli, begin, count)
    np.testing.assert_array_equal(got, expected[begin : None if count is None else begin + count])


def test_writes_only_its_rows(device):
    weights, residues = operands(4, np.int16, np.uint64, False, 6, 9, [1048573], 3)
    memory = np.full((8, 1, 3), 7, np.uint64)
    got = product(device, weights, False, residues, [1048573], out=memory[1:7])
    np.testing.assert_array_equal(memory[1:7], schoolbook(weights, False, residues, [1048573]))
    np.testing.assert_array_equal(got, memory[1:7])
    assert memory[0].tolist() == memory[7].tolist() == [[7, 7, 7]]


@pytest.mark.parametrize("word", WORDS)
def test_the_longest_sum_of_the_largest_terms(word):
    """-128 * 255 * 65536 is within 0.4 % of what 32 bits hold; the host's instruction traps beyond."""
    weight = -128
    q = 4294967295 if word == np.uint32 else (1 << 60) - 1  # odd, and q - 1 is all ones but for the last bit
    depth = _core.MAX_DEPTH
    weights = np.full((1, depth), weight, np.int8)
    residues = np.full((depth, 1, 1), q - 1, word)
    residues[::2] = q - 256  # low byte 255
    got = product(NumpyDevice(), weights, False, residues, [q])
    assert got.item() == (depth // 2) * weight * (q - 1 + q - 256) % q


def test_the_longest_sum_of_long_weights():
    depth, q, weight = _core.MAX_DEPTH, Q32, 32639
    residues = np.full((depth, 1, 1), q - 1, np.uint32)
    got = product(NumpyDevice(), np.full((depth, 1), weight, np.int16), True, residues, [q])
    assert got.item() == -weight * depth % q


def test_every_16_bit_weight(device):
    """Its two bytes are signed and give it back: the identity."""
    weights = np.arange(-_core.MAX_WEIGHT_16, _core.MAX_WEIGHT_16 + 1, dtype=np.int16).reshape(-1, 1)
    held = gemm.Weights(device, weights)
    low, high = device.download(held.planes).astype(np.int64)
    np.testing.assert_array_equal(256 * high + low, weights)
    some = np.ascontiguousarray(weights[:: 65279 // 200])
    got = product(device, some, False, np.ones((1, 1, 1), np.uint32), [Q32])
    np.testing.assert_array_equal(got[:, 0], some.astype(np.int64) % Q32)


def test_memory(device):
    """What callers plan with: exact where nothing is padded."""
    assert gemm.packed_bytes(128, 3, 64, 4, 20) == 128 * 3 * 64 * 4
    assert gemm.packed_bytes(128, 3, 64, 8, 40) == 128 * 3 * 64 * 5
    assert gemm.packed_bytes(1, 1, 1, 8, 57) == 64 * 32 * 8
    held = gemm.Weights(device, np.zeros((130, 65), np.int16))
    assert (held.rows, held.cols, held.bytes_per_weight, held.nbytes) == (130, 65, 2, 130 * 65 * 2)
    assert gemm.workspace_bytes(held, False) == 2 * 256 * 128
    assert gemm.workspace_bytes(held, True) == 2 * 128 * 192
    assert gemm.workspace_bytes(held, False, 128) == 2 * 128 * 128
    packed = gemm.pack(device, np.zeros((65, 1, 33), np.uint64), 60)
    assert packed.nbytes == packed.data.nbytes == 128 * 64 * 8
    with pytest.raises(EngineError, match="residues laid out takes 65536 bytes"):
        gemm.pack(NumpyDevice(memory_bytes=65535), np.zeros((65, 1, 33), np.uint64), 60)


@pytest.mark.parametrize(("word", "bits"), [(np.uint32, 32), (np.uint64, 40), (np.uint64, 56), (np.uint64, 60)])
def test_padding_is_zeros(device, word, bits):
    """And comes from nowhere: what lies behind the operands is not zero."""
    depth, batch, columns, planes = 67, 2, 35, -(-bits // 8)
    memory = np.full((depth + 64, batch, columns), (1 << bits) - 1, word)
    packed = gemm.pack(device, memory[:depth], bits)
    assert np.count_nonzero(packed.data) == depth * batch * columns * planes
    weights = np.ones((2, 200, 300), np.int8)
    for transpose, depth in ((0, 70), (1, 130)):
        out = device.empty((2, 2, -(-depth // 64), 128 * 64), np.uint8)
        rows, cols = (depth, 150) if transpose else (150, depth)
        device.launch("gemm_left", (out.shape[2], 2, 2), 256, out, weights, rows, cols, transpose, 9, 140, shared=8704)
        assert out.sum() == 2 * (140 - 9) * depth


def test_shared_memory_fits_every_gpu():
    """What multiply asks of a block: within 99 KiB, and a grid's blocks are what the kernels were compiled for."""
    for word_bytes, planes in ((4, 4), (8, 5), (8, 6), (8, 7), (8, 8)):
        assert 4 * 64 * (128 + {4: 64, 8: 32}[word_bytes] * planes) <= 99 << 10
        assert f"gemm_u{8 * word_bytes}_{planes}" in sources.kernels()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros((2, 2), np.int32), "weights are int32"),
        (np.zeros(4, np.int8), r"shape \(4,\)"),
        (np.zeros((0, 2), np.int8), r"shape \(0, 2\)"),
        (np.zeros((1, 65537), np.int8), r"shape \(1, 65537\)"),
        (np.array([[32640]], np.int16), r"a weight is outside \[-32639, 32639\]"),
        (np.array([[-32640]], np.int16), r"a weight is outside \[-32639, 32639\]"),
    ],
)
def test_rejects_weights(weights, message):
    with pytest.raises(InputError, match=message):
        gemm.Weights(NumpyDevice(), weights)


@pytest.mark.parametrize(
    ("residues", "bits", "message"),
    [
        (np.zeros((2, 1, 2), np.int64), 32, "residues are int64"),
        (np.zeros((2, 2), np.uint32), 32, r"shape \(2, 2\)"),
        (np.zeros((2, 0, 2), np.uint32), 32, r"shape \(2, 0, 2\)"),
        (np.zeros((65537, 1, 1), np.uint32), 32, r"\(65537, 1, 1\)"),
        (np.zeros((1, 65536, 1), np.uint32), 32, r"\(1, 65536, 1\)"),
        (np.zeros((2, 1, 2), np.uint32), 33, "bits is 33"),
        (np.zeros((2, 1, 2), np.uint64), 61, "bits is 61"),
        (np.zeros((2, 1, 2), np.uint64), 1, "bits is 1;"),
        (np.zeros((2, 1, 4), np.uint32)[:, :, ::2], 32, "not contiguous"),
    ],
)
def test_rejects_residues(residues, bits, message):
    with pytest.raises(InputError, match=message):
        gemm.pack(NumpyDevice(), residues, bits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moduli": [Q32]}, "1 moduli for a batch of 2"),
        ({"moduli": [Q32, 2]}, "modulus 2"),
        ({"moduli": [Q32, 1]}, "modulus 1:"),
        ({"moduli": [Q32, Q32 + 1]}, "modulus 4293918722"),
        ({"moduli": [Q32, (1 << 32) + 1]}, "modulus 4294967297"),
        ({"transpose": True}, "over 3 weights a row and 2 residues"),
        ({"row_begin": -1}, "rows -1 to 3"),
        ({"row_count": 0}, "rows 0 to 0"),
        ({"row_begin": 2, "row_count": 2}, "rows 2 to 4 of a matrix of 3"),
        ({"row_begin": 3}, "rows 3 to 3"),
        ({"out": np.zeros((3, 2, 5), np.uint64)}, "out is uint64"),
        ({"out": np.zeros((2, 2, 5), np.uint32)}, r"out is uint32 \(2, 2, 5\)"),
        ({"out": np.zeros((3, 2, 10), np.uint32)[:, :, ::2]}, "not contiguous"),
    ],
)
def test_rejects_products(arguments, message):
    device = NumpyDevice()
    packed = gemm.pack(device, np.zeros((2, 2, 5), np.uint32), 32)
    held = gemm.Weights(device, np.zeros((3, 2), np.int8))
    with pytest.raises(InputError, match=message):
        gemm.multiply(held, **{"transpose": False, "packed": packed, "moduli": [Q32, Q32], **arguments})
    with pytest.raises(InputError, match="weights are on cuda:1 and the residues on cuda:0"):
        gemm.multiply(gemm.Weights(NumpyDevice("cuda:1"), np.zeros((3, 2), np.int8)), False, packed, [Q32, Q32])

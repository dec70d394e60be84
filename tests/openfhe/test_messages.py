"""Messages that carry OpenFHE ciphertexts, and the server's half of the product: neither needs OpenFHE."""

import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from message_cases import resealed
from openfhe_cases import apply_blocks
from privtuner import linear, wire
from privtuner.errors import MessageError
from privtuner.openfhe import messages
from privtuner.openfhe.messages import BLOCK, REQUEST, Head
from privtuner.openfhe.server import OpenFheServer

N = 1024
MODULI = (12289, 18014398509404161)  # 1 modulo 2,048: of 14 and of 54 bits
HEAD = Head(REQUEST, "forward", bytes(range(16)), bytes(range(16, 32)), N, MODULI, 700, 3)


def residues(head: Head, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    words = np.empty(head.shape, np.uint64)
    for tower, modulus in enumerate(head.moduli):
        words[:, tower] = rng.integers(0, modulus, words[:, tower].shape, np.uint64)
    return words


def test_the_format_byte_by_byte():
    head = Head(REQUEST, "backward", b"L" * 16, b"R" * 16, N, (12289,), 1, 1)
    words = np.arange(2 * N, dtype=np.uint64)
    data = messages.write(head, [words])
    length = 16 + 8 + 8 * len(words)
    assert wire.peek(data) == ("openfhe_request", "backward", 0, b"L" * 16, b"R" * 16, 1, 1, length)
    assert data[72:88] == struct.pack("<4I", N, 1, 0, 0)
    assert data[88:96] == (12289).to_bytes(8, "little")
    assert data[96:] == words.tobytes()


def test_requests_and_blocks_travel():
    for head in (HEAD, replace(HEAD, kind=BLOCK, direction="backward", first=5, total=8)):
        words = residues(head)
        data = messages.write(head, list(words))
        assert data == messages.write(head, [words])  # however they are cut
        for kind in (bytes, bytearray, memoryview):
            found, received = messages.read(kind(data), head.kind)
            assert found == head
            assert (received == words).all()
    assert HEAD.groups == 2
    assert HEAD.shape == (2, 2, 3, 2, N)


@given(st.integers(1, 3), st.integers(1, 1100), st.integers(1, 2), st.sampled_from(["forward", "backward"]))
def test_any_shape_travels(features, tokens, towers, direction):
    head = replace(HEAD, features=features, tokens=tokens, moduli=MODULI[:towers], direction=direction)
    words = residues(head)
    found, received = messages.read(messages.write(head, [words]), REQUEST)
    assert found == head
    assert (received == words).all()


SMALL = replace(HEAD, tokens=2, features=1, moduli=MODULI[:1])
DATA = messages.write(SMALL, [residues(SMALL)])
REPLY = messages.write(replace(SMALL, kind=BLOCK, total=1), [residues(SMALL)])


def test_truncation_anywhere():
    for size in [*range(90), len(DATA) // 2, len(DATA) - 1]:
        with pytest.raises(MessageError, match="truncated"):
            messages.read(DATA[:size], REQUEST)
    body = len(DATA) - wire.HEAD_BYTES
    for size in (0, 15, 23, 24, body - 1, body - 8):
        with pytest.raises(MessageError, match="request: .*truncated"):
            messages.read(resealed(DATA, cut=size), REQUEST)
    with pytest.raises(MessageError, match="1 bytes too many"):
        messages.read(DATA + b"x", REQUEST)
    with pytest.raises(MessageError, match=f"request: {body + 1} bytes where {body} are due"):
        messages.read(resealed(DATA, (body, b"x")), REQUEST)


@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_seen(at, bit):
    changed = bytearray(DATA)
    changed[at] ^= 1 << bit
    with pytest.raises(MessageError):
        messages.read(changed, REQUEST)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 512, "ring dimension 512 is not a power of two from 1024 to 65536"),
        (0, 1536, "ring dimension 1536 is not a power of two"),
        (0, 1 << 17, "ring dimension 131072 is not a power of two"),
        (4, 0, "0 towers; from 1 to 64 are possible"),
        (4, 65, "65 towers; from 1 to 64 are possible"),
        (8, 1, "it carries a range of features, which only replies have"),
        (12, 1, "it carries a range of features"),
        (16, 12288, "modulus 12288 is not 1 modulo 2 N = 2048"),
        (20, 1 << 28, "or not below 2\\^60"),
    ],
)
def test_fields_of_a_request(at, value, message):
    with pytest.raises(MessageError, match=message):
        messages.read(resealed(DATA, (at, struct.pack("<I", value))), REQUEST)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 0}, "0 tokens; from 1 to 16777216"),
        ({"tokens": (1 << 24) + 1}, "16777217 tokens"),
        ({"features": 0}, "0 features; from 1 to 65536"),
        ({"features": 65537}, "65537 features"),
        ({"parameters": 1}, "parameters 1 are not used here"),
        ({"kind": "request"}, "expected a message of kind openfhe request, got request"),
    ],
)
def test_heads_of_a_request(fields, message):
    with pytest.raises(MessageError, match=message):
        messages.read(resealed(DATA, **fields), REQUEST)


@pytest.mark.parametrize(("first", "total"), [(0, 0), (1, 1), (0, 65537)])
def test_ranges_of_a_reply(first, total):
    messages.read(REPLY, BLOCK)
    with pytest.raises(MessageError, match=f"reply: features {first} to {first + 1} of {total}"):
        messages.read(resealed(REPLY, (8, struct.pack("<II", first, total))), BLOCK)


def test_kinds_are_not_mixed_up():
    with pytest.raises(MessageError, match="expected a message of kind openfhe request, got openfhe reply"):
        messages.read(REPLY, REQUEST)
    with pytest.raises(MessageError, match="expected a message of kind openfhe reply, got openfhe request"):
        messages.read(DATA, BLOCK)


def test_the_same_modulus_twice():
    head = replace(SMALL, moduli=MODULI[:1] * 2)
    with pytest.raises(MessageError, match="the same modulus twice"):
        messages.read(messages.write(head, [residues(head)]), REQUEST)


def test_announced_sizes_take_no_memory():
    fields = struct.pack("<IIIIQ", 65536, 1, 0, 0, 786433)
    huge = resealed(DATA, (0, fields), tokens=1 << 24, features=65536)
    tracemalloc.start()
    with pytest.raises(MessageError, match="bytes where .* are due"):
        messages.read(huge, REQUEST)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_what_anybody_reads_of_the_head():
    head = wire.peek(DATA)
    assert (head.kind, head.direction, head.tokens, head.features) == ("openfhe_request", "forward", 2, 1)
    assert (head.length - 16 - 8) // head.features == 16 * N


# The server's half


RNG = np.random.default_rng(1)
PREPARED = linear.prepare(RNG.standard_normal((37, 5)))


def asked(direction: str, **changes) -> Head:
    features = PREPARED.spec.d_in if direction == "forward" else PREPARED.spec.d_out
    fields = {"layer": PREPARED.spec.id, "features": features, "direction": direction} | changes
    return replace(HEAD, **fields)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("block_rows", [1, 32, 1000])
def test_products_are_exact(direction, block_rows):
    head = asked(direction)
    words = residues(head)
    blocks = list(apply_blocks(PREPARED, messages.write(head, [words]), block_rows))
    weights = PREPARED.quantised().astype(object)
    if direction == "backward":
        weights = weights.T
    step = -(-block_rows // 32) * 32
    assert len(blocks) == -(-len(weights) // step)
    done = 0
    for data in blocks:
        found, received = messages.read(data, BLOCK)
        assert found == replace(head, kind=BLOCK, features=found.features, first=done, total=len(weights))
        rows = weights[done : done + found.features]
        for group in range(head.groups):
            for tower, modulus in enumerate(MODULI):
                want = np.tensordot(rows, words[group, tower].astype(object), 1) % modulus
                assert (received[group, tower].astype(object) == want).all()
        done += found.features
    assert done == len(weights)


def test_blocks_are_of_about_the_size_asked_for():
    head = asked("forward")
    data = messages.write(head, [residues(head)])
    output_bytes = residues(head).nbytes // head.features
    for block_bytes, sizes in ((1, [32, 5]), (33 * output_bytes, [37]), (1 << 40, [37])):
        blocks = OpenFheServer().answer(PREPARED, data, block_bytes)
        assert [messages.read(block, BLOCK)[0].features for block in blocks] == sizes


def test_requests_that_do_not_fit_the_layer():
    def answer(head: Head, words=None) -> None:
        apply_blocks(PREPARED, messages.write(head, [residues(head) if words is None else words]))

    with pytest.raises(MessageError, match="meant for another layer"):
        answer(asked("forward", layer=bytes(16)))
    with pytest.raises(MessageError, match="request: 4 features, the layer takes 5 in forward requests"):
        answer(asked("forward", features=4))
    with pytest.raises(MessageError, match="request: 5 features, the layer takes 37 in backward requests"):
        answer(asked("backward", features=5))
    large = residues(asked("forward"))
    large[1, 0, 2, 1, 7] = MODULI[0]
    with pytest.raises(MessageError, match=r"request: the residue at \(2, 1031\) is not below the modulus 12289"):
        answer(asked("forward"), large)
    composite = 2048 * 3 + 1
    with pytest.raises(MessageError, match=f"request: .*{composite}"):
        answer(asked("forward", moduli=(composite,)))
    with pytest.raises(MessageError, match="expected a message of kind openfhe request, got request"):
        apply_blocks(PREPARED, linear.encrypt(np.ones((2, 5), np.float32), PREPARED.spec)[0])

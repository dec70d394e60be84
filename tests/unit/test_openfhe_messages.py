"""Messages that carry OpenFHE ciphertexts, and the server's half of the product: neither needs OpenFHE."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openfhe_cases import apply_blocks
from privtuner import linear
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


def patched(data: bytes, at: int, form: str, value: object) -> bytes:
    """``data`` with a field changed and a checksum that fits."""
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    changed[-4:] = zlib.crc32(changed[:-4]).to_bytes(4, "little")
    return bytes(changed)


def test_the_format_byte_by_byte():
    head = Head(REQUEST, "backward", b"L" * 16, b"R" * 16, N, (12289,), 1, 1)
    words = np.arange(2 * N, dtype=np.uint64)
    data = messages.write(head, [words])
    assert data[:8] == b"PVOR" + bytes([1, 0, 1, 1])
    assert data[8:40] == b"L" * 16 + b"R" * 16
    assert data[40:64] == struct.pack("<6I", N, 1, 1, 1, 0, 0)
    assert data[64:72] == (12289).to_bytes(8, "little")
    assert data[72:-4] == words.tobytes()
    assert data[-4:] == zlib.crc32(data[:-4]).to_bytes(4, "little")


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
        with pytest.raises(MessageError, match=r"request: .*(truncated|bytes)"):
            messages.read(DATA[:size], REQUEST)
    with pytest.raises(MessageError, match=f"request: {len(DATA) + 1} bytes where {len(DATA)} are due"):
        messages.read(DATA + b"x", REQUEST)


@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_seen(at, bit):
    changed = bytearray(DATA)
    changed[at] ^= 1 << bit
    with pytest.raises(MessageError):
        messages.read(changed, REQUEST)


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (0, "4s", b"PVLR", "this is no message of the OpenFHE engine; use the same --scheme on both sides"),
        (4, "<H", 2, "message version 2, this build speaks version 1: install the same privtuner"),
        (6, "B", 3, "kind 3 or direction 0 is unknown"),
        (7, "B", 2, "kind 1 or direction 2 is unknown"),
        (40, "<I", 512, "ring dimension 512 is not a power of two from 1024 to 65536"),
        (40, "<I", 1536, "ring dimension 1536 is not a power of two"),
        (40, "<I", 1 << 17, "ring dimension 131072 is not a power of two"),
        (44, "<I", 0, "0 towers; from 1 to 64 are possible"),
        (44, "<I", 65, "65 towers; from 1 to 64 are possible"),
        (48, "<I", 0, "0 tokens; from 1 to 16777216"),
        (48, "<I", (1 << 24) + 1, "16777217 tokens"),
        (52, "<I", 0, "0 features; from 1 to 65536"),
        (52, "<I", 65537, "65537 features"),
        (56, "<I", 1, "it carries a range of features, which only replies have"),
        (60, "<I", 1, "it carries a range of features"),
        (64, "<Q", 12288, "modulus 12288 is not 1 modulo 2 N = 2048"),
        (64, "<Q", (1 << 60) + 1, "or not below 2\\^60"),
    ],
)
def test_fields_of_a_request(at, form, value, message):
    with pytest.raises(MessageError, match=message):
        messages.read(patched(DATA, at, form, value), REQUEST)


@pytest.mark.parametrize(("first", "total"), [(0, 0), (1, 1), (0, 65537)])
def test_ranges_of_a_reply(first, total):
    messages.read(REPLY, BLOCK)
    with pytest.raises(MessageError, match=f"reply: features {first} to {first + 1} of {total}"):
        messages.read(patched(patched(REPLY, 56, "<I", first), 60, "<I", total), BLOCK)


def test_kinds_are_not_mixed_up():
    with pytest.raises(MessageError, match="request: kind 2"):
        messages.read(REPLY, REQUEST)
    with pytest.raises(MessageError, match="reply: kind 1"):
        messages.read(DATA, BLOCK)


def test_the_same_modulus_twice():
    head = replace(SMALL, moduli=MODULI[:1] * 2)
    with pytest.raises(MessageError, match="the same modulus twice"):
        messages.read(messages.write(head, [residues(head)]), REQUEST)


def test_announced_sizes_take_no_memory():
    huge = patched(patched(patched(DATA, 40, "<I", 65536), 48, "<I", 1 << 24), 52, "<I", 65536)
    huge = patched(huge, 64, "<Q", 786433)
    with pytest.raises(MessageError, match="bytes where .* are due"):
        messages.read(huge, REQUEST)


# The server's half


RNG = np.random.default_rng(1)
PREPARED = linear.prepare(RNG.standard_normal((37, 5)))


def asked(direction: str, **changes) -> Head:
    features = PREPARED.public.d_in if direction == "forward" else PREPARED.public.d_out
    fields = {"layer": PREPARED.public.id, "features": features, "direction": direction} | changes
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
    with pytest.raises(MessageError, match="no message of the OpenFHE engine"):
        apply_blocks(PREPARED, linear.encrypt(np.ones((2, 5), np.float32), PREPARED.public)[0])

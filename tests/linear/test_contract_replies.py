"""Replies: sizes, blocks, forms, order, and what is refused. On every backend."""

import numpy as np
import pytest

from linear_cases import (
    BLOCK_PREFIX,
    DIRECTIONS,
    OUTPUT,
    PRESETS,
    WORD,
    N,
    batch,
    check_result,
    features_in,
    features_out,
    layer,
)
from privtuner import _core, linear
from privtuner.errors import InputError, MessageError, SecretError


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sizes_of_replies(backend, preset, direction):
    prepared = layer(40, 24, preset)
    tokens, outputs = 5, features_out(prepared, direction)
    request, _ = backend.encrypt(batch(tokens, features_in(prepared, direction)), prepared.spec, direction)
    assert len(backend.apply(prepared, request)) == BLOCK_PREFIX + outputs * (
        OUTPUT[preset] * tokens + WORD[preset] * N
    )


@pytest.mark.parametrize(
    ("block_rows", "rows"),
    [(1, [32, 32, 32, 4]), (32, [32, 32, 32, 4]), (33, [64, 36]), (100, [100]), (10**9, [100])],
)
def test_block_rows_are_rounded_up(backend, block_rows, rows):
    prepared = layer(100, 8)
    x = batch(3, 8)
    request, secret = backend.encrypt(x, prepared.spec)
    blocks = list(backend.blocks(prepared, request, block_rows))
    assert [len(block) for block in blocks] == [BLOCK_PREFIX + r * (3 * 3 + 4 * N) for r in rows]
    check_result(prepared, x, backend.decrypt(blocks, secret), "forward")


@pytest.mark.parametrize("block_rows", [0, -1])
def test_block_rows_are_refused(backend, block_rows):
    prepared = layer()
    request, _ = backend.encrypt(batch(1, 24), prepared.spec)
    with pytest.raises(InputError, match=f"block_rows = {block_rows}: must be positive"):
        backend.blocks(prepared, request, block_rows)


def test_the_default_block_is_256_rows():
    prepared = layer(600, 4)
    request, _ = linear.encrypt(batch(1, 4), prepared.spec)
    blocks = list(linear.apply_blocks(prepared, request))
    assert blocks == list(linear.apply_blocks(prepared, request, 256))
    assert len(blocks) == 3


def test_blocks_are_decrypted_as_they_arrive(backend, monkeypatch):
    prepared = layer(64, 8)
    x = batch(3, 8)
    request, secret = backend.encrypt(x, prepared.spec)
    module, name = backend.decryption
    genuine, events = getattr(module, name), []

    class Watched:
        def __init__(self, *arguments):
            self.decryption = genuine(*arguments)

        def __getattr__(self, name):
            return getattr(self.decryption, name)

        def feed(self, block):
            self.decryption.feed(block)
            events.append("read")

    def blocks():
        for number, block in enumerate(backend.blocks(prepared, request)):
            events.append(number)
            yield block

    monkeypatch.setattr(module, name, Watched)
    check_result(prepared, x, backend.decrypt(blocks(), secret), "forward")
    assert events == [0, "read", 1, "read"]


@pytest.mark.parametrize(
    "form",
    [
        bytes,
        bytearray,
        memoryview,
        lambda reply: [reply],
        lambda reply: iter([bytearray(reply), b""]),
        lambda reply: (memoryview(reply),),
    ],
)
def test_forms_of_a_reply(backend, form):
    prepared = layer(40, 8)
    x = batch(3, 8)
    request, secret = backend.encrypt(x, prepared.spec)
    check_result(prepared, x, backend.decrypt(form(backend.apply(prepared, request)), secret), "forward")


def test_the_whole_reply_may_be_joined_from_blocks(backend):
    prepared = layer(70, 8)
    x = batch(3, 8)
    request, secret = backend.encrypt(x, prepared.spec)
    reply = b"".join(backend.reply(prepared, request))
    check_result(prepared, x, backend.decrypt(reply, secret), "forward")


ORDER = [
    # Blocks in another arrangement, and what the linear scheme and OpenFHE's say of it.
    (
        lambda b: [b[1], b[0], b[2]],
        "starts at output 32, expected 0: reordered, repeated or lost",
        "features from 32 of 70 where those from 0",
    ),
    (
        lambda b: [b[0], b[0], b[1], b[2]],
        "starts at output 0, expected 32",
        "features from 0 of 70 where those from 32",
    ),
    (lambda b: [b[0], b[2]], "starts at output 64, expected 32", "features from 64 of 70 where those from 32"),
    (lambda b: [b[0], b[1]], "ends after output 64 of 70: truncated", "it ends after 64 of 70 features"),
    (lambda b: b[:1], "ends after output 32 of 70: truncated", "it ends after 32 of 70 features"),
    (lambda b: [], "ends after output 0 of 70: truncated", "it ends after 0 of 70 features"),
    (lambda b: [*b, b[1]], "starts at output 32, expected 70", "features from 32 of 70 where those from 70"),
    (lambda b: [b[0], b[1][:100], b[2]], "truncated", "truncated"),
    (lambda b: [b[0], b[1][:-1], b[2]], "only .* are here: truncated", "truncated"),
    (lambda b: [b[0], b[1][:-1] + bytes([b[1][-1] ^ 1]), b[2]], "checksum mismatch", "checksum"),
]
WHOLE = [
    (lambda b: b"", "ends after output 0 of 70: truncated"),
    (lambda b: b"".join(b)[:-1], "only .* are here: truncated"),
    (lambda b: b"".join(b) + b"\0", "reply of 1 bytes is shorter than its head"),
    (lambda b: b"".join(b) + b[1], "starts at output 32, expected 70"),
]


def check_refused(backend, arrange, message):
    prepared, x = layer(70, 8), batch(3, 8)
    request, secret = backend.encrypt(x, prepared.spec)
    blocks = backend.reply(prepared, request)
    with pytest.raises(MessageError, match=message):
        backend.decrypt(arrange(blocks), secret)
    assert secret.used
    with pytest.raises(SecretError, match="encrypt again"):
        backend.decrypt(blocks, secret)
    request, secret = backend.encrypt(x, prepared.spec)
    assert backend.decrypt(backend.apply(prepared, request), secret).shape == (3, 70)


@pytest.mark.parametrize(("arrange", "linear_says", "openfhe_says"), ORDER)
def test_replies_out_of_order_are_refused_and_end_the_secret(any_backend, arrange, linear_says, openfhe_says):
    check_refused(any_backend, arrange, linear_says if any_backend.scheme == "linear" else openfhe_says)


@pytest.mark.parametrize(("arrange", "message"), WHOLE)
def test_whole_replies_that_are_damaged_are_refused_and_end_the_secret(backend, arrange, message):
    check_refused(backend, arrange, message)


def test_replies_to_others_are_refused(any_backend):
    prepared, other = layer(40, 40), layer(40, 40, seed=5)
    x = batch(3, 40)
    for spec, by, direction, message in (
        (prepared.spec, prepared, "forward", "answers another request"),
        (other.spec, other, "forward", "comes from another layer|answers another request"),
        (prepared.spec, prepared, "backward", "answers another request"),
    ):
        foreign, _ = any_backend.encrypt(x, spec, direction)
        _, secret = any_backend.encrypt(x, prepared.spec)
        with pytest.raises(MessageError, match=message):
            any_backend.decrypt(any_backend.reply(by, foreign), secret)
        assert secret.used
    request, secret = any_backend.encrypt(x, prepared.spec)
    with pytest.raises(MessageError, match="kind"):
        any_backend.decrypt(request, secret)


def sealed_block(prepared, request, direction="forward", tokens=3, features=40, rows=40, mask=True):
    """A block in order that answers this request, but for what is given."""
    message = np.zeros(_core.linear_block_bytes("linear-w8", rows, tokens, mask), np.uint8)
    block = (message, bytes(request[32:48]), tokens, 0, rows, mask)
    _core.linear_seal_blocks("linear-w8", direction, prepared.spec.id, features, [block])
    return message.tobytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"direction": "backward", "features": 11, "rows": 11}, "is backward, the request was forward"),
        ({"tokens": 4}, r"shape \(4, 40\), expected \(3, 40\)"),
        ({"mask": False}, "lacks the mask product that was asked for"),
    ],
)
def test_blocks_of_other_requests_are_refused_under_the_right_name(backend, changed, message):
    prepared = layer(40, 11)
    request, secret = backend.encrypt(batch(3, 11), prepared.spec)
    with pytest.raises(MessageError, match=message):
        backend.decrypt(sealed_block(prepared, request, **changed), secret)
    assert secret.used


def test_a_mask_product_nobody_asked_for_is_refused(backend):
    prepared, masks = layer(40, 11), linear.MaskCache()
    request, secret = backend.encrypt(batch(3, 11), prepared.spec, masks=masks)
    backend.decrypt(backend.apply(prepared, request), secret)
    request, secret = backend.encrypt(batch(3, 11), prepared.spec, masks=masks)
    with pytest.raises(MessageError, match="carries a mask product nobody asked for"):
        backend.decrypt(sealed_block(prepared, request), secret)


@pytest.mark.parametrize("bad", ["text", 5, None, np.zeros((30, 30), np.uint8), memoryview(b"ab" * 100)[::2]])
def test_what_is_no_bytes_is_refused(backend, bad):
    prepared = layer()
    _, secret = backend.encrypt(batch(1, 24), prepared.spec)
    for read in (
        lambda: backend.apply(prepared, bad),
        lambda: linear.LayerSpec.from_bytes(bad),
        lambda: backend.decrypt([bad], secret),
    ):
        with pytest.raises((TypeError, BufferError)):
            read()


@pytest.mark.parametrize("preset", PRESETS)
def test_requests_of_many_layers_do_not_mix(backend, preset):
    layers = [layer(33, 20, preset, seed) for seed in range(4)]
    x = [batch(3, 20, seed) for seed in range(4)]
    sent = [backend.encrypt(x[i], layers[i].spec) for i in range(4)]
    replies = [backend.apply(layers[i], sent[i][0]) for i in reversed(range(4))][::-1]
    for i in (2, 0, 3, 1):
        check_result(layers[i], x[i], backend.decrypt(replies[i], sent[i][1]), "forward")

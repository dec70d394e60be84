"""Messages as Python sees them: sizes, streaming, order, foreign and damaged messages, public parts."""

import copy
import pickle

import numpy as np
import pytest

from linear_cases import (
    BLOCK_PREFIX,
    DIRECTIONS,
    OUTPUT,
    PRESETS,
    REQUEST_PREFIX,
    WORD,
    N,
    batch,
    check_exchange,
    check_result,
    features_in,
    features_out,
    layer,
)
from privtuner import linear
from privtuner.errors import InputError, MessageError, SecretError


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sizes_of_messages(preset, direction):
    prepared = layer(40, 24, preset)
    tokens, inputs, outputs = 5, features_in(prepared, direction), features_out(prepared, direction)
    request, _ = linear.encrypt(batch(tokens, inputs), prepared.spec, direction)
    assert type(request) is bytes
    assert len(request) == REQUEST_PREFIX + WORD[preset] * tokens * inputs
    reply = linear.apply(prepared, request)
    assert type(reply) is bytes
    assert len(reply) == BLOCK_PREFIX + outputs * (OUTPUT[preset] * tokens + WORD[preset] * N)


@pytest.mark.parametrize(
    ("block_rows", "rows"),
    [(1, [32, 32, 32, 4]), (32, [32, 32, 32, 4]), (33, [64, 36]), (100, [100]), (10**9, [100])],
)
def test_block_rows_are_rounded_up(block_rows, rows):
    prepared = layer(100, 8)
    x = batch(3, 8)
    request, secret = linear.encrypt(x, prepared.spec)
    blocks = list(linear.apply_blocks(prepared, request, block_rows))
    assert [len(block) for block in blocks] == [BLOCK_PREFIX + r * (3 * 3 + 4 * N) for r in rows]
    check_result(prepared, x, linear.decrypt(blocks, secret), "forward")


def test_the_default_block_is_256_rows():
    prepared = layer(600, 4)
    request, _ = linear.encrypt(batch(1, 4), prepared.spec)
    assert list(linear.apply_blocks(prepared, request)) == list(linear.apply_blocks(prepared, request, 256))
    assert len(list(linear.apply_blocks(prepared, request))) == 3


def test_blocks_are_decrypted_as_they_arrive(monkeypatch):
    prepared = layer(64, 8)
    x = batch(3, 8)
    request, secret = linear.encrypt(x, prepared.spec)
    events = []

    class Watched:
        def __init__(self, secret):
            self.decryption = decryption(secret)
            self.finish = self.decryption.finish

        def feed(self, block):
            self.decryption.feed(block)
            events.append("read")

    def blocks():
        for number, block in enumerate(linear.apply_blocks(prepared, request, 32)):
            events.append(number)
            yield block

    decryption = linear._core.Decryption
    monkeypatch.setattr(linear._core, "Decryption", Watched)
    check_result(prepared, x, linear.decrypt(blocks(), secret), "forward")
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
def test_forms_of_a_reply(form):
    prepared = layer(40, 8)
    x = batch(3, 8)
    request, secret = linear.encrypt(x, prepared.spec)
    check_result(prepared, x, linear.decrypt(form(linear.apply(prepared, request)), secret), "forward")


def test_the_whole_reply_may_be_joined_from_blocks():
    prepared = layer(70, 8)
    x = batch(3, 8)
    request, secret = linear.encrypt(x, prepared.spec)
    reply = b"".join(linear.apply_blocks(prepared, request, 32))
    check_result(prepared, x, linear.decrypt(reply, secret), "forward")


@pytest.mark.parametrize("form", [bytearray, memoryview])
def test_forms_of_a_request(form):
    prepared = layer(40, 8)
    request, _ = linear.encrypt(batch(3, 8), prepared.spec)
    assert linear.apply(prepared, form(request)) == linear.apply(prepared, request)


def test_a_request_may_be_answered_again():
    prepared = layer(40, 8)
    x = batch(3, 8)
    request, secret = linear.encrypt(x, prepared.spec)
    replies = [linear.apply(prepared, request) for _ in range(2)]
    assert replies[0] == replies[1]
    # A second server with the same weights has the same layer.
    twin = layer(40, 8)
    assert linear.apply(twin, request) == replies[0]
    check_result(prepared, x, linear.decrypt(replies[1], secret), "forward")


def blocks_of(prepared, request):
    return list(linear.apply_blocks(prepared, request, 32))


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda b: [b[1], b[0], b[2]], "starts at output 32, expected 0: reordered, repeated or lost"),
        (lambda b: [b[0], b[0], b[1], b[2]], "starts at output 0, expected 32"),
        (lambda b: [b[0], b[2]], "starts at output 64, expected 32"),
        (lambda b: [b[0], b[1]], "ends after output 64 of 70: truncated"),
        (lambda b: [], "ends after output 0 of 70: truncated"),
        (lambda b: b"", "ends after output 0 of 70: truncated"),
        (lambda b: b"".join(b)[:-1], "only .* are here: truncated"),
        (lambda b: b"".join(b) + b"\0", "reply of 1 bytes is shorter than its head"),
        (lambda b: [b[0], b[1][:100], b[2]], "truncated"),
        (lambda b: [b[0], b[1][:-1] + bytes([b[1][-1] ^ 1]), b[2]], "checksum mismatch"),
    ],
)
def test_replies_out_of_order_are_refused_and_end_the_secret(arrange, message):
    prepared = layer(70, 8)
    x = batch(3, 8)
    request, secret = linear.encrypt(x, prepared.spec)
    blocks = blocks_of(prepared, request)
    with pytest.raises(MessageError, match=message):
        linear.decrypt(arrange(blocks), secret)
    assert secret.used
    with pytest.raises(SecretError, match="used already: a secret decrypts one reply; encrypt again for another"):
        linear.decrypt(blocks, secret)
    check_exchange(prepared, x)


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("arrived", [0, 1, 2])
def test_an_error_in_the_source_of_blocks_ends_the_secret(error, arrived):
    prepared = layer(70, 8)
    request, secret = linear.encrypt(batch(3, 8), prepared.spec)
    blocks = blocks_of(prepared, request)

    def broken():
        yield from blocks[:arrived]
        raise error("the line is dead")

    with pytest.raises(error, match="dead"):
        linear.decrypt(broken(), secret)
    with pytest.raises(SecretError, match="used already"):
        linear.decrypt(blocks, secret)


@pytest.mark.parametrize("arrived", [0, 1])
def test_a_decryption_that_is_given_up_ends_the_secret(arrived):
    prepared = layer(70, 8)
    request, secret = linear.encrypt(batch(3, 8), prepared.spec)
    blocks = blocks_of(prepared, request)
    decryption = linear._core.Decryption(secret)
    for block in blocks[:arrived]:
        decryption.feed(block)
    with pytest.raises(SecretError, match="used already"):
        linear.decrypt(blocks, secret)
    del decryption
    with pytest.raises(SecretError, match="used already"):
        linear.decrypt(blocks, secret)


def test_a_refused_block_ends_a_decryption():
    prepared = layer(70, 8)
    request, secret = linear.encrypt(batch(3, 8), prepared.spec)
    blocks = blocks_of(prepared, request)
    decryption = linear._core.Decryption(secret)
    decryption.feed(blocks[0])
    with pytest.raises(MessageError, match="starts at output 64, expected 32"):
        decryption.feed(blocks[2])
    with pytest.raises(SecretError, match="used already"):
        decryption.feed(blocks[1])


def test_replies_to_others_are_refused():
    prepared, other = layer(40, 40), layer(40, 40, seed=5)
    x = batch(3, 40)
    second_request, _ = linear.encrypt(x, prepared.spec)
    foreign_request, _ = linear.encrypt(x, other.spec)
    backward_request, _ = linear.encrypt(x, prepared.spec, "backward")
    for made, by, message in (
        (second_request, prepared, "answers another request"),
        (foreign_request, other, "comes from another layer"),
        (backward_request, prepared, "answers another request"),
    ):
        with pytest.raises(MessageError, match=message):
            linear.decrypt(linear.apply(by, made), linear.encrypt(x, prepared.spec)[1])
    request, secret = linear.encrypt(x, prepared.spec)
    with pytest.raises(MessageError, match="expected a message of kind reply, got request"):
        linear.decrypt(request, secret)


def test_foreign_requests_are_refused():
    prepared = layer(40, 24)
    request, _ = linear.encrypt(batch(3, 24), layer(40, 24, seed=5).spec)
    with pytest.raises(MessageError, match="meant for another layer, or other weights of this one"):
        linear.apply(prepared, request)
    request, _ = linear.encrypt(batch(3, 24), layer(40, 24, "linear-w16").spec)
    with pytest.raises(MessageError, match="made with other parameters than this layer's linear-w8"):
        linear.apply(prepared, request)
    for garbage, message in ((b"", "of 0 bytes is shorter than its head"), (b"x" * 500, "not a privtuner message")):
        with pytest.raises(MessageError, match=message):
            linear.apply(prepared, garbage)


def test_a_request_is_checked_before_its_first_block_is_asked_for():
    with pytest.raises(MessageError, match="not a privtuner message"):
        linear.apply_blocks(layer(), b"x" * 500)


@pytest.mark.parametrize("bad", ["text", 5, None, np.zeros((30, 30), np.uint8), memoryview(b"ab" * 100)[::2]])
def test_what_is_no_bytes_is_refused(bad):
    prepared = layer()
    _, secret = linear.encrypt(batch(1, 24), prepared.spec)
    with pytest.raises((TypeError, BufferError)):
        linear.apply(prepared, bad)
    with pytest.raises((TypeError, BufferError)):
        linear.LayerSpec.from_bytes(bad)
    with pytest.raises((TypeError, BufferError)):
        linear.decrypt([bad], secret)


def test_public_part_round_trips():
    for preset in PRESETS:
        spec = layer(40, 24, preset).spec
        data = spec.to_bytes()
        assert len(data) == 96 + 8 * 40
        for again in (
            linear.LayerSpec.from_bytes(data),
            linear.LayerSpec.from_bytes(bytearray(data)),
            linear.LayerSpec.from_bytes(memoryview(data)),
            pickle.loads(pickle.dumps(spec)),
            copy.copy(spec),
            copy.deepcopy(spec),
        ):
            assert again == spec
            assert hash(again) == hash(spec)
            assert again.to_bytes() == data
            assert (again.id, again.preset, again.d_out, again.d_in) == (spec.id, preset, 40, 24)
            np.testing.assert_array_equal(again.scale, spec.scale)


def test_a_public_part_from_bytes_encrypts():
    prepared = layer()
    spec = linear.LayerSpec.from_bytes(prepared.spec.to_bytes())
    x = batch(3, 24)
    request, secret = linear.encrypt(x, spec)
    check_result(prepared, x, linear.decrypt(linear.apply(prepared, request), secret), "forward")


def test_public_parts_are_told_apart():
    weight = np.random.default_rng(0).standard_normal((4, 6))
    spec = linear.prepare(weight).spec
    assert linear.prepare(weight).spec == spec
    changed = weight.copy()
    changed[2, 3] *= 1.5
    others = [linear.prepare(changed), linear.prepare(2 * weight), linear.prepare(weight, "linear-w16")]
    ids = {spec.id, *(other.spec.id for other in others)}
    assert len(ids) == 4
    assert all(len(identity) == 16 for identity in ids)
    assert spec not in [other.spec for other in others]
    assert spec != spec.to_bytes()


def test_a_block_too_many_is_refused_after_the_last_output():
    prepared = layer(40, 8)
    request, secret = linear.encrypt(batch(3, 8), prepared.spec)
    blocks = blocks_of(prepared, request)
    with pytest.raises(MessageError, match="starts at output 32, expected 40"):
        linear.decrypt([*blocks, blocks[1]], secret)


def test_the_public_part_cannot_be_changed_by_accident():
    spec = layer().spec
    with pytest.raises(ValueError, match="read-only"):
        spec.scale[0] = 1


def test_the_public_part_does_not_hold_the_weight():
    prepared = layer(30, 50)
    data = prepared.spec.to_bytes() + pickle.dumps(prepared.spec)
    integers = prepared.quantised()
    assert len(prepared.spec.to_bytes()) < integers.nbytes
    assert not any(integers[k, :8].tobytes() in data for k in range(30))


def test_damaged_public_parts_are_refused():
    data = layer().spec.to_bytes()
    for damaged, message in (
        (data[:-1], "truncated"),
        (data + b"\0", "1 bytes too many"),
        (data[:100] + bytes([data[100] ^ 4]) + data[101:], "checksum mismatch"),
        (b"", "shorter than its head"),
    ):
        with pytest.raises(MessageError, match=message):
            linear.LayerSpec.from_bytes(damaged)


def test_reprs():
    prepared = layer()
    text = f"LayerSpec(preset='linear-w8', d_out=40, d_in=24, id={prepared.spec.id.hex()})"
    assert repr(prepared.spec) == text
    assert repr(prepared) == f"QuantisedWeight({text})"


def test_error_classes_serve_plain_python_too():
    assert issubclass(MessageError, ValueError)
    assert issubclass(InputError, ValueError)
    assert issubclass(SecretError, RuntimeError)


@pytest.mark.parametrize("preset", PRESETS)
def test_requests_of_many_layers_do_not_mix(preset):
    layers = [layer(33, 20, preset, seed) for seed in range(4)]
    x = [batch(3, 20, seed) for seed in range(4)]
    sent = [linear.encrypt(x[i], layers[i].spec) for i in range(4)]
    replies = [linear.apply(layers[i], sent[i][0]) for i in reversed(range(4))][::-1]
    for i in (2, 0, 3, 1):
        check_result(layers[i], x[i], linear.decrypt(replies[i], sent[i][1]), "forward")
    check_exchange(layers[0], x[0])

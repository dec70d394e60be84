"""Requests, on every backend: sizes, forms, which batches are refused on encryption, and which messages by a server."""

import numpy as np
import pytest

from backends import LINEAR, OnDevice
from linear_cases import DIRECTIONS, PRESETS, REQUEST_PREFIX, WORD, Q, batch, check_result, features_in, layer
from privtuner import _core, linear
from privtuner.errors import InputError, MessageError, PrivtunerError


def changed(shape, place, value, dtype=np.float32):
    x = np.ones(shape, dtype)
    x[place] = value
    return x


# Where a function gets a batch it refuses the same ones.
BATCHES = [
    (
        np.ones(24, np.float32),
        r"x has shape \(24,\): expected \(tokens, 24\) with at least one token \(forward direction\)",
    ),
    (np.ones((2, 3, 24), np.float32), r"x has shape \(2, 3, 24\)"),
    (np.ones((2, 23), np.float32), r"x has shape \(2, 23\): expected \(tokens, 24\)"),
    (np.ones((2, 40), np.float32), r"x has shape \(2, 40\): expected \(tokens, 24\)"),
    (np.ones((0, 24), np.float32), r"x has shape \(0, 24\): .* at least one token"),
    (np.ones((2, 24), np.int64), "x has dtype int64: expected float16, float32 or float64"),
    (np.ones((2, 24), ">f4"), "x has dtype >f4"),
    (np.ones((2, 24), np.longdouble), "x has dtype float128"),
    (changed((3, 24), (1, 5), np.nan), r"x\[1, 5\] is nan: every value must be finite"),
    (changed((3, 24), (2, 23), -np.inf), r"x\[2, 23\] is -inf: every value must be finite"),
    (changed((3, 24), (0, 0), np.inf, np.float16), r"x\[0, 0\] is inf"),
    (changed((3, 24), (1, 5), np.nan, np.float64), r"x\[1, 5\] is nan: every value must be finite"),
    (changed((3, 24), (1, 5), 1e39, np.float64), r"x \(as float32\)\[1, 5\] is inf"),
]


@pytest.mark.parametrize(("x", "message"), BATCHES)
def test_batches_are_refused(any_backend, x, message):
    for given in any_backend.forms(x):
        with pytest.raises(InputError, match=message):
            any_backend.encrypt(given, layer().spec)


@pytest.mark.parametrize(("x", "message"), BATCHES)
def test_error_bound_refuses_the_same_batches(x, message):
    with pytest.raises(InputError, match=message):
        linear.error_bound(layer().spec, x)


def test_batches_are_refused_backward(any_backend):
    spec = layer().spec
    with pytest.raises(InputError, match=r"expected \(tokens, 40\) with at least one token \(backward direction\)"):
        any_backend.encrypt(batch(2, 24), spec, "backward")
    with pytest.raises(InputError, match=r"x\[1, 39\] is nan"):
        any_backend.encrypt(changed((3, 40), (1, 39), np.nan), spec, "backward")
    with pytest.raises(InputError, match=r"expected \(tokens, 40\)"):
        linear.error_bound(spec, batch(2, 24), "backward")
    # Not even where the scale of the row is zero.
    zeros = linear.prepare(np.zeros((2, 3))).spec
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match=r"x\[0, 1\] is"):
            any_backend.encrypt(changed((1, 2), (0, 1), bad), zeros, "backward")


@pytest.mark.parametrize("direction", ["", "Forward", "both", None, 0])
def test_directions_are_refused(any_backend, direction):
    spec, x = layer().spec, batch(2, 24)
    for refuse in (
        lambda: any_backend.encrypt(x, spec, direction),
        lambda: linear.error_bound(spec, x, direction),
    ):
        with pytest.raises(InputError, match=f"direction {direction!r}: choose 'forward' or 'backward'"):
            refuse()


def test_refusals_are_of_one_family_and_show_no_other_value(any_backend):
    x = changed((2, 24), (1, 5), np.nan)
    x[0] = 1234.5
    for given in any_backend.forms(x):
        with pytest.raises(PrivtunerError) as caught:
            any_backend.encrypt(given, layer().spec)
        assert isinstance(caught.value, ValueError)
        assert "1234" not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sizes_of_requests(backend, preset, direction):
    prepared = layer(40, 24, preset)
    tokens, inputs = 5, features_in(prepared, direction)
    request, _ = backend.encrypt(batch(tokens, inputs), prepared.spec, direction)
    assert len(request) == REQUEST_PREFIX + WORD[preset] * tokens * inputs
    assert isinstance(request, bytes) or request.readonly


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_forms_of_a_request(any_backend, form):
    prepared = layer(40, 8)
    request, _ = any_backend.encrypt(batch(3, 8), prepared.spec)
    assert any_backend.apply(prepared, form(request)) == any_backend.apply(prepared, request)


def test_a_request_may_be_answered_again(any_backend):
    prepared = layer(40, 8)
    request, secret = any_backend.encrypt(batch(3, 8), prepared.spec)
    replies = [any_backend.apply(prepared, request) for _ in range(2)]
    assert replies[0] == replies[1]
    # A second server with the same weights has the same layer.
    assert any_backend.apply(layer(40, 8), request) == replies[0]
    assert any_backend.decrypt(replies[1], secret).shape == (3, 40)


def test_a_public_part_from_bytes_encrypts(backend):
    prepared = layer()
    spec = linear.LayerSpec.from_bytes(prepared.spec.to_bytes())
    x = batch(3, 24)
    request, secret = backend.encrypt(x, spec)
    check_result(prepared, x, backend.decrypt(backend.apply(prepared, request), secret), "forward")


def sealed_request(prepared, features, word=0):
    """A request in order to this layer, of zeros, but for its width and its last word."""
    message = np.zeros(_core.linear_request_bytes("linear-w8", features, 1), np.uint8)
    message[-4:] = np.array([word], np.uint32).view(np.uint8)
    _core.linear_seal_request(
        "linear-w8", message, "forward", prepared.spec.id, bytes(16), bytes(32), 1, features, True
    )
    return message.tobytes()


def test_foreign_and_damaged_requests_are_refused_before_the_first_block_is_asked_for(backend):
    prepared = layer(40, 24)
    request = bytes(backend.encrypt(batch(3, 24), prepared.spec)[0])
    for bad, message in (
        (b"", "of 0 bytes is shorter than its head"),
        (request[:50], "shorter than its head"),
        (request[:-1], "truncated"),
        (request + b"\0", "1 bytes too many"),
        (request[:-1] + bytes([request[-1] ^ 1]), "checksum mismatch"),
        (b"x" * 500, "not a privtuner message"),
        (
            backend.encrypt(batch(3, 24), layer(40, 24, seed=5).spec)[0],
            "meant for another layer, or other weights of this one",
        ),
        (
            backend.encrypt(batch(3, 24), layer(40, 24, "linear-w16").spec)[0],
            "made with other parameters than this layer's linear-w8",
        ),
        (sealed_request(prepared, 12), "request: 12 features, this layer takes 24 in the forward direction"),
        (sealed_request(prepared, 24, Q["linear-w8"]), "is not below q|not below the modulus"),
    ):
        with pytest.raises(MessageError, match=message):
            backend.blocks(prepared, bad)
    assert list(backend.blocks(prepared, sealed_request(prepared, 24, Q["linear-w8"] - 1)))


def test_foreign_and_damaged_requests_are_refused_by_every_scheme(any_backend):
    prepared = layer(40, 24)
    request = bytes(any_backend.encrypt(batch(3, 24), prepared.spec)[0])
    other, _ = any_backend.encrypt(batch(3, 24), layer(40, 24, seed=5).spec)
    reply = any_backend.apply(prepared, request)
    for bad in (b"", request[:50], request[:-1], request[:-1] + bytes([request[-1] ^ 1]), b"x" * 500, other, reply):
        with pytest.raises(MessageError):
            any_backend.blocks(prepared, bad)


@pytest.mark.parametrize("backend", [name for name in LINEAR if name != "cpu"], indirect=True)
def test_a_batch_on_another_device_is_refused(backend):
    with pytest.raises(InputError, match="x lies on cuda:1 and is to be encrypted on cuda:0: move it there"):
        backend.encrypt(OnDevice(batch(5, 24), (2, 1)), layer().spec)

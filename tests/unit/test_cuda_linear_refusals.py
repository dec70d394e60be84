"""What the linear scheme on a device refuses: the same, in the same words, as the C++ core."""

import numpy as np
import pytest

from cuda_arrays import host
from cuda_host import HostDevice
from linear_cases import (
    DIRECTIONS,
    Q,
    batch,
    check_result,
    layer,
)
from privtuner import _core, linear
from privtuner.cuda import linear as device_linear
from privtuner.errors import EngineError, InputError, MessageError, SecretError

TOKENS = (1, 5, 2048, 2049)
BACKWARDS = (False, True)
SEED, MASK, REQUEST = bytes(range(32)), bytes(range(100, 132)), bytes(range(200, 216))


def test_requests_are_refused_as_the_core_does():
    device, prepared = HostDevice(), layer(40, 11)
    held = device_linear.DeviceLayer(device, prepared)
    request, _ = linear.encrypt(batch(3, 11), prepared.spec)
    other, _ = linear.encrypt(batch(3, 11), layer(40, 11, seed=1).spec)
    wide, _ = linear.encrypt(batch(3, 11), layer(40, 11, "linear-w16").spec)
    broken = bytearray(request)
    broken[-1] ^= 1
    for bad in (b"", request[:50], request[:-1], request + b"\0", bytes(broken), other, wide, large_word(prepared)):
        with pytest.raises(MessageError) as native:
            linear.apply_blocks(prepared, bad)
        with pytest.raises(MessageError) as mine:
            device_linear.apply_blocks(held, bad)
        assert str(mine.value) == str(native.value)
    with pytest.raises(InputError, match="block_rows = 0: must be positive"):
        device_linear.apply_blocks(held, request, 0)


def large_word(prepared):
    """A request that is in order, but for one word that is q."""
    message = np.zeros(_core.linear_request_bytes("linear-w8", 11, 1), np.uint8)
    message[-4:] = np.array([Q["linear-w8"]], np.uint32).view(np.uint8)
    _core.linear_seal_request("linear-w8", message, "forward", prepared.spec.id, REQUEST, MASK, 1, 11, True)
    return message.tobytes()


def test_a_request_of_another_width_is_refused():
    device, prepared = HostDevice(), layer(40, 11)
    held = device_linear.DeviceLayer(device, prepared)
    message = np.zeros(_core.linear_request_bytes("linear-w8", 12, 1), np.uint8)
    _core.linear_seal_request("linear-w8", message, "forward", prepared.spec.id, REQUEST, MASK, 1, 12, True)
    for refuse in (lambda m: linear.apply_blocks(prepared, m), lambda m: device_linear.apply_blocks(held, m)):
        with pytest.raises(MessageError, match="request: 12 features, this layer takes 11 in the forward direction"):
            refuse(message.tobytes())


def test_requests_of_both_directions_are_not_answered_together():
    device, prepared = HostDevice(), layer(11, 11)
    held = device_linear.DeviceLayer(device, prepared)
    both = [
        device_linear.open_request(held, linear.encrypt(batch(1, 11), prepared.spec, direction)[0])
        for direction in DIRECTIONS
    ]
    for refused in (both, []):
        with pytest.raises(InputError, match="one product serves one direction"):
            device_linear.answer(held, refused)


def outcome(decrypt, blocks, secret):
    try:
        return decrypt(blocks, secret).tobytes()
    except (MessageError, SecretError) as error:
        return type(error), str(error)


def test_replies_are_refused_as_the_core_does():
    device, prepared, x = HostDevice(), layer(40, 11), batch(3, 11)

    def spoil(request):
        blocks = list(linear.apply_blocks(prepared, request, 32))
        square, other = layer(40, 11, seed=1), layer(40, 11)
        sealed = lambda **changed: sealed_block(prepared, request, **changed)  # noqa: E731
        yield blocks[:1]
        yield blocks[1:]
        yield [blocks[0], blocks[0]]
        yield [blocks[0], blocks[1][:-1]]
        yield [blocks[0][:70]]
        yield [linear.apply(square, linear.encrypt(x, square.spec)[0])]
        yield [linear.apply(other, linear.encrypt(x, other.spec)[0])]
        yield [sealed(direction="backward", features=11, rows=11)]
        yield [sealed(tokens=4)]
        yield [sealed(mask=False)]
        yield [b"".join(blocks) + blocks[1]]

    for index in range(11):
        results = []
        for encrypt, decrypt in (
            (linear.encrypt, linear.decrypt),
            (lambda *args: device_linear.encrypt(device, *args), device_linear.decrypt),
        ):
            request, secret = encrypt(x, prepared.spec)
            wrong = list(spoil(request))
            assert len(wrong) == 11
            results.append(outcome(decrypt, wrong[index], secret))
            assert secret.used
            with pytest.raises(SecretError, match="used already"):
                decrypt(linear.apply(prepared, request), secret)
        assert results[0] == results[1], index
        assert results[0][0] is MessageError

    after = device_linear.encrypt(device, x, prepared.spec)
    whole = linear.apply(prepared, after[0])
    with pytest.raises(MessageError, match="starts at output 0, expected 40"):
        device_linear.decrypt([whole, whole], after[1])
    assert after[1].used


def sealed_block(prepared, request, direction="forward", tokens=3, features=40, rows=40, mask=True):
    message = np.zeros(_core.linear_block_bytes("linear-w8", rows, tokens, mask), np.uint8)
    block = (message, bytes(request[32:48]), tokens, 0, rows, mask)
    _core.linear_seal_blocks("linear-w8", direction, prepared.spec.id, features, [block])
    return message.tobytes()


def test_a_mask_product_nobody_asked_for_is_refused():
    device, prepared, x = HostDevice(), layer(40, 11), batch(3, 11)
    masks = linear.MaskCache()
    for _ in range(2):
        request, secret = device_linear.encrypt(device, x, prepared.spec, masks=masks)
        kept = secret._mask
        if kept is None:
            device_linear.decrypt(linear.apply(prepared, request), secret)
    assert kept is not None
    with pytest.raises(MessageError, match="carries a mask product nobody asked for"):
        device_linear.decrypt(sealed_block(prepared, request), secret)


def test_batches_are_refused_as_the_core_does():
    device, spec = HostDevice(), layer(40, 11).spec

    def spoilt(place, value, dtype=np.float32):
        x = np.ones((3, 11), dtype)
        x[place] = value
        return x

    for direction, x in (
        ("forward", np.ones(11, np.float32)),
        ("forward", np.ones((2, 12), np.float32)),
        ("forward", np.ones((0, 11), np.float32)),
        ("backward", np.ones((2, 11), np.float32)),
        ("forward", np.ones((2, 11), np.int64)),
        ("sideways", np.ones((2, 11), np.float32)),
        ("forward", spoilt((1, 5), np.nan)),
        ("forward", spoilt((2, 10), -np.inf)),
        ("forward", spoilt((0, 0), np.inf, np.float16)),
        ("forward", spoilt((1, 5), np.nan, np.float64)),
        ("forward", spoilt((1, 5), 1e39, np.float64)),
    ):
        with pytest.raises(InputError) as native:
            linear.encrypt(x, spec, direction)
        for given in (x, OnDevice(x)):
            with pytest.raises(InputError) as mine:
                device_linear.encrypt(device, given, spec, direction)
            assert str(mine.value) == str(native.value)
    with pytest.raises(InputError, match="secret is of type str: expected the DeviceSecret that encrypt returned"):
        device_linear.decrypt(b"", "secret")


def test_too_many_tokens_are_refused():
    device, spec = HostDevice(), layer(40, 1).spec
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), ((1 << 24) + 1, 1), (0, 4))
    with pytest.raises(InputError, match="x has 16777217 tokens: a request carries 1 to 16777216"):
        device_linear.encrypt_words(device, x, spec, mask_seed=MASK)


class OnDevice:
    """An array that says it lies on a GPU."""

    def __init__(self, array, place=(2, 0)):
        self._array, self._place = array, place

    def __dlpack_device__(self):
        return self._place

    def __dlpack__(self, **_):
        return self._array.__dlpack__()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_batches_that_lie_on_the_device(dtype, monkeypatch):
    device, prepared = HostDevice(), layer(40, 11)
    x = batch(5, 11).astype(dtype)
    expected, _ = device_linear.encrypt(device, x, prepared.spec, seed=SEED, mask_seed=MASK, request=REQUEST)
    before = x.copy()
    taken = []
    with monkeypatch.context() as patch:
        launch = device.launch
        patch.setattr(device, "launch", lambda *a, **k: (taken.append(a), launch(*a, **k)))
        request, secret = device_linear.encrypt(
            device, OnDevice(x), prepared.spec, seed=SEED, mask_seed=MASK, request=REQUEST
        )
    assert request == expected
    assert np.array_equal(x, before)  # what is not ours is not overwritten
    read = next(a[5] for a in taken if a[0] == "linear_scales")
    assert np.shares_memory(host(read), x) == (dtype == np.float32)
    y = device_linear.decrypt(linear.apply(prepared, request), secret, on_device=True)
    assert isinstance(y, device.xp.ndarray)
    check_result(prepared, x, host(y), "forward")
    apart = OnDevice(np.asfortranarray(x))
    assert device_linear.encrypt(
        device, apart, prepared.spec, seed=SEED, mask_seed=MASK, request=REQUEST
    )[0] == expected  # fmt: skip


def test_a_batch_on_another_device_is_refused():
    with pytest.raises(InputError, match="x lies on cuda:1 and is to be encrypted on cuda:0: move it there"):
        device_linear.encrypt(HostDevice(), OnDevice(batch(5, 11), (2, 1)), layer(40, 11).spec)


def test_device_arrays_are_checked():
    device, prepared = HostDevice(), layer(40, 11)
    held = device_linear.DeviceLayer(device, prepared)
    for words in (np.ones((11, 3), np.uint64), np.ones((12, 3), np.uint32), np.ones(11, np.uint32)):
        with pytest.raises(InputError, match=r"expected \(11, tokens\) of uint32 \(forward direction\)"):
            device_linear.apply(held, "forward", words, None)
    words = device.upload(np.ones((11, 3), np.uint32))
    with pytest.raises(InputError, match="direction 'up': choose 'forward' or 'backward'"):
        device_linear.apply(held, "up", words, None)
    for begin, count in ((1, 1), (-32, 1), (32, 9), (0, 0), (64, None)):
        with pytest.raises(InputError, match="must start at a multiple of 32 and end by 40"):
            device_linear.apply(held, "forward", words, None, begin, count)
    words, secret = device_linear.encrypt_words(device, device.upload(batch(3, 11)), prepared.spec, mask_seed=MASK)
    data, mask = device_linear.apply(held, "forward", words, MASK)
    with pytest.raises(InputError, match=r"data is uint8 \(39, 9\); it must be uint8 \(40, 9\)"):
        device_linear.decrypt_words(data[1:], mask, secret)
    with pytest.raises(InputError, match=r"mask is int64 \(40, 2048\); it must be uint32 \(40, 2048\)"):
        device_linear.decrypt_words(data, device.empty(mask.shape, np.int64), secret)
    with pytest.raises(InputError, match="expected float16, float32 or float64"):
        device_linear.encrypt_words(device, np.ones((3, 11), np.int32), prepared.spec, mask_seed=MASK)


def test_memory_that_does_not_suffice_is_named():
    prepared = layer(40, 11)
    request, _ = linear.encrypt(batch(3, 11), prepared.spec)
    device = HostDevice()
    held = device_linear.DeviceLayer(device, prepared)
    device._limit = 5000
    blocks = device_linear.apply_blocks(held, request)
    with pytest.raises(EngineError, match="1 requests takes .* bytes"):
        list(blocks)
    with pytest.raises(EngineError, match="takes .* bytes"):
        device_linear.encrypt(device, batch(3, 11), prepared.spec)

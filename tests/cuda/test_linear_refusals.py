"""What the linear scheme refuses on a device alone, and batches that lie there already. The rest is in the contract."""

import numpy as np
import pytest

from backends import OnDevice
from cuda_arrays import host
from cuda_host import HostDevice
from linear_cases import DIRECTIONS, batch, check_result, layer
from privtuner import linear
from privtuner.cuda import linear as device_linear
from privtuner.errors import EngineError, InputError

SEED, MASK, REQUEST = bytes(range(32)), bytes(range(100, 132)), bytes(range(200, 216))


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


def test_too_many_tokens_are_refused():
    device, spec = HostDevice(), layer(40, 1).spec
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), ((1 << 24) + 1, 1), (0, 4))
    with pytest.raises(InputError, match="x has 16777217 tokens: a request carries 1 to 16777216"):
        device_linear.encrypt_words(device, x, spec, mask_seed=MASK)


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

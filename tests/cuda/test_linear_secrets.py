"""Secrets in the memory of a device: whatever ends them overwrites them. What they promise is in the contract."""

import numpy as np
import pytest

from cuda_arrays import host
from cuda_host import HostDevice
from linear_cases import batch, layer
from privtuner import _core, linear
from privtuner.cuda import linear as device_linear
from privtuner.cuda.linear import decryption as decryption_module
from privtuner.errors import EngineError, InputError, MessageError, SecretError

SEED, MASK = bytes(range(32)), bytes(range(100, 132))


def arrays_of(secret):
    return [host(array) for array in (*secret._factors, secret._inverse_scales)]


@pytest.mark.parametrize("how", ["decrypt", "wipe", "release"])
def test_a_secret_that_is_used_or_wiped_or_released_is_overwritten(how):
    device, prepared = HostDevice(), layer(40, 11)
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.spec)
    arrays = arrays_of(secret)
    assert all(array.any() for array in arrays)
    if how == "decrypt":
        device_linear.decrypt(linear.apply(prepared, request), secret)
    elif how == "wipe":
        secret.wipe()
    else:
        del secret
    assert not any(array.any() for array in arrays)


def test_the_seed_comes_from_the_operating_system_and_is_overwritten(monkeypatch):
    device, prepared, x = HostDevice(), layer(40, 11), batch(3, 11)
    fill, keys = _core.os_random, []

    def watched(out):
        fill(out)
        assert any(out)
        keys.append(out)

    monkeypatch.setattr(_core, "os_random", watched)
    device_linear.encrypt(device, x, prepared.spec)
    device_linear.encrypt_words(device, device.upload(x), prepared.spec, mask_seed=MASK)
    with pytest.raises(InputError, match="is nan"):
        device_linear.encrypt(device, np.full((3, 11), np.nan, np.float32), prepared.spec)
    assert keys == [bytearray(32)] * 3


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("arrived", [0, 1])
def test_an_error_in_the_source_of_blocks_overwrites_the_secret(error, arrived):
    device, prepared = HostDevice(), layer(40, 11)
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.spec)
    blocks, arrays = list(linear.apply_blocks(prepared, request, 32)), arrays_of(secret)

    def broken():
        yield from blocks[:arrived]
        raise error("the line is dead")

    with pytest.raises(error, match="dead"):
        device_linear.decrypt(broken(), secret)
    assert not any(array.any() for array in arrays)
    with pytest.raises(SecretError, match="used already"):
        device_linear.decrypt(blocks, secret)


def test_a_refused_block_overwrites_the_secret():
    device, prepared = HostDevice(), layer(40, 11)
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.spec)
    blocks, arrays = list(linear.apply_blocks(prepared, request, 32)), arrays_of(secret)
    decryption = decryption_module.Decryption(secret)
    try:
        decryption.feed(blocks[0])
        with pytest.raises(SecretError, match="used already"):  # it is this decryption's from the start
            device_linear.decrypt(blocks, secret)
        with pytest.raises(MessageError, match="starts at output 0, expected 32"):
            decryption.feed(blocks[0])
        assert not any(array.any() for array in arrays)
        with pytest.raises(SecretError, match="used already"):
            decryption.feed(blocks[1])
    finally:
        decryption.close()


def test_words_that_cannot_be_decrypted_overwrite_the_secret(monkeypatch):
    device, prepared = HostDevice(), layer(40, 11)
    held = device_linear.DeviceLayer(device, prepared)
    words, secret = device_linear.encrypt_words(device, device.upload(batch(3, 11)), prepared.spec, mask_seed=MASK)
    data, mask = device_linear.apply(held, "forward", words, MASK)
    arrays = arrays_of(secret)

    def broken(*arguments, **options):
        raise EngineError("out of memory")

    monkeypatch.setattr(decryption_module, "_reveal", broken)
    with pytest.raises(EngineError, match="out of memory"):
        device_linear.decrypt_words(data, mask, secret)
    assert secret.used
    assert not any(array.any() for array in arrays)


def test_work_memory_is_overwritten(monkeypatch):
    device, prepared = HostDevice(), layer(40, 11)
    taken = []
    empty = device.empty
    monkeypatch.setattr(
        device, "empty", lambda shape, dtype, what="": taken.append((empty(shape, dtype), what)) or taken[-1][0]
    )
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.spec, seed=SEED)
    kept = [array.ctypes.data for array in arrays_of(secret)]
    secrets = {"secrets", "scales", "products with secrets", "errors", "a batch"}
    assert {what for _, what in taken} >= {*secrets, "a seed"}
    assert not any(host(array).tobytes() == SEED for array, _ in taken)
    used = [host(array) for array, what in taken if what in secrets]
    assert not any(array.any() for array in used if array.ctypes.data not in kept)
    taken.clear()
    device_linear.decrypt(linear.apply(prepared, request), secret)
    assert {what for _, what in taken} >= {"products with secrets", "a decrypted reply"}
    assert not any(host(array).any() for array, what in taken if what in ("products with secrets", "a decrypted reply"))

"""Secrets on a device: one decryption each, overwritten, never copied."""

import copy
import pickle
import threading

import pytest

from cuda_arrays import host
from cuda_host import HostDevice
from linear_cases import (
    batch,
    check_result,
    layer,
)
from privtuner import linear
from privtuner.cuda import linear as device_linear
from privtuner.errors import SecretError

TOKENS = (1, 5, 2048, 2049)
BACKWARDS = (False, True)
SEED, MASK, REQUEST = bytes(range(32)), bytes(range(100, 132)), bytes(range(200, 216))
DROPPED = {"linear-w8": 8, "linear-w16": 18}


def arrays_of(secret):
    return [host(array) for array in (*secret._factors, secret._inverse_scales)]


def test_a_secret_serves_one_decryption_and_is_overwritten():
    device, prepared, x = HostDevice(), layer(40, 11), batch(3, 11)
    request, secret = device_linear.encrypt(device, x, prepared.public)
    reply, arrays = linear.apply(prepared, request), arrays_of(secret)
    assert (secret.used, secret.tokens) == (False, 3)
    assert all(array.any() for array in arrays)
    assert repr(secret) == "<privtuner.cuda.linear.DeviceSecret of one forward request, 3 tokens>"
    check_result(prepared, x, device_linear.decrypt(reply, secret), "forward")
    assert secret.used
    assert not any(array.any() for array in arrays)
    assert repr(secret).endswith("3 tokens, used>")
    for again in (reply, [], b""):
        with pytest.raises(SecretError, match="used already: a secret decrypts one reply; encrypt again for another"):
            device_linear.decrypt(again, secret)


@pytest.mark.parametrize("how", ["wipe", "release"])
def test_a_secret_that_is_wiped_or_released_is_overwritten(how):
    device, prepared = HostDevice(), layer(40, 11)
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.public)
    arrays = arrays_of(secret)
    if how == "wipe":
        secret.wipe()
        secret.wipe()
        with pytest.raises(SecretError, match="used already"):
            device_linear.decrypt(linear.apply(prepared, request), secret)
    del secret
    assert not any(array.any() for array in arrays)


def test_work_memory_is_overwritten(monkeypatch):
    device, prepared = HostDevice(), layer(40, 11)
    taken = []
    empty = device.empty
    monkeypatch.setattr(
        device, "empty", lambda shape, dtype, what="": taken.append((empty(shape, dtype), what)) or taken[-1][0]
    )
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.public, seed=SEED)
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


@pytest.mark.parametrize("leave", [copy.copy, copy.deepcopy, pickle.dumps, lambda secret: pickle.dumps(secret, 0)])
def test_a_secret_is_never_copied_or_pickled(leave):
    prepared = layer(40, 11)
    _, secret = device_linear.encrypt(HostDevice(), batch(3, 11), prepared.public)
    with pytest.raises(SecretError, match="never copied or pickled"):
        leave(secret)
    assert {name for name in dir(secret) if not name.startswith("_")} == {"tokens", "used", "wipe"}
    assert not hasattr(secret, "__dict__")


def test_a_secret_cannot_be_made_by_hand():
    with pytest.raises(TypeError, match="No constructor"):
        device_linear.DeviceSecret()


def test_a_secret_that_is_wiped_or_used_meanwhile_decrypts_nothing():
    device, prepared = HostDevice(), layer(40, 11)
    for interfere in (lambda secret, _: secret.wipe(), lambda secret, blocks: device_linear.decrypt(blocks, secret)):
        request, secret = device_linear.encrypt(device, batch(3, 11), prepared.public)
        blocks = list(linear.apply_blocks(prepared, request, 32))

        def interrupted(secret=secret, blocks=blocks, interfere=interfere):
            yield blocks[0]
            interfere(secret, blocks)
            yield blocks[1]

        with pytest.raises(SecretError, match="used already"):
            device_linear.decrypt(interrupted(), secret)


def test_threads_cannot_use_one_secret_twice():
    device, prepared, x = HostDevice(), layer(40, 11), batch(3, 11)
    request, secret = device_linear.encrypt(device, x, prepared.public)
    blocks = list(linear.apply_blocks(prepared, request, 32))
    results, refused = [], []

    def work():
        try:
            results.append(device_linear.decrypt(blocks, secret))
        except SecretError:
            refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(results), len(refused)) == (1, 2)
    check_result(prepared, x, results[0], "forward")

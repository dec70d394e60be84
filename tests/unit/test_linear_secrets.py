"""Secrets serve once and go nowhere; what travels looks uniform whatever it carries."""

import copy
import gc
import multiprocessing.reduction
import pickle
import threading

import numpy as np
import pytest

from linear_cases import DIRECTIONS, PRESETS, REQUEST_PREFIX, Q, batch, check_result, layer
from privtuner import linear
from privtuner.errors import InputError, SecretError


def words(request, preset):
    return np.frombuffer(request, np.uint32 if preset == "linear-w8" else np.uint64, offset=REQUEST_PREFIX)


def chi_square(values, bins):
    """The statistic of `values` in [0, bins): its mean is bins - 1, its standard deviation sqrt(2 (bins - 1))."""
    counts = np.bincount(values, minlength=bins)
    expected = values.size / bins
    return ((counts - expected) ** 2 / expected).sum()


def assert_uniform(values, q):
    """Residues in [0, q): their high bits, their low bits, and pairs of neighbours."""
    assert int(values.max()) < q
    bins = 256
    high = (values.astype(np.float64) * bins / q).astype(np.int64)
    low = (values % bins).astype(np.int64)
    neighbours = high[:-1:2] // 16 * 16 + high[1::2] // 16
    for digits in (high, low, neighbours):
        statistic = chi_square(digits, bins)
        assert abs(statistic - (bins - 1)) < 7 * np.sqrt(2 * (bins - 1)), statistic


def test_the_test_of_uniformity_sees_what_is_not_uniform():
    rng, q = np.random.default_rng(0), Q["linear-w8"]
    uniform = rng.integers(0, q, 1 << 17, np.uint64)
    assert_uniform(uniform, q)
    for spoilt in (
        np.where(rng.random(uniform.size) < 0.06, uniform // 2, uniform),  # too many small words
        np.where(rng.random(uniform.size) < 0.06, uniform // 2 * 2, uniform),  # too many even ones
        np.repeat(uniform[::2], 2),  # neighbours alike
    ):
        with pytest.raises(AssertionError):
            assert_uniform(spoilt, q)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_requests_look_uniform(preset, direction):
    prepared = layer(64, 64, preset)
    batches = {
        "zeros": np.zeros((2048, 64), np.float32),
        "equal tokens": np.ones((2048, 64), np.float32),
        "one huge value": np.pad(np.full((1, 1), 3e38, np.float32), ((0, 2047), (0, 63))),
        "ordinary": batch(2048, 64),
    }
    for x in batches.values():
        request, _ = linear.encrypt(x, prepared.spec, direction)
        assert_uniform(words(request, preset), Q[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_two_requests_of_one_batch_have_nothing_in_common(preset):
    prepared, x, q = layer(8, 64, preset), batch(2048, 64), Q[preset]
    for masks in (None, linear.MaskCache()):
        first, second = (words(linear.encrypt(x, prepared.spec, masks=masks)[0], preset) for _ in range(2))
        # 2^17 words: chance makes 2^17 / q of them equal in place.
        assert np.count_nonzero(first == second) <= 2
        difference = (first.astype(object) - second.astype(object)) % q
        assert_uniform(difference.astype(np.uint64), q)


def test_groups_of_tokens_have_secrets_of_their_own():
    # Two groups of 2,048 equal tokens under one mask.
    prepared, q = layer(8, 64), Q["linear-w8"]
    columns = words(linear.encrypt(np.ones((4096, 64), np.float32), prepared.spec)[0], "linear-w8").reshape(64, 4096)
    difference = (columns[:, :2048].astype(np.int64) - columns[:, 2048:]) % q
    assert_uniform(difference.reshape(-1).astype(np.uint64), q)


def test_request_ids_do_not_repeat():
    prepared, x = layer(), batch(1, 24)
    assert len({linear.encrypt(x, prepared.spec)[0][32:48] for _ in range(50)}) == 50


def test_a_secret_serves_one_decryption():
    prepared, x = layer(), batch(3, 24)
    request, secret = linear.encrypt(x, prepared.spec)
    reply = linear.apply(prepared, request)
    assert (secret.used, secret.tokens) == (False, 3)
    check_result(prepared, x, linear.decrypt(reply, secret), "forward")
    assert secret.used
    for again in (reply, [], b""):
        with pytest.raises(SecretError, match="used already: a secret decrypts one reply; encrypt again for another"):
            linear.decrypt(again, secret)


def test_a_secret_can_be_wiped():
    prepared = layer()
    request, secret = linear.encrypt(batch(3, 24), prepared.spec)
    for _ in range(2):
        secret.wipe()
        assert secret.used
    with pytest.raises(SecretError, match="used already"):
        linear.decrypt(linear.apply(prepared, request), secret)


def test_a_secret_that_is_wiped_or_used_meanwhile_decrypts_nothing():
    prepared, x = layer(70, 24), batch(3, 24)
    for masks in (None, linear.MaskCache(), filled_cache(prepared)):
        for interfere in (lambda secret, blocks: secret.wipe(), lambda secret, blocks: linear.decrypt(blocks, secret)):
            request, secret = linear.encrypt(x, prepared.spec, masks=masks)
            blocks = list(linear.apply_blocks(prepared, request, 32))

            def interrupted(secret=secret, blocks=blocks, interfere=interfere):
                yield blocks[0]
                interfere(secret, blocks)
                yield from blocks[1:]

            with pytest.raises(SecretError, match="used already"):
                linear.decrypt(interrupted(), secret)


def filled_cache(prepared):
    masks = linear.MaskCache()
    request, secret = linear.encrypt(batch(1, 24), prepared.spec, masks=masks)
    linear.decrypt(linear.apply(prepared, request), secret)
    return masks


def test_threads_cannot_use_one_secret_twice():
    prepared, x = layer(256, 24), batch(50, 24)
    masks = filled_cache(prepared)
    for _ in range(20):
        request, secret = linear.encrypt(x, prepared.spec, masks=masks)
        blocks = list(linear.apply_blocks(prepared, request, 32))
        results, refused = [], []

        def work(secret=secret, blocks=blocks, results=results, refused=refused):
            try:
                results.append(linear.decrypt(blocks, secret))
            except SecretError:
                refused.append(1)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(results), len(refused)) == (1, 2)
        check_result(prepared, x, results[0], "forward")


@pytest.mark.parametrize(
    "leave",
    [
        copy.copy,
        copy.deepcopy,
        lambda secret: pickle.dumps(secret, 0),
        pickle.dumps,
        multiprocessing.reduction.ForkingPickler.dumps,
        lambda secret: copy.deepcopy({"inside": [secret]}),
    ],
)
def test_a_secret_is_never_copied_or_pickled(leave):
    prepared, x = layer(), batch(3, 24)
    request, secret = linear.encrypt(x, prepared.spec)
    with pytest.raises(SecretError, match="never copied or pickled"):
        leave(secret)
    check_result(prepared, x, linear.decrypt(linear.apply(prepared, request), secret), "forward")


def test_a_secret_shows_and_holds_nothing_to_python():
    prepared = layer()
    request, secret = linear.encrypt(batch(3, 24), prepared.spec, "forward")
    assert repr(secret) == str(secret) == "<privtuner.linear.Secret of one forward request, 3 tokens>"
    linear.decrypt(linear.apply(prepared, request), secret)
    assert repr(secret) == "<privtuner.linear.Secret of one forward request, 3 tokens, used>"
    assert {name for name in dir(secret) if not name.startswith("_")} == {"tokens", "used", "wipe"}
    assert not hasattr(secret, "__dict__")
    with pytest.raises(TypeError):
        memoryview(secret)
    with pytest.raises(AttributeError):
        secret.used = False


def test_a_secret_cannot_be_made_by_hand():
    with pytest.raises(TypeError, match="No constructor"):
        linear.OneTimeKey()


@pytest.mark.parametrize("what", [None, b"secret", "secret", 3])
def test_decrypt_needs_a_secret(what):
    with pytest.raises(InputError, match=f"secret is of type {type(what).__name__}: expected the Secret that encrypt"):
        linear.decrypt(b"", what)


def test_a_decryption_outlives_the_names_of_what_it_uses():
    prepared, x = layer(70, 24), batch(3, 24)
    request, secret = linear.encrypt(x, prepared.spec)
    job = linear.apply_blocks(layer(70, 24), request, 32)
    blocks = []
    for block in job:
        gc.collect()
        blocks.append(block)
    decryption = linear._core.Decryption(secret)
    del secret
    gc.collect()
    for block in blocks:
        decryption.feed(block)
    check_result(prepared, x, decryption.finish(), "forward")

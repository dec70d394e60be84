"""Secrets serve once and go nowhere; what travels looks uniform whatever it carries. On every backend."""

import copy
import gc
import multiprocessing.reduction
import pickle
import threading

import numpy as np
import pytest

from linear_cases import DIRECTIONS, PRESETS, REQUEST_PREFIX, Q, batch, check_result, layer
from privtuner import linear
from privtuner.errors import InputError, MessageError, SecretError

USED = "used already: a secret decrypts one reply; encrypt again for another|decrypted already, or refused"


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
def test_requests_look_uniform(backend, preset, direction):
    prepared = layer(64, 64, preset)
    batches = {
        "zeros": np.zeros((2048, 64), np.float32),
        "equal tokens": np.ones((2048, 64), np.float32),
        "one huge value": np.pad(np.full((1, 1), 3e38, np.float32), ((0, 2047), (0, 63))),
        "ordinary": batch(2048, 64),
    }
    for x in batches.values():
        request, _ = backend.encrypt(x, prepared.spec, direction)
        assert_uniform(words(request, preset), Q[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_two_requests_of_one_batch_have_nothing_in_common(backend, preset):
    prepared, x, q = layer(8, 64, preset), batch(2048, 64), Q[preset]
    for masks in (None, linear.MaskCache()):
        first, second = (words(backend.encrypt(x, prepared.spec, masks=masks)[0], preset) for _ in range(2))
        # 2^17 words: chance makes 2^17 / q of them equal in place.
        assert np.count_nonzero(first == second) <= 2
        difference = (first.astype(object) - second.astype(object)) % q
        assert_uniform(difference.astype(np.uint64), q)


def test_groups_of_tokens_have_secrets_of_their_own(backend):
    # Two groups of 2,048 equal tokens under one mask.
    prepared, q = layer(8, 64), Q["linear-w8"]
    columns = words(backend.encrypt(np.ones((4096, 64), np.float32), prepared.spec)[0], "linear-w8").reshape(64, 4096)
    difference = (columns[:, :2048].astype(np.int64) - columns[:, 2048:]) % q
    assert_uniform(difference.reshape(-1).astype(np.uint64), q)


def test_request_ids_do_not_repeat(any_backend):
    prepared, x = layer(), batch(1, 24)
    assert len({bytes(any_backend.encrypt(x, prepared.spec)[0][32:48]) for _ in range(50)}) == 50


def test_a_secret_serves_one_decryption(any_backend):
    prepared, x = layer(), batch(3, 24)
    request, secret = any_backend.encrypt(x, prepared.spec)
    reply = any_backend.apply(prepared, request)
    assert not secret.used
    assert any_backend.decrypt(reply, secret).shape == (3, 40)
    assert secret.used
    for again in (reply, [], b""):
        with pytest.raises(SecretError, match=USED):
            any_backend.decrypt(again, secret)


def test_a_secret_knows_its_tokens_and_can_be_wiped(backend):
    prepared = layer()
    request, secret = backend.encrypt(batch(3, 24), prepared.spec)
    for _ in range(2):
        assert secret.tokens == 3
        secret.wipe()
        assert secret.used
    with pytest.raises(SecretError, match=USED):
        backend.decrypt(backend.apply(prepared, request), secret)


def test_a_secret_that_is_wiped_or_used_meanwhile_decrypts_nothing(backend):
    prepared, x = layer(70, 24), batch(3, 24)
    for masks in (None, linear.MaskCache(), filled_cache(backend, prepared)):
        for interfere in (lambda secret, blocks: secret.wipe(), lambda secret, blocks: backend.decrypt(blocks, secret)):
            request, secret = backend.encrypt(x, prepared.spec, masks=masks)
            blocks = list(backend.blocks(prepared, request))

            def interrupted(secret=secret, blocks=blocks, interfere=interfere):
                yield blocks[0]
                interfere(secret, blocks)
                yield from blocks[1:]

            with pytest.raises(SecretError, match=USED):
                backend.decrypt(interrupted(), secret)


def filled_cache(backend, prepared):
    masks = linear.MaskCache()
    request, secret = backend.encrypt(batch(1, 24), prepared.spec, masks=masks)
    backend.decrypt(backend.apply(prepared, request), secret)
    return masks


def test_threads_cannot_use_one_secret_twice(backend):
    prepared, x = layer(256, 24), batch(50, 24)
    masks = filled_cache(backend, prepared)
    for _ in range(20 if backend.name == "cpu" else 5):
        request, secret = backend.encrypt(x, prepared.spec, masks=masks)
        blocks = list(backend.blocks(prepared, request))
        results, refused = [], []

        def work(secret=secret, blocks=blocks, results=results, refused=refused):
            try:
                results.append(backend.decrypt(blocks, secret))
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
def test_a_secret_is_never_copied_or_pickled(any_backend, leave):
    prepared, x = layer(), batch(3, 24)
    request, secret = any_backend.encrypt(x, prepared.spec)
    with pytest.raises(SecretError, match="never copied or pickled"):
        leave(secret)
    assert any_backend.decrypt(any_backend.apply(prepared, request), secret).shape == (3, 40)


def test_a_secret_shows_and_holds_nothing_to_python(backend):
    prepared = layer()
    request, secret = backend.encrypt(batch(3, 24), prepared.spec, "forward")
    assert repr(secret) == str(secret) == f"<{backend.title} of one forward request, 3 tokens>"
    backend.decrypt(backend.apply(prepared, request), secret)
    assert repr(secret) == f"<{backend.title} of one forward request, 3 tokens, used>"
    assert {name for name in dir(secret) if not name.startswith("_")} == {"tokens", "used", "wipe"}
    assert not hasattr(secret, "__dict__")
    with pytest.raises(TypeError):
        memoryview(secret)
    with pytest.raises(AttributeError):
        secret.used = False


def test_a_secret_cannot_be_made_by_hand(backend):
    with pytest.raises(TypeError, match="No constructor"):
        backend.secret()


@pytest.mark.parametrize("what", [None, b"secret", "secret", 3])
def test_decrypt_needs_a_secret(any_backend, what):
    with pytest.raises(InputError, match=f"secret is of type {type(what).__name__}: expected .* encrypt returned"):
        any_backend.decrypt(b"", what)


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("arrived", [0, 1, 2])
def test_an_error_in_the_source_of_blocks_ends_the_secret(any_backend, error, arrived):
    prepared = layer(70, 8)
    request, secret = any_backend.encrypt(batch(3, 8), prepared.spec)
    blocks = list(any_backend.blocks(prepared, request))

    def broken():
        yield from blocks[:arrived]
        raise error("the line is dead")

    with pytest.raises(error, match="dead"):
        any_backend.decrypt(broken(), secret)
    with pytest.raises(SecretError, match=USED):
        any_backend.decrypt(blocks, secret)


@pytest.mark.parametrize("arrived", [0, 1])
def test_a_decryption_that_is_given_up_ends_the_secret(backend, arrived):
    prepared = layer(70, 8)
    request, secret = backend.encrypt(batch(3, 8), prepared.spec)
    blocks = list(backend.blocks(prepared, request))
    decryption = backend.begin(secret)
    for block in blocks[:arrived]:
        decryption.feed(block)
    with pytest.raises(SecretError, match=USED):
        backend.decrypt(blocks, secret)
    del decryption
    with pytest.raises(SecretError, match=USED):
        backend.decrypt(blocks, secret)


def test_a_refused_block_ends_a_decryption(backend):
    prepared = layer(70, 8)
    request, secret = backend.encrypt(batch(3, 8), prepared.spec)
    blocks = list(backend.blocks(prepared, request))
    decryption = backend.begin(secret)
    decryption.feed(blocks[0])
    with pytest.raises(MessageError, match="starts at output 64, expected 32"):
        decryption.feed(blocks[2])
    with pytest.raises(SecretError, match=USED):
        decryption.feed(blocks[1])


def test_a_decryption_outlives_the_names_of_what_it_uses(backend):
    prepared, x = layer(70, 24), batch(3, 24)
    request, secret = backend.encrypt(x, prepared.spec)
    job = backend.blocks(layer(70, 24), request)
    blocks = []
    for block in job:
        gc.collect()
        blocks.append(block)
    decryption = backend.begin(secret)
    del secret
    gc.collect()
    for block in blocks:
        decryption.feed(block)
    check_result(prepared, x, decryption.finish(), "forward")

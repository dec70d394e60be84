"""The cache of mask products, on every backend: what it saves and holds, and that it never costs correctness."""

import numpy as np
import pytest

from linear_cases import (
    DIRECTIONS,
    MASK_SEED,
    PRESETS,
    REQUEST_PREFIX,
    WORD,
    N,
    batch,
    check_result,
    features_in,
    features_out,
    layer,
)
from privtuner import linear
from privtuner.errors import InputError, MessageError


def product_bytes(prepared, direction):
    return features_out(prepared, direction) * N * WORD[prepared.spec.preset]


def send(backend, prepared, masks, direction="forward", seed=1):
    x = batch(3, features_in(prepared, direction), seed)
    request, secret = backend.encrypt(x, prepared.spec, direction, masks)
    return x, backend.apply(prepared, request), secret


def receive(backend, prepared, x, reply, secret, direction="forward"):
    check_result(prepared, x, backend.decrypt(reply, secret), direction)


def has_mask(prepared, reply, direction="forward"):
    return len(reply) > product_bytes(prepared, direction)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_mask_product_travels_once_a_layer_and_direction(backend, preset):
    layers = [layer(40, 24, preset, seed) for seed in range(2)]
    masks = linear.MaskCache()
    kept = 0
    for prepared in layers:
        for direction in DIRECTIONS:
            assert masks.bytes == kept
            lengths = []
            for seed in range(3):
                x, reply, secret = send(backend, prepared, masks, direction, seed)
                lengths.append(len(reply))
                receive(backend, prepared, x, reply, secret, direction)
            kept += product_bytes(prepared, direction)
            assert masks.bytes == kept
            assert lengths[0] - product_bytes(prepared, direction) == lengths[1] == lengths[2]
    assert kept == 2 * (40 + 24) * N * WORD[preset]


def test_token_counts_may_change_from_request_to_request(backend):
    prepared, masks = layer(), linear.MaskCache()
    for tokens in (3, 1, 2049, 4096, 2):
        for direction in DIRECTIONS:
            x = batch(tokens, features_in(prepared, direction))
            request, secret = backend.encrypt(x, prepared.spec, direction, masks)
            receive(backend, prepared, x, backend.apply(prepared, request), secret, direction)


def test_without_a_cache_every_request_has_a_mask_of_its_own(backend):
    prepared = layer()
    seeds = set()
    for _ in range(3):
        request, _ = backend.encrypt(batch(1, 24), prepared.spec)
        seeds.add(bytes(request[MASK_SEED]))
    assert len(seeds) == 3


def test_a_cache_keeps_one_public_seed_and_caches_do_not_share_it(backend):
    caches = linear.MaskCache(), linear.MaskCache()
    seeds = [
        {
            bytes(request[MASK_SEED])
            for prepared in (layer(), layer(seed=1))
            for direction in DIRECTIONS
            for x in [batch(1, features_in(prepared, direction))]
            for request, _ in [backend.encrypt(x, prepared.spec, direction, masks)]
        }
        for masks in caches
    ]
    assert len(seeds[0]) == len(seeds[1]) == 1
    assert seeds[0] != seeds[1]


def test_requests_under_one_mask_have_secrets_of_their_own(backend):
    # The same batch under the same mask: were the secret the same too, the words would differ by small errors alone.
    prepared, masks = layer(), linear.MaskCache()
    x = batch(64, 24)
    first, second = (
        np.frombuffer(backend.encrypt(x, prepared.spec, masks=masks)[0], np.uint32, offset=REQUEST_PREFIX)
        for _ in range(2)
    )
    difference = (first.astype(np.int64) - second).astype(np.int64)
    assert np.median(np.abs(difference)) > 2**28


@pytest.mark.parametrize("preset", PRESETS)
def test_capacity_of_nothing(backend, preset):
    prepared, masks = layer(40, 24, preset), linear.MaskCache(0)
    for seed in range(3):
        x, reply, secret = send(backend, prepared, masks, seed=seed)
        assert has_mask(prepared, reply)
        receive(backend, prepared, x, reply, secret)
    assert masks.bytes == 0


def test_capacity_of_one_layer_serves_the_first(backend):
    first, second = layer(seed=1), layer(seed=2)
    masks = linear.MaskCache(product_bytes(first, "forward"))
    for seed in range(3):
        for prepared in (first, second):
            x, reply, secret = send(backend, prepared, masks, seed=seed)
            assert has_mask(prepared, reply) == (prepared is second or seed == 0)
            receive(backend, prepared, x, reply, secret)
        assert masks.bytes == masks.max_bytes


def test_capacity_just_short_of_a_layer(backend):
    prepared = layer()
    masks = linear.MaskCache(product_bytes(prepared, "forward") - 1)
    for seed in range(2):
        x, reply, secret = send(backend, prepared, masks, seed=seed)
        assert has_mask(prepared, reply)
        receive(backend, prepared, x, reply, secret)
    assert masks.bytes == 0


def test_two_requests_on_their_way_before_the_first_reply(backend):
    prepared, masks = layer(), linear.MaskCache()
    sent = [send(backend, prepared, masks, seed=seed) for seed in range(3)]
    assert all(has_mask(prepared, reply) for _, reply, _ in sent)
    for x, reply, secret in reversed(sent):
        receive(backend, prepared, x, reply, secret)
    assert masks.bytes == product_bytes(prepared, "forward")


def test_two_layers_on_their_way_where_one_fits(backend):
    first, second = layer(seed=1), layer(seed=2)
    masks = linear.MaskCache(product_bytes(first, "forward"))
    sent = [(prepared, *send(backend, prepared, masks)) for prepared in (first, second)]
    for prepared, x, reply, secret in sent:
        receive(backend, prepared, x, reply, secret)
    assert masks.bytes == masks.max_bytes
    assert not has_mask(first, send(backend, first, masks)[1])
    assert has_mask(second, send(backend, second, masks)[1])


def test_a_reply_that_was_dropped_halfway_leaves_the_cache_unfilled(backend):
    prepared, masks = layer(70, 24), linear.MaskCache()
    x = batch(3, 24)
    request, secret = backend.encrypt(x, prepared.spec, masks=masks)
    blocks = list(backend.blocks(prepared, request))
    with pytest.raises(MessageError, match="ends after output 32 of 70"):
        backend.decrypt(blocks[:1], secret)
    assert masks.bytes == 0
    # The next request asks again.
    other_x, other_reply, other_secret = send(backend, prepared, masks, seed=2)
    assert has_mask(prepared, other_reply)
    receive(backend, prepared, other_x, other_reply, other_secret)
    assert masks.bytes == product_bytes(prepared, "forward")


def test_a_secret_that_was_wiped_leaves_the_cache_unfilled(backend):
    prepared, masks = layer(), linear.MaskCache()
    _, _, secret = send(backend, prepared, masks)
    secret.wipe()
    assert masks.bytes == 0
    assert has_mask(prepared, send(backend, prepared, masks)[1])


def test_a_layer_with_other_weights_is_another_layer(backend):
    masks = linear.MaskCache()
    for seed in range(3):
        x, reply, secret = send(backend, layer(seed=seed), masks)
        assert has_mask(layer(seed=seed), reply)
        receive(backend, layer(seed=seed), x, reply, secret)


def test_two_owners_of_one_server_do_not_disturb_each_other(backend):
    prepared = layer()
    caches = linear.MaskCache(), linear.MaskCache()
    for seed in range(3):
        for masks in caches:
            x, reply, secret = send(backend, prepared, masks, seed=seed)
            assert has_mask(prepared, reply) == (seed == 0)
            receive(backend, prepared, x, reply, secret)


@pytest.mark.parametrize("max_bytes", [-1, 1 << 63])
def test_capacities_out_of_range(max_bytes):
    with pytest.raises(InputError, match=rf"max_bytes = {max_bytes}: must be in \[0, 2\*\*63\)"):
        linear.MaskCache(max_bytes)


def test_repr_and_limits():
    assert repr(linear.MaskCache(5)) == "MaskCache(bytes=0, max_bytes=5)"
    assert linear.MaskCache().max_bytes == 1 << 62
    assert linear.MaskCache((1 << 63) - 1).max_bytes == (1 << 63) - 1

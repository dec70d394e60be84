"""The linear scheme on a device: the same messages as the C++ core, bit for bit."""

import hashlib
import weakref

import numpy as np
import pytest

from cuda_arrays import host
from cuda_host import HostDevice, NumpyDevice
from linear_cases import (
    BLOCK_PREFIX,
    DIRECTIONS,
    DROPPED,
    MASK_SEED,
    OUTPUT,
    PRESETS,
    REQUEST_PREFIX,
    WORD,
    N,
    Q,
    batch,
    check_result,
    features_in,
    features_out,
    layer,
)
from privtuner import _core, linear
from privtuner.cuda import linear as device_linear
from privtuner.cuda import sampling
from privtuner.cuda.linear import lanes
from privtuner.errors import InputError, MessageError, SecretError

TOKENS = (1, 5, 2048, 2049)
BACKWARDS = (False, True)
SEED, MASK, REQUEST = bytes(range(32)), bytes(range(100, 132)), bytes(range(200, 216))


def pattern(rows, columns, period):
    """Exact floats of both signs, the same on every machine."""
    steps = np.arange(rows * columns, dtype=np.int64) * 7919 % period
    return ((steps - period // 2) / 256).astype(np.float32).reshape(rows, columns)


# SHA-256, first half, of the request and of the decrypted reply that the C++ core makes of these seeds.
CORE = {
    ("linear-w8", "forward", 5): ("f38ff86ff20b69f5130eceb8d94fe824", "8aceaeb11b32ac06d26f08459ef027e5"),
    ("linear-w8", "forward", 2049): ("0d39a21d697b72ec09b057e577a36052", "ec9eb508ba77ab68345b77c76709aa01"),
    ("linear-w8", "backward", 5): ("46d0db72abb5c855e75c6c827ab9b3d1", "2d731c561367bc3d083fc742a95dce8f"),
    ("linear-w8", "backward", 2049): ("77614d805f8509030a47598f9d34a094", "5982decc1db0ebd75a28506d6872c83b"),
    ("linear-w16", "forward", 5): ("efeebb3421ebe167b0b11fb95395ea00", "bc2a0003a190c053b1bb7a873ef766fb"),
    ("linear-w16", "forward", 2049): ("6eb6ad52ec36b3f6c2f970d9f75b17a6", "631bcd0f32cdb7dcb5bdbfcc6cddd502"),
    ("linear-w16", "backward", 5): ("5088a3ca0967a2e4f4502fedc337af1a", "21b5e165e4cc2b663f14b1224db8d919"),
    ("linear-w16", "backward", 2049): ("1c35c452ad2ec0010437622183b04cb5", "d3bf886483c030d22978254062a8e4fa"),
}


def digest(data):
    return hashlib.sha256(data).hexdigest()[:32]


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize(("preset", "direction", "tokens"), CORE)
def test_the_same_seeds_give_the_bytes_and_floats_of_the_core(preset, direction, tokens, backwards):
    device, prepared = HostDevice(backwards=backwards), linear.prepare(pattern(36, 11, 1009), preset)
    x = pattern(tokens, features_in(prepared, direction), 4001)
    x[0] = 0
    request, secret = device_linear.encrypt(
        device, x, prepared.spec, direction, seed=SEED, mask_seed=MASK, request=REQUEST
    )
    y = device_linear.decrypt(linear.apply(prepared, request), secret)
    assert (digest(request), digest(y.tobytes())) == CORE[preset, direction, tokens]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_either_side_may_have_a_device(preset, direction):
    device, prepared = HostDevice(), layer(40, 11, preset)
    held = device_linear.DeviceLayer(device, prepared)
    for tokens in TOKENS:
        x = batch(tokens, features_in(prepared, direction))
        for mine in (True, False):
            encrypt = (lambda *a: device_linear.encrypt(device, *a)) if mine else linear.encrypt
            decrypt = device_linear.decrypt if mine else linear.decrypt
            request, secret = encrypt(x, prepared.spec, direction)
            reply = b"".join(device_linear.apply_blocks(held, request))
            assert reply == b"".join(linear.apply_blocks(prepared, request))
            check_result(prepared, x, decrypt(reply, secret), direction)


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_replies_are_those_of_the_core_in_blocks_of_any_size(preset, direction, backwards, monkeypatch):
    device, prepared = HostDevice(backwards=backwards), layer(70, 40, preset)
    held = device_linear.DeviceLayer(device, prepared)
    masks = linear.MaskCache()
    x = batch(7, features_in(prepared, direction))
    for _ in range(2):  # with the product of the mask, and without
        request, secret = linear.encrypt(x, prepared.spec, direction, masks)
        for block_rows in (1, 33, 1 << 40):
            expected = list(linear.apply_blocks(prepared, request, block_rows))
            assert list(device_linear.apply_blocks(held, request, block_rows)) == expected
        with monkeypatch.context() as patch:  # every piece on its own
            patch.setattr(lanes, "PIECE_BYTES", 1)
            patch.setattr(lanes, "WORK_BYTES", 1)
            expected = list(linear.apply_blocks(prepared, request, 32))
            assert list(device_linear.apply_blocks(held, request, 32)) == expected
        linear.decrypt(linear.apply(prepared, request), secret)


def test_pieces_do_not_show_in_messages(monkeypatch):
    device, prepared = HostDevice(), layer(40, 11)
    x = batch(2049, 11)
    whole, secret = device_linear.encrypt(device, x, prepared.spec, seed=SEED, mask_seed=MASK, request=REQUEST)
    reply = linear.apply(prepared, whole)
    y = device_linear.decrypt(reply, secret)
    monkeypatch.setattr(lanes, "PIECE_BYTES", 1)
    monkeypatch.setattr(lanes, "WORK_BYTES", 1)
    request, secret = device_linear.encrypt(device, x, prepared.spec, seed=SEED, mask_seed=MASK, request=REQUEST)
    assert request == whole
    assert device_linear.decrypt(linear.apply_blocks(prepared, request, 32), secret).tobytes() == y.tobytes()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_several_requests_as_one_product(preset, direction):
    device, prepared = HostDevice(), layer(40, 37, preset)
    held = device_linear.DeviceLayer(device, prepared)
    masks = linear.MaskCache()
    x = batch(3, features_in(prepared, direction))
    request, secret = linear.encrypt(x, prepared.spec, direction, masks)
    linear.decrypt(linear.apply(prepared, request), secret)  # now the cache knows the product
    requests = [
        linear.encrypt(batch(tokens, x.shape[1]), prepared.spec, direction, cache)[0]
        for tokens, cache in ((1, None), (9, masks), (2049, None), (5, masks))
    ]
    opened = [device_linear.open_request(held, request) for request in requests]
    assert [request.tokens for request in opened] == [1, 9, 2049, 5]
    assert [request.mask_wanted for request in opened] == [True, False, True, False]
    replies = list(zip(*device_linear.answer(held, opened, 32), strict=True))
    assert replies == [tuple(linear.apply_blocks(prepared, request, 32)) for request in requests]


@pytest.mark.parametrize("preset", PRESETS)
def test_device_arrays_in_and_out(preset):
    device, prepared = HostDevice(), layer(70, 9, preset)
    held = device_linear.DeviceLayer(device, prepared)
    assert held.nbytes >= 70 * 9 * _core.preset_info(preset)["weight_bytes"]
    x = batch(130, 9)
    words, secret = device_linear.encrypt_words(device, device.upload(x), prepared.spec, mask_seed=MASK, seed=SEED)
    request, _ = device_linear.encrypt(device, x, prepared.spec, seed=SEED, mask_seed=MASK, request=REQUEST)
    assert host(words).tobytes() == request[REQUEST_PREFIX:]
    reply = linear.apply(prepared, request)[BLOCK_PREFIX:]
    data, mask = device_linear.apply(held, "forward", words, MASK)
    assert host(data).tobytes() + host(mask).tobytes() == reply
    part, none = device_linear.apply(held, "forward", words, None, 32, 7)
    assert host(part).tobytes() == host(data)[32:39].tobytes()
    assert none is None
    pair = device_linear.apply_many(held, "forward", [(words, None), (words[:, :2], MASK)], 64)
    assert host(pair[0][0]).tobytes() == host(data)[64:].tobytes()
    assert host(pair[1][1]).tobytes() == host(mask)[64:].tobytes()
    y = device_linear.decrypt_words(data, mask, secret)
    check_result(prepared, x, host(y), "forward")
    with pytest.raises(SecretError, match="used already"):
        device_linear.decrypt_words(data, mask, secret)


# ---- the definition, from Python's integers ----


def transform(words, roots, q, inverse=False):
    """Stages of Cooley-Tukey (Gentleman-Sande for the inverse) on Python integers."""
    n = len(words)
    values = np.array([int(word) for word in words], object)
    blocks = n // 2 if inverse else 1
    while 1 <= blocks < n:
        pairs, w = values.reshape(blocks, 2, -1), roots[blocks : 2 * blocks, None]
        u, v = pairs[:, 0], pairs[:, 1]
        if inverse:
            values = np.stack([(u + v) % q, (u - v) * w % q], 1).reshape(-1)
            blocks //= 2
        else:
            values = np.stack([(u + v * w) % q, (u - v * w) % q], 1).reshape(-1)
            blocks *= 2
    return values * pow(n, -1, q) % q if inverse else values


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_requests_and_results_by_their_definition(preset, direction):
    device, prepared, q = HostDevice(), layer(5, 4, preset), Q[preset]
    tokens, width = 2053, features_in(prepared, direction)
    x = batch(tokens, width)
    x[3] = 0
    request, secret = device_linear.encrypt(
        device, x, prepared.spec, direction, seed=SEED, mask_seed=MASK, request=REQUEST
    )
    words = np.frombuffer(request, np.uint32 if WORD[preset] == 4 else np.uint64, offset=REQUEST_PREFIX)
    words = words.reshape(width, tokens)

    roots, _, inverse_roots, _, _ = _core.ntt_tables(N, q, 8)  # plain powers for 8-byte words
    roots, inverse_roots = (np.array([int(w) for w in table], object) for table in (roots, inverse_roots))
    seed = sampling.seed_words(device, SEED)
    keys = [transform(s, roots, q) for s in host(sampling.ternary(device, seed, 0, 2, N))]
    errors = host(sampling.binomial(device, seed, 0, width, range(2), N))
    masks = host(sampling.uniform(device, MASK, sampling.MASK, 0, width, N, q, WORD[preset]))
    delta = prepared.spec.scale if direction == "backward" else np.ones(width)
    squares = (x.astype(np.float64) * delta) ** 2
    sums = np.zeros((tokens, 8))
    for j in range(width):
        sums[:, j % 8] += squares[:, j]
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    length = np.sqrt(sums[:, 0])
    core = prepared.spec._core
    norm = max(core.norm_forward if direction == "forward" else core.norm_backward, 1.0)
    room = (q / 2 - _core.noise_bound(preset, width, norm)) * (1 - 2.0**-40) / norm
    scale = np.divide(room, length, out=np.zeros(tokens), where=length > 0)
    for j in range(width):
        product = [
            transform([int(m) * k for m, k in zip(masks[j], key, strict=True)], inverse_roots, q, True) for key in keys
        ]
        message = np.rint(x[:, j].astype(np.float64) * delta[j] * scale)
        for group, part in enumerate((slice(0, N), slice(N, tokens))):
            count = part.stop - part.start
            noise = errors[j, group, :count].astype(np.int64) + message[part].astype(np.int64)
            assert words[j, part].tolist() == [
                (int(a) + int(b)) % q for a, b in zip(product[group], noise, strict=False)
            ]

    outputs, dropped = features_out(prepared, direction), DROPPED[preset]
    reply = linear.apply(prepared, request)
    data, mask = reply_rows(reply, preset, outputs, tokens)
    y = device_linear.decrypt(reply, secret)
    out_delta = prepared.spec.scale if direction == "forward" else np.ones(outputs)
    for k in range(outputs):
        for group, part in enumerate((slice(0, N), slice(N, tokens))):
            product = transform([int(m) * s for m, s in zip(mask[k], keys[group], strict=True)], inverse_roots, q, True)
            factor = out_delta[k] * (length / room)[part]
            found = [centred((int(d) << dropped) - int(p), q) for d, p in zip(data[k, part], product, strict=False)]
            assert y[part, k].tolist() == (np.array(found, np.float64) * factor).astype(np.float32).tolist()


def centred(value, q):
    value -= q if value > q // 2 else 0
    return value + (q if value < -(q // 2) else 0)


def reply_rows(reply, preset, outputs, tokens):
    """The kept bits (outputs, tokens) and the mask product (outputs, N) of a reply of one block."""
    body = np.frombuffer(reply, np.uint8, offset=BLOCK_PREFIX)
    data, mask = (
        body[: outputs * OUTPUT[preset] * tokens].reshape(outputs, -1),
        body[outputs * OUTPUT[preset] * tokens :],
    )
    if preset == "linear-w16":
        return data.copy().view(np.uint32).astype(np.int64), mask.copy().view(np.uint64).reshape(-1, N)
    kept = data[:, : 2 * tokens].copy().view(np.uint16).astype(np.int64) << 8 | data[:, 2 * tokens :]
    return kept, mask.copy().view(np.uint32).reshape(-1, N)


# ---- kernels, at the ends of their ranges ----


def ends(preset, dtype):
    q = Q[preset]
    return np.array([0, 1, 2, q // 2 - 1, q // 2, q // 2 + 1, q - 2, q - 1], dtype)


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_embedding_at_the_ends_of_its_range(preset, backwards):
    device, q = NumpyDevice(backwards=backwards), Q[preset]
    ring = lanes.Ring(device, preset)
    tokens, width, first, rows = N + 200, 37, 2, 34  # two groups, tiles that are not full on either side
    rng = np.random.default_rng(0)
    product = rng.choice(ends(preset, ring.dtype), (2, rows, N))
    errors = rng.choice(np.array([-21, 0, 21], np.int8), (rows, 2, N))
    halves = np.array([-0.5, 0.5, 1.5, 2.5, 0.49999997, 1, -1], np.float32)  # ties go to the even integer
    x = rng.choice(halves, (tokens, width))
    scale = rng.choice(np.array([1.0, (q / 2 - 30) / 2.5]), tokens)
    out = device.empty((rows, tokens), ring.dtype)
    ring.launch(
        "embed", lanes.tiles(tokens, rows), out, product, errors, x, np.ones(width), scale, q, N, tokens,
        width, first, rows, 2, N, shared=lanes.TILE_BYTES,
    )  # fmt: skip
    message = np.rint(x[:, first : first + rows].astype(np.float64) * scale[:, None]).astype(np.int64).T
    masked = product.transpose(1, 0, 2).reshape(rows, 2 * N)[:, :tokens].astype(np.int64)
    expected = (masked + errors.reshape(rows, 2 * N)[:, :tokens] + message) % q
    assert np.array_equal(out.astype(np.int64), expected)


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize("tokens", [1, 257])
@pytest.mark.parametrize("preset", PRESETS)
def test_shortening_at_the_ends_of_its_range(preset, tokens, backwards):
    device = NumpyDevice(backwards=backwards)
    ring = lanes.Ring(device, preset)
    rows, column, columns = 3, 2, tokens + 5
    drop = 1 << DROPPED[preset]
    near = np.array([drop // 2 - 1, drop // 2, drop // 2 + 1, drop * 255 + drop // 2, drop * 256], ring.dtype)
    product = np.random.default_rng(0).choice(np.concatenate([ends(preset, ring.dtype), near]), (rows, 1, columns))
    out = device.empty((rows, tokens * ring.reply_bytes), np.uint8)
    blocks = -(-tokens // 256)
    arguments = (DROPPED[preset], OUTPUT[preset], tokens, column, columns, blocks)
    ring.launch("shorten", (blocks * rows,), out, product, *arguments)
    kept, _ = reply_rows(bytes(BLOCK_PREFIX) + out.tobytes(), preset, rows, tokens)
    words = product[:, 0, column : column + tokens].astype(np.int64)
    assert np.array_equal(kept, (words + drop // 2) // drop)


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_revealing_any_bits(preset, backwards):
    # A hostile reply may hold any bits: what comes out is of no use, and still what the core gives.
    device, q, drop = NumpyDevice(backwards=backwards), Q[preset], DROPPED[preset]
    ring = lanes.Ring(device, preset)
    tokens, rows, first, outputs = N + 131, 35, 3, 40
    rng = np.random.default_rng(0)
    product = rng.choice(ends(preset, ring.dtype), (2, rows, N))
    reply = rng.integers(0, 256, (rows, tokens * ring.reply_bytes), np.uint8)
    reply[0], reply[1] = 0, 255
    weight, inverse = rng.random(outputs) + 0.5, rng.random(tokens) * 2.0**-30
    y = np.full((tokens, outputs), 7, np.float32)
    ring.launch(
        "reveal", lanes.tiles(tokens, rows), y, reply, product, weight, inverse, q,
        drop, OUTPUT[preset], N, tokens, outputs, first, rows, shared=lanes.TILE_BYTES,
    )  # fmt: skip
    kept, _ = reply_rows(bytes(BLOCK_PREFIX) + reply.tobytes(), preset, rows, tokens)
    difference = (kept << drop) - product.transpose(1, 0, 2).reshape(rows, 2 * N)[:, :tokens].astype(np.int64)
    difference -= np.where(difference > q // 2, q, 0)
    difference += np.where(difference < -(q // 2), q, 0)
    factor = weight[first : first + rows, None] * inverse
    expected = (difference.astype(np.float64) * factor).astype(np.float32)
    assert np.array_equal(y[:, first : first + rows], expected.T)
    assert (np.delete(y, np.s_[first : first + rows], axis=1) == 7).all()


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize("width", [1, 7, 8, 9, 300])
def test_scales_add_in_the_order_of_the_core(width, backwards):
    device = NumpyDevice(backwards=backwards)
    rng = np.random.default_rng(0)
    tokens = 37
    x = (rng.standard_normal((tokens, width)) * 10.0 ** rng.integers(-20, 20, (tokens, width))).astype(np.float32)
    x[5] = 0
    x[6] = np.finfo(np.float32).max
    weight = rng.random(width) * 3e38
    scale, inverse = device.empty((tokens,), np.float64), device.empty((tokens,), np.float64)
    blocks = -(-tokens * 8 // 256)
    device.launch("linear_scales", (blocks,), 256, scale, inverse, x, weight, 1234.5, tokens, width, shared=8 * 256)
    for t in range(tokens):
        sums = [0.0] * 8
        for j in range(width):
            value = float(x[t, j]) * float(weight[j])
            sums[j % 8] += value * value
        total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))
        length = float(np.sqrt(total))
        assert (scale[t], inverse[t]) == (1234.5 / length if length > 0 else 0.0, length / 1234.5)


@pytest.mark.parametrize("backwards", BACKWARDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_secrets_as_residues(preset, backwards):
    device = NumpyDevice(backwards=backwards)
    ring = lanes.Ring(device, preset)
    values = np.array([-1, 0, 1] * 99, np.int8)
    out = device.empty(values.shape, ring.dtype)
    ring.launch("residues", (2,), out, values, ring.q, values.size)
    assert out.tolist() == [int(v) % ring.q for v in values]


# ---- masks ----


@pytest.mark.parametrize("preset", PRESETS)
def test_one_cache_serves_the_processor_and_devices_side_by_side(preset):
    prepared, masks = layer(40, 11, preset), linear.MaskCache()
    places = [
        (lambda x, d=device: device_linear.encrypt(d, x, prepared.spec, masks=masks), device_linear.decrypt)
        for device in (HostDevice("cuda:0"), HostDevice("cuda:1"))
    ]
    places.append((lambda x: linear.encrypt(x, prepared.spec, masks=masks), linear.decrypt))
    product, seeds = 40 * N * WORD[preset], set()
    for turn in range(2):
        for number, (encrypt, decrypt) in enumerate(places):
            x = batch(3, 11)
            request, secret = encrypt(x)
            seeds.add(bytes(request[MASK_SEED]))
            reply = linear.apply(prepared, request)
            assert (len(reply) > product) == (turn == 0)  # a place knows what it was sent itself
            check_result(prepared, x, decrypt(reply, secret), "forward")
            assert masks.bytes == product * (3 if turn else number + 1)
    assert len(seeds) == 1


def test_masks_that_do_not_fit_the_device_travel_with_every_reply():
    prepared, masks = layer(40, 11), linear.MaskCache()
    device = HostDevice(memory_bytes=2 * 40 * N * 4 - 1)  # half of it at most
    for _ in range(2):
        x = batch(3, 11)
        request, secret = device_linear.encrypt(device, x, prepared.spec, masks=masks)
        reply = linear.apply(prepared, request)
        assert len(reply) > 40 * N * 4
        check_result(prepared, x, device_linear.decrypt(reply, secret), "forward")
    assert masks.bytes == 0


def test_a_product_is_found_by_its_layer_direction_and_place():
    device, prepared = HostDevice(), layer(40, 11)
    masks, spec = linear.MaskCache(), prepared.spec._core
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.spec, masks=masks)
    blocks = list(linear.apply_blocks(prepared, request, 32))
    with pytest.raises(MessageError, match="truncated"):
        device_linear.decrypt(blocks[:1], secret)
    assert masks.bytes == 0
    assert masks._core.find(spec, "forward", "cuda:0") is None
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.spec, masks=masks)
    device_linear.decrypt(linear.apply(prepared, request), secret)
    assert masks._core.find(spec, "forward", "cuda:0") is not None
    assert masks._core.find(spec, "backward", "cuda:0") is None
    assert masks._core.find(spec, "forward", "cuda:1") is None
    longer = _core.QuantisedWeight("linear-w8", spec.id, np.zeros((41, 11), np.int8), np.zeros(41)).spec()
    assert masks._core.find(longer, "forward", "cuda:0") is None


def test_a_full_cache_takes_no_late_product():
    masks, small, large = _core.MaskCache(4 * N * 4), layer(2, 5).spec._core, layer(3, 5).spec._core
    assert masks.fits(large, "forward")
    masks.insert(small, "forward", "cuda:0", "first")
    assert not masks.fits(large, "forward")
    masks.insert(large, "forward", "cuda:0", "late")
    assert masks.bytes == 2 * N * 4
    assert masks.find(small, "forward", "cuda:0") == "first"
    assert masks.find(large, "forward", "cuda:0") is None


def test_products_on_the_processor_are_out_of_reach():
    masks, spec = _core.MaskCache(1 << 20), layer(2, 5).spec._core
    for reach in (lambda: masks.find(spec, "forward", "cpu"), lambda: masks.insert(spec, "forward", "cpu", b"")):
        with pytest.raises(InputError, match="products on the processor are found and kept by encrypt and Decryption"):
            reach()


def test_a_product_goes_with_its_cache():
    class Product:
        pass

    masks, spec, product = _core.MaskCache(1 << 20), layer(2, 5).spec._core, Product()
    gone = weakref.ref(product)
    masks.insert(spec, "forward", "cuda:0", product)
    masks.insert(spec, "forward", "cuda:0", Product())  # the first one stays
    assert masks.find(spec, "forward", "cuda:0") is product
    del product
    assert gone() is not None
    del masks
    assert gone() is None


# ---- rings that nobody can name ----


def test_kernels_take_the_layout_of_a_reply_from_the_preset():
    # Words of one size in the other layout: 31 bits kept of 32-bit words, 23 of 64-bit words.
    device, tokens, rng = NumpyDevice(), 131, np.random.default_rng(0)
    for preset, dropped, reply_bytes in (("linear-w8", 1, 4), ("linear-w16", 27, 3)):
        ring, q = lanes.Ring(device, preset), Q[preset]
        words = rng.choice(ends(preset, ring.dtype), (3, 1, tokens))
        reply = device.empty((3, tokens * reply_bytes), np.uint8)
        ring.launch("shorten", (3,), reply, words, dropped, reply_bytes, tokens, 0, tokens, 1)
        if reply_bytes == 4:
            kept = reply.view(np.uint32).astype(np.int64)
        else:
            kept = reply[:, : 2 * tokens].copy().view(np.uint16).astype(np.int64) << 8 | reply[:, 2 * tokens :]
        assert np.array_equal(kept, (words[:, 0].astype(np.int64) + (1 << dropped) // 2) >> dropped)
        product, y = np.zeros((1, 3, N), ring.dtype), device.empty((tokens, 3), np.float32)
        ring.launch(
            "reveal", lanes.tiles(tokens, 3), y, reply, product, np.ones(3), np.ones(tokens), q, dropped, reply_bytes,
            N, tokens, 3, 0, 3, shared=lanes.TILE_BYTES,
        )  # fmt: skip
        difference = kept << dropped
        difference -= np.where(difference > q // 2, q, 0)
        assert np.array_equal(y, difference.T.astype(np.float32))

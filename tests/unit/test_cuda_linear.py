"""The linear scheme on a device: the same messages as the C++ core, bit for bit, and the same refusals."""

import copy
import hashlib
import pickle
import threading

import numpy as np
import pytest

from cuda_arrays import host
from cuda_host import HostDevice, NumpyDevice
from linear_cases import (
    BLOCK_PREFIX,
    DIRECTIONS,
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
from privtuner.errors import EngineError, InputError, MessageError, SecretError

TOKENS = (1, 5, 2048, 2049)
BACKWARDS = (False, True)
SEED, MASK, REQUEST = bytes(range(32)), bytes(range(100, 132)), bytes(range(200, 216))
DROPPED = {"linear-w8": 8, "linear-w16": 18}


def pattern(rows, columns, period):
    """Exact floats of both signs, the same on every machine."""
    steps = np.arange(rows * columns, dtype=np.int64) * 7919 % period
    return ((steps - period // 2) / 256).astype(np.float32).reshape(rows, columns)


# SHA-256, first half, of the request and of the decrypted reply that the C++ core makes of these seeds.
CORE = {
    ("linear-w8", "forward", 5): ("eb50596076d755a13a456032610d606c", "8aceaeb11b32ac06d26f08459ef027e5"),
    ("linear-w8", "forward", 2049): ("52c93f74ba229cbee15132edee108579", "ec9eb508ba77ab68345b77c76709aa01"),
    ("linear-w8", "backward", 5): ("d9141ef86beb51698f07e34615241461", "2d731c561367bc3d083fc742a95dce8f"),
    ("linear-w8", "backward", 2049): ("e467afa77fd0c6626b86ec6b4eea4f1a", "5982decc1db0ebd75a28506d6872c83b"),
    ("linear-w16", "forward", 5): ("c077ac58dff9e117986856e83cba91ec", "bc2a0003a190c053b1bb7a873ef766fb"),
    ("linear-w16", "forward", 2049): ("5a9911aa1d7c1b30ad84bb348c0a9f11", "631bcd0f32cdb7dcb5bdbfcc6cddd502"),
    ("linear-w16", "backward", 5): ("97803eb78ad8aa10ec1d17223ede3283", "21b5e165e4cc2b663f14b1224db8d919"),
    ("linear-w16", "backward", 2049): ("0a73fbc5992a8776a2e86331ad95167e", "d3bf886483c030d22978254062a8e4fa"),
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
        device, x, prepared.public, direction, seed=SEED, mask_seed=MASK, request=REQUEST
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
            request, secret = encrypt(x, prepared.public, direction)
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
        request, secret = linear.encrypt(x, prepared.public, direction, masks)
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
    whole, secret = device_linear.encrypt(device, x, prepared.public, seed=SEED, mask_seed=MASK, request=REQUEST)
    reply = linear.apply(prepared, whole)
    y = device_linear.decrypt(reply, secret)
    monkeypatch.setattr(lanes, "PIECE_BYTES", 1)
    monkeypatch.setattr(lanes, "WORK_BYTES", 1)
    request, secret = device_linear.encrypt(device, x, prepared.public, seed=SEED, mask_seed=MASK, request=REQUEST)
    assert request == whole
    assert device_linear.decrypt(linear.apply_blocks(prepared, request, 32), secret).tobytes() == y.tobytes()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("preset", PRESETS)
def test_several_requests_as_one_product(preset, direction):
    device, prepared = HostDevice(), layer(40, 37, preset)
    held = device_linear.DeviceLayer(device, prepared)
    masks = linear.MaskCache()
    x = batch(3, features_in(prepared, direction))
    request, secret = linear.encrypt(x, prepared.public, direction, masks)
    linear.decrypt(linear.apply(prepared, request), secret)  # now the cache knows the product
    requests = [
        linear.encrypt(batch(tokens, x.shape[1]), prepared.public, direction, cache)[0]
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
    words, secret = device_linear.encrypt_words(device, device.upload(x), prepared.public, mask_seed=MASK, seed=SEED)
    request, _ = device_linear.encrypt(device, x, prepared.public, seed=SEED, mask_seed=MASK, request=REQUEST)
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
        device, x, prepared.public, direction, seed=SEED, mask_seed=MASK, request=REQUEST
    )
    words = np.frombuffer(request, np.uint32 if WORD[preset] == 4 else np.uint64, offset=REQUEST_PREFIX)
    words = words.reshape(width, tokens)

    roots, _, inverse_roots, _, _ = _core.ntt_tables(N, q, 8)  # plain powers for 8-byte words
    roots, inverse_roots = (np.array([int(w) for w in table], object) for table in (roots, inverse_roots))
    seed = sampling.seed_words(device, SEED)
    keys = [transform(s, roots, q) for s in host(sampling.ternary(device, seed, 0, 2, N))]
    errors = host(sampling.binomial(device, seed, 0, width, range(2), N))
    masks = host(sampling.uniform(device, MASK, sampling.MASK, 0, width, N, q, WORD[preset]))
    delta = prepared.public.delta if direction == "backward" else np.ones(width)
    squares = (x.astype(np.float64) * delta) ** 2
    sums = np.zeros((tokens, 8))
    for j in range(width):
        sums[:, j % 8] += squares[:, j]
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    length = np.sqrt(sums[:, 0])
    core = prepared.public._core
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
    out_delta = prepared.public.delta if direction == "forward" else np.ones(outputs)
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
    arguments = (DROPPED[preset], tokens, column, columns, blocks)
    ring.launch("shorten", (blocks * rows,), out.view(ring.reply_dtype), product, *arguments)
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
        "reveal", lanes.tiles(tokens, rows), y, reply.view(ring.reply_dtype), product, weight, inverse, q,
        drop, N, tokens, outputs, first, rows, shared=lanes.TILE_BYTES,
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
def test_a_mask_product_travels_once_a_layer_and_direction(preset):
    device, layers = HostDevice(), [layer(40, 11, preset, seed) for seed in range(2)]
    masks, kept = device_linear.DeviceMasks(device), 0
    for prepared in layers:
        for direction in DIRECTIONS:
            product = features_out(prepared, direction) * N * WORD[preset]
            lengths = []
            for tokens in (3, 3, 2049):
                x = batch(tokens, features_in(prepared, direction))
                request, secret = device_linear.encrypt(device, x, prepared.public, direction, masks=masks)
                assert request[64:96] == masks.seed
                reply = list(linear.apply_blocks(prepared, request, 32))
                lengths.append(sum(map(len, reply)))
                check_result(prepared, x, device_linear.decrypt(reply, secret), direction)
            kept += product
            assert masks.bytes == kept
            assert lengths[0] - lengths[1] == product
    assert repr(masks) == f"DeviceMasks(bytes={kept}, max_bytes=None, on cuda:0)"


def test_masks_that_do_not_fit_travel_with_every_reply():
    device, prepared = HostDevice(), layer(40, 11)
    for masks in (
        device_linear.DeviceMasks(device, 40 * N * 4 - 1),
        device_linear.DeviceMasks(device, 0),
        device_linear.DeviceMasks(HostDevice(memory_bytes=40 * N * 4)),  # half of it at most
    ):
        for _ in range(2):
            x = batch(3, 11)
            request, secret = device_linear.encrypt(device, x, prepared.public, masks=masks)
            reply = linear.apply(prepared, request)
            assert len(reply) > 40 * N * 4
            check_result(prepared, x, device_linear.decrypt(reply, secret), "forward")
        assert masks.bytes == 0


def test_an_incomplete_product_is_not_kept():
    device, prepared = HostDevice(), layer(40, 11)
    masks = device_linear.DeviceMasks(device)
    request, secret = device_linear.encrypt(device, batch(3, 11), prepared.public, masks=masks)
    blocks = list(linear.apply_blocks(prepared, request, 32))
    with pytest.raises(MessageError, match="truncated"):
        device_linear.decrypt(blocks[:1], secret)
    assert masks.bytes == 0
    assert masks.find(prepared.public.id, "forward", 40 * N * 4) is None
    device_linear.decrypt(blocks, secret)
    assert masks.find(prepared.public.id, "forward", 40 * N * 4) is not None
    assert masks.find(prepared.public.id, "forward", 41 * N * 4) is None
    assert masks.find(prepared.public.id, "backward", 40 * N * 4) is None


def test_a_full_cache_takes_no_late_product():
    device = HostDevice()
    masks = device_linear.DeviceMasks(device, 4 * N * 4)
    late = masks.reserve(3, N, np.dtype(np.uint32))
    masks.insert(b"first", "forward", masks.reserve(2, N, np.dtype(np.uint32)))
    masks.insert(b"late", "forward", late)
    assert masks.bytes == 2 * N * 4


def test_the_size_of_a_cache_is_checked():
    with pytest.raises(InputError, match="max_bytes = -1: must not be negative"):
        device_linear.DeviceMasks(HostDevice(), -1)


# ---- secrets ----


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


# ---- refusals ----


def test_requests_are_refused_as_the_core_does():
    device, prepared = HostDevice(), layer(40, 11)
    held = device_linear.DeviceLayer(device, prepared)
    request, _ = linear.encrypt(batch(3, 11), prepared.public)
    other, _ = linear.encrypt(batch(3, 11), layer(40, 11, seed=1).public)
    wide, _ = linear.encrypt(batch(3, 11), layer(40, 11, "linear-w16").public)
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
    _core.linear_seal_request("linear-w8", message, "forward", prepared.public.id, REQUEST, MASK, 1, 11, True)
    return message.tobytes()


def test_a_request_of_another_width_is_refused():
    device, prepared = HostDevice(), layer(40, 11)
    held = device_linear.DeviceLayer(device, prepared)
    message = np.zeros(_core.linear_request_bytes("linear-w8", 12, 1), np.uint8)
    _core.linear_seal_request("linear-w8", message, "forward", prepared.public.id, REQUEST, MASK, 1, 12, True)
    for refuse in (lambda m: linear.apply_blocks(prepared, m), lambda m: device_linear.apply_blocks(held, m)):
        with pytest.raises(MessageError, match="request: 12 features, this layer takes 11 in the forward direction"):
            refuse(message.tobytes())


def test_requests_of_both_directions_are_not_answered_together():
    device, prepared = HostDevice(), layer(11, 11)
    held = device_linear.DeviceLayer(device, prepared)
    both = [
        device_linear.open_request(held, linear.encrypt(batch(1, 11), prepared.public, direction)[0])
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
    native = linear.encrypt(x, prepared.public)
    mine = device_linear.encrypt(device, x, prepared.public)
    cached = linear.MaskCache()
    linear.decrypt(
        linear.apply(prepared, (filling := linear.encrypt(x, prepared.public, "forward", cached))[0]), filling[1]
    )

    def spoil(request):
        blocks = list(linear.apply_blocks(prepared, request, 32))
        square, other = layer(40, 11, seed=1), layer(40, 11)
        sealed = lambda **changed: sealed_block(prepared, request, **changed)  # noqa: E731
        yield blocks[:1]
        yield blocks[1:]
        yield [blocks[0], blocks[0]]
        yield [blocks[0], blocks[1][:-1]]
        yield [blocks[0][:70]]
        yield [linear.apply(square, linear.encrypt(x, square.public)[0])]
        yield [linear.apply(other, linear.encrypt(x, other.public)[0])]
        yield [sealed(direction="backward", features=11, rows=11)]
        yield [sealed(tokens=4)]
        yield [sealed(mask=False)]
        yield [b"".join(blocks) + blocks[1]]

    for index, (wrong, expected) in enumerate(zip(spoil(mine[0]), spoil(native[0]), strict=True)):
        found = outcome(device_linear.decrypt, wrong, mine[1])
        assert found == outcome(linear.decrypt, expected, native[1]), index
        assert found[0] is MessageError
    check_result(prepared, x, device_linear.decrypt(linear.apply(prepared, mine[0]), mine[1]), "forward")

    after = device_linear.encrypt(device, x, prepared.public)
    whole = linear.apply(prepared, after[0])
    with pytest.raises(MessageError, match="starts at output 0, expected 40"):
        device_linear.decrypt([whole, whole], after[1])
    assert after[1].used


def sealed_block(prepared, request, direction="forward", tokens=3, features=40, rows=40, mask=True):
    message = np.zeros(_core.linear_block_bytes("linear-w8", rows, tokens, mask), np.uint8)
    _core.linear_seal_block(
        "linear-w8", message, direction, prepared.public.id, request[32:48], tokens, features, 0, rows, mask
    )
    return message.tobytes()


def test_a_mask_product_nobody_asked_for_is_refused():
    device, prepared, x = HostDevice(), layer(40, 11), batch(3, 11)
    masks = device_linear.DeviceMasks(device)
    for _ in range(2):
        request, secret = device_linear.encrypt(device, x, prepared.public, masks=masks)
        reply = linear.apply(prepared, request)
        kept = secret._mask
        if kept is not None:
            with pytest.raises(MessageError, match="carries a mask product nobody asked for"):
                device_linear.decrypt(sealed_block(prepared, request), secret)
        device_linear.decrypt(reply, secret)
    assert kept is not None


def test_batches_are_refused_as_the_core_does():
    device, public = HostDevice(), layer(40, 11).public

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
            linear.encrypt(x, public, direction)
        for given in (x, OnDevice(x)):
            with pytest.raises(InputError) as mine:
                device_linear.encrypt(device, given, public, direction)
            assert str(mine.value) == str(native.value)
    with pytest.raises(InputError, match="secret is of type str: expected the DeviceSecret that encrypt returned"):
        device_linear.decrypt(b"", "secret")


def test_too_many_tokens_are_refused():
    device, public = HostDevice(), layer(40, 1).public
    x = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), ((1 << 24) + 1, 1), (0, 4))
    with pytest.raises(InputError, match="x has 16777217 tokens: a request carries 1 to 16777216"):
        device_linear.encrypt_words(device, x, public, mask_seed=MASK)


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
    expected, _ = device_linear.encrypt(device, x, prepared.public, seed=SEED, mask_seed=MASK, request=REQUEST)
    before = x.copy()
    taken = []
    with monkeypatch.context() as patch:
        launch = device.launch
        patch.setattr(device, "launch", lambda *a, **k: (taken.append(a), launch(*a, **k)))
        request, secret = device_linear.encrypt(
            device, OnDevice(x), prepared.public, seed=SEED, mask_seed=MASK, request=REQUEST
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
        device, apart, prepared.public, seed=SEED, mask_seed=MASK, request=REQUEST
    )[0] == expected  # fmt: skip


def test_a_batch_on_another_device_is_refused():
    with pytest.raises(InputError, match="x lies on cuda:1 and is to be encrypted on cuda:0: move it there"):
        device_linear.encrypt(HostDevice(), OnDevice(batch(5, 11), (2, 1)), layer(40, 11).public)


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
    words, secret = device_linear.encrypt_words(device, device.upload(batch(3, 11)), prepared.public, mask_seed=MASK)
    data, mask = device_linear.apply(held, "forward", words, MASK)
    with pytest.raises(InputError, match=r"data is uint8 \(39, 9\); it must be uint8 \(40, 9\)"):
        device_linear.decrypt_words(data[1:], mask, secret)
    with pytest.raises(InputError, match=r"mask is int64 \(40, 2048\); it must be uint32 \(40, 2048\)"):
        device_linear.decrypt_words(data, device.empty(mask.shape, np.int64), secret)
    with pytest.raises(InputError, match="expected float16, float32 or float64"):
        device_linear.encrypt_words(device, np.ones((3, 11), np.int32), prepared.public, mask_seed=MASK)


def test_memory_that_does_not_suffice_is_named():
    prepared = layer(40, 11)
    request, _ = linear.encrypt(batch(3, 11), prepared.public)
    device = HostDevice()
    held = device_linear.DeviceLayer(device, prepared)
    device._limit = 5000
    blocks = device_linear.apply_blocks(held, request)
    with pytest.raises(EngineError, match="1 requests takes .* bytes"):
        list(blocks)
    with pytest.raises(EngineError, match="takes .* bytes"):
        device_linear.encrypt(device, batch(3, 11), prepared.public)

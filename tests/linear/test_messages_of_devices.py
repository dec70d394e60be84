"""Messages of the linear scheme whose bodies another engine reads and writes: sealed and opened by the core."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from linear_cases import MASK_SEED
from privtuner import _core
from privtuner.errors import InputError, MessageError

PRESETS = {"linear-w8": np.int8, "linear-w16": np.int16}


def exchange(preset: str, direction: str = "forward", known_mask: bool = False) -> tuple[bytes, list[bytes]]:
    """A request of 5 tokens to a layer (40, 24), and the reply in two blocks."""
    weights = np.random.default_rng(3).integers(-127, 128, (40, 24)).astype(PRESETS[preset])
    prepared = _core.QuantisedWeight(preset, bytes(range(16)), weights, np.full(40, 0.01))
    spec, masks = prepared.spec(), _core.MaskCache(1 << 24)
    x = np.random.default_rng(4).standard_normal((5, 24 if direction == "forward" else 40)).astype(np.float32)
    for _ in range(2 if known_mask else 1):
        request, secret = _core.encrypt(spec, direction, x, masks)
        job, decryption = _core.Job(prepared, request), _core.Decryption(secret)
        ends = [0, 32, 40] if direction == "forward" else [0, 24]
        blocks = [job.rows(begin, end - begin) for begin, end in itertools.pairwise(ends)]
        for block in blocks:
            decryption.feed(block)
        decryption.finish()  # the mask product is known from here on
    return request, blocks


def fresh_buffer(message: bytes, prefix: int, kind: type) -> bytearray | memoryview | npt.NDArray[np.uint8]:
    """The body of a message behind a prefix of rubbish."""
    content = bytearray(b"\xa5" * prefix + message[prefix:])
    return np.frombuffer(content, np.uint8) if kind is np.ndarray else kind(content)


def seal_block(preset, buffer, direction, layer, request, tokens, features, row_begin, row_count, mask_present):
    block = (buffer, request, tokens, row_begin, row_count, mask_present)
    _core.linear_seal_blocks(preset, direction, layer, features, [block])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("known_mask", [False, True])
@pytest.mark.parametrize("kind", [bytearray, memoryview, np.ndarray])
def test_sealed_again_a_message_is_the_same(preset, direction, known_mask, kind):
    request, blocks = exchange(preset, direction, known_mask)
    depth, rows = (24, 40) if direction == "forward" else (40, 24)
    fields = _core.linear_open_request(preset, request)
    assert fields.pop("seed") == request[MASK_SEED]
    identity = {"direction": direction, "layer": bytes(range(16)), "request": request[32:48]}
    assert fields == identity | {"tokens": 5, "features": depth, "mask_wanted": not known_mask}
    assert len(request) == _core.linear_request_bytes(preset, depth, 5)
    buffer = fresh_buffer(request, _core.LINEAR_REQUEST_PREFIX, kind)
    _core.linear_seal_request(preset, buffer, seed=request[MASK_SEED], **fields)
    assert bytes(buffer) == request

    reply, begin = b"".join(blocks), 0
    for block in blocks:
        fields = _core.linear_open_block(preset, reply[begin:])
        assert fields.pop("size") == len(block)
        count = fields["row_count"]
        assert len(block) == _core.linear_block_bytes(preset, count, 5, not known_mask)
        shape = {"tokens": 5, "features": rows, "row_begin": 0 if begin == 0 else 32, "row_count": count}
        assert fields == identity | shape | {"mask_present": not known_mask}
        buffer = fresh_buffer(block, _core.LINEAR_BLOCK_PREFIX, kind)
        seal_block(preset, buffer, **fields)
        assert bytes(buffer) == block
        begin += len(block)
    assert begin == len(reply)


@pytest.mark.parametrize("preset", PRESETS)
def test_threads_find_what_one_finds(preset):
    """Messages that are long enough to be shared out among threads: the same checksums, and every damage."""
    info = _core.preset_info(preset)
    features, tokens = 331, 3301  # 4.4 and 8.7 MB
    dtype = np.uint32 if info["word_bytes"] == 4 else np.uint64
    words = np.random.default_rng(0).integers(0, info["q"], features * tokens, dtype)
    fields = {"direction": "forward", "layer": bytes(16), "request": bytes(16), "tokens": tokens, "features": features}
    sealed, before = {}, _core.num_threads()
    try:
        for threads in (1, 2, 5):
            _core.set_num_threads(threads)
            message = sealed[threads] = bytearray(bytes(112) + words.tobytes())
            _core.linear_seal_request(preset, message, seed=bytes(32), mask_wanted=False, **fields)
            assert message == sealed[1]
            copy = bytearray(len(message))
            assert _core.linear_open_request(preset, message, copy)["tokens"] == tokens
            assert copy == message
            for place in (
                65,
                73,
                111,
                112,
                len(message) // 4,
                len(message) // 2 + 1,
                len(message) - 9,
                len(message) - 1,
            ):
                message[place] ^= 4
                with pytest.raises(MessageError):
                    _core.linear_open_request(preset, message)
                message[place] ^= 4
            # The ends of the threads' shares, whatever they are, and what is between.
            for place in {0, 1, len(words) - 1, *range(len(words) // 4 - 3, len(words), len(words) // 4)}:
                bad = bytearray(message)
                np.frombuffer(bad, dtype, offset=112)[place] = info["q"]
                _core.linear_seal_request(preset, bad, seed=bytes(32), mask_wanted=False, **fields)
                with pytest.raises(MessageError, match="a residue is not below q"):
                    _core.linear_open_request(preset, bad)
    finally:
        _core.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_blocks_are_sealed_at_once(threads):
    before = _core.num_threads()
    _core.set_num_threads(threads)
    try:
        rows, tokens = 64, 2000
        size = _core.linear_block_bytes("linear-w8", rows, tokens, False)
        content = np.random.default_rng(0).integers(0, 256, (9, size), np.uint8)  # 3.4 MB: of several threads
        buffers = [bytearray(row) for row in content]
        layer, requests = bytes(16), [bytes([i] * 16) for i in range(9)]
        blocks = [(buffers[i], requests[i], tokens, 64 * i, rows, False) for i in range(9)]
        _core.linear_seal_blocks("linear-w8", "backward", layer, 9 * 64, blocks)
        for i, buffer in enumerate(buffers):
            alone = bytearray(content[i])
            seal_block("linear-w8", alone, "backward", layer, requests[i], tokens, 9 * 64, 64 * i, rows, False)
            assert buffer == alone
            assert buffer[88:] == content[i, 88:].tobytes()
            assert _core.linear_open_block("linear-w8", buffer)["row_begin"] == 64 * i
    finally:
        _core.set_num_threads(before)
    with pytest.raises(InputError, match="for a reply block of"):
        _core.linear_seal_blocks(
            "linear-w8", "backward", layer, 9 * 64, [*blocks[:2], (*blocks[2][:2], 1999, 0, 1, True)]
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_messages_are_copied_while_they_are_checked(preset):
    request, blocks = exchange(preset)
    reply = b"".join(blocks)
    for message, size, read in [
        (request, len(request), _core.linear_open_request),
        (blocks[1], len(blocks[1]), _core.linear_open_block),
        (reply, len(blocks[0]), _core.linear_open_block),
    ]:
        copy = bytearray(b"\xa5" * (len(message) + 3))
        assert read(preset, message, copy) == read(preset, message)
        assert copy[:size] == message[:size]
        assert copy[size:] == b"\xa5" * (len(copy) - size)  # nothing but the one message
        with pytest.raises(InputError, match="a buffer of .* bytes for a message of"):
            read(preset, message, bytearray(len(message) - 1))
        with pytest.raises(TypeError, match="writable, contiguous"):
            read(preset, message, bytes(len(message)))
        damaged = bytearray(message)
        damaged[size - 1] ^= 1
        with pytest.raises(MessageError):
            read(preset, damaged, copy)


@pytest.mark.parametrize("place", [0, 243, 244, 245, 499, 500, 501, 2047, -1])  # around steps of 1024 bytes
def test_a_residue_is_looked_at_wherever_it_stands(place):
    q = _core.preset_info("linear-w8")["q"]
    words = np.full(3000, q - 1, np.uint32)
    for value in (q - 1, q, 2**32 - 1):
        words[place] = value
        message = bytearray(b"\xa5" * 112 + words.tobytes())
        fields = {"direction": "forward", "layer": bytes(16), "request": bytes(16), "tokens": 3, "features": 1000}
        _core.linear_seal_request("linear-w8", message, seed=bytes(32), mask_wanted=False, **fields)
        # A block whose words stand at no multiple of their length: 7 tokens of 3 bytes, one row.
        mask = np.full(2048, q - 1, np.uint32)
        mask[place % 2048] = value
        block = bytearray(b"\xa5" * (88 + 21) + mask.tobytes())
        seal_block("linear-w8", block, "forward", bytes(16), bytes(16), 7, 1, 0, 1, True)
        for sealed, read in [(message, _core.linear_open_request), (block, _core.linear_open_block)]:
            if value < q:
                read("linear-w8", sealed)
                continue
            for copy in (None, bytearray(len(sealed))):
                with pytest.raises(MessageError, match=f"a residue is not below q = {q}"):
                    read("linear-w8", sealed, copy)


@pytest.mark.parametrize("preset", PRESETS)
def test_damaged_messages(preset):
    request, blocks = exchange(preset)
    for message, read in [(request, _core.linear_open_request), (blocks[1], _core.linear_open_block)]:
        read(preset, bytearray(message))
        for size in (0, 71, 72, len(message) - 1):
            with pytest.raises(MessageError, match="truncated"):
                read(preset, message[:size])
        for place in [*range(0, 120, 3), len(message) // 2, len(message) - 1]:
            damaged = bytearray(message)
            damaged[place] ^= 1
            with pytest.raises(MessageError):
                read(preset, damaged)
        with pytest.raises(MessageError, match="made with other parameters"):
            read(next(name for name in PRESETS if name != preset), message)
    with pytest.raises(MessageError, match="1 bytes too many"):
        _core.linear_open_request(preset, request + b"\0")
    with pytest.raises(MessageError, match="expected a message of kind request, got reply"):
        _core.linear_open_request(preset, blocks[0])
    with pytest.raises(InputError, match="unknown preset 'linear'"):
        _core.linear_open_request("linear", request)
    # Well sealed, but a residue is not one.
    body = bytearray(request)
    body[-8:] = b"\xff" * 8
    _core.linear_seal_request(preset, body, **_core.linear_open_request(preset, request))
    with pytest.raises(MessageError, match="a residue is not below q"):
        _core.linear_open_request(preset, body)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"direction": "sideways"}, InputError, "'sideways'"),
        ({"layer": b"short"}, InputError, "a layer id has 16 bytes"),
        ({"request": b""}, InputError, "a request id has 16 bytes"),
        ({"seed": bytes(16)}, InputError, "a mask seed has 32 bytes"),
        ({"tokens": 0}, InputError, "0 tokens: choose 1"),
        ({"tokens": 6}, InputError, "for a request of"),
        ({"tokens": 2**24 + 1}, InputError, "16777217 tokens"),
        ({"features": 0}, InputError, "0 features"),
        ({"features": 65537}, InputError, "65537 features: choose 1 to 65536"),
        ({"preset": "linear-w16"}, InputError, "for a request of"),
        ({"buffer": b"read-only"}, TypeError, "writable, contiguous"),
        ({"buffer": memoryview(bytearray(2048))[::2]}, TypeError, "writable, contiguous"),
        ({"buffer": np.zeros(100, np.uint16)}, TypeError, "writable, contiguous"),
    ],
)
def test_requests_that_cannot_be_sealed(change, error, message):
    request, _ = exchange("linear-w8")
    arguments = {"preset": "linear-w8", "buffer": bytearray(request)} | _core.linear_open_request("linear-w8", request)
    with pytest.raises(error, match=message):
        _core.linear_seal_request(**(arguments | change))
    if isinstance(change.get("buffer"), bytes):
        return
    assert bytes(arguments["buffer"]) == request  # nothing was written


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"direction": ""}, InputError, "choose 'forward' or 'backward'"),
        ({"layer": bytes(17)}, InputError, "a layer id has 16 bytes"),
        ({"request": bytes(15)}, InputError, "a request id has 16 bytes"),
        ({"tokens": 0}, InputError, "0 tokens: choose 1"),
        ({"features": 0}, InputError, "0 features"),
        ({"features": 31}, InputError, "32 rows from 0: there are 31"),
        ({"row_begin": 9}, InputError, "32 rows from 9: there are 40"),
        ({"row_begin": 2**32 - 1}, InputError, "there are 40"),
        ({"row_count": 0}, InputError, "0 rows: choose 1"),
        ({"row_count": 31}, InputError, "for a reply block of"),
        ({"mask_present": False}, InputError, "for a reply block of"),
        ({"buffer": b"read-only"}, TypeError, "writable, contiguous"),
    ],
)
def test_blocks_that_cannot_be_sealed(change, error, message):
    _, (block, _) = exchange("linear-w8")
    fields = _core.linear_open_block("linear-w8", block)
    del fields["size"]
    arguments = {"preset": "linear-w8", "buffer": bytearray(block)} | fields
    with pytest.raises(error, match=message):
        seal_block(**(arguments | change))
    assert bytes(arguments["buffer"]) == block


def test_sizes_of_messages():
    assert (_core.LINEAR_REQUEST_PREFIX, _core.LINEAR_BLOCK_PREFIX) == (112, 88)
    for preset in PRESETS:
        info = _core.preset_info(preset)
        assert _core.linear_request_bytes(preset, 3, 7) == 112 + 21 * info["word_bytes"]
        assert _core.linear_block_bytes(preset, 3, 7, False) == 88 + 21 * info["reply_bytes"]
        assert _core.linear_block_bytes(preset, 3, 7, True) == 88 + 3 * (
            7 * info["reply_bytes"] + info["n"] * info["word_bytes"]
        )
        assert 0 < info["hash"] < 2**64
    for call, arguments in [
        (_core.linear_request_bytes, (0, 1)),
        (_core.linear_request_bytes, (1, 2**24 + 1)),
        (_core.linear_block_bytes, (0, 1, True)),
        (_core.linear_block_bytes, (1, 0, True)),
    ]:
        with pytest.raises(InputError, match="choose 1 to"):
            call("linear-w8", *arguments)

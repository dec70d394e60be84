"""How fast is the GPU? Against PyTorch's plain product, against the roofline, against this machine's processor.

    python benchmarks/gpu.py --all [--json F] [--plot F.png] [--device cuda:0]
    python benchmarks/gpu.py ntt ckks                     # some parts: linear, bytes, llama, ntt, ckks, chebyshev

Needs a GPU, CuPy, and for the plain products PyTorch's CUDA build. Where one is missing, what cannot be measured is
listed as such, with the reason. Times are of the device, by events, with data and weights resident; those from and to
messages in host memory are of the host, beside the copies over the bus. Before a part is timed, its results are
compared with the processor's, bit for bit. Ceilings are measured in the same run: a copy for memory, PyTorch's int8
product for the tensor cores.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import harness
from harness import Record, progress
from privtuner import ckks, cuda, linear, system
from privtuner.cuda import linear as kernels
from privtuner.cuda import ntt
from privtuner.cuda.client import CudaClient
from privtuner.cuda.evaluator import CudaEvaluator
from privtuner.cuda.server import CudaServer

TOKENS = 8192
RUNS = 7
SEED = bytes(range(32))

# Stacked layers of one transformer block, (d_out, d_in): query/key/value, output, gate/up, down.
MODELS = {
    "Llama-3.2-1B": (16, ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192))),
    "Llama-3-8B": (32, ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))),
}
Models = dict[str, tuple[int, tuple[tuple[int, int], ...]]]
STEPS = {
    "Llama-3.2-1B": (16, TOKENS, MODELS["Llama-3.2-1B"][1]),
    "MiniLM-L6": (6, 1024, ((1152, 384), (384, 384), (1536, 384), (384, 1536))),
}
"""Blocks, tokens of a step, layers of a block."""
Steps = dict[str, tuple[int, int, tuple[tuple[int, int], ...]]]
SETS = ((1 << 14, 8, (None, None)), (1 << 16, 24, (1.5, 1.2)))
"""Ring, limbs, milliseconds to reach of a product and a rotation."""
Sets = tuple[tuple[int, int, tuple[float | None, float | None]], ...]
TOKENS_A_SECOND = {"Llama-3.2-1B": 20_000, "Llama-3-8B": 3_000}
LANES = 64  # 32-bit multiply-adds a cycle of a multiprocessor
BUTTERFLY = 24  # 32-bit operations: a 64-bit high product, two low ones, two corrections


class Gpu:
    """The device, its ceilings, and times by its events."""

    def __init__(self, device: Any) -> None:
        self.device, self.cupy = device, device.xp
        self.torch = _torch()
        self.memory = self._memory_bandwidth()
        self.bytes_multiplied = self._int8_rate()
        clock = self.cupy.cuda.runtime.getDeviceProperties(int(device.name[5:]))["clockRate"] * 1e3
        self.integers = device.multiprocessors * LANES * clock

    def milliseconds(self, run: Callable[[], object], runs: int = RUNS) -> float:
        """Median of ``runs`` after two that do not count."""
        events = [(self.cupy.cuda.Event(), self.cupy.cuda.Event()) for _ in range(runs + 2)]
        for start, end in events:
            start.record()
            run()
            end.record()
        events[-1][1].synchronize()
        return statistics.median(self.cupy.cuda.get_elapsed_time(*pair) for pair in events[2:])

    def _memory_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy."""
        words = self.device.empty((1 << 27,), np.uint64)
        copy = self.device.empty((1 << 27,), np.uint64)
        words.fill(1)

        def run() -> None:
            copy[...] = words

        return 2 * words.nbytes / self.milliseconds(run) * 1e3

    def _int8_rate(self) -> float | None:
        """Operations a second of PyTorch's int8 product with 32-bit sums."""
        if self.torch is None:
            return None
        a = self.torch.ones(8192, 8192, dtype=self.torch.int8, device=self.device.name)
        return 2 * 8192**3 / self.milliseconds(lambda: self.torch._int_mm(a, a.T)) * 1e3

    def roof(self, nbytes: float, operations: float, peak: float | None) -> float:
        """The least milliseconds that so many bytes and operations take."""
        return 1e3 * max(nbytes / self.memory, operations / peak if peak else 0.0)


def _torch() -> Any:
    """PyTorch if it can use the GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        return None
    return torch if torch.cuda.is_available() else None


class Layer:
    """A layer of random weights on the device, and requests of random words of ``tokens`` tokens in both directions."""

    def __init__(self, gpu: Gpu, d_out: int, d_in: int, tokens: int = TOKENS) -> None:
        rng = np.random.default_rng(0)
        self.gpu, self.d_out, self.d_in, self.tokens = gpu, d_out, d_in, tokens
        self.prepared = linear.prepare(rng.standard_normal((d_out, d_in), np.float32))
        self.layer = kernels.DeviceLayer(gpu.device, self.prepared)
        self.x = {
            "forward": gpu.device.upload(rng.standard_normal((tokens, d_in), np.float32)),
            "backward": gpu.device.upload(rng.standard_normal((tokens, d_out), np.float32)),
        }

    def encrypt(self, direction: Any) -> tuple[Any, Any]:
        """The owner's encryption of a batch on the device: words and what decrypts them."""
        return kernels.encrypt_words(self.gpu.device, self.x[direction], self.prepared.spec, direction, mask_seed=SEED)

    def milliseconds(self, direction: Any, mask: bool) -> float:
        """Of the server's product, with the product of the mask or without it (the owner knows it)."""
        words, _ = self.encrypt(direction)
        seed = SEED if mask else None
        return self.gpu.milliseconds(lambda: kernels.apply(self.layer, direction, words, seed))

    def owner_milliseconds(self, direction: Any) -> tuple[float, float]:
        """Of the owner's encryption and decryption, batch, words and result on the device."""
        words, secret = self.encrypt(direction)
        data, mask = kernels.apply(self.layer, direction, words, SEED)
        kernels.decrypt_words(data, mask, secret)
        encrypting = self.gpu.milliseconds(lambda: self.encrypt(direction))
        waiting = [self.encrypt(direction)[1] for _ in range(RUNS + 2)]  # each secret decrypts once
        decrypting = self.gpu.milliseconds(lambda: kernels.decrypt_words(data, mask, waiting.pop()))
        return encrypting, decrypting

    def operations(self, mask: bool) -> int:
        """Byte operations: four planes of a 32-bit residue."""
        return 2 * 4 * self.d_out * self.d_in * self._columns(mask)

    def bytes(self, direction: str, mask: bool) -> int:
        """That must be read or written: words in, a reply out, weights."""
        wide, out = (self.d_in, self.d_out) if direction == "forward" else (self.d_out, self.d_in)
        mask_out = 4 * (self._columns(mask) - self.tokens) * out
        return 4 * self.tokens * wide + 3 * self.tokens * out + mask_out + self.d_out * self.d_in

    def _columns(self, mask: bool) -> int:
        return self.tokens + (linear.ring("linear-w8")[0] if mask else 0)

    def record(self, name: str, milliseconds: float, mask: bool, **other: Any) -> Record:
        """A record of a forward product with the roofline beside it."""
        nbytes, operations = self.bytes("forward", mask), self.operations(mask)
        return Record(
            name,
            milliseconds,
            "ms",
            d_in=self.d_in,
            d_out=self.d_out,
            tokens=self.tokens,
            bytes=nbytes,
            operations=operations,
            of_roof=self.gpu.roof(nbytes, operations, self.gpu.bytes_multiplied) / milliseconds,
            **other,
        )


def check_linear(gpu: Gpu, size: int, block_rows: int = 32) -> None:
    """The reply to a request is the processor's, block by block, in both directions, with a mask."""
    layer = Layer(gpu, size, size, tokens=256)
    for direction in ("forward", "backward"):
        x = gpu.device.download(layer.x[direction])
        request, secret = linear.encrypt(x, layer.prepared.spec, direction=direction)
        reply = list(kernels.apply_blocks(layer.layer, request, block_rows))
        expected = list(linear.apply_blocks(layer.prepared, request, block_rows))
        assert reply == expected, f"{direction}: the replies differ"
        linear.decrypt(reply, secret)


def linear_part(gpu: Gpu, size: int = 4096, tokens: int = TOKENS) -> Iterator[Record]:
    """One square layer: the server's product, both halves of the owner."""
    check_linear(gpu, size)
    layer = Layer(gpu, size, size, tokens)
    plain = _plain_product(gpu, layer)
    for mask in (True, False):
        what = "apply, linear-w8" + (", with the product of the mask" if mask else ", mask product known")
        time_taken = layer.milliseconds("forward", mask)
        against = {} if plain is None else {"reference": "PyTorch bf16", "ratio": time_taken / plain}
        yield layer.record(what, time_taken, mask, target=4.0 if mask else None, **against)
    if plain is not None:
        yield Record("PyTorch bf16 product of that shape", plain, "ms", d_in=size, d_out=size, tokens=tokens)
    shape = {"d_in": size, "d_out": size, "tokens": tokens}
    product = layer.milliseconds("forward", mask=False)
    yield _owner_record("owner's encrypt + decrypt", layer.owner_milliseconds("forward"), product, **shape)


def bytes_part(gpu: Gpu, size: int = 2048, tokens: int = TOKENS, steps: Steps = STEPS) -> Iterator[Record]:
    """From and to messages, owner and server on one GPU: the parts of an exchange, all exchanges of training steps."""
    check_linear(gpu, size)
    server, owner = CudaServer([gpu.device]), CudaClient(gpu.device)
    layer = Layer(gpu, size, size, tokens)
    _exchange(server, owner, layer, "forward")  # brings the product of the mask, once
    runs = [_exchange(server, owner, layer, "forward") for _ in range(RUNS + 1)][1:]
    request, reply = runs[0].request, runs[0].reply
    inwards, outwards = _copies(gpu, request)
    reply_inwards, reply_outwards = _copies(gpu, reply)
    for place, (name, copies, nbytes) in enumerate(
        (
            ("encrypt to bytes", outwards, request),
            ("apply from and to bytes", inwards + reply_outwards, request + reply),
            ("decrypt from bytes", reply_inwards, reply),
        )
    ):
        taken = 1e3 * statistics.median(run.seconds[place] for run in runs)
        yield Record(
            f"{name}, mask product known",
            taken,
            "ms",
            reference="its copies over the bus",
            ratio=taken / copies,
            d_in=size,
            d_out=size,
            tokens=tokens,
            note=f"{nbytes / 1e6:.3g} MB over the bus in {copies:.3g} ms",
        )
    for name, (blocks, rows, shapes) in steps.items():
        seconds = 0.0
        for d_out, d_in in shapes:
            progress(f"{name}: {d_out} x {d_in}")
            layer = Layer(gpu, d_out, d_in, rows)
            for direction in ("forward", "backward"):
                _exchange(server, owner, layer, direction)
                seconds += blocks * min(sum(_exchange(server, owner, layer, direction).seconds) for _ in range(2))
        yield Record(f"all exchanges of a training step, {name}", seconds, "s", tokens=rows)
    server.close()


class _Exchange(NamedTuple):
    seconds: tuple[float, float, float]  # to encrypt, to apply, to decrypt
    request: int  # bytes
    reply: int


def _exchange(server: CudaServer, owner: CudaClient, layer: Layer, direction: Any) -> _Exchange:
    start = time.perf_counter()
    request, secret = owner.encrypt(layer.x[direction], layer.prepared.spec, direction)
    sent = time.perf_counter()
    blocks = list(server.answer(layer.prepared, request))
    answered = time.perf_counter()
    owner.decrypt(blocks, secret)  # its result lies on the device when it returns
    seconds = (sent - start, answered - sent, time.perf_counter() - answered)
    return _Exchange(seconds, len(request), sum(map(len, blocks)))


def _copies(gpu: Gpu, nbytes: int) -> tuple[float, float]:
    """Milliseconds of a copy from page-locked memory to the device, and back."""
    host, array = gpu.device.page_locked(nbytes), gpu.device.empty((nbytes,), np.uint8)
    inwards = gpu.milliseconds(lambda: gpu.device.copy_in(host, array))
    return inwards, gpu.milliseconds(lambda: gpu.device.copy_out(array, host))


def _plain_product(gpu: Gpu, layer: Layer) -> float | None:
    if gpu.torch is None:
        return None
    options = {"dtype": gpu.torch.bfloat16, "device": gpu.device.name}
    x, w = gpu.torch.ones(layer.tokens, layer.d_in, **options), gpu.torch.ones(layer.d_out, layer.d_in, **options)
    return gpu.milliseconds(lambda: gpu.torch.nn.functional.linear(x, w))


def _owner_record(name: str, times: tuple[float, float], product: float, **shape: Any) -> Record:
    """The owner's encryption and decryption beside the server's product, the mask's product known to the owner."""
    return Record(
        name,
        sum(times),
        "ms",
        reference="apply, mask product known",
        ratio=sum(times) / product,
        target=0.5,
        note=f"{times[0]:.3g} + {times[1]:.3g} ms",
        **shape,
    )


def llama_part(gpu: Gpu, models: Models = MODELS, tokens: int = TOKENS) -> Iterator[Record]:
    """All frozen linear layers of two models, forward and backward: the server's tokens a second, the owner's part."""
    for name, (blocks, shapes) in models.items():
        product, roof = {False: 0.0, True: 0.0}, {False: 0.0, True: 0.0}  # without and with products of masks
        encrypting = decrypting = 0.0
        for d_out, d_in in shapes:
            progress(f"{name}: {d_out} x {d_in}")
            layer = Layer(gpu, d_out, d_in, tokens)
            for direction in ("forward", "backward"):
                for mask in product:
                    product[mask] += layer.milliseconds(direction, mask)
                    roof[mask] += gpu.roof(layer.bytes(direction, mask), layer.operations(mask), gpu.bytes_multiplied)
                times = layer.owner_milliseconds(direction)
                encrypting, decrypting = encrypting + times[0], decrypting + times[1]
        for mask, what in ((False, "mask products known"), (True, "with mask products")):
            yield Record(
                f"{name}, forward + backward, {what}",
                tokens / (product[mask] * blocks) * 1e3,
                "tokens/s",
                tokens=tokens,
                of_roof=roof[mask] / product[mask],
                note="" if mask else f"to reach: {TOKENS_A_SECOND.get(name)} or more",
            )
        shape = f"{name}, one block forward + backward, owner's encrypt + decrypt"
        yield _owner_record(shape, (encrypting, decrypting), product[False], tokens=tokens)


def ntt_part(gpu: Gpu, n: int = 1 << 16, rows: int = 1000) -> Iterator[Record]:
    """Many transforms at once."""
    parameters = ckks.Parameters.secure(depth=1, ring_dimension=n)
    rng = np.random.default_rng(0)
    small = ntt.Transforms(gpu.device, n, parameters._core.primes, 8)
    words = rng.integers(0, parameters._core.primes[0], n, dtype=np.uint64)
    got = gpu.device.upload(words)
    small.forward(got, gpu.device.upload(np.zeros(1, np.uint32)))
    parameters._core.transform(0, words)
    assert (gpu.device.download(got) == words).all(), "the transforms differ"
    primes = _primes(61, n, 8)
    transforms = ntt.Transforms(gpu.device, n, primes, 8)
    batch = gpu.device.upload(rng.integers(0, primes[-1], (rows, n), dtype=np.uint64))
    order = gpu.device.upload(np.arange(len(primes), dtype=np.uint32))
    for name, run in (("forward", transforms.forward), ("inverse", transforms.inverse)):
        taken = gpu.milliseconds(lambda run=run: run(batch, order))
        nbytes, operations = 4 * rows * n * 8, rows * n // 2 * (n.bit_length() - 1) * BUTTERFLY
        yield Record(
            f"{name} NTT, N = {n}, {rows} rows of 61 bits, {len(primes)} primes",
            taken,
            "ms",
            target=2.5 if name == "forward" else None,
            bytes=nbytes,
            operations=operations,
            of_roof=gpu.roof(nbytes, operations, gpu.integers) / taken,
        )


def _primes(bits: int, n: int, count: int) -> list[int]:
    """The largest primes below 2^bits that are 1 modulo 2 n."""
    found: list[int] = []
    candidate = (1 << bits) - (1 << bits) % (2 * n) + 1
    while len(found) < count:
        candidate -= 2 * n
        if candidate % 3 and pow(2, candidate - 1, candidate) == 1 and pow(3, candidate - 1, candidate) == 1:
            found.append(candidate)
    return found


def _circuit(ring: int, limbs: int) -> tuple[Any, Any, Any]:
    parameters = ckks.Parameters.secure(depth=limbs - 1, ring_dimension=ring)
    secret = ckks.SecretKey(parameters)
    return parameters, secret, secret.evaluation_keys(rotations=(1,))


def ckks_part(gpu: Gpu, sets: Sets = SETS) -> Iterator[Record]:
    """Multiplication and rotation of one ciphertext."""
    for ring, limbs, targets in sets:
        progress(f"CKKS keys, N = {ring}, {limbs} limbs")
        yield from _primitives(gpu, ring, limbs, targets)


def _primitives(gpu: Gpu, ring: int, limbs: int, targets: tuple[float | None, float | None]) -> Iterator[Record]:
    parameters, secret, keys = _circuit(ring, limbs)
    native, evaluator = ckks.Evaluator(parameters, keys), CudaEvaluator(gpu.device, parameters, keys)
    values = np.random.default_rng(0).uniform(-1, 1, (parameters.slots, 1))
    x, y = secret.encrypt(values), secret.encrypt(values)
    a, b = evaluator.upload(x), evaluator.upload(y)
    specials = parameters._core.special_count
    digits = -(-limbs // parameters._core.digit_limbs)
    key_bytes = 2 * digits * (limbs + specials) * ring * 8
    product = ("multiply, relinearise, rescale", lambda: evaluator.multiply(a, b), lambda: native.multiply(x, y))
    rotation = ("rotate", lambda: evaluator.rotate(a, 1), lambda: native.rotate(x, 1))
    for (name, ours, theirs), target in zip((product, rotation), targets, strict=True):
        assert evaluator.download(ours()).to_bytes() == theirs().to_bytes(), f"{name}: the ciphertexts differ"
        taken = gpu.milliseconds(ours)
        start = time.perf_counter()
        theirs()
        processor = 1e3 * (time.perf_counter() - start)
        # Limbs taken apart, digits in all other primes, what is divided out of two components, what is left of it.
        divided = specials + (name != "rotate")
        rows = limbs + digits * (limbs + specials) - limbs + 2 * divided + 2 * (limbs - divided + specials)
        operations = rows * ring // 2 * (ring.bit_length() - 1) * BUTTERFLY
        nbytes = key_bytes + 4 * rows * ring * 8
        yield Record(
            f"{name}, N = {ring}, {limbs} limbs",
            taken,
            "ms",
            reference="this processor",
            ratio=taken / processor,
            bytes=nbytes,
            operations=operations,
            of_roof=gpu.roof(nbytes, operations, gpu.integers) / taken,
            note="" if target is None else f"to reach: {target} ms",
        )


def chebyshev_part(gpu: Gpu, ring: int = 1 << 14, count: int = 8, times: int = 64) -> Iterator[Record]:
    """A polynomial of degree 27 on many ciphertexts; the processor's time is that of ``count``, times ``times``."""
    parameters, secret, keys = _circuit(ring, 8)
    native, evaluator = ckks.Evaluator(parameters, keys), CudaEvaluator(gpu.device, parameters, keys)
    polynomial = ckks.Polynomial(np.random.default_rng(0).uniform(-0.1, 0.1, 28), "chebyshev", (-1.0, 1.0))
    x = secret.encrypt(np.random.default_rng(1).uniform(-1, 1, (parameters.slots, count)))
    some = evaluator.upload(x)
    assert (
        evaluator.download(evaluator.polynomial(some, polynomial)).to_bytes()
        == native.polynomial(x, polynomial).to_bytes()
    )
    many = evaluator.concatenate([some] * times)
    taken = gpu.milliseconds(lambda: evaluator.polynomial(many, polynomial), runs=3)
    system.set_num_threads(2)
    start = time.perf_counter()
    native.polynomial(x, polynomial)
    processor = times * 1e3 * (time.perf_counter() - start)
    yield Record(
        f"Chebyshev, degree 27, {count * times} ciphertexts, N = {ring}, 8 limbs",
        taken,
        "ms",
        reference=f"this processor, 2 threads, {count} ciphertexts times {times}",
        ratio=taken / processor,
    )


PARTS: dict[str, Callable[[Gpu], Iterator[Record]]] = {
    "linear": linear_part,
    "bytes": bytes_part,
    "llama": llama_part,
    "ntt": ntt_part,
    "ckks": ckks_part,
    "chebyshev": chebyshev_part,
}


def main() -> int:
    """Measure what was asked for; 1 if there is no GPU to measure it on."""
    parser = harness.parser_of(__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--all", action="store_true", help="every part")
    parser.add_argument("--device", default="cuda:0", metavar="D", help="(default %(default)s)")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown or not (options.parts or options.all):
        parser.error(f"name parts among {', '.join(PARTS)}, or pass --all")
    status = cuda.status()
    if not status.available:
        records = [Record(name, None, "", note=status.reason) for name in (PARTS if options.all else options.parts)]
        harness.finish(records, options, "GPU")
        return 1
    (device,) = cuda.devices(options.device)
    records = []
    with device.active():
        gpu = Gpu(device)
        for name in PARTS if options.all else options.parts:
            progress(f"{name} ...")
            records += PARTS[name](gpu)
    records.append(Record("ceiling: memory, a copy", gpu.memory / 1e12, "TB/s"))
    if gpu.bytes_multiplied:
        records.append(Record("ceiling: int8 product of PyTorch", gpu.bytes_multiplied / 1e12, "T operations/s"))
    records = [dataclasses.replace(record, device=status.reason) for record in records]
    harness.finish(records, options, f"GPU: {status.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

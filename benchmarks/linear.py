"""How fast is an encrypted linear layer? Against PyTorch's plain product and against other encrypted products.

    python benchmarks/linear.py [--quick] [--json F] [--plot F.png] [--threads N]

Both sides of every ratio run in turn in this process with the same number of threads. Peers that are not installed are
named and left out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

import harness
from harness import Record, median_ratio, paired, progress
from privtuner import linear, system
from privtuner.commands import info

# Largest ratio to reach for `apply` at d = 2048, 2048 tokens, by path: (against float32, against bfloat16).
APPLY_TARGETS = {
    "amx": (0.6, 3.5),
    "avx512ifma": (3.0, None),
    "avx512": (3.0, None),
    "avx2": (8.0, None),
    "portable": (None, None),
}


class Layer:
    """One layer of random weights, a batch, and the clear product in float32 and bfloat16."""

    def __init__(self, d_out: int, d_in: int, tokens: int, preset: str = "linear-w8") -> None:
        rng = np.random.default_rng(0)
        self.d_out, self.d_in, self.tokens = d_out, d_in, tokens
        self.weight = rng.normal(size=(d_out, d_in)).astype(np.float32)
        self.x = rng.normal(size=(tokens, d_in)).astype(np.float32)
        self.prepared = linear.prepare(self.weight, preset)
        self.clear = torch.from_numpy(self.x), torch.from_numpy(self.weight)
        self.clear_bf16 = tuple(tensor.bfloat16() for tensor in self.clear)
        self.masks = linear.MaskCache()
        request, secret = linear.encrypt(self.x, self.prepared.spec, masks=self.masks)
        linear.decrypt(linear.apply(self.prepared, request), secret)

    def float32(self) -> None:
        """The clear product, as PyTorch users run it."""
        torch.nn.functional.linear(*self.clear)

    def bfloat16(self) -> None:
        """The clear product in bfloat16."""
        torch.nn.functional.linear(*self.clear_bf16)

    def record(self, name: str, value: float, unit: str, **fields: object) -> Record:
        """A record with this layer's shape and the threads in force."""
        shape = {
            "d_in": self.d_in,
            "d_out": self.d_out,
            "tokens": self.tokens,
            "threads": system.get_num_threads(),
        }
        return Record(name, value, unit, **(shape | fields))  # type: ignore[arg-type]


def server(layer: Layer, runs: int) -> Iterator[Record]:
    """Server's time on every usable path, with and without the mask half."""
    usable = [path["name"] for path in info.collect()["isa"]["paths"] if path["usable"]]
    best = system.active_isa()
    full, _ = linear.encrypt(layer.x, layer.prepared.spec)
    data_only, _ = linear.encrypt(layer.x, layer.prepared.spec, masks=layer.masks)
    for isa in reversed(usable):
        progress(f"apply on {isa}")
        system.set_isa(isa)
        candidates = {
            "float32": layer.float32,
            "bfloat16": layer.bfloat16,
            "full": lambda: linear.apply(layer.prepared, full),
            "data": lambda: linear.apply(layer.prepared, data_only),
        }
        seconds = paired(candidates, runs if isa in ("amx", "avx512ifma", "avx512") else max(1, runs // 3))
        to_float32, to_bfloat16 = APPLY_TARGETS[isa]
        for name, reference, target in (
            ("full", "float32", to_float32),
            ("full", "bfloat16", to_bfloat16),
            ("data", "float32", None),
        ):
            yield layer.record(
                "apply" if name == "full" else "apply, mask product known",
                statistics.median(seconds[name]) * 1e3,
                "ms",
                reference=f"torch {reference}",
                ratio=median_ratio(seconds[name], seconds[reference]),
                target=target,
                isa=isa,
            )
    system.set_isa(best)


def owner(layer: Layer, runs: int) -> Iterator[Record]:
    """Owner's encrypt + decrypt, mask expanded each time and mask product known."""
    progress("owner's encrypt and decrypt")
    for masks, name in ((None, "encrypt + decrypt"), (layer.masks, "encrypt + decrypt, mask product known")):
        encrypting, decrypting, clear = [], [], []
        for _ in range(runs + 1):
            start = time.perf_counter()
            layer.float32()
            middle = time.perf_counter()
            request, secret = linear.encrypt(layer.x, layer.prepared.spec, masks=masks)
            end = time.perf_counter()
            reply = linear.apply(layer.prepared, request)
            begin = time.perf_counter()
            linear.decrypt(reply, secret)
            decrypting.append(time.perf_counter() - begin)
            clear.append(middle - start)
            encrypting.append(end - middle)
        both = [e + d for e, d in zip(encrypting[1:], decrypting[1:], strict=True)]
        yield layer.record(
            name,
            statistics.median(both) * 1e3,
            "ms",
            reference="torch float32",
            ratio=median_ratio(both, clear[1:]),
            target=0.35,
            isa=system.active_isa(),
            note=f"encrypt {statistics.median(encrypting[1:]) * 1e3:.1f} ms,"
            f" decrypt {statistics.median(decrypting[1:]) * 1e3:.1f} ms",
        )


def shapes(runs: int, quick: bool) -> Iterator[Record]:
    """Whole encrypted product, both parties, over layer shapes and presets, mask product known."""
    cases = [("linear-w8", 384, 384), ("linear-w8", 1536, 384), ("linear-w8", 2048, 2048), ("linear-w16", 1024, 1024)]
    if not quick:
        cases += [("linear-w8", 768, 768), ("linear-w8", 4096, 4096), ("linear-w16", 2048, 2048)]
    for preset, d_out, d_in in cases:
        progress(f"{preset} {d_out} x {d_in}")
        layer = Layer(d_out, d_in, 2048, preset)

        def product(layer: Layer = layer) -> None:
            request, secret = linear.encrypt(layer.x, layer.prepared.spec, masks=layer.masks)
            linear.decrypt(linear.apply(layer.prepared, request), secret)

        seconds = paired({"float32": layer.float32, "product": product}, runs)
        yield layer.record(
            f"encrypt + apply + decrypt, {preset}, {d_out} x {d_in}",
            statistics.median(seconds["product"]) * 1e3,
            "ms",
            reference="torch float32",
            ratio=median_ratio(seconds["product"], seconds["float32"]),
            isa=system.active_isa(),
        )


def traffic(layer: Layer) -> Iterator[Record]:
    """Bytes of one request and its reply."""
    request, _ = linear.encrypt(layer.x, layer.prepared.spec)
    reply = linear.apply(layer.prepared, request)
    known, _ = linear.encrypt(layer.x, layer.prepared.spec, masks=layer.masks)
    short = linear.apply(layer.prepared, known)
    yield layer.record("upload an input element", len(request) / layer.x.size, "bytes", target=4.1)
    yield layer.record("reply an output element", len(reply) / (layer.tokens * layer.d_out), "bytes")
    yield layer.record(
        "reply an output element, mask product known", len(short) / (layer.tokens * layer.d_out), "bytes"
    )


def concrete_ml(layer: Layer, product_seconds_a_token: float, quick: bool) -> Iterator[Record]:
    """Encrypted product under Concrete ML's LoRA trainer: one token, 8-bit values."""
    if importlib.util.find_spec("concrete_ml_extensions") is None:
        progress("concrete-ml-extensions is not installed: left out")
        return
    import concrete_ml_extensions as peer

    d = 512 if quick else layer.d_in
    progress(f"concrete-ml-extensions, one token, {d} x {d} (slow)")
    parameters = peer.MatmulCryptoParameters.deserialize(peer.default_params())
    private_key, compression_key = peer.create_private_key(parameters)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 128, (1, d)).astype(np.uint64)
    w = rng.integers(0, 128, (d, d)).astype(np.uint64)
    start = time.perf_counter()
    encrypted = peer.encrypt_matrix(private_key, parameters, x)
    result = peer.matrix_multiplication(encrypted, w, compression_key)
    peer.decrypt_matrix(result, private_key, parameters, num_valid_glwe_values_in_last_ciphertext=d)
    seconds = time.perf_counter() - start
    scale = (layer.d_in * layer.d_out) / d**2
    yield layer.record(
        f"concrete-ml-extensions {peer_version('concrete-ml-extensions')}, {d} x {d}, a token",
        seconds,
        "s",
        reference=f"privtuner {layer.d_out} x {layer.d_in}, a token",
        ratio=seconds * scale / product_seconds_a_token,
        note="" if scale == 1 else f"ratio scaled by {scale:g} multiply-adds",
    )


def tenseal(layer: Layer, product_seconds_a_token: float) -> Iterator[Record]:
    """CKKSVector.mm: one vector of 512 features, N = 2^13."""
    if importlib.util.find_spec("tenseal") is None:
        progress("tenseal is not installed: left out")
        return
    import tenseal as peer

    progress("tenseal, one vector, 512 x 512")
    d = 512
    context = peer.context(peer.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[40, 30, 40])
    context.global_scale = 2**30
    context.generate_galois_keys()
    vector = peer.ckks_vector(context, layer.x[0, :d].tolist())
    matrix = layer.weight[:d, :d].T.tolist()
    start = time.perf_counter()
    vector.mm(matrix)
    seconds = time.perf_counter() - start
    scale = (layer.d_in * layer.d_out) / d**2
    yield layer.record(
        f"tenseal {peer_version('tenseal')}, {d} x {d}, a vector",
        seconds,
        "s",
        reference=f"privtuner {layer.d_out} x {layer.d_in}, a token",
        ratio=seconds * scale / product_seconds_a_token,
        note=f"ratio scaled by {scale:g} multiply-adds",
    )


def peer_version(distribution: str) -> str:
    """Version of an installed package."""
    return importlib.metadata.version(distribution)


def main() -> None:
    """Measure everything and write what was asked for."""
    options = harness.arguments(__doc__.splitlines()[0] if __doc__ else "")
    system.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    runs = 3 if options.quick else 9
    layer = Layer(2048, 2048, 2048)
    records = [*server(layer, runs), *owner(layer, runs), *shapes(runs, options.quick), *traffic(layer)]
    whole = next(record for record in records if record.name.endswith("linear-w8, 2048 x 2048"))
    a_token = whole.value / 1e3 / layer.tokens
    records += [*concrete_ml(layer, a_token, options.quick), *tenseal(layer, a_token)]
    harness.finish(records, options, "encrypted linear layer")


if __name__ == "__main__":
    main()

"""What does a polynomial in place of GELU cost in accuracy? MiniLM on BANKING77, and the sealed block itself.

    python benchmarks/activation.py [--quick] [--json F] [--plot F.png] [--threads N]

Training runs in the clear with the very polynomial that sealed blocks evaluate; then one sealed block of the model
computes on ciphertexts, forward and backward, what the polynomial gives in the clear.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from transformers import AutoModel

import harness
from harness import Record, progress
from privtuner import nn, system
from privtuner.sealed.blocks import SealedClient, SealedMLP
from privtuner.train import dataset, training
from training import MODEL, Task


def accuracy(task: Task, quick: bool) -> Iterator[Record]:
    """Test accuracy with exact GELU and with its polynomial, over seeds."""
    seeds = range(1 if quick else 3)
    exact, polynomial = [], []
    for seed in seeds:
        config = training.TrainConfig(steps=30 if quick else 150, seed=seed)
        for results, replaced in ((exact, False), (polynomial, True)):
            model = task.plain(config)
            if replaced:
                nn.polynomial_activations(model)
            for _ in training.iterate_steps(model, task.train, config):
                pass
            results.append(100 * training.evaluate(model, task.test, progress=True).accuracy)
        progress(f"seed {seed}: exact {exact[-1]:.2f} %, polynomial {polynomial[-1]:.2f} %")
    note = f"{task.name}, {config.steps} steps, seeds {list(seeds)}"
    for name, values in (("exact GELU", exact), ("polynomial GELU", polynomial)):
        yield Record(f"accuracy, {name}", statistics.mean(values), "%", note=f"{[round(a, 2) for a in values]}, {note}")
    loss = statistics.mean(exact) - statistics.mean(polynomial)
    yield Record("accuracy lost to the polynomial", loss, "points", target=0.5)


def sealed(task: Task, threads: int) -> Iterator[Record]:
    """The first sealed block of the model on real activations: encrypted against the polynomial in the clear."""
    system.set_num_threads(threads)
    split = nn.split_pretrained(MODEL, seal="mlp")
    name, spec = next(iter(split.bundle.sealed.items()))
    block = split.server[name]
    assert isinstance(block, SealedMLP)
    model = AutoModel.from_pretrained(MODEL).eval()
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(spec.first).register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    batch = dataset.collate(task.test, range(64))
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    x = seen[0][batch.attention_mask.bool()].double().numpy()[: spec.public.parameters.slots]
    g = np.random.default_rng(0).normal(size=(len(x), spec.public.d_out))
    client = SealedClient(spec.public.parameters)
    for direction, gradient in (("forward", None), ("backward", g)):
        progress(f"sealed block, {direction}, {len(x)} tokens: minutes")
        request, pending = client.request(spec.public, x, gradient)
        start = time.perf_counter()
        reply = list(block.answer(request))
        seconds = time.perf_counter() - start
        got, clear = client.decrypt(reply, pending), block.exact(x, gradient)
        error = float(np.abs(got - clear).max() / np.abs(clear).max())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        yield Record(
            f"sealed block of layer 0, {direction}",
            seconds,
            "s",
            tokens=len(x),
            threads=threads,
            isa=system.active_isa(),
            note=f"{len(request) / 1e6:.0f} MB up, {sum(map(len, reply)) / 1e6:.0f} MB down, peak {peak:.2f} GB, "
            f"worst error {error:.1e} of the largest value; the time does not depend on the tokens, up to "
            f"{spec.spec.parameters.slots}",
        )


def main() -> None:
    """Measure everything and write what was asked for."""
    options = harness.arguments((__doc__ or "").splitlines()[0])
    torch.set_num_threads(options.threads)
    task = Task()
    records = [*sealed(task, options.threads), *accuracy(task, options.quick)]
    harness.finish(records, options, "polynomial activations")


if __name__ == "__main__":
    main()

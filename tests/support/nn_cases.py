"""Tiny models, their clear twins, and error bounds carried through whole models, for the tests of ``privtuner.nn``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from privtuner import linear
from privtuner.nn import LocalTransport, Split
from privtuner.wire import peek

VOCABULARY = 50


def tiny_bert(**changes: Any) -> BertModel:
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 40}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return _random(BertModel, BertConfig(vocab_size=VOCABULARY, **{**sizes, **options, **changes}))


def tiny_roberta() -> RobertaModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return _random(RobertaModel, RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=40, **sizes))


def tiny_distilbert() -> DistilBertModel:
    config = DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=40, dim=32, n_layers=2, n_heads=2, hidden_dim=48
    )
    return _random(DistilBertModel, config)


def tiny_gpt2() -> GPT2LMHeadModel:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, **dropout
    )
    return _random(GPT2LMHeadModel, config)


def tiny_llama(*, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tied,
    )
    return _random(LlamaForCausalLM, config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "distilbert": tiny_distilbert,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "llama-tied": lambda: tiny_llama(tied=True),
}


def _random(cls: Any, config: Any) -> Any:
    """Return a model with every tensor random, so that no bias or norm is trivially right."""
    with torch.random.fork_rng():
        torch.manual_seed(20240817)
        model = cls(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean().round()), std=0.15)
    return model.eval()


def tokens(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


class CountingTransport(LocalTransport):
    """Remembers which layers were asked, in order."""

    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.calls: list[str] = []

    def apply(self, layer: str, request: bytes) -> Iterator[bytes]:
        self.calls.append(layer)
        return super().apply(layer, request)


class RecordingTransport(LocalTransport):
    """Remembers (layer, direction, tokens) of every request, as the server sees them."""

    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.seen: list[tuple[str, str, int]] = []

    def apply(self, layer: str, request: bytes) -> Iterator[bytes]:
        head = peek(request)
        self.seen.append((layer, head.direction, head.tokens))
        return super().apply(layer, request)


def weight_in_force(prepared: linear.QuantisedWeight) -> np.ndarray:
    """The quantised weight the server multiplies by, float64 (d_out, d_in)."""
    return prepared.spec.scale[:, None] * prepared.quantised().astype(np.float64)


def clear_twin(
    model: PreTrainedModel, split: Split, *, dtype: torch.dtype = torch.float64, attention: str = "eager"
) -> PreTrainedModel:
    """Return the owner's ``model`` with its weights back in: the clear model of the same quantised weights.

    Loading is strict, so this also proves that the owner's model lacks the served weights and nothing else.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = attention
    twin = type(model)(config)
    state = dict(model.state_dict())
    names = {name.removeprefix(f"{model.base_model_prefix}."): name for name, _ in model.named_modules()}
    for wire, spec in split.bundle.groups.items():
        stacked = torch.from_numpy(weight_in_force(split.server[wire]))
        parts = stacked.split(list(spec.members.values()))
        for member, part in zip(spec.members, parts, strict=True):
            if member in names:
                state[f"{names[member]}.weight"] = part if spec.kind == "linear" else part.T
    twin.to(dtype).load_state_dict({key: value.to(dtype) for key, value in state.items()})
    for name, parameter in model.named_parameters():
        twin.get_parameter(name).requires_grad_(parameter.requires_grad)
    return twin.train(model.training)


@dataclass
class _Call:
    """One product of one group in one step: its input, the noises added to outputs and to the input's gradient."""

    wire: str
    x: torch.Tensor
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    backward: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class NoiseProbe:
    """Carries the error bounds of all products of a clear twin to any scalar computed with it, to first order.

    Every served product gets a noise leaf n at its output; adding <m, x> to the loss adds m to the gradient of its
    input x, which is the noise of the backward product. A scalar s then moves by at most
    sum |ds/dn| bound(forward) + |ds/dm| bound(backward). The bounds are worst cases over the randomness and the sum
    adds them all up with one sign, so the second order, quadratic in the far smaller actual noise, is covered.
    """

    def __init__(self, twin: torch.nn.Module, split: Split) -> None:
        self._split = split
        self._calls: list[_Call] = []
        self._open: dict[str, _Call] = {}
        self._hooks = []
        for wire, spec in split.bundle.groups.items():
            for member in spec.members:
                for path, module in twin.named_modules():
                    at_end = f".{path}".endswith((f".{member}.base_layer", f".{member}"))
                    if at_end and not hasattr(module, "base_layer"):
                        self._hooks.append(module.register_forward_hook(self._hook(wire, member)))

        assert self._hooks, "no served layer found in the twin"

    def _hook(self, wire: str, member: str) -> Callable[..., torch.Tensor]:
        def add_noise(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            call = self._open.setdefault(wire, _Call(wire, args[0]))
            assert call.x is args[0], "the members of a group are fed by the same tensor"
            noise = torch.zeros_like(output, requires_grad=True)
            call.outputs[member] = noise
            return output + noise

        return add_noise

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """Close a step whose loss is ``loss``; return the loss to differentiate, with the backward noises in it."""
        for call in self._open.values():
            noises = list(call.outputs.values())
            grads = torch.autograd.grad(loss, noises, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(n) if g is None else g for n, g in zip(noises, grads, strict=True)]
            call.gradient = torch.cat([part.detach() for part in parts], dim=-1)
            if call.x.requires_grad:
                call.backward = torch.zeros_like(call.x, requires_grad=True)
                loss = loss + (call.backward * call.x).sum()
            self._calls.append(call)
        self._open = {}
        return loss

    def bound(self, scalar: torch.Tensor) -> float:
        """Return how far ``scalar`` can be from its value in an encrypted run."""
        self.step(scalar)
        total = 0.0
        for call in self._calls:
            spec = self._split.server[call.wire].spec
            noises = list(call.outputs.values())
            slopes = torch.autograd.grad(scalar, noises, retain_graph=True, allow_unused=True)
            slope = torch.cat(
                [torch.zeros_like(n) if s is None else s for n, s in zip(noises, slopes, strict=True)], -1
            )
            total += _weighed(slope, linear.error_bound(spec, _rows(call.x)))
            if call.backward is not None and call.gradient is not None:
                (back,) = torch.autograd.grad(scalar, [call.backward], retain_graph=True, allow_unused=True)
                if back is not None:
                    total += _weighed(back, linear.error_bound(spec, _rows(call.gradient), "backward"))
        return total

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@contextmanager
def probing(twin: torch.nn.Module, split: Split) -> Iterator[NoiseProbe]:
    probe = NoiseProbe(twin, split)
    try:
        yield probe
    finally:
        probe.close()


def _rows(x: torch.Tensor) -> np.ndarray:
    return x.detach().reshape(-1, x.shape[-1]).numpy()


def _weighed(slope: torch.Tensor, bound: np.ndarray) -> float:
    return float((np.abs(_rows(slope)) * bound).sum())

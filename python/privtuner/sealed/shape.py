"""What everybody may know of a sealed encoder: how many layers, how wide, how its output is pooled, what is adapted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from privtuner.errors import InputError

__all__ = ["Chunks", "Placement", "Pooling", "Shape", "Target"]

Pooling = Literal["mean", "first"]
Target = Literal["query", "value"]
Placement = Literal["owner-encrypted", "server"]
"""Adapters under the owner's key, or in the clear at the server, which then reads noisy gradients."""


class Chunks(NamedTuple):
    """How the numbers of one adapter lie in packed ciphertexts: the rows of A^T, then those of B.

    Both have ``width`` rows of ``rank`` numbers; ``rows`` of them, one after the other, share a ciphertext.
    """

    rank: int
    width: int
    rows: int

    @property
    def groups(self) -> tuple[slice, ...]:
        """The rows in each ciphertext of one matrix."""
        return tuple(slice(begin, begin + self.rows) for begin in range(0, self.width, self.rows))

    @property
    def ciphertexts(self) -> int:
        """Ciphertexts of both matrices."""
        return 2 * len(self.groups)

    @property
    def numbers(self) -> int:
        """How many numbers a ciphertext holds, at most ``width``."""
        return self.rows * self.rank


@dataclass(frozen=True)
class Shape:
    """A BERT-like encoder: post-norm blocks of bidirectional attention and two dense layers with an activation between.

    Attributes:
        layers: blocks, 1 to 64.
        width: features of a token, d; a multiple of ``heads``.
        heads: attention heads.
        hidden: features between the two dense layers.
        period: tokens of a sequence with its padding, T: a power of two.
        eps: what the layer norms add to the variance.
        activation: the name of a function of `privtuner.ckks.functions.FUNCTIONS`.
        pool: ``"mean"`` over the real tokens (the sum is revealed: its owner knows the lengths), or the ``"first"``.
        pooler: whether the model's dense layer follows the first token. Its tanh, which can be undone and so hides
            nothing, is left to the data owner.
        rank: of the adapters; 0 for none.
        alpha: their strength: W x + alpha / rank B A x.
        targets: the matrices that have one.
        placement: how the server has the adapters.

    Raises:
        InputError: a value out of range.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    period: int
    eps: float = 1e-12
    activation: str = "gelu"
    pool: Pooling = "mean"
    pooler: bool = False
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[Target, ...] = ("query", "value")
    placement: Placement = "owner-encrypted"

    def __post_init__(self) -> None:
        limits = {"layers": 64, "width": 8192, "heads": 256, "hidden": 65536, "period": 4096}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} = {getattr(self, name)}: must be from 1 to {most}")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not a multiple of {self.heads} heads")
        if self.period & (self.period - 1):
            raise InputError(f"period {self.period}: must be a power of two; pad the sequences")
        if not 0 <= self.eps < 1:
            raise InputError(f"eps = {self.eps}: must be at least 0 and below 1")
        if self.pool not in get_args(Pooling):
            raise InputError(f"pool = {self.pool!r}: choose 'mean' or 'first'")
        if self.pooler and self.pool != "first":
            raise InputError("a pooler follows the first token: pool must be 'first'")
        if not 0 <= self.rank <= self.width:
            raise InputError(f"rank = {self.rank}: must be from 0 to the width, {self.width}")
        if not 0 < self.alpha < 1e6:
            raise InputError(f"alpha = {self.alpha}: must be positive and below a million")
        known = get_args(Target)
        if list(self.targets) != [t for t in known if t in self.targets] or (self.rank and not self.targets):
            raise InputError(f"targets = {self.targets}: name some of {known}, in this order")
        if self.placement not in get_args(Placement):
            raise InputError(f"adapters = {self.placement!r}: choose one of {', '.join(get_args(Placement))}")

    @property
    def head_width(self) -> int:
        """Features of a head."""
        return self.width // self.heads

    @property
    def pairs(self) -> int:
        """Features of scores and probabilities: a head's T after the other's."""
        return self.heads * self.period

    @property
    def chunks(self) -> Chunks:
        """How one adapter is packed."""
        rank = max(self.rank, 1)
        rows = next(rows for rows in range(self.width // rank, 0, -1) if self.width % rows == 0)
        return Chunks(rank, self.width, rows)

    @property
    def adapted(self) -> tuple[tuple[int, Target], ...]:
        """(layer, target) of every adapter, in the order of their ciphertexts."""
        return tuple((layer, target) for layer in range(self.layers) for target in self.targets if self.rank)

    @property
    def clear(self) -> bool:
        """Whether there are adapters, in the clear at the server."""
        return self.rank > 0 and self.placement == "server"

    @property
    def adapter_ciphertexts(self) -> int:
        """Packed ciphertexts of all adapters."""
        return self.chunks.ciphertexts * len(self.adapted)

    def adapter(self, layer: int, target: Target) -> int:
        """The first ciphertext of an adapter."""
        return self.adapted.index((layer, target)) * self.chunks.ciphertexts

    def strength(self, target: Target) -> float:
        """What B is multiplied by before it is encrypted: alpha / rank, for queries also 1 / sqrt(head width)."""
        scale = self.alpha / max(self.rank, 1)
        return scale / self.head_width**0.5 if target == "query" else scale

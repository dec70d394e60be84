"""The whole encoder on ciphertexts: its blocks, and the pooled vectors, which alone are revealed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from privtuner.ckks import circuits
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError
from privtuner.sealed.affine import Affine, Masks
from privtuner.sealed.block import Block, Keep, Saved, Stages, within
from privtuner.sealed.clear_adapters import ClearAdapters
from privtuner.sealed.domains import Domains
from privtuner.sealed.weights import Weights

__all__ = ["Encoder", "places"]

POOLED_ERROR = 2.0**-19
"""What pooled vectors are off by, as a part of their bound: known as `privtuner.sealed.adapters.ERROR` is."""
LARGEST_GRADIENT = 2.0**8
"""What the bounds of all gradients stay below: a quarter of what a refresh takes at a scale of 2^40."""

Array = npt.NDArray[np.float64]


class Encoder:
    """The circuits of all blocks.

    Args:
        weights: of the encoder.
        domains: measured with these weights.

    Attributes:
        input_bound, pooled_bound, gradient_bound: powers of two, of what is sent, revealed, and sent back.

    Raises:
        InputError: domains of another number of layers.
    """

    def __init__(self, weights: Weights, domains: Domains) -> None:
        self.weights, self.domains, self.shape = weights, domains, weights.shape
        if len(domains.layers) != len(weights.layers):
            raise InputError(f"domains of {len(domains.layers)} layers for {len(weights.layers)}: measure them again")
        self.input_bound, self.pooled_bound = power_of_two(domains.inputs), power_of_two(domains.pooled)
        # Gradients are linear in the one that comes in: that is small enough for all of them to fit a refresh.
        largest = max(getattr(layer, f.name) for layer in domains.layers for f in fields(layer) if f.name[:2] == "d_")
        self.gradient_bound = min(1.0, LARGEST_GRADIENT / power_of_two(largest))
        scaled = [layer.with_gradients(self.gradient_bound) for layer in domains.layers]
        parts = zip(weights.layers, scaled, strict=True)
        self.blocks = tuple(Block(self.shape, w, d, index) for index, (w, d) in enumerate(parts))
        self.pooler = None if weights.pooler is None else Affine.of(weights.pooler)

    def with_adapters(self, adapters: ClearAdapters) -> Encoder:
        """The circuits with adapters that the server has in the clear."""
        folded = adapters.folded(self.shape)
        encoder = copy.copy(self)
        encoder.blocks = tuple(
            block.with_adapters({target: folded[layer, target] for layer, target in folded if layer == block.index})
            for block in self.blocks
        )
        return encoder

    def narrow(self) -> Encoder:
        """An encoder of the same levels everywhere, with few features and one head."""
        width = min(self.shape.width, max(8, self.shape.rank))
        return Encoder(self.weights.narrow(width), self.domains)

    def forward(
        self,
        ev: EvaluatorProtocol[Tensor],
        x: Tensor,
        mask: Tensor,
        values: Tensor | None,
        stages: Stages[Tensor],
        levels: Mapping[str, int] | None = None,
    ) -> tuple[Tensor, list[Saved[Tensor]]]:
        """Return the pooled vectors, not yet fit to be revealed, and what the backward pass reads.

        Args:
            ev: computes.
            x: embeddings (slots, width), zero at hidden positions.
            mask: (slots, 1), 1 at real positions, else 0.
            values: of `EncryptedAdapters`, or None without adapters.
            stages: those of the blocks, and ``output`` between two of them, all with the block's number before; at the
                end ``pooled``.
            levels: of `Keep`, with the block's number before each name; None keeps nothing.

        Returns:
            (slots, ceil(width / period)), by `places`; one `Saved` a block.
        """
        masks = Masks(ev, mask)
        pairs = circuits.pair_mask(ev, mask, self.shape.period)
        saved: list[Saved[Tensor]] = []
        h = x
        for block in self.blocks:
            name = f"{block.index}."
            ours = None if levels is None else {k[len(name) :]: v for k, v in levels.items() if k.startswith(name)}
            keep = Keep(ev, ours)
            h = block.feed_forward(ev, block.attention(ev, h, masks, pairs, values, stages, keep), masks, stages, keep)
            saved.append(keep.saved)
            if block.index < len(self.blocks) - 1:
                h = stages.at(name + "output", h)
        return self._pool(ev, stages.at("pooled", h), masks), saved

    def _pool(self, ev: EvaluatorProtocol[Tensor], h: Tensor, masks: Masks[Tensor]) -> Tensor:
        """Sum the vectors of every sequence, or take the first one, and zero all slots but those of `places`."""
        period = self.shape.period
        # No more levels than it takes. Sums over many tokens need the second prime's room, at level 1.
        room = ev.parameters.primes[0] / ev.parameters.scale(0)
        depth = (1 if self.shape.pool == "mean" else 2) + int(4 * self.pooled_bound > room)
        h = ev.drop_level(h, depth)
        if self.shape.pool == "first":
            # The mask comes along, so that sequences that are not there show no bias.
            h = ev.concatenate([h, masks.at(depth)])
            h = ev.multiply_plain(h, first_position(ev.slots, period))
        step = ev.slots // period
        while step < ev.slots:
            turned = ev.rotate(h, step)
            assert not isinstance(turned, list)  # noqa: S101 - one step gives one tensor
            h, step = ev.add(h, turned), 2 * step
        if self.pooler is not None:
            there = ev.select(h, slice(self.shape.width, None))
            h = self.pooler.apply(ev, ev.select(h, slice(0, self.shape.width)), Masks(ev, there))
        h = within(ev, h, self.pooled_bound)
        packed, table = [], places(ev.slots, period)
        for begin in range(0, self.shape.width, period):
            some = ev.select(h, slice(begin, min(begin + period, self.shape.width)))
            packed.append(ev.sum_features(ev.multiply_plain(some, table[:, : some.shape[1]])))
        return ev.assume(ev.concatenate(packed), self.pooled_bound, self.pooled_bound * POOLED_ERROR)

    def backward(
        self,
        ev: EvaluatorProtocol[Tensor],
        saved: list[Saved[Tensor]],
        gradient: Tensor,
        values: Tensor | None,
        stages: Stages[Tensor],
    ) -> Tensor:
        """Return the gradients by the numbers of all adapters.

        Args:
            ev: computes.
            saved: of `forward`.
            gradient: by the last block's output (slots, width), or by the pooler's where there is one.
            values: of `EncryptedAdapters`, or None for clear ones.
            stages: those of the blocks, and ``d_output2`` between two of them.

        Returns:
            Packed, (slots, `Shape.adapter_ciphertexts`).
        """
        found: dict[int, list[Tensor]] = {}
        dy = gradient
        if self.pooler is not None:
            dy = stages.settle("d_pooler", self.pooler.backward(ev, dy))
        for block in reversed(self.blocks):
            ours = saved[block.index]
            dy = block.feed_forward_backward(ev, ours, dy, stages)
            dx, found[block.index] = block.attention_backward(ev, ours, dy, values, stages)
            if dx is not None:
                before = self.blocks[block.index - 1].domains.d_output2
                dy = stages.at(f"{block.index - 1}.d_output2", within(ev, dx, before))
        return ev.concatenate([g for index in sorted(found) for g in found[index]])


def power_of_two(value: float) -> float:
    """The least one that is no less."""
    return float(2.0 ** math.ceil(math.log2(value)))


def first_position(slots: int, period: int) -> Array:
    """1 in the slots of the first position, else 0: float64 (slots,)."""
    first: Array = (np.arange(slots) < slots // period).astype(np.float64)
    return first


def places(slots: int, period: int) -> Array:
    """1 where a pooled feature is, else 0: of ``period`` features one at each position, (slots, period)."""
    position = np.arange(slots) // (slots // period)
    table: Array = (position[:, None] == np.arange(period)).astype(np.float64)
    return table

"""One block of the encoder on ciphertexts, forward and backward, over the evaluator protocol.

Every tensor has one ciphertext a feature and all slots as tokens; slot ``position * sequences + sequence``. Rows of
hidden positions are exactly zero between blocks. At the points named in `Stages` a tensor with many features may be
refreshed, as the plan says; where a matrix changed its scale it is brought back to the chain's there in any case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Generic

from privtuner.ckks import circuits
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.sealed.adapters import ERROR, Adapter
from privtuner.sealed.affine import Affine, Masks, add_residual, canonical
from privtuner.sealed.clear_adapters import ClearAdapter
from privtuner.sealed.domains import LayerDomains
from privtuner.sealed.shape import Shape, Target
from privtuner.sealed.weights import Dense, LayerWeights

__all__ = ["Block", "Saved", "Stages", "kind_of"]

DEGREES = (15, 31, 63, 95, 127)
"""Degrees of the polynomial in place of the activation."""
ACTIVATION_ERROR = 2.0**-12
"""What that polynomial may be off by, as a part of the largest value in its domain."""
CHUNK = 64
"""Features between the two dense layers that are worked on at a time."""

INNER = 1.0
"""The norm that the rows of A, and the columns of B, are expected to stay below: errors are predicted from it."""

Saved = dict[str, Tensor]
"""What a block keeps for its backward pass, by name."""


def activation_degree(name: str, domain: tuple[float, float]) -> int:
    """The least degree, of those that use their levels up, that is as exact as the domain's width allows for."""
    for degree in DEGREES:
        if circuits.Activation.choose(name, domain, degree).error <= ACTIVATION_ERROR * max(map(abs, domain)):
            break
    return degree


def within(ev: EvaluatorProtocol[Tensor], x: Tensor, bound: float) -> Tensor:
    """The tensor with the bound that was measured, and errors within `ERROR` of it."""
    return ev.assume(x, bound, bound * ERROR)


class Stages(Generic[Tensor]):
    """The points of a pass where tensors of many features may be refreshed.

    Args:
        ev: computes.
        levels: the points where one is, with the level it comes back at.
        progress: is called with the name of every point.
    """

    def __init__(
        self,
        ev: EvaluatorProtocol[Tensor],
        levels: Mapping[str, int],
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.ev, self.levels, self.progress = ev, levels, progress

    def at(self, name: str, x: Tensor) -> Tensor:
        """The tensor, refreshed if the plan says so. It has the chain's scale, before and after."""
        if self.progress is not None:
            self.progress(name)
        return self.ev.refresh(x, self.levels[name]) if name in self.levels else x

    def settle(self, name: str, x: Tensor) -> Tensor:
        """As `at`, for what a matrix made: where it is not refreshed, a level brings it to the chain's scale."""
        refreshed = self.at(name, x)
        return canonical(self.ev, x) if refreshed is x else refreshed

    def level_with(self, name: str, x: Tensor, other: Tensor) -> Tensor:
        """The tensor, refreshed to the level of another one where it is below that, so as not to hold it back."""
        if self.progress is not None:
            self.progress(name)
        return self.ev.refresh(x, other.level) if x.level < other.level else x

    def within(self, prefix: str) -> Callable[[str, Tensor], Tensor]:
        """`at` for a circuit that names its own points."""
        return lambda name, x: self.at(prefix + name, x)


def kind_of(name: str) -> str:
    """What is kept under a name, whichever chunk of features it is of."""
    return name.rstrip("0123456789") if name.startswith("slope") else name


class Keep(Generic[Tensor]):
    """Keeps what the backward pass reads, at the lowest level that serves it.

    Args:
        ev: computes.
        levels: the level of each name (`kind_of`), at whose scale it is kept; None keeps nothing.
    """

    def __init__(self, ev: EvaluatorProtocol[Tensor], levels: Mapping[str, int] | None) -> None:
        self.ev, self.levels = ev, levels
        self.saved: Saved[Tensor] = {}

    def __bool__(self) -> bool:
        return self.levels is not None

    def __call__(self, name: str, x: Tensor) -> None:
        """Keep a tensor under a name."""
        if self.levels is not None:
            level = self.levels.get(kind_of(name), x.level)
            self.saved[name] = canonical(self.ev, x, level) if level < x.level else x


class Block:
    """Attention and its norm, two dense layers and theirs.

    Args:
        shape: of the encoder.
        weights: of this block.
        domains: of this block.
        index: its number from 0.
    """

    def __init__(self, shape: Shape, weights: LayerWeights, domains: LayerDomains, index: int) -> None:
        self.shape, self.domains, self.index, self._weights = shape, domains, index, weights
        self.softmax = circuits.SquaringSoftmax.choose(shape.period, domains.scores, unit=domains.scores)
        self.unit = self.softmax.unit
        self._fold({})
        self.key, self.output = (Affine.of(w) for w in (weights.key, weights.output))
        low, high = domains.up
        self.half = 0.5 * (high - low)  # what values before the activation are divided by, and their gradient
        up = Affine.of(Dense(weights.up.weight / self.half, weights.up.bias / self.half))
        up_back, down = Affine.of(weights.up), Affine.of(weights.down)
        self.chunks = list(zip(up.rows(CHUNK), up_back.rows(CHUNK), down.columns(CHUNK), strict=True))
        degree = activation_degree(shape.activation, domains.up)
        self.activation = circuits.Activation.choose(shape.activation, domains.up, degree, unit=self.half)
        self.norms = tuple(
            (circuits.LayerNorm.choose(shape.width, domain, shape.eps), norm)
            for domain, norm in ((domains.variance1, weights.norm1), (domains.variance2, weights.norm2))
        )
        self.adapters: dict[Target, Adapter] = {
            target: Adapter(shape, layer, target)
            for layer, target in shape.adapted
            if layer == index and not shape.clear
        }

    def _fold(self, adapters: dict[Target, ClearAdapter]) -> None:
        """Make the projections that take adapters, with these in their weights."""
        weights, root = self._weights, self.shape.head_width**0.5
        matrices = {"query": weights.query.weight / root, "value": weights.value.weight}
        for target, adapter in adapters.items():
            matrices[target] = matrices[target] + adapter.product
        query = Dense(matrices["query"], weights.query.bias / root)
        # Scores arrive divided by their bound, where the exponential's polynomial wants them.
        self.query = Affine.of(Dense(query.weight / self.unit, query.bias / self.unit))
        self.value = Affine.of(Dense(matrices["value"], weights.value.bias))
        self.clear_adapters = adapters

    def with_adapters(self, adapters: dict[Target, ClearAdapter]) -> Block:
        """The block with clear adapters; nothing else is made anew."""
        block = copy.copy(self)
        block._fold(adapters)
        return block

    # Forward

    def attention(
        self,
        ev: EvaluatorProtocol[Tensor],
        h: Tensor,
        masks: Masks[Tensor],
        pairs: Tensor,
        values: Tensor | None,
        stages: Stages[Tensor],
        keep: Keep[Tensor],
    ) -> Tensor:
        """The first half of the block: attention, its output added to h, and the norm.

        Args:
            ev: computes.
            h: (slots, width), of the chain's scale.
            masks: of the real positions.
            pairs: `circuits.pair_mask` of it.
            values: of `EncryptedAdapters`, or None without adapters.
            stages: the points ``scores``, those of the softmax, and ``residual1``.
            keep: of ``input``, ``query``, ``key``, ``value``, ``inner_query``, ``inner_value``, ``probabilities``,
                ``centred1`` and ``root1``.

        Returns:
            (slots, width), of the chain's scale.
        """
        shape, domains, name = self.shape, self.domains, f"{self.index}."
        level = h.level - (2 if self.adapters else 1)
        keep("input", h)
        q = self._project(ev, "query", self.query, h, masks, values, level, keep)
        k = canonical(ev, self.key.apply(ev, h, masks), level)
        v = self._project(ev, "value", self.value, h, masks, values, level, keep)
        q, k, v = (
            within(ev, x, bound) for x, bound in ((q, domains.query / self.unit), (k, domains.key), (v, domains.value))
        )
        for part, x in (("query", q), ("key", k), ("value", v)):
            if part != "query" or self.index > 0:  # the first block's backward pass ends before the key's gradient
                keep(part, x)
        scores = within(ev, circuits.attention_scores(ev, q, k, shape.period, shape.heads), 1.0)
        scores = stages.at(name + "scores", scores)
        p = self.softmax.forward(ev, scores, pairs, masks.mask, shape.heads, stages.within(name))
        keep("probabilities", p)
        mixed = within(ev, circuits.attention_values(ev, p, v, shape.period, shape.heads), domains.mixed)
        out = self.output.apply(ev, mixed, masks)
        x = within(ev, add_residual(ev, out, h), domains.residual1)
        return self._norm(ev, 1, stages.settle(name + "residual1", x), masks, keep)

    def feed_forward(
        self,
        ev: EvaluatorProtocol[Tensor],
        y: Tensor,
        masks: Masks[Tensor],
        stages: Stages[Tensor],
        keep: Keep[Tensor],
    ) -> Tensor:
        """The second half: the dense layers with the activation between, their output added to y, and the norm.

        Features between the dense layers are worked on in chunks, and so meet their points several times.

        Args:
            ev: computes.
            y: what `attention` returned.
            masks: of the real positions.
            stages: the points ``output1``, ``up``, ``active`` and ``residual2``.
            keep: of ``slope0``, ``slope1``, ... a chunk each, ``centred2`` and ``root2``.

        Returns:
            (slots, width), of the chain's scale.
        """
        domains, name = self.domains, f"{self.index}."
        y = stages.at(name + "output1", y)
        total: Tensor | None = None
        for number, (up, _, down) in enumerate(self.chunks):
            z = within(ev, up.apply(ev, y, masks), max(-domains.up[0], domains.up[1]) / self.half)
            z = stages.settle(name + "up", z)
            if keep:
                active, slope = self.activation.forward_with_slope(ev, z)
                keep(f"slope{number}", within(ev, slope, self.activation.derivative.bound))
            else:
                active = self.activation.forward(ev, z)
            active = stages.at(name + "active", within(ev, active, domains.active))
            part = down.apply(ev, active, masks)
            total = part if total is None else ev.add(total, part)
        assert total is not None  # noqa: S101 - there is a chunk
        x = within(ev, add_residual(ev, total, y), domains.residual2)
        return self._norm(ev, 2, stages.settle(name + "residual2", x), masks, keep)

    def _project(
        self,
        ev: EvaluatorProtocol[Tensor],
        target: Target,
        affine: Affine,
        h: Tensor,
        masks: Masks[Tensor],
        values: Tensor | None,
        level: int,
        keep: Keep[Tensor],
    ) -> Tensor:
        y = affine.apply(ev, h, masks)
        inner = INNER * self.shape.width**0.5 * h.bound
        if target in self.clear_adapters and keep:
            keep(f"inner_{target}", self.clear_adapters[target].inner(ev, h, inner))
        if target not in self.adapters or values is None:
            return canonical(ev, y, level)
        factor = 1 / self.unit if target == "query" else 1.0
        u, delta = self.adapters[target].forward(ev, values, h, inner, factor)
        keep(f"inner_{target}", u)
        return ev.add(y, delta)

    def _norm(
        self, ev: EvaluatorProtocol[Tensor], which: int, x: Tensor, masks: Masks[Tensor], keep: Keep[Tensor]
    ) -> Tensor:
        norm, weights = self.norms[which - 1]
        y, saved = norm.forward(ev, x, masks.mask, weights.weight, weights.bias)
        keep(f"centred{which}", saved.centred)
        keep(f"root{which}", saved.root)
        return within(ev, y, self.domains.output1 if which == 1 else self.domains.output2)

    # Backward

    def feed_forward_backward(
        self, ev: EvaluatorProtocol[Tensor], saved: Saved[Tensor], dy: Tensor, stages: Stages[Tensor]
    ) -> Tensor:
        """The gradient by what `feed_forward` took, from the one by what it returned.

        Args:
            ev: computes.
            saved: of its `Keep`.
            dy: (slots, width), of the chain's scale.
            stages: the points ``d_residual2``, ``d_active`` and ``d_up``, chunk by chunk, and ``d_output1``.

        Returns:
            (slots, width), of the chain's scale.
        """
        domains, name = self.domains, f"{self.index}."
        dx = stages.at(name + "d_residual2", self._norm_backward(ev, 2, saved, dy))
        total: Tensor | None = None
        for number, (_, up, down) in enumerate(self.chunks):
            da = stages.settle(name + "d_active", within(ev, down.backward(ev, dx), domains.d_active))
            dz = within(ev, ev.multiply(da, saved[f"slope{number}"]), domains.d_up)
            part = up.backward(ev, stages.at(name + "d_up", dz))
            total = part if total is None else ev.add(total, part)
        assert total is not None  # noqa: S101 - there is a chunk
        return stages.settle(name + "d_output1", within(ev, add_residual(ev, total, dx), domains.d_output1))

    def attention_backward(
        self,
        ev: EvaluatorProtocol[Tensor],
        saved: Saved[Tensor],
        dy: Tensor,
        values: Tensor | None,
        stages: Stages[Tensor],
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradient by what `attention` took, and those by the numbers of its adapters.

        Args:
            ev: computes.
            saved: of its `Keep`.
            dy: (slots, width), of the chain's scale.
            values: of `EncryptedAdapters`, or None for clear ones.
            stages: the points ``d_residual1``, ``d_probabilities``, ``d_scores`` and ``d_query``, where the key's comes
                along. The value's is refreshed when it would hold that one back. The first block computes what its
                adapters need, and has the point ``d_value`` where that is of values alone.

        Returns:
            (slots, width) of the chain's scale, None of the first block; and packed gradients, a ciphertext each.
        """
        shape, domains, name = self.shape, self.domains, f"{self.index}."
        k, v, p = (saved[part] for part in ("key", "value", "probabilities"))
        dx = stages.at(name + "d_residual1", self._norm_backward(ev, 1, saved, dy))
        do = canonical(ev, within(ev, self.output.backward(ev, dx), domains.d_mixed))
        through = self.index > 0
        adapted = {*self.adapters, *self.clear_adapters}
        dq = dv = None
        if through or "query" in adapted:
            dp = within(ev, circuits.attention_scores(ev, do, v, shape.period, shape.heads), domains.d_probabilities)
            dp = stages.at(name + "d_probabilities", dp)
            ds = within(ev, circuits.softmax_backward(ev, p, dp, shape.heads), domains.d_scores)
            ds = stages.at(name + "d_scores", ds)
            dq = within(ev, circuits.attention_values(ev, ds, k, shape.period, shape.heads), domains.d_query)
            if through:
                dk = circuits.attention_values_transposed(ev, ds, saved["query"], shape.period, shape.heads)
                # The query was divided by the scores' bound, and so is the gradient by the key.
                dk = within(ev, dk, domains.d_key / self.unit)
                both = stages.at(name + "d_query", ev.concatenate([dq, dk]))
                dq, dk = ev.select(both, slice(0, shape.width)), ev.select(both, slice(shape.width, None))
                dx = ev.add(dx, canonical(ev, self.key.backward(ev, dk), factor=self.unit))
            else:
                dq = stages.at(name + "d_query", dq)
        if through or "value" in adapted:
            dv = circuits.attention_values_transposed(ev, p, do, shape.period, shape.heads)
            dv = within(ev, dv, domains.d_value)
            point = name + "d_value"
            dv = stages.at(point, dv) if dq is None else stages.level_with(point, dv, dq)
        gradients: list[Tensor] = []
        targets: tuple[tuple[Target, Tensor | None, float, Affine, float], ...] = (
            ("query", dq, domains.d_query, self.query, self.unit),
            ("value", dv, domains.d_value, self.value, 1.0),
        )
        for target, d, bound, affine, unit in targets:
            if d is None:
                continue
            if through:
                dx = ev.add(dx, canonical(ev, affine.backward(ev, d), factor=unit))
            inner = INNER * shape.width**0.5 * bound
            if target in self.clear_adapters:
                h, u = saved["input"], saved[f"inner_{target}"]
                gradients.extend(self.clear_adapters[target].gradients(ev, h, u, d, inner))
            elif target in self.adapters and values is not None:
                h, u = saved["input"], saved[f"inner_{target}"]
                found, more = self.adapters[target].backward(ev, values, h, u, d, inner, through)
                gradients.extend(found)
                dx = dx if more is None else ev.add(dx, more)
        return (dx if through else None), gradients

    def _norm_backward(self, ev: EvaluatorProtocol[Tensor], which: int, saved: Saved[Tensor], dy: Tensor) -> Tensor:
        norm, weights = self.norms[which - 1]
        kept = circuits.Normed(saved[f"centred{which}"], saved[f"root{which}"])
        dx = norm.backward(ev, kept, dy, weights.weight)
        return within(ev, dx, self.domains.d_residual1 if which == 1 else self.domains.d_residual2)

"""The encoder in float64, exactly: what the sealed one approximates, and what its domains are measured on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from privtuner.ckks.functions import FUNCTIONS
from privtuner.ckks.remez import Function
from privtuner.errors import InputError
from privtuner.sealed.weights import LayerWeights, Norm, Weights

__all__ = ["ExactEncoder", "Observe"]

Array = npt.NDArray[np.float64]
Observe = Callable[[int, str, Array], None]
"""Called with the layer, the name of a place in it and the values there."""


class ExactEncoder:
    """Forward and backward pass of the encoder without adapters, by NumPy.

    Args:
        weights: of the encoder.
        observe: is shown the values at real positions: (positions, features), or of pairs of such positions in one
            dimension. The names are those of `privtuner.sealed.domains.LayerDomains`.
    """

    def __init__(self, weights: Weights, observe: Observe | None = None) -> None:
        self.weights, self.shape, self.observe = weights, weights.shape, observe or _look_away
        self._activation = FUNCTIONS[weights.shape.activation]
        self._kept: list[dict[str, Array]] = []
        self._mask: npt.NDArray[np.bool_] = np.zeros((0, 0), bool)

    def forward(self, embeddings: npt.ArrayLike, lengths: npt.ArrayLike) -> Array:
        """Return what is revealed of each sequence: float64 (n, width).

        Args:
            embeddings: (n, tokens, width), after their norm; what lies beyond a sequence's length is not looked at.
            lengths: whole numbers (n,), from 1 to ``tokens``.

        Raises:
            InputError: shapes that do not fit, or values that are not finite.
        """
        x, self._mask = self._check(embeddings, lengths)
        self._kept = [{} for _ in self.weights.layers]
        for index, layer in enumerate(self.weights.layers):
            x = self._layer(index, layer, x, self._kept[index])
        pooled = x.sum(axis=1) if self.shape.pool == "mean" else x[:, 0]
        return self.weights.pooler(pooled) if self.weights.pooler is not None else pooled

    def backward(self, gradient: npt.ArrayLike) -> Array:
        """Return the gradient by the embeddings, (n, tokens, width), of the last forward pass.

        Args:
            gradient: by what that pass returned, (n, width).
        """
        g = np.asarray(gradient, np.float64)
        if self.weights.pooler is not None:
            g = self.weights.pooler.transposed(g)
        dx = np.zeros((*self._mask.shape, self.shape.width))
        if self.shape.pool == "mean":
            dx[self._mask] = np.repeat(g, self._mask.sum(axis=1), axis=0)
        else:
            dx[:, 0] = g
        for index in reversed(range(self.shape.layers)):
            dx = self._layer_backward(index, self.weights.layers[index], dx, self._kept[index])
        return dx

    def _check(self, embeddings: npt.ArrayLike, lengths: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.bool_]]:
        x, counts = np.array(embeddings, np.float64), np.asarray(lengths)
        if x.ndim != 3 or x.shape[2] != self.shape.width or x.shape[1] > self.shape.period or 0 in x.shape:
            raise InputError(
                f"embeddings have shape {x.shape}: expected (n, at most {self.shape.period}, {self.shape.width})"
            )
        if counts.shape != (len(x),) or counts.dtype.kind not in "iu":
            raise InputError(f"lengths: expected {len(x)} whole numbers, got {counts.dtype} of shape {counts.shape}")
        if counts.min() < 1 or counts.max() > x.shape[1]:
            raise InputError(f"lengths must be from 1 to {x.shape[1]}")
        mask = np.arange(x.shape[1]) < counts[:, None]
        x[~mask] = 0.0
        if not np.isfinite(x).all():
            raise InputError("embeddings hold NaN or infinity")
        return x, mask

    def _show(self, index: int, name: str, values: Array) -> Array:
        """Let the observer see values of shape (n, tokens, features)."""
        self.observe(index, name, values[self._mask])
        return values

    def _at_real(self, function: Function, x: Array) -> Array:
        """A function at real positions, zero elsewhere."""
        values = np.zeros_like(x)
        values[self._mask] = function(x[self._mask])
        return values

    def _split(self, x: Array) -> Array:
        n, tokens, _ = x.shape
        heads: Array = x.reshape(n, tokens, self.shape.heads, self.shape.head_width).transpose(0, 2, 1, 3)
        return heads

    def _join(self, x: Array) -> Array:
        n, _, tokens, _ = x.shape
        joined: Array = x.transpose(0, 2, 1, 3).reshape(n, tokens, self.shape.width)
        return joined

    def _layer(self, index: int, layer: LayerWeights, x: Array, kept: dict[str, Array]) -> Array:
        mask, show = self._mask, self._show
        q = show(index, "query", layer.query(x) / self.shape.head_width**0.5)
        k, v = show(index, "key", layer.key(x)), show(index, "value", layer.value(x))
        kept["query"], kept["key"], kept["value"] = q, k, v = self._split(q), self._split(k), self._split(v)
        scores = q @ k.swapaxes(-1, -2)
        pairs = np.broadcast_to((mask[:, :, None] & mask[:, None, :])[:, None], scores.shape)
        self.observe(index, "scores", scores[pairs])
        shifted = np.where(pairs, scores, -np.inf)
        shifted = shifted - np.where(mask[:, None, :, None], shifted.max(axis=-1, keepdims=True), 0.0)
        weights = np.exp(shifted)
        sums = weights.sum(axis=-1, keepdims=True)
        kept["probabilities"] = p = weights / np.where(sums > 0, sums, 1.0)
        mixed = show(index, "mixed", self._join(p @ v))
        y = self._norm(index, "1", layer.norm1, show(index, "residual1", layer.output(mixed) + x), kept)
        kept["up"] = z = show(index, "up", layer.up(y))
        active = show(index, "active", self._at_real(self._activation.exact, z))
        return self._norm(index, "2", layer.norm2, show(index, "residual2", layer.down(active) + y), kept)

    def _norm(self, index: int, which: str, norm: Norm, x: Array, kept: dict[str, Array]) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred * centred).mean(axis=-1, keepdims=True)
        self._show(index, f"variance{which}", variance)
        root = 1 / np.sqrt(variance + self.shape.eps)
        root[~self._mask] = 0.0
        kept[f"root{which}"], kept[f"normed{which}"] = root, centred * root
        y = (centred * root * norm.weight + norm.bias) * self._mask[:, :, None]
        return self._show(index, f"output{which}", y)

    def _layer_backward(self, index: int, layer: LayerWeights, dy: Array, kept: dict[str, Array]) -> Array:
        show = self._show
        dr2 = self._norm_backward(index, "2", layer.norm2, show(index, "d_output2", dy), kept)
        da = show(index, "d_active", layer.down.transposed(dr2))
        dz = show(index, "d_up", da * self._at_real(self._activation.slope, kept["up"]))
        dy1 = show(index, "d_output1", dr2 + layer.up.transposed(dz))
        dr1 = self._norm_backward(index, "1", layer.norm1, dy1, kept)
        do = self._split(show(index, "d_mixed", layer.output.transposed(dr1)))
        q, k, v, p = (kept[name] for name in ("query", "key", "value", "probabilities"))
        pairs = np.broadcast_to((self._mask[:, :, None] & self._mask[:, None, :])[:, None], p.shape)
        dp = do @ v.swapaxes(-1, -2)
        self.observe(index, "d_probabilities", dp[pairs])
        ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
        self.observe(index, "d_scores", ds[pairs])
        dq = show(index, "d_query", self._join(ds @ k))
        dk = show(index, "d_key", self._join(ds.swapaxes(-1, -2) @ q))
        dv = show(index, "d_value", self._join(p.swapaxes(-1, -2) @ do))
        dx = dr1 + layer.key.transposed(dk) + layer.value.transposed(dv)
        total: Array = dx + layer.query.transposed(dq) / self.shape.head_width**0.5
        return total

    def _norm_backward(self, index: int, which: str, norm: Norm, dy: Array, kept: dict[str, Array]) -> Array:
        normed, root = kept[f"normed{which}"], kept[f"root{which}"]
        g = dy * norm.weight
        across = (g * normed).mean(axis=-1, keepdims=True)
        dx = root * (g - g.mean(axis=-1, keepdims=True) - normed * across)
        return self._show(index, f"d_residual{which}", dx)


def _look_away(_index: int, _name: str, _values: Array) -> None:
    pass

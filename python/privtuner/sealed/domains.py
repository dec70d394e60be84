"""Domains: how large every value in the encoder gets. Measured by the server, on text of its own choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner.ckks.polynomial import Domain
from privtuner.errors import InputError
from privtuner.sealed.exact import ExactEncoder
from privtuner.sealed.weights import Weights

__all__ = ["Domains", "LayerDomains"]

Array = npt.NDArray[np.float64]

GRADIENT_ROOM = 2.0
"""Further head room of gradients: those of a loss are not random."""


@dataclass(frozen=True)
class LayerDomains:
    """What the values of one layer stay within, at real positions. A number is a bound of the absolute value.

    Attributes:
        query, key, value: behind the projections; queries with their 1 / sqrt(head width).
        scores: queries by keys.
        mixed: values weighed by probabilities.
        residual1, variance1, output1: before the first norm, of its rows, behind it.
        up, active: before the activation and behind it.
        residual2, variance2, output2: of the second norm, whose output is the layer's.
        d_output2 to d_value: the gradients by them, for a gradient by the revealed vectors of entries up to one.
    """

    query: float
    key: float
    value: float
    scores: float
    mixed: float
    residual1: float
    variance1: Domain
    output1: float
    up: Domain
    active: float
    residual2: float
    variance2: Domain
    output2: float
    d_output2: float
    d_residual2: float
    d_active: float
    d_up: float
    d_output1: float
    d_residual1: float
    d_mixed: float
    d_probabilities: float
    d_scores: float
    d_query: float
    d_key: float
    d_value: float

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            pair = isinstance(value, tuple)
            numbers = value if pair else (value,)
            if not all(math.isfinite(v) for v in numbers):
                raise InputError(f"domain {f.name} = {value}: must be finite")
            if (pair and not (len(value) == 2 and value[0] < value[1])) or (not pair and value <= 0):
                raise InputError(f"domain {f.name} = {value}: expected {'(low, high)' if pair else 'a positive bound'}")
        for name in ("variance1", "variance2"):
            if getattr(self, name)[0] <= 0:
                raise InputError(f"domain {name} = {getattr(self, name)}: a variance is positive")
        if not self.up[0] < 0 < self.up[1]:
            raise InputError(f"domain up = {self.up}: must hold zero, which hidden positions are at")

    def with_gradients(self, factor: float) -> LayerDomains:
        """The domains for gradients times a factor."""
        return replace(self, **{f.name: factor * getattr(self, f.name) for f in fields(self) if f.name[:2] == "d_"})


@dataclass(frozen=True)
class Domains:
    """The domains of all layers.

    Attributes:
        layers: one `LayerDomains` a layer.
        inputs: bound of the embeddings.
        pooled: bound of what is revealed.
    """

    layers: tuple[LayerDomains, ...]
    inputs: float
    pooled: float

    def __post_init__(self) -> None:
        for name in ("inputs", "pooled"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"domain {name} = {getattr(self, name)}: expected a positive bound")

    @classmethod
    def measure(
        cls,
        weights: Weights,
        embeddings: npt.ArrayLike,
        lengths: npt.ArrayLike,
        room: float = 1.25,
        *,
        seed: int = 0,
        batch: int = 64,
    ) -> Domains:
        """Measure the domains on a sample of texts, with the exact encoder.

        Args:
            weights: of the encoder.
            embeddings: (n, tokens, width), after their norm.
            lengths: whole numbers (n,): the real tokens of each.
            room: at least 1. Bounds and the ends of the activation's domain are widened by this factor, a variance's by
                its square both ways, gradients' by `GRADIENT_ROOM` on top.
            seed: of the random signs that stand for gradients.
            batch: sequences at a time.

        Raises:
            InputError: as `ExactEncoder.forward`, or room below 1.
        """
        if not 1 <= room < 100:
            raise InputError(f"room = {room}: must be at least 1 and below 100")
        extremes = _Extremes()
        exact = ExactEncoder(weights, extremes)
        rows, counts = np.asarray(embeddings), np.asarray(lengths)
        if rows.ndim != 3 or counts.shape != rows.shape[:1] or batch < 1:
            raise InputError(
                f"embeddings of shape {rows.shape} and lengths of shape {counts.shape} in batches of {batch}"
            )
        rng = np.random.default_rng(seed)
        pooled = inputs = 0.0
        for begin in range(0, len(rows), batch):
            part = slice(begin, begin + batch)
            out = exact.forward(rows[part], counts[part])
            exact.backward(rng.choice((-1.0, 1.0), size=out.shape))
            pooled = max(pooled, float(np.abs(out).max()))
            real = np.arange(rows.shape[1]) < counts[part, None]
            inputs = max(inputs, float(np.abs(rows[part][real]).max()))
        layers = tuple(extremes.layer(index, room) for index in range(weights.shape.layers))
        return cls(layers, inputs * room, pooled * room)

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers, for JSON."""
        return asdict(self)

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> Domains:
        """Read what `to_dict` wrote.

        Raises:
            InputError: a field that is missing, unknown, or out of range.
        """
        try:
            layers = []
            for layer in data["layers"]:
                values: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in layer.items()}
                layers.append(LayerDomains(**values))
            return cls(tuple(layers), float(data["inputs"]), float(data["pooled"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"these are no domains: {error}; measure them again") from error


class _Extremes:
    """The observer that keeps the smallest and the largest value of every place."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str], tuple[float, float]] = {}

    def __call__(self, index: int, name: str, values: Array) -> None:
        low, high = self.found.get((index, name), (math.inf, -math.inf))
        self.found[index, name] = min(low, float(values.min())), max(high, float(values.max()))

    def layer(self, index: int, room: float) -> LayerDomains:
        domains: dict[str, Any] = {}
        for f in fields(LayerDomains):
            low, high = self.found[index, f.name]
            if f.name.startswith("variance"):
                domains[f.name] = (low / room**2, high * room**2)
            elif f.name == "up":
                domains[f.name] = (min(room * low, -1.0), max(room * high, 1.0))
            else:
                # A model may hold zeros only; a bound is positive.
                largest = max(-low, high, 2.0**-20)
                domains[f.name] = largest * room * (GRADIENT_ROOM if f.name.startswith("d_") else 1.0)
        return LayerDomains(**domains)

"""The server's weights of a BERT-like encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from privtuner.errors import InputError
from privtuner.sealed.shape import Shape

__all__ = ["Dense", "LayerWeights", "Norm", "Weights"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Dense:
    """x W^T + b. Attributes: weight float64 (d_out, d_in); bias float64 (d_out,)."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        """Apply to the last axis."""
        return _product(x, self.weight.T) + self.bias

    def transposed(self, gradient: Array) -> Array:
        """Return the gradient by x: g W, on the last axis."""
        return _product(gradient, self.weight)


def _product(x: Array, matrix: Array) -> Array:
    """x (..., k) by a matrix (k, d): one product for all rows, where NumPy would do one for each sequence."""
    return np.asarray(x.reshape(-1, len(matrix)) @ matrix).reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Norm:
    """A layer norm's factors and offsets. Attributes: weight, bias float64 (d,)."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class LayerWeights:
    """One block: attention and its norm, two dense layers and theirs."""

    query: Dense
    key: Dense
    value: Dense
    output: Dense
    norm1: Norm
    up: Dense
    down: Dense
    norm2: Norm


_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


@dataclass(frozen=True)
class Weights:
    """All blocks, and the dense layer behind the first token where there is one.

    Attributes:
        shape: of the encoder they are for.
        layers: one `LayerWeights` a block.
        pooler: the dense layer that ``shape.pooler`` speaks of, else None.
    """

    shape: Shape
    layers: tuple[LayerWeights, ...]
    pooler: Dense | None = None

    @classmethod
    def of_state(cls, state: Mapping[str, npt.ArrayLike], shape: Shape) -> Weights:
        """Take the weights from the state of a ``transformers.BertModel``, or of a model that holds one as ``bert``.

        Args:
            state: name to array, ``encoder.layer.0.attention.self.query.weight`` for instance.
            shape: of the encoder. Its layers may be the first of more.

        Raises:
            InputError: a weight that is missing, of another shape, or not finite.
        """
        d, hidden = shape.width, shape.hidden
        sizes = {"up": (hidden, d), "down": (d, hidden)}
        layers = []
        for index in range(shape.layers):
            parts: dict[str, Dense | Norm] = {}
            for field, name in _NAMES.items():
                full = f"encoder.layer.{index}.{name}"
                if field.startswith("norm"):
                    parts[field] = Norm(_read(state, f"{full}.weight", (d,)), _read(state, f"{full}.bias", (d,)))
                else:
                    parts[field] = _dense(state, full, *sizes.get(field, (d, d)))
            layers.append(LayerWeights(**parts))  # type: ignore[arg-type]
        pooler = _dense(state, "pooler.dense", d, d) if shape.pooler else None
        return cls(shape, tuple(layers), pooler)

    def narrow(self, width: int) -> Weights:
        """A part of every weight, of an encoder of one head and so many features in all places."""

        def part(weight: Dense | Norm) -> Dense | Norm:
            if isinstance(weight, Norm):
                return Norm(weight.weight[:width], weight.bias[:width])
            return Dense(weight.weight[:width, :width], weight.bias[:width])

        shape = replace(self.shape, width=width, heads=1, hidden=width)
        layers = tuple(
            LayerWeights(*(part(getattr(layer, f.name)) for f in fields(layer)))  # type: ignore[arg-type]
            for layer in self.layers
        )
        return Weights(shape, layers, None if self.pooler is None else part(self.pooler))  # type: ignore[arg-type]

    def arrays(self) -> Iterator[Array]:
        """All arrays in a fixed order."""
        for part in [getattr(layer, f.name) for layer in self.layers for f in fields(layer)] + [self.pooler]:
            if part is not None:
                yield part.weight
                yield part.bias

    def to_state(self) -> Iterator[tuple[str, Array]]:
        """Yield names and arrays as `of_state` takes them."""
        parts: list[tuple[str, Dense | Norm | None]] = [
            (f"encoder.layer.{index}.{name}", getattr(layer, field))
            for index, layer in enumerate(self.layers)
            for field, name in _NAMES.items()
        ]
        for name, part in [*parts, ("pooler.dense", self.pooler)]:
            if part is not None:
                yield f"{name}.weight", part.weight
                yield f"{name}.bias", part.bias


def _dense(state: Mapping[str, npt.ArrayLike], name: str, rows: int, columns: int) -> Dense:
    return Dense(_read(state, f"{name}.weight", (rows, columns)), _read(state, f"{name}.bias", (rows,)))


def _read(state: Mapping[str, npt.ArrayLike], name: str, shape: tuple[int, ...]) -> Array:
    found = state.get(name, state.get(f"bert.{name}"))
    if found is None:
        raise InputError(f"the state has no {name}: only BERT-like encoders can be sealed whole")
    array = np.array(found, np.float64)
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}: expected {shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or infinity")
    array.flags.writeable = False
    return array

"""The two kinds of linear layer: PyTorch's, and ``Conv1D`` of ``transformers``, which stores its weight transposed."""

from __future__ import annotations

from typing import Literal

import torch

__all__ = ["Kind", "kind_of", "matrix_of"]

Kind = Literal["linear", "conv1d"]


def kind_of(module: torch.nn.Module) -> Kind | None:
    """Return the kind of a linear layer, None for every other module."""
    from transformers.pytorch_utils import Conv1D

    # Subclasses may compute something else, so only the classes themselves count.
    if type(module) is torch.nn.Linear:
        return "linear"
    return "conv1d" if type(module) is Conv1D else None


def matrix_of(module: torch.nn.Module) -> torch.Tensor:
    """Return the weight of a linear layer as (out_features, in_features)."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight if kind_of(module) == "linear" else weight.T

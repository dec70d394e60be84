"""The encrypted form of GPT-2's ``Conv1D``, a linear layer that stores its weight transposed."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

from privtuner.nn.groups import EncryptedGroup
from privtuner.nn.layers import EncryptedLayer

__all__ = ["EncryptedConv1D"]


class EncryptedConv1D(EncryptedLayer, Conv1D):  # type: ignore[misc]
    """A frozen ``transformers`` ``Conv1D`` without its weight.

    Being a ``Conv1D`` makes PEFT treat it as the layer it stands for: the saved adapter says ``fan_in_fan_out``, as one
    trained on the clear model does. ``weight`` reports the shape (in_features, out_features).
    """

    def __init__(
        self,
        group: EncryptedGroup,
        member: int = 0,
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        EncryptedLayer.__init__(self, group, member, bias=bias, dtype=dtype)
        self.nx, self.nf = self.in_features, self.out_features

    @property
    def _weight_shape(self) -> tuple[int, int]:
        return (self.in_features, self.out_features)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

"""The encrypted product of a group as one node of PyTorch's graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from privtuner.nn.groups import EncryptedGroup
    from privtuner.nn.padding import Rows

__all__ = ["GroupProduct"]


class GroupProduct(torch.autograd.Function):
    """``x -> (x @ W_1.T, ..., x @ W_m.T)`` for the m members of a group, in one request each way.

    The map is linear, so nothing of the forward pass is kept for backward, and a graph may be walked more than once.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: EncryptedGroup, rows: Rows | None) -> tuple[torch.Tensor, ...]:
        """Return the members' products.

        Args:
            ctx: autograd's context.
            x: (..., d_in), float32, bfloat16 or float16.
            group: the layers fed by ``x``.
            rows: the tokens to encrypt, all when None; the others give zeros.

        Returns:
            One (..., d_out_k) for each member, in the dtype and on the device of ``x``.
        """
        ctx.set_materialize_grads(False)
        ctx.group, ctx.rows = group, rows
        ctx.leading, ctx.dtype, ctx.device = x.shape[:-1], x.dtype, x.device
        return group.forward_product(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        """Return the gradient (..., d_in) of ``x``; members without a gradient count as zeros.

        Raises:
            privtuner.errors.InputError: a gradient reaches a token that was left out.
        """
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, None, None
        overflowed = ctx.rows is not None and any(ctx.rows.overflowed(ctx.group.name, grad) for grad in given)
        gradient = ctx.group.backward_product(grads, ctx.leading, ctx.dtype, ctx.device, ctx.rows)
        return gradient.fill_(torch.nan) if overflowed else gradient, None, None

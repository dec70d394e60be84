"""Layers fed by the same tensor: one stacked weight, one upload, one reply, in both directions."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.dlpack
from torch.autograd.function import once_differentiable

from privtuner import linear
from privtuner.errors import InputError
from privtuner.nn.live import LiveResource
from privtuner.nn.overflow import blank_overflow
from privtuner.nn.padding import Rows
from privtuner.nn.session import Session

__all__ = ["DTYPES", "EncryptedGroup", "spread"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of activations that layers take."""


class _Shared:
    """Products already computed for one input, waiting for the members that have not asked yet."""

    def __init__(
        self,
        x: torch.Tensor,
        rows: Rows | None,
        outputs: dict[int, torch.Tensor],
        group: EncryptedGroup,
    ) -> None:
        owner = weakref.ref(group)

        def drop(_: weakref.ref[torch.Tensor]) -> None:
            living = owner()
            if living is not None:
                living.forget(self)

        self._x = weakref.ref(x, drop)
        # Inference tensors count no versions, so a copy tells whether they were written to.
        self._copy = x.clone() if x.is_inference() else None
        self._version = None if x.is_inference() else x._version
        self._mode = (torch.is_grad_enabled(), x.requires_grad)
        self._rows = rows
        self.outputs = outputs

    def fits(self, x: torch.Tensor, rows: Rows | None) -> bool:
        if self._x() is not x or self._rows is not rows:
            return False
        if self._mode != (torch.is_grad_enabled(), x.requires_grad):
            return False
        if self._copy is not None:
            return torch.equal(self._copy, x)
        return bool(x._version == self._version)


class EncryptedGroup(LiveResource):
    """One prepared layer of the server and the data owner's layers that share it.

    The first member called with a tensor runs the product for all; the others called with the *same* tensor object,
    unchanged and under the same gradient mode, take theirs. A member asked again, or with another tensor, runs anew.

    Args:
        name: wire name of the prepared layer.
        spec: the layer's description, of shape (sum of ``out_features``, in_features).
        out_features: output features of each member, in the order of the stacked rows.
        session: transport and counters.

    Raises:
        privtuner.errors.InputError: ``out_features`` is empty, not positive, or does not add up to ``spec.d_out``.
    """

    def __init__(self, name: str, spec: linear.LayerSpec, out_features: Sequence[int], session: Session) -> None:
        self.name = name
        self.spec = spec
        self.out_features = tuple(out_features)
        self.session = session
        self._shared: _Shared | None = None
        if not self.out_features or min(self.out_features) < 1 or sum(self.out_features) != spec.d_out:
            raise InputError(
                f"group '{name}': members of {list(self.out_features)} output features do not stack to the "
                f"{spec.d_out} rows of the prepared layer"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> EncryptedGroup:
        return EncryptedGroup(self.name, self.spec, self.out_features, self.session)

    @property
    def in_features(self) -> int:
        """Features of the shared input."""
        return int(self.spec.d_in)

    def take(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ W_member.T``, sharing one request between the members.

        Args:
            member: index into ``out_features``.
            x: (..., in_features), float32, bfloat16 or float16, any device.

        Returns:
            (..., out_features[member]) in the dtype and on the device of ``x``, without the bias.

        Raises:
            privtuner.errors.InputError: wrong dtype or shape, a NaN or infinity in ``x``, or a number of tokens that
                does not follow from the shapes of the model's inputs; see `privtuner.nn.passes.PassTracker`.
        """
        self._check(x)
        rows = self.session.passes.admit(self.name, x.shape[:-1])
        shared = self._shared
        if shared is not None and shared.fits(x, rows):
            waiting = shared.outputs.pop(member, None)
            if not shared.outputs:
                self._shared = None
            if waiting is not None:
                return waiting
        self._shared = None
        products: tuple[torch.Tensor, ...] = _GroupProduct.apply(x, self, rows)  # type: ignore[no-untyped-call]
        left = {index: product for index, product in enumerate(products) if index != member}
        if left:
            self._shared = _Shared(x, rows, left, self)
        return products[member]

    def forget(self, shared: _Shared) -> None:
        """Drop ``shared`` once its input is gone."""
        if self._shared is shared:
            self._shared = None

    def forward_product(self, x: torch.Tensor, rows: Rows | None) -> tuple[torch.Tensor, ...]:
        """Return every member's ``x @ W_k.T`` in one request; see `_GroupProduct`."""
        leading = x.shape[:-1]
        flat = x.detach().reshape(-1, self.in_features)
        if rows is not None:
            flat = rows.select(flat)
        stacked = self._run(flat, "forward")
        parts = stacked.split(self.out_features, dim=1)
        return tuple(spread(part, rows, leading, x.dtype, x.device) for part in parts)

    def backward_product(
        self,
        grads: Sequence[torch.Tensor | None],
        leading: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        rows: Rows | None,
    ) -> torch.Tensor:
        """Return ``sum_k G_k @ W_k`` (..., in_features) in one request; None among ``grads`` counts as zeros.

        Tokens whose gradient is not finite get NaN, as in the clear, and zeros are sent for them.
        """
        tokens = int(torch.Size(leading).numel()) if rows is None else rows.visible.numel()
        where = device if self.session.on_device else "cpu"
        stacked = torch.zeros(tokens, int(self.spec.d_out), dtype=torch.float32, device=where)
        start = 0
        for features, grad in zip(self.out_features, grads, strict=True):
            if grad is not None:
                flat = grad.detach().reshape(-1, features)
                if rows is not None:
                    flat = rows.select(flat)
                stacked[:, start : start + features] = flat
            start += features
        lost = blank_overflow(stacked)
        product = self._run(stacked, "backward")
        product[lost.to(product.device)] = torch.nan
        return spread(product, rows, leading, dtype, device)

    def _run(self, flat: torch.Tensor, direction: linear.Direction) -> torch.Tensor:
        """Return the product of ``flat`` (tokens, features) as float32, where it is computed.

        Rows of zeros are sent beside the tokens where the session says so; neither tokens nor such rows, no request.
        """
        tokens = flat.shape[0]
        more = self.session.padded(tokens) - tokens
        if tokens + more == 0:
            features = self.spec.d_out if direction == "forward" else self.spec.d_in
            return torch.zeros(0, int(features))
        x = torch.nn.functional.pad(flat.to(torch.float32), (0, 0, 0, more)).contiguous()
        batch = x if self.session.on_device else x.cpu().numpy()
        return torch.utils.dlpack.from_dlpack(self.session.product(self.name, self.spec, batch, direction))[:tokens]

    def _check(self, x: torch.Tensor) -> None:
        if x.dtype not in DTYPES:
            raise InputError(f"layer '{self.name}': input has dtype {x.dtype}; cast it to float32, bfloat16 or float16")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise InputError(
                f"layer '{self.name}': input has shape {tuple(x.shape)}; its last dimension must be {self.in_features}"
            )


class _GroupProduct(torch.autograd.Function):
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
        overflowed = ctx.rows is not None and any(ctx.rows.check_hidden(ctx.group.name, grad) for grad in given)
        gradient = ctx.group.backward_product(grads, ctx.leading, ctx.dtype, ctx.device, ctx.rows)
        return gradient.fill_(torch.nan) if overflowed else gradient, None, None


def spread(
    part: torch.Tensor,
    rows: Rows | None,
    leading: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Copy ``part`` (rows, features) to its place in a tensor (*leading, features) that is zero elsewhere."""
    # A tensor of its own, not a view: autograd forbids writing in place to views that a custom function returns.
    make = torch.empty if rows is None else torch.zeros
    full = make(*leading, part.shape[1], dtype=dtype, device=device)
    flat = full.view(-1, part.shape[1])
    if rows is None:
        flat.copy_(part)
    else:
        flat[rows.visible.to(device)] = part.to(device=device, dtype=dtype)
    return full

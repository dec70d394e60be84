"""Which rows of a batch are real tokens, so that padding is neither encrypted nor sent."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch

from privtuner.nn.live import LiveResource

__all__ = ["PaddingTracker"]


class PaddingTracker(LiveResource):
    """Holds the rows of real tokens while a model's forward pass runs.

    Rows that the attention mask hides cannot change the rows it shows, so their products may be left out: their
    outputs are then the bias alone, and their gradients zero. The state is kept per thread and only during a forward
    pass. A gradient checkpoint recomputes its segment afterwards and therefore sends all rows: right, but not shorter.
    """

    def __init__(self) -> None:
        self._state = threading.local()
        self._position: int | None = None

    def watch(self, module: torch.nn.Module) -> None:
        """Follow the ``attention_mask`` argument, (batch, seq) with 0 for padding, of ``module``'s forward passes."""
        names = list(inspect.signature(module.forward).parameters)
        self._position = names.index("attention_mask") if "attention_mask" in names else None
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        # The state must not outlive a forward pass that failed: the next one may come without a mask.
        module.register_forward_hook(self._leave, always_call=True)

    def rows(self, leading: torch.Size) -> torch.Tensor | None:
        """Return the indices of real tokens in a flattened batch, or None when every row counts.

        Args:
            leading: all dimensions of an activation but the last. Only (batch, seq) of the current mask matches.

        Returns:
            int64 (real tokens,), ascending, on the mask's device.
        """
        if leading != getattr(self._state, "leading", None):
            return None
        rows: torch.Tensor = self._state.rows
        return rows

    def _enter(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leave()
        mask = kwargs.get("attention_mask")
        if mask is None and self._position is not None and self._position < len(args):
            mask = args[self._position]
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return
        real = mask.detach().reshape(-1) != 0
        if not bool(real.all()):
            self._state.leading = mask.shape
            self._state.rows = real.nonzero().squeeze(1)

    def _leave(self, *_: Any) -> None:
        self._state.leading = None
        self._state.rows = None

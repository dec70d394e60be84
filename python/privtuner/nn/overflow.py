"""Gradients that are not finite: an overflow is part of training with a scaled loss, and is kept from the server."""

from __future__ import annotations

import torch

__all__ = ["blank_overflow"]


def blank_overflow(gradient: torch.Tensor) -> torch.Tensor:
    """Write zeros over the rows of ``gradient`` that are not finite, and say which they were.

    A row with a NaN or an infinity has no finite product, so the caller gives NaN for it, as the clear layer would.
    The zeros are sent in its place: the server sees requests of the same number and size either way.

    Args:
        gradient: (tokens, features) of a floating dtype, changed in place.

    Returns:
        bool (tokens,), true where a row was overwritten.
    """
    # One pass and no copy; a sum of finite float32 in double precision is finite.
    lost = ~gradient.sum(1, dtype=torch.float64).isfinite()
    if bool(lost.any()):
        gradient[lost] = 0.0
    return lost

"""The data owner's half of the linear scheme on the processor."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from privtuner import linear
from privtuner.parties import LinearClient

__all__ = ["CpuClient"]


class CpuClient(LinearClient):
    """Ring learning with errors with secrets of one request; see `privtuner.linear`.

    Args:
        mask_cache_bytes: memory for mask products, None for no limit; see `privtuner.linear.MaskCache`.

    Raises:
        privtuner.errors.InputError: ``mask_cache_bytes`` is negative.
    """

    scheme = "linear"

    def __init__(self, mask_cache_bytes: int | None = None) -> None:
        self._masks = linear.MaskCache() if mask_cache_bytes is None else linear.MaskCache(mask_cache_bytes)

    def encrypt(
        self, x: NDArray[np.float32], spec: linear.LayerSpec, direction: linear.Direction = "forward"
    ) -> tuple[bytes, linear.OneTimeKey]:
        """Encrypt a batch; see `privtuner.parties.LinearClient`."""
        return linear.encrypt(x, spec, direction=direction, masks=self._masks)

    def decrypt(self, blocks: Iterable[linear.BytesLike], secret: linear.OneTimeKey) -> NDArray[np.float32]:
        """Decrypt a reply; see `privtuner.parties.LinearClient`."""
        return linear.decrypt(blocks, secret)

    def noise(self, spec: linear.LayerSpec, direction: linear.Direction) -> linear.Noise:
        """Return what products are off by; see `privtuner.parties.LinearClient`."""
        return linear.noise(spec, direction)

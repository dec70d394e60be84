"""The data owner's half of the linear scheme on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from privtuner.copies import Stays
from privtuner.cuda import linear as kernels
from privtuner.cuda.device import Device
from privtuner.linear import BytesLike, Direction, LayerSpec, MaskCache, Noise, noise
from privtuner.parties import LinearClient

__all__ = ["CudaClient"]


class CudaClient(LinearClient, Stays):
    """The data owner's half of the linear scheme on a GPU: secrets of one request, made, used and wiped there.

    Args:
        device: from `privtuner.cuda.devices`.
        mask_cache_bytes: device memory for mask products, None for what work leaves of it; see `linear.MaskCache`.

    Raises:
        privtuner.errors.InputError: ``mask_cache_bytes`` is negative.
    """

    scheme = "linear"
    on_device = True
    stays = "a client on a GPU cannot be pickled: make one of the other process's privtuner.cuda.devices there"

    def __init__(self, device: Device, mask_cache_bytes: int | None = None) -> None:
        self.device = device
        self._masks = MaskCache() if mask_cache_bytes is None else MaskCache(mask_cache_bytes)

    def encrypt(
        self, x: Any, spec: LayerSpec, direction: Direction = "forward"
    ) -> tuple[BytesLike, kernels.DeviceOneTimeKey]:
        """Encrypt a batch; see `privtuner.parties.LinearClient`. A CUDA tensor is taken without a copy (DLPack)."""
        with self.device.active():
            return kernels.encrypt(self.device, x, spec, direction, masks=self._masks)

    def decrypt(self, blocks: Iterable[BytesLike], secret: kernels.DeviceOneTimeKey) -> Any:
        """Decrypt a reply; see `privtuner.parties.LinearClient`. Returns a device array, for ``torch.from_dlpack``."""
        with self.device.active():
            return kernels.decrypt(blocks, secret, on_device=True)

    def noise(self, spec: LayerSpec, direction: Direction) -> Noise:
        """Return what products are off by; see `privtuner.parties.LinearClient`."""
        return noise(spec, direction)

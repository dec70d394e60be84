"""The data owner's half of the linear scheme on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from privtuner.copies import Stays
from privtuner.cuda import linear as kernels
from privtuner.cuda.device import Device
from privtuner.errors import InputError
from privtuner.linear import BytesLike, Direction, Public

__all__ = ["CudaClient"]


class CudaClient(Stays):
    """The data owner's half of the native engine on a GPU: secrets of one request, made, used and wiped there.

    Args:
        device: from :func:`privtuner.cuda.devices`.
        mask_cache_bytes: device memory for mask products, None for no limit; see :class:`privtuner.linear.MaskCache`.

    Raises:
        privtuner.errors.InputError: ``mask_cache_bytes`` is negative.
    """

    name = "native"
    on_device = True
    stays = "an owner on a GPU cannot be pickled: make one of the other process's privtuner.cuda.devices there"

    def __init__(self, device: Device, mask_cache_bytes: int | None = None) -> None:
        if mask_cache_bytes is not None and mask_cache_bytes < 0:
            raise InputError(f"mask_cache_bytes = {mask_cache_bytes}: must not be negative")
        self.device = device
        with device.active():
            self._masks = kernels.DeviceMasks(device, mask_cache_bytes)

    def encrypt(self, x: Any, public: Public, direction: Direction) -> tuple[BytesLike, kernels.DeviceSecret]:
        """Encrypt a batch; see `privtuner.schemes.LinearClient`. A CUDA tensor is taken without a copy (DLPack)."""
        with self.device.active():
            return kernels.encrypt(self.device, x, public, direction, masks=self._masks)

    def decrypt(self, blocks: Iterable[BytesLike], secret: kernels.DeviceSecret) -> Any:
        """Decrypt a reply; see `privtuner.schemes.LinearClient`. Returns a device array, for ``torch.from_dlpack``."""
        with self.device.active():
            return kernels.decrypt(blocks, secret, on_device=True)

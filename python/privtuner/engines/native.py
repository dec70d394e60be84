"""The engine of this package's own kernels, and the transport that runs it in the same process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtuner import linear
from privtuner.engines.base import DEFAULT_BLOCK_ROWS, Engine, Layer
from privtuner.errors import InputError

__all__ = ["LocalTransport", "NativeEngine", "NativeOwner"]


class NativeEngine:
    """Byte-plane kernels on the processor; see ``python -m privtuner info`` for the instruction set they chose."""

    name = "native"

    def hold(self, layers: Mapping[str, Layer]) -> Mapping[str, int]:  # noqa: ARG002 - the protocol's signature
        """Nothing to do: the layers lie in memory already."""
        return {}

    def close(self) -> None:
        """Nothing."""

    def gather(self, prepared: Layer, parts: Sequence[bytes]) -> bytes:  # noqa: ARG002 - the protocol's signature
        """A request from its parts; see :class:`privtuner.engines.Engine`."""
        return b"".join(parts)  # of a single part, the part itself

    def apply_blocks(
        self, prepared: Layer, request: linear.BytesLike, block_rows: int = DEFAULT_BLOCK_ROWS
    ) -> Iterator[bytes]:
        """Yield the reply to ``request`` in blocks; see :class:`privtuner.engines.Engine`."""
        if isinstance(prepared, linear.Prepared):
            yield from linear.apply_blocks(prepared, request, block_rows=block_rows)
        else:
            yield from prepared.answer(request)


class NativeOwner:
    """Ring learning with errors with secrets of one request; see :mod:`privtuner.linear`.

    Args:
        mask_cache_bytes: memory for mask products, None for no limit; see :class:`privtuner.linear.MaskCache`.

    Raises:
        privtuner.errors.InputError: ``mask_cache_bytes`` is negative.
    """

    name = "native"
    on_device = False

    def __init__(self, mask_cache_bytes: int | None = None) -> None:
        self._masks = linear.MaskCache() if mask_cache_bytes is None else linear.MaskCache(mask_cache_bytes)

    def encrypt(
        self, x: NDArray[np.float32], public: linear.Public, direction: linear.Direction
    ) -> tuple[bytes, linear.Secret]:
        """Encrypt a batch; see :class:`privtuner.engines.Owner`."""
        return linear.encrypt(x, public, direction=direction, masks=self._masks)

    def decrypt(self, blocks: Iterable[linear.BytesLike], secret: linear.Secret) -> NDArray[np.float32]:
        """Decrypt a reply; see :class:`privtuner.engines.Owner`."""
        return linear.decrypt(blocks, secret)


class LocalTransport:
    """Serves prepared layers inside this process, through the same bytes as a remote server.

    For tests, benchmarks and trying things out: the process then holds both parties' data, so nothing is private.

    Args:
        layers: wire name -> prepared layer, e.g. :attr:`privtuner.nn.Split.server`.
        engine: what computes the product; the native one when None.
        block_rows: output features in one block of a reply, at least 1.

    Raises:
        privtuner.errors.InputError: ``block_rows`` is below 1.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        *,
        engine: Engine | None = None,
        block_rows: int = DEFAULT_BLOCK_ROWS,
    ) -> None:
        if block_rows < 1:
            raise InputError(f"block_rows is {block_rows}; give at least 1")
        self.layers: Mapping[str, Layer] = MappingProxyType(dict(layers))
        self.engine: Engine = NativeEngine() if engine is None else engine
        self.block_rows = block_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layers": dict(self.layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.layers = MappingProxyType(state["layers"])

    def apply(self, layer: str, request: linear.BytesLike) -> Iterator[linear.BytesLike]:
        """Yield the blocks of the reply of ``layer``; see :class:`privtuner.engines.Transport`."""
        prepared = self.layers.get(layer)
        if prepared is None:
            known = ", ".join(sorted(self.layers)) or "none"
            raise InputError(f"no prepared layer is called '{layer}'; this transport serves: {known}")
        return self.engine.apply_blocks(prepared, request, self.block_rows)

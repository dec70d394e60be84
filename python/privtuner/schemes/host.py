"""The transport that serves layers inside the same process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from privtuner import linear
from privtuner.cpu import CpuServer
from privtuner.errors import InputError
from privtuner.schemes.protocol import Layer, LinearServer

__all__ = ["LocalTransport"]


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
        engine: LinearServer | None = None,
        block_rows: int = linear.DEFAULT_BLOCK_ROWS,
    ) -> None:
        if block_rows < 1:
            raise InputError(f"block_rows is {block_rows}; give at least 1")
        self.layers: Mapping[str, Layer] = MappingProxyType(dict(layers))
        self.engine: LinearServer = CpuServer() if engine is None else engine
        self.block_rows = block_rows

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layers": dict(self.layers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.layers = MappingProxyType(state["layers"])

    def apply(self, layer: str, request: linear.BytesLike) -> Iterator[linear.BytesLike]:
        """Yield the blocks of the reply of ``layer``; see :class:`privtuner.schemes.Transport`."""
        prepared = self.layers.get(layer)
        if prepared is None:
            known = ", ".join(sorted(self.layers)) or "none"
            raise InputError(f"no prepared layer is called '{layer}'; this transport serves: {known}")
        return self.engine.apply_blocks(prepared, request, self.block_rows)

"""The server's half of the linear scheme on the processor."""

from __future__ import annotations

from collections.abc import Iterator

from privtuner import linear, wire
from privtuner.linear import BytesLike, QuantisedWeight
from privtuner.parties import BLOCK_BYTES, LinearServer, rows_of

__all__ = ["CpuServer"]


class CpuServer(LinearServer):
    """Byte-plane kernels on the processor; ``privtuner info`` names the instruction set they chose."""

    scheme = "linear"

    def answer(self, prepared: QuantisedWeight, request: BytesLike, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Yield the reply to ``request`` in blocks; see `privtuner.parties.LinearServer`."""
        return linear.apply_blocks(prepared, request, rows_of(block_bytes, 4 * wire.peek(request).tokens))

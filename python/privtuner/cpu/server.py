"""The server's half of the linear scheme on the processor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from privtuner import linear

__all__ = ["CpuServer"]


class CpuServer:
    """Byte-plane kernels on the processor; see ``python -m privtuner info`` for the instruction set they chose."""

    name = "native"

    def hold(self, layers: Mapping[str, Any]) -> Mapping[str, int]:  # noqa: ARG002 - the protocol's signature
        """Nothing to do: the layers lie in memory already."""
        return {}

    def close(self) -> None:
        """Nothing."""

    def gather(self, prepared: Any, parts: Sequence[bytes]) -> bytes:  # noqa: ARG002 - the protocol's signature
        """A request from its parts; see :class:`privtuner.schemes.LinearServer`."""
        return b"".join(parts)  # of a single part, the part itself

    def apply_blocks(
        self, prepared: Any, request: linear.BytesLike, block_rows: int = linear.DEFAULT_BLOCK_ROWS
    ) -> Iterator[bytes]:
        """Yield the reply to ``request`` in blocks; see :class:`privtuner.schemes.LinearServer`."""
        if isinstance(prepared, linear.Prepared):
            yield from linear.apply_blocks(prepared, request, block_rows=block_rows)
        else:
            yield from prepared.answer(request)

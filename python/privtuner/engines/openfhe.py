"""The engine whose requests carry OpenFHE ciphertexts. The data owner needs OpenFHE for it, the server does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from privtuner.engines.base import DEFAULT_BLOCK_ROWS, Layer
from privtuner.linear import BytesLike, Prepared
from privtuner.openfhe.linear import apply_blocks

__all__ = ["OpenFheEngine"]


class OpenFheEngine:
    """Multiplies the residues of OpenFHE ciphertexts; sealed blocks have messages of their own, of the native CKKS."""

    name = "openfhe"

    def hold(self, layers: Mapping[str, Layer]) -> Mapping[str, int]:  # noqa: ARG002 - the protocol's signature
        """Nothing to do: the layers lie in memory already."""
        return {}

    def close(self) -> None:
        """Nothing."""

    def gather(self, prepared: Layer, parts: Sequence[bytes]) -> bytes:  # noqa: ARG002 - the protocol's signature
        """A request from its parts; see :class:`privtuner.engines.Engine`."""
        return b"".join(parts)  # of a single part, the part itself

    def apply_blocks(
        self, prepared: Layer, request: BytesLike, block_rows: int = DEFAULT_BLOCK_ROWS
    ) -> Iterator[bytes]:
        """Yield the reply to ``request`` in blocks; see :class:`privtuner.engines.Engine`."""
        if isinstance(prepared, Prepared):
            yield from apply_blocks(prepared, request, block_rows=block_rows)
        else:
            yield from prepared.answer(request)

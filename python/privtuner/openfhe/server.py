"""The server's half of a linear layer whose requests carry OpenFHE ciphertexts.

A product with clear integers acts on the residues of a ciphertext alone, so the server needs neither a key nor OpenFHE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import _core
from ..errors import InputError, MessageError
from ..linear import DEFAULT_BLOCK_ROWS, Prepared, row_step
from . import messages
from .messages import BytesLike, Head

__all__ = ["OpenFheServer", "apply_blocks"]


class OpenFheServer:
    """Multiplies the residues of OpenFHE ciphertexts; sealed blocks have messages of their own, of the native CKKS."""

    name = "openfhe"

    def hold(self, layers: Mapping[str, Any]) -> Mapping[str, int]:  # noqa: ARG002 - the protocol's signature
        """Nothing to do: the layers lie in memory already."""
        return {}

    def close(self) -> None:
        """Nothing."""

    def gather(self, prepared: Any, parts: Sequence[bytes]) -> bytes:  # noqa: ARG002 - the protocol's signature
        """A request from its parts; see :class:`privtuner.schemes.LinearServer`."""
        return b"".join(parts)  # of a single part, the part itself

    def apply_blocks(self, prepared: Any, request: BytesLike, block_rows: int = DEFAULT_BLOCK_ROWS) -> Iterator[bytes]:
        """Yield the reply to ``request`` in blocks; see :class:`privtuner.schemes.LinearServer`."""
        if isinstance(prepared, Prepared):
            yield from apply_blocks(prepared, request, block_rows=block_rows)
        else:
            yield from prepared.answer(request)


def apply_blocks(prepared: Prepared, request: BytesLike, block_rows: int = DEFAULT_BLOCK_ROWS) -> Iterator[bytes]:
    """Answer a request in blocks of ``block_rows`` outputs, as they are computed (model owner).

    Args:
        prepared: the layer the request is meant for.
        request: bytes from :meth:`privtuner.openfhe.OpenFheClient.encrypt`.
        block_rows: outputs a block, rounded up to a multiple of 32.

    Returns:
        An iterator over the blocks of one reply, in order. The request is checked before this function returns.

    Raises:
        MessageError: the request is malformed, truncated, corrupted, or meant for another layer.
        InputError: ``block_rows`` is not positive.
    """
    step = row_step(block_rows)
    head, residues = messages.read(request, messages.REQUEST)
    public = prepared.public
    if head.layer != public.id:
        raise MessageError("the request is meant for another layer, or for other weights; fetch the bundle again")
    backward = head.direction == "backward"
    features, rows = (public.d_out, public.d_in) if backward else (public.d_in, public.d_out)
    if head.features != features:
        raise MessageError(
            f"request: {head.features} features, the layer takes {features} in {head.direction} requests"
        )
    try:
        products = [
            _core.ResidueProduct(prepared._core, backward, np.ascontiguousarray(words).reshape(features, -1), modulus)
            for group in residues
            for words, modulus in zip(group, head.moduli, strict=True)
        ]
    except InputError as error:
        raise MessageError(f"request: {error}") from error
    return (_block(head, products, begin, min(step, rows - begin), rows) for begin in range(0, rows, step))


def _block(head: Head, products: list[_core.ResidueProduct], begin: int, count: int, total: int) -> bytes:
    block = replace(head, kind=messages.BLOCK, features=count, first=begin, total=total)
    return messages.write(block, [product.multiply(begin, count) for product in products])

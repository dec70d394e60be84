"""The server's half of a linear layer whose requests carry OpenFHE ciphertexts.

A product with clear integers acts on the residues of a ciphertext alone, so the server needs neither a key nor OpenFHE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from privtuner import _core
from privtuner.errors import InputError, MessageError
from privtuner.linear import QuantisedWeight, row_step
from privtuner.openfhe import messages
from privtuner.openfhe.messages import BytesLike, Head
from privtuner.parties import BLOCK_BYTES, LinearServer, rows_of

__all__ = ["OpenFheServer"]


class OpenFheServer(LinearServer):
    """Multiplies the residues of OpenFHE ciphertexts."""

    scheme = "openfhe"

    def answer(self, prepared: QuantisedWeight, request: BytesLike, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Return the blocks of the reply to ``request``; see `privtuner.parties.LinearServer`.

        The request is checked before this function returns.
        """
        head, residues = messages.read(request, messages.REQUEST)
        step = row_step(rows_of(block_bytes, residues.nbytes // head.features))
        spec = prepared.spec
        if head.layer != spec.id:
            raise MessageError("the request is meant for another layer, or for other weights; fetch the bundle again")
        backward = head.direction == "backward"
        features, rows = (spec.d_out, spec.d_in) if backward else (spec.d_in, spec.d_out)
        if head.features != features:
            raise MessageError(
                f"request: {head.features} features, the layer takes {features} in {head.direction} requests"
            )
        try:
            products = [
                _core.ResidueProduct(
                    prepared._core, backward, np.ascontiguousarray(words).reshape(features, -1), modulus
                )
                for group in residues
                for words, modulus in zip(group, head.moduli, strict=True)
            ]
        except InputError as error:
            raise MessageError(f"request: {error}") from error
        return (_block(head, products, begin, min(step, rows - begin), rows) for begin in range(0, rows, step))


def _block(head: Head, products: list[_core.ResidueProduct], begin: int, count: int, total: int) -> bytes:
    block = replace(head, kind=messages.BLOCK, features=count, first=begin, total=total)
    return messages.write(block, [product.multiply(begin, count) for product in products])

"""The two protocols between the data owner's layers and whatever computes the encrypted product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from privtuner.linear import Prepared

__all__ = ["DEFAULT_BLOCK_ROWS", "Engine", "Transport"]

DEFAULT_BLOCK_ROWS = 256
"""Output features in one block of a reply: small enough to overlap decryption with the product that follows."""


@runtime_checkable
class Transport(Protocol):
    """Carries requests of the data owner to the server's prepared layers.

    An implementation sees ciphertexts only, so it need not be trusted with secrets. It must return the reply of the
    very request it was given: mixed-up or damaged replies are refused on decryption
    (:class:`privtuner.errors.MessageError`), but one that was forged on purpose is not recognised.
    """

    def apply(self, layer: str, request: bytes) -> Iterable[bytes]:
        """Return the blocks of the reply to ``request``, in order, possibly as they are computed.

        Args:
            layer: name of the prepared layer, as in the bundle's ``publics``.
            request: what :func:`privtuner.linear.encrypt` made.

        Raises:
            privtuner.errors.PrivtunerError: the layer is unknown, the request is malformed, or the server failed.
        """
        ...


class Engine(Protocol):
    """Computes the encrypted product of one prepared layer, block by block."""

    name: str

    def apply_blocks(self, prepared: Prepared, request: bytes, block_rows: int) -> Iterator[bytes]:
        """Yield the reply to ``request`` in blocks of at most ``block_rows`` output features.

        Raises:
            privtuner.errors.MessageError: the request is malformed or meant for another layer.
        """
        ...

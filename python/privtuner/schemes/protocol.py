"""The protocols between the layers above and whatever computes on the bytes of their requests below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from privtuner.linear import BytesLike, Direction, Prepared, Public

if TYPE_CHECKING:
    from privtuner.sealed.exchange import Block

__all__ = ["Layer", "LinearClient", "LinearServer", "Transport"]

Layer: TypeAlias = "Prepared | Block"
"""What a server holds under one name: a linear layer, or a block evaluated whole on ciphertexts."""


@runtime_checkable
class Transport(Protocol):
    """Carries requests of the data owner to the server's prepared layers.

    An implementation sees ciphertexts only, so it need not be trusted with secrets. It must return the reply of the
    very request it was given: mixed-up or damaged replies are refused on decryption
    (:class:`privtuner.errors.MessageError`), but one that was forged on purpose is not recognised.
    """

    def apply(self, layer: str, request: BytesLike) -> Iterable[BytesLike]:
        """Return the blocks of the reply to ``request``, in order, possibly as they are computed.

        Args:
            layer: name of the prepared layer, as in the bundle's ``publics``.
            request: what an `Owner` encrypted, or `privtuner.sealed.blocks.SealedClient`. Of an owner on a GPU it
                is a read-only memoryview, of memory that is used again once nothing refers to the view or a part of it;
                ``bytes(request)`` is a copy.

        Raises:
            privtuner.errors.PrivtunerError: the layer is unknown, the request is malformed, or the server failed.
        """
        ...


class LinearServer(Protocol):
    """Computes the reply of one layer, block by block. Safe to use from several threads."""

    name: str

    def hold(self, layers: Mapping[str, Layer]) -> Mapping[str, int]:
        """Get ready for ``layers``, all that will be asked for: an engine with memories of its own copies them there.

        Returns:
            Bytes of layers in each such memory, by its name; empty where there is none.

        Raises:
            privtuner.errors.EngineError: they do not fit.
        """
        ...

    def close(self) -> None:
        """Let go of threads and the like. A later request still works."""
        ...

    def gather(self, prepared: Layer, parts: Sequence[bytes]) -> BytesLike:
        """A request to a layer from its parts, where this engine reads it without another copy.

        Raises:
            privtuner.errors.EngineError: there is no memory for it.
        """
        ...

    def apply_blocks(self, prepared: Layer, request: BytesLike, block_rows: int) -> Iterator[BytesLike]:
        """Yield the reply to ``request``: of a linear layer in blocks of at most ``block_rows`` output features.

        On a GPU they are read-only memoryviews, of memory that is used again once nothing refers to them.

        Raises:
            privtuner.errors.MessageError: the request is malformed or meant for another layer.
        """
        ...


class LinearClient(Protocol):
    """The data owner's half of linear layers: encrypts requests and decrypts replies. Safe to use from several threads.

    Attributes:
        name: of the engine that answers its requests.
        on_device: whether batches and results are arrays of a GPU, exchanged by DLPack; else they are NumPy's.
    """

    name: str
    on_device: bool

    def encrypt(self, x: Any, public: Public, direction: Direction) -> tuple[BytesLike, Any]:
        """Return the request for ``x @ W.T`` (forward) or ``x @ W`` (backward), and what decrypts its reply.

        Args:
            x: float32 (tokens, features), a NumPy array, or if ``on_device`` anything with ``__dlpack__``.
            public: of the layer.
            direction: "forward" or "backward".

        Raises:
            privtuner.errors.InputError: wrong shape or dtype, a NaN or infinity, or no tokens.
        """
        ...

    def decrypt(self, blocks: Iterable[BytesLike], secret: Any) -> Any:
        """Decrypt the blocks of a reply as they arrive; ``secret`` is used up. Returns float32 (tokens, features).

        Raises:
            privtuner.errors.MessageError: a block is malformed, or answers another request.
            privtuner.errors.SecretError: ``secret`` was used before.
        """
        ...

"""The two parties of a linear layer, whatever the scheme and the device, and what carries bytes between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from privtuner.linear import DEFAULT_BLOCK_ROWS, BytesLike, Direction, LayerSpec, Noise, QuantisedWeight

__all__ = ["BLOCK_BYTES", "LinearClient", "LinearServer", "Transport", "rows_of"]

BLOCK_BYTES = 1 << 20
"""About the size of one block of a reply: large enough to amortise its cost, small enough to overlap with the next."""


@runtime_checkable
class Transport(Protocol):
    """Carries requests of the data owner to the server's layers.

    An implementation sees ciphertexts only, so it need not be trusted with secrets. It must return the reply of the
    very request it was given: mixed-up or damaged replies are refused on decryption (`MessageError`), and those that
    were forged on purpose by `privtuner.nn.verification`, unless they are nearly right.
    """

    def apply(self, layer: str, request: BytesLike) -> Iterable[BytesLike]:
        """Return the blocks of the reply to ``request``, in order, possibly as they are computed.

        Args:
            layer: wire name of the layer, as in the bundle's ``specs``.
            request: what a `LinearClient` encrypted. From a client on a GPU it is a read-only memoryview, of memory
                that is used again once nothing refers to the view or a part of it; ``bytes(request)`` is a copy.

        Raises:
            PrivtunerError: the layer is unknown, the request is malformed, or the server failed.
        """
        ...


class LinearServer(ABC):
    """The server's half of one scheme on one device: computes replies of linear layers, block by block.

    Safe to use from several threads.

    Attributes:
        scheme: name of the scheme whose requests it answers.
    """

    scheme: ClassVar[str]

    def load(self, layers: Iterable[QuantisedWeight]) -> Mapping[str, int]:  # noqa: ARG002 - for those with memories
        """Get ready for ``layers``, all that will be asked for: a device with a memory of its own copies them there.

        Returns:
            Bytes of layers in each such memory, by its name; empty where there is none.

        Raises:
            EngineError: they do not fit.
        """
        return {}

    def gather(self, prepared: QuantisedWeight, parts: Sequence[bytes]) -> BytesLike:  # noqa: ARG002 - as above
        """Return the request to ``prepared`` that arrived in ``parts``, where `answer` reads it without another copy.

        Raises:
            EngineError: there is no memory for it.
        """
        return b"".join(parts)

    @abstractmethod
    def answer(
        self, prepared: QuantisedWeight, request: BytesLike, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[BytesLike]:
        """Yield the reply to ``request`` in blocks of about ``block_bytes`` bytes, 32 to 256 outputs each.

        On a GPU they are read-only memoryviews, of memory that is used again once nothing refers to them.

        Raises:
            MessageError: the request is malformed or meant for another layer.
        """
        ...

    def close(self) -> None:  # noqa: B027 - for those with threads
        """Let go of threads and the like; a later request still works."""


class LinearClient(ABC):
    """The data owner's half of one scheme on one device: encrypts requests and decrypts replies.

    Safe to use from several threads.

    Attributes:
        scheme: name of the scheme of its requests.
        on_device: whether batches and results are arrays of a GPU, exchanged by DLPack; else they are NumPy's.
    """

    scheme: ClassVar[str]
    on_device: ClassVar[bool] = False

    @abstractmethod
    def encrypt(self, x: Any, spec: LayerSpec, direction: Direction = "forward") -> tuple[BytesLike, Any]:
        """Return the request for ``x @ W.T`` (forward) or ``x @ W`` (backward), and what decrypts its reply.

        Args:
            x: float32 (tokens, features), a NumPy array, or if ``on_device`` anything with ``__dlpack__``.
            spec: the description of the layer that will answer.
            direction: "forward" or "backward".

        Raises:
            InputError: wrong shape or dtype, a NaN or infinity, or no tokens.
        """
        ...

    @abstractmethod
    def decrypt(self, blocks: Iterable[BytesLike], secret: Any) -> Any:
        """Decrypt the blocks of a reply as they arrive; ``secret`` is used up. Returns float32 (tokens, features).

        Raises:
            MessageError: a block is malformed, or answers another request.
            SecretError: ``secret`` was used before.
        """
        ...

    @abstractmethod
    def noise(self, spec: LayerSpec, direction: Direction) -> Noise:
        """Return what an honest server's products are off by: what is further off was not computed as asked."""
        ...


def rows_of(block_bytes: int, output_bytes: int) -> int:
    """Return how many outputs of ``output_bytes`` make a block of about ``block_bytes``, at most 256."""
    return min(DEFAULT_BLOCK_ROWS, max(1, block_bytes // max(1, output_bytes)))

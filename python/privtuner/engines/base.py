"""The protocols between the layers and circuits above and whatever computes on ciphertexts below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from numpy.typing import ArrayLike

from privtuner.linear import BytesLike, Direction, Prepared, Public

if TYPE_CHECKING:
    from privtuner.ckks.exchange import Block

__all__ = ["DEFAULT_BLOCK_ROWS", "CkksEngine", "Engine", "Layer", "Owner", "Transport"]

Layer: TypeAlias = "Prepared | Block"
"""What a server holds under one name: a linear layer, or a block evaluated whole on ciphertexts."""

Tensor = TypeVar("Tensor")

DEFAULT_BLOCK_ROWS = 256
"""Output features in one block of a reply: small enough to overlap decryption with the product that follows."""


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
            request: what an `Owner` encrypted, or :class:`privtuner.ckks.blocks.SealedClient`. Of an owner on a GPU it
                is a read-only memoryview, of memory that is used again once nothing refers to the view or a part of it;
                ``bytes(request)`` is a copy.

        Raises:
            privtuner.errors.PrivtunerError: the layer is unknown, the request is malformed, or the server failed.
        """
        ...


class Engine(Protocol):
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


class Owner(Protocol):
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


class CkksEngine(Protocol[Tensor]):
    """Approximate arithmetic on encrypted tensors of shape (tokens, features), one ciphertext a feature.

    Circuits (:mod:`privtuner.ckks.circuits`) are written against this protocol alone. A tensor has the attributes
    ``shape`` (tokens, features), ``level`` (multiplications left) and ``bound`` (what |value| stays below, as declared
    or derived). No operation changes its inputs. Two tensors may differ in level: the higher one is brought down. A
    tensor of one feature combines with one of any number of features, the same feature with each.

    Every operation raises :class:`privtuner.errors.CkksError` when it cannot be done: not enough levels, scales that
    do not agree, tensors of other parameters or shapes, a rotation without its key.
    """

    name: str
    slots: int

    def add(self, x: Tensor, y: Tensor | ArrayLike) -> Tensor:
        """X + y; y a tensor, a number, or numbers of shape (features,). No level."""
        ...

    def subtract(self, x: Tensor, y: Tensor | ArrayLike) -> Tensor:
        """X - y, as :meth:`add`. No level."""
        ...

    def negate(self, x: Tensor) -> Tensor:
        """-x. No level."""
        ...

    def multiply(self, x: Tensor, y: Tensor | ArrayLike) -> Tensor:
        """X y slot by slot; y a tensor, a number, or numbers of shape (features,). One level."""
        ...

    def multiply_plain(self, x: Tensor, values: ArrayLike) -> Tensor:
        """X times clear values of shape (tokens,) or (tokens, features), slot by slot. One level."""
        ...

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum over features of x y, one feature: one relinearisation for all of them. One level."""
        ...

    def sum_features(self, x: Tensor) -> Tensor:
        """The sum over features, one feature. No level."""
        ...

    def concatenate(self, tensors: Sequence[Tensor]) -> Tensor:
        """The features of all tensors, one after the other, at the lowest level among them. No level."""
        ...

    def select(self, x: Tensor, features: slice) -> Tensor:
        """Some of the features. No level."""
        ...

    def linear(self, x: Tensor, weights: Any, *, transpose: bool = False) -> Tensor:
        """X W^T (x W if ``transpose``) for clear weights, prepared or as an array. No level."""
        ...

    def linear_combination(self, tensors: Sequence[Tensor], weights: ArrayLike, constant: ArrayLike = 0.0) -> Tensor:
        """Constant + sum_t weights[t] tensors[t]; weights of shape (t,) or (t, features). One level."""
        ...

    def polynomial(self, x: Tensor, polynomial: Any) -> Tensor:
        """A :class:`privtuner.ckks.Polynomial` of every slot, at the depth the polynomial states."""
        ...

    def rotate(self, x: Tensor, steps: Sequence[int] | int) -> Tensor | list[Tensor]:
        """Slot i takes slot i + steps (cyclic over all slots), as numpy.roll(x, -steps). No level.

        Several steps are hoisted: the decomposition of x is computed once, and a list comes back.
        """
        ...

    def conjugate(self, x: Tensor) -> Tensor:
        """The complex conjugate of every slot. No level."""
        ...

    def sum_slots(self, x: Tensor) -> Tensor:
        """The sum over all slots, in every slot. No level."""
        ...

    def pack_slot_sums(self, x: Tensor) -> Tensor:
        """The sums over all slots of every feature, packed for ``decrypt_sums`` of the secret key. No level."""
        ...

    def assume(self, x: Tensor, bound: float) -> Tensor:
        """X with the caller's promise that |value| <= bound in every slot."""
        ...

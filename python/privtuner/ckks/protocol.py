"""The protocol between circuits and whatever computes on encrypted tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from numpy.typing import ArrayLike

from privtuner.ckks.evaluator import Matrix
from privtuner.ckks.parameters import Parameters
from privtuner.ckks.polynomial import Polynomial

__all__ = ["BudgetProtocol", "EvaluatorProtocol", "Tensor", "TensorProtocol"]


class BudgetProtocol(Protocol):
    """What circuits read of a tensor's budget."""

    @property
    def error(self) -> float:
        """What the worst slot's absolute error stays below, but for one case in a million."""
        ...


class TensorProtocol(Protocol):
    """What circuits read of a tensor."""

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, features)."""
        ...

    @property
    def level(self) -> int:
        """Multiplications left."""
        ...

    @property
    def bound(self) -> float:
        """What |value| stays below."""
        ...

    def budget(self) -> BudgetProtocol:
        """What is predicted of its errors."""
        ...


Tensor = TypeVar("Tensor", bound=TensorProtocol)


class EvaluatorProtocol(Protocol[Tensor]):
    """Approximate arithmetic on encrypted tensors of shape (tokens, features), one ciphertext a feature.

    Circuits (`privtuner.ckks.circuits`) are written against this protocol alone. A tensor is what `TensorProtocol`
    says; its bound is declared or derived. No operation changes its inputs. Two tensors may differ in level: the higher
    one is brought down. A tensor of one feature combines with one of any number of features, the same with each.

    Every operation raises `privtuner.errors.CkksError` when it cannot be done: not enough levels, scales that
    do not agree, tensors of other parameters or shapes, a rotation without its key.
    """

    name: str
    parameters: Parameters
    slots: int

    def add(self, x: Tensor, y: Tensor | ArrayLike) -> Tensor:
        """The sum x + y; y a tensor, a number, or numbers of shape (features,). No level."""
        ...

    def subtract(self, x: Tensor, y: Tensor | ArrayLike) -> Tensor:
        """The difference x - y, as `add`. No level."""
        ...

    def negate(self, x: Tensor) -> Tensor:
        """The negative, -x. No level."""
        ...

    def multiply(self, x: Tensor, y: Tensor | ArrayLike) -> Tensor:
        """The product x y, slot by slot; y a tensor, a number, or numbers of shape (features,). One level."""
        ...

    def square(self, x: Tensor) -> Tensor:
        """The square x x. One level."""
        ...

    def multiply_plain(self, x: Tensor, values: ArrayLike) -> Tensor:
        """The product of x and clear values of shape (tokens,) or (tokens, features), slot by slot. One level."""
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

    def linear(self, x: Tensor, weights: Matrix | ArrayLike, *, transpose: bool = False) -> Tensor:
        """The product x W^T (x W if ``transpose``) for a clear matrix. No level."""
        ...

    def linear_combination(self, tensors: Sequence[Tensor], weights: ArrayLike, constant: ArrayLike = 0.0) -> Tensor:
        """The sum constant + sum_t weights[t] tensors[t]; weights of shape (t,) or (t, features). One level."""
        ...

    def polynomial(self, x: Tensor, polynomial: Polynomial) -> Tensor:
        """The polynomial's value in every slot. The depth it states."""
        ...

    def polynomials(self, x: Tensor, polynomials: Sequence[Polynomial]) -> list[Tensor]:
        """The values of several polynomials of one basis and domain, whose powers are shared. The depth each states."""
        ...

    def drop_level(self, x: Tensor, level: int) -> Tensor:
        """The same values at a lower level: smaller and faster, no more exact."""
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

    def expand(self, x: Tensor, count: int, features: slice | None = None) -> Tensor:
        """The ``count`` numbers packed in one feature (some of them), each in every slot of a feature. No level."""
        ...

    def refresh(self, x: Tensor, level: int | None = None, *, packed: bool = False) -> Tensor:
        """The same values in fresh ciphertexts at ``level`` (default: the depth), by the owner of the key.

        ``x`` is at level 2 or above; from 3 on the result has the chain's scale. Real values, or ``packed`` sums.
        """
        ...

    def reveal(self, x: Tensor, flood_bits: int = 12, *, error: float, packed: bool = False) -> Tensor:
        """The same values to be decrypted by the owner: re-randomised, and flooded as far as ``error`` allows."""
        ...

    def assume(self, x: Tensor, bound: float, error: float | None = None) -> Tensor:
        """The same tensor with the caller's promise that |value| <= bound in every slot, off by ``error`` at most."""
        ...

"""Encrypted tensors, feature-major: tokens in the slots, one ciphertext a feature."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from privtuner import _core, wire
from privtuner.ckks.parameters import BytesLike, Parameters
from privtuner.copies import Immutable

__all__ = ["Budget", "EncryptedTensor", "Tensor"]


class Budget(NamedTuple):
    """What is left of a ciphertext, and how exact it is predicted to be."""

    level: int
    """Multiplications left."""
    scale_bits: float
    """log2 of the largest feature's scale."""
    error: float
    """The worst slot's absolute error stays below it, but for one case in a million."""
    bits: float
    """log2(bound / error): correct bits of a value as large as the bound."""


class Tensor(ABC):
    """What is known of an encrypted array of shape (tokens, features) wherever its words are. Immutable.

    Attributes:
        shape: (tokens, features).
        level: multiplications left.
        bound: |value| <= bound in every slot, as declared on encryption, derived, or promised by ``assume``.
        planned: True in a dry run, where the tensor has everything but ciphertexts.
        nbytes: bytes of its words in memory.
    """

    planned: bool

    def __init__(self, core: _core.CkksTensor, parameters: Parameters) -> None:
        self._core = core
        self.parameters = parameters
        self.shape: tuple[int, int] = (core.tokens, core.features)
        self.level: int = core.level
        self.bound: float = core.bound
        self.nbytes: int = core.nbytes

    @property
    def scale(self) -> npt.NDArray[np.float64]:
        """float64 (features,): value = slot / scale."""
        return self._core.scale

    @property
    def noise(self) -> npt.NDArray[np.float64]:
        """float64 (features,): predicted standard deviation of the slots' errors."""
        return self._core.noise

    def budget(self) -> Budget:
        """Level, scale and predicted error."""
        error = self._core.worst_error
        bits = math.inf if error == 0 else math.log2(self.bound / error) if self.bound > 0 else -math.inf
        return Budget(self.level, math.log2(float(self.scale.max())), error, bits)

    @abstractmethod
    def _place(self) -> str:
        """Say in a word where the words are."""

    def __repr__(self) -> str:
        budget = self.budget()
        return (
            f"<{self._place()} tensor {self.shape}, level {budget.level}, scale 2^{budget.scale_bits:.1f}, "
            f"|value| <= {self.bound:.4g}, {budget.bits:.1f} bits>"
        )


class EncryptedTensor(Tensor, Immutable):
    """An encrypted array of shape (tokens, features) in this process. Immutable."""

    def __init__(self, core: _core.CkksTensor, parameters: Parameters) -> None:
        super().__init__(core, parameters)
        self.planned = core.planned

    @property
    def message_bytes(self) -> int:
        """Length of ``to_bytes()``: a fresh tensor carries a 32-byte seed instead of half of its words."""
        return self._core.message_bytes

    def residues(self, limb: int) -> npt.NDArray[np.uint64]:
        """Residues modulo ``parameters.primes[limb]``: uint64 (features, 2, N), transformed (NTT).

        Raises:
            InputError: there is no such limb. CkksError: the tensor is a planned one.
        """
        return self._core.residues(limb)

    def to_bytes(self) -> bytes:
        """Serialise for the other side: shape, level and ciphertexts.

        Scale, bound and predicted error stay here: the reader knows them from its own plan of the circuit, and of a
        circuit with secret weights they would tell the weights. To keep a tensor for yourself, pickle it.

        Raises:
            CkksError: the tensor is a planned one.
        """
        return self._core.to_bytes()

    @classmethod
    def from_bytes(
        cls, parameters: Parameters, data: BytesLike, expected: EncryptedTensor | None = None
    ) -> EncryptedTensor:
        """Read what `to_bytes` wrote.

        Args:
            parameters: the parameters of the ciphertexts.
            data: the message.
            expected: a planned tensor, of `Evaluator.planned` or `Plan.outputs`: shape and level of the message must be
                its, and the tensor read has its scale, bound and predicted error. None for what `SecretKey.encrypt`
                makes by default, of any shape.

        Raises:
            MessageError: malformed, truncated, corrupted, of another version, of other parameters, or not as expected.
            CkksError: ``expected`` is no planned tensor, or of other parameters.
        """
        core = None if expected is None else expected._core
        return cls(_core.CkksTensor.from_bytes(parameters._core, data, core), parameters)

    @classmethod
    def _restore(cls, parameters: Parameters, data: bytes, level: int, bound: float, *rows: bytes) -> EncryptedTensor:
        scale, noise, shared = (np.frombuffer(row) for row in rows)
        head = wire.peek(data)
        planned = _core.CkksTensor.plan(parameters._core, head.tokens, level, bound, scale, noise, shared)
        return cls(_core.CkksTensor.from_bytes(parameters._core, data, planned), parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        rows = (row.tobytes() for row in (self._core.scale, self._core.noise, self._core.shared))
        return (EncryptedTensor._restore, (self.parameters, self.to_bytes(), self.level, self.bound, *rows))

    def _place(self) -> str:
        return "planned" if self.planned else "encrypted"

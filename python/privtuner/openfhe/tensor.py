"""Encrypted tensors of OpenFHE ciphertexts, feature-major: tokens in the slots, one ciphertext a feature."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from privtuner import wire
from privtuner.ckks.arguments import whole
from privtuner.ckks.tensor import Budget
from privtuner.copies import Immutable
from privtuner.errors import CkksError, InputError, MessageError
from privtuner.openfhe.context import BytesLike, Context, require_message
from privtuner.openfhe.estimate import Estimate
from privtuner.openfhe.library import Saved, library, read, write

__all__ = ["EncryptedTensor"]

Array = npt.NDArray[np.float64]

_FIELDS = struct.Struct("<Qdddd")


class EncryptedTensor(Immutable, Saved):
    """An encrypted array of shape (tokens, features). Immutable.

    A value is ``factor`` times what a slot holds: a product with a quantised matrix leaves its scale there, so that it
    takes no level.

    Attributes:
        shape: (tokens, features). level: multiplications left.
        bound: |value| <= bound in every slot, as declared on encryption, derived, or promised by ``assume``.
        factor: float64 (features,).
        estimate: all that is predicted of the values.
        nbytes: in memory.
    """

    def __init__(self, core: Any, context: Context, tokens: int, estimate: Estimate) -> None:
        self._core, self.context, self.estimate = core, context, estimate
        self.shape: tuple[int, int] = (tokens, core.features)
        self.bound, self.factor = estimate.bound, estimate.factor
        self.level: int = context.level_of(core.level, core.noise_scale_degree)
        self.nbytes: int = core.nbytes
        if self.level < 0:
            raise CkksError(f"the operation takes {-self.level} more levels than are left; choose a larger depth")
        room = sum(math.log2(q) for q in core.moduli) - 1 - math.log2(core.scaling_factor)
        if estimate.slots > 0 and math.log2(estimate.slots) >= room:
            raise CkksError(
                f"values up to {estimate.slots:.3g} in the slots outgrow the modulus left at level {self.level}, "
                f"which holds 2^{room:.1f}; declare a smaller bound, or do this at a higher level"
            )

    @property
    def tag(self) -> str:
        """OpenFHE's tag of the secret key."""
        return str(self._core.tag)

    @property
    def moduli(self) -> tuple[int, ...]:
        """The primes of the towers that are left."""
        return tuple(self._core.moduli)

    def budget(self) -> Budget:
        """Level, scale and predicted error; OpenFHE adds noise of the error's own size when it decrypts."""
        count = self.shape[0] * self.shape[1]
        n = self.context.ring_dimension
        # OpenFHE's added noise has at least N^(1/2) / 8 in every coefficient, at the scale it decodes at.
        scale = 2.0**self.context.scale_bits if len(self.moduli) > 1 else float(self._core.scaling_factor)
        floor = 0.125 * math.sqrt(n) * math.sqrt(n / 2) / scale
        spread = math.sqrt(2) * math.hypot(self.estimate.noise, floor)
        worst = math.sqrt(2 * math.log(2e6 * count)) * spread + self.estimate.bias
        error = worst * float(np.abs(self.factor).max())
        bits = math.log2(self.bound / error) if self.bound > 0 else -math.inf
        return Budget(self.level, math.log2(self._core.scaling_factor), error, bits)

    def residues(self, tower: int) -> npt.NDArray[np.uint64]:
        """Residues modulo ``moduli[tower]``: uint64 (features, components, N), in OpenFHE's evaluation format.

        Raises:
            InputError: there is no such tower.
        """
        n = self.context.ring_dimension
        return np.stack([self._core.residues(tower, c, 0, n) for c in range(self._core.components)], axis=1)

    def to_bytes(self) -> bytes:
        """Serialise all of this tensor: bound, factors and predicted errors, then what `to_openfhe` gives.

        Not for others: of a circuit with secret weights, factors and errors tell the weights. Send `to_openfhe`, whose
        reader says itself what to expect.
        """
        e = self.estimate
        fields = _FIELDS.pack(int(e.independent), e.bound, e.slots, e.noise, e.bias)
        tokens, features = self.shape
        body = [fields, self.factor.astype("<f8").tobytes(), self.to_openfhe()]
        return wire.seal("openfhe_tensor", body, tokens=tokens, features=features)

    @classmethod
    def from_bytes(cls, context: Context, data: BytesLike) -> EncryptedTensor:
        """Read what `to_bytes` wrote; as `Context.from_bytes`, from a writer you trust.

        Raises:
            MessageError: malformed, truncated, corrupted, of another version, or of another context.
        """
        # OpenFHE trusts what it reads below: it must be what OpenFHE wrote.
        head, body = wire.open("openfhe_tensor", require_message(data, "tensor"))
        tokens, features = head.tokens, head.features
        unused = ("openfhe_tensor", "forward", 0, bytes(16), bytes(16), tokens, features, len(body))
        if head != unused or features < 1 or len(body) < _FIELDS.size + 8 * features:
            raise MessageError(f"tensor: {len(body)} bytes do not hold {features} features: truncated?")
        flag, *numbers = _FIELDS.unpack_from(body)
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or flag > 1:
            raise MessageError(f"tensor: impossible bounds {numbers}")
        start = _FIELDS.size + 8 * features
        factor = np.frombuffer(body[_FIELDS.size : start], "<f8").astype(np.float64)
        core = library().Ciphertexts.from_bytes(context._core, bytes(body[start:]))
        if core.features != features or not 1 <= tokens <= core.slots or not (np.isfinite(factor) & (factor > 0)).all():
            raise MessageError(f"tensor: shape ({tokens}, {features}) does not fit its {core.features} ciphertexts")
        bound, slots, noise, bias = numbers
        return cls(core, context, tokens, Estimate(bound, factor, slots, noise, bias, bool(flag)))

    @classmethod
    def load(cls, context: Context, path: str | Path) -> EncryptedTensor:
        """Read a file as `from_bytes` reads bytes."""
        return cls.from_bytes(context, read(path))

    def to_openfhe(self) -> bytes:
        """The ciphertexts alone, as OpenFHE serialises a ``std::vector<Ciphertext<DCRTPoly>>``."""
        return bytes(self._core.to_bytes())

    def save_openfhe(self, path: str | Path) -> None:
        """Write `to_openfhe` to a file."""
        write(path, self.to_openfhe())

    @classmethod
    def from_openfhe(
        cls,
        context: Context,
        data: BytesLike,
        *,
        bound: float = 1.0,
        error: float = 0.0,
        tokens: int | None = None,
    ) -> EncryptedTensor:
        """Read the ciphertexts of another program, a ``std::vector<Ciphertext<DCRTPoly>>`` in binary.

        Args:
            context: theirs.
            data: bytes, from a writer you trust.
            bound: what |value| stays below.
            error: what the values may be off by.
            tokens: slots in use; all when None.

        Raises:
            MessageError: these are no ciphertexts of this context. InputError: an unusable bound, error or tokens.
        """
        core = library().Ciphertexts.from_bytes(context._core, require_message(data, "ciphertexts"))
        used = core.slots if tokens is None else whole("tokens", tokens)
        if not 1 <= used <= core.slots:
            raise InputError(f"tokens {used}: the ciphertexts have {core.slots} slots")
        if not (math.isfinite(bound) and bound > 0 and math.isfinite(error) and error >= 0):
            raise InputError(f"bound {bound} must be a positive number and error {error} not negative")
        return cls(core, context, used, Estimate.of_slots(bound, core.features, 0.0, float(error)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (EncryptedTensor.from_bytes, (self.context, self.to_bytes()))

    def __repr__(self) -> str:
        budget = self.budget()
        return (
            f"<OpenFHE tensor {self.shape}, level {budget.level}, scale 2^{budget.scale_bits:.1f}, "
            f"|value| <= {self.bound:.4g}, {budget.bits:.1f} bits>"
        )

"""Parameter sets of CKKS."""

from __future__ import annotations

from typing import Any

from privtuner import _core
from privtuner.copies import Immutable
from privtuner.errors import InputError

__all__ = ["Parameters", "require_secure"]

BytesLike = bytes | bytearray | memoryview


class Parameters(Immutable):
    """A ring, a chain of primes, scales and the digits of key switching. Immutable; made by `secure`.

    Attributes:
        name: says ring, depth and scale; begins with INSECURE below 128 bits of security.
        ring_dimension: N. slots: N / 2, the tokens one tensor holds.
        depth: multiplications in a row; the level of a fresh ciphertext.
        scale_bits: log2 of the scale.
        log_q, log_qp: log2 of the ciphertext modulus, and of it times the special primes: what security rests on.
        security_bits: 128, or 0 for a set that is not secure.
        primes: the chain, then the special primes.
    """

    def __init__(self, core: _core.CkksParameters) -> None:
        self._core = core
        self.name: str = core.name
        self.ring_dimension: int = core.ring_dimension
        self.slots: int = core.slots
        self.depth: int = core.depth
        self.scale_bits: int = core.scale_bits
        self.log_q: float = core.log_q
        self.log_qp: float = core.log_qp
        self.security_bits: int = core.security_bits
        self.primes: tuple[int, ...] = tuple(core.primes)

    @classmethod
    def secure(
        cls, depth: int, scale_bits: int = 40, *, first_bits: int | None = None, ring_dimension: int | None = None
    ) -> Parameters:
        """Choose a set with 128 bits of classical security (Bossuat et al., IACR ePrint 2024/463, ternary secrets).

        Args:
            depth: multiplications in a row, 0 to 40.
            scale_bits: log2 of the scale, 20 to 49: some 14 to 17 bits more than the precision of a fresh value.
            first_bits: bits of the prime that is left at level 0, up to 50; what they have beyond ``scale_bits`` is
                the room for values above 1 there. Default: ``scale_bits + 10``, at most 50.
            ring_dimension: N; default the smallest secure one. Twice as large: twice the slots and the time.

        Raises:
            InputError: a value out of range, or no secure set fits.
        """
        return cls(_core.CkksParameters(depth, scale_bits, first_bits or 0, _log2(ring_dimension), False))

    @classmethod
    def INSECURE(  # noqa: N802 - the capitals are the warning
        cls, depth: int, scale_bits: int = 40, *, first_bits: int | None = None, ring_dimension: int = 1024
    ) -> Parameters:
        """Choose a set as `secure` does, without its check: for tests and demonstrations of circuits, never for data.

        Raises:
            InputError: a value out of range.
        """
        return cls(_core.CkksParameters(depth, scale_bits, first_bits or 0, _log2(ring_dimension), True))

    def scale(self, level: int) -> float:
        """The chain's scale at ``level``: what every product and every sum of products has there."""
        return self._core.scale(level)

    def key_bytes(self, count: int) -> int:
        """Bytes on the wire of ``count`` evaluation keys (relinearisation, rotations, conjugation alike)."""
        return self._core.keys_bytes(count)

    @property
    def public_key_bytes(self) -> int:
        """Bytes on the wire of a public key."""
        return self._core.public_key_bytes()

    def refresh_batch(self, level: int) -> int:
        """How many ciphertexts one message of a refresh to ``level`` holds: what fits 4 MiB either way, or one.

        Raises:
            CkksError: no refresh leads to that level.
        """
        return self._core.refresh_batch(level)

    def to_bytes(self) -> bytes:
        """Serialise: what the other party needs to derive the same set."""
        return self._core.to_bytes()

    @classmethod
    def from_bytes(cls, data: BytesLike) -> Parameters:
        """Read what `to_bytes` wrote.

        Raises:
            MessageError: malformed, or of a build that derives other primes.
        """
        return cls(_core.CkksParameters.from_bytes(data))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Parameters.from_bytes, (self.to_bytes(),))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parameters) and self._core.hash == other._core.hash

    def __hash__(self) -> int:
        return hash(self._core.hash)

    def __repr__(self) -> str:
        return (
            f"Parameters({self.name}: N = {self.ring_dimension}, {self.slots} slots, depth {self.depth}, "
            f"log2(QP) = {self.log_qp:.0f}, {self.security_bits or 'no'} bits of security)"
        )


def require_secure(parameters: Parameters, allow_insecure: bool) -> Parameters:
    """Return ``parameters`` that another party chose, if data may be encrypted under them.

    Raises:
        InputError: they have less than 128 bits of security and ``allow_insecure`` is not set.
    """
    if parameters.security_bits < 128 and not allow_insecure:
        raise InputError(
            f"the server asks for {parameters.name}, which protects nothing; refuse that server, or for tests pass "
            "allow_insecure=True"
        )
    return parameters


def _log2(ring_dimension: int | None) -> int:
    if ring_dimension is None:
        return 0
    if ring_dimension < 1024 or ring_dimension > 65536 or ring_dimension & (ring_dimension - 1):
        raise InputError(f"ring_dimension {ring_dimension} is not a power of two from 1024 to 65536")
    return ring_dimension.bit_length() - 1

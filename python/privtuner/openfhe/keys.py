"""Keys of OpenFHE, each owned by its Python object."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from privtuner.ckks.keys import as_values
from privtuner.copies import Immutable
from privtuner.errors import CkksError, InputError, SecretError
from privtuner.openfhe.context import BytesLike, Context, require_message, same_context
from privtuner.openfhe.estimate import SIGMA, Estimate, slot_noise
from privtuner.openfhe.library import Saved, library, read, write
from privtuner.openfhe.tensor import EncryptedTensor

__all__ = ["EvaluationKeys", "PublicKey", "SecretKey"]

Array = npt.NDArray[Any]


def _encrypt(
    key: PublicKey | SecretKey, values: npt.ArrayLike, bound: float, level: int | None, fresh: float
) -> EncryptedTensor:
    context = key.context
    re, im = as_values(values)
    if im is not None and not context.complex:
        raise InputError(
            "complex values, and this context decrypts real parts only; make one with ckks_data_type='COMPLEX'"
        )
    if not (math.isfinite(bound) and bound > 0):
        raise InputError(f"bound {bound}: give a positive number")
    at = context.require_level(context.depth if level is None else level)
    if len(re) > context.slots:
        raise CkksError(f"{len(re)} tokens do not fit the {context.slots} slots of this context")
    size = np.abs(re) if im is None else np.hypot(re, im)
    if not np.isfinite(size).all():
        raise CkksError("values hold NaN or infinity")
    if size.max() > bound:
        raise CkksError(f"a value is above the bound {bound:g} that was declared; declare a larger one")
    parts = (np.ascontiguousarray(re.T), None if im is None else np.ascontiguousarray(im.T))
    core = key._core.encrypt(*parts, context.openfhe_level(at))
    # Errors, and the rounding of N coefficients.
    noise = slot_noise(context, math.hypot(fresh, math.sqrt(1 / 12)), core.scaling_factor)
    # Doubles and OpenFHE's transform of them.
    bias = bound * 2.0**-44
    estimate = Estimate.of_slots(bound, re.shape[1], noise, bias, independent=True)
    return EncryptedTensor(core, context, len(re), estimate)


class EvaluationKeys(Immutable):
    """What the server needs to compute: a relinearisation key, rotation keys. Public.

    OpenFHE finds such keys in tables of the process; these are there only while an operation of theirs runs.

    Attributes:
        relinearisation, conjugation: whether there is such a key. elements: of the Galois group that have keys.
        tag: OpenFHE's, of the secret key. nbytes: in memory.
    """

    def __init__(self, core: Any, context: Context) -> None:
        self._core, self.context = core, context
        self.relinearisation: bool = core.relinearisation
        self.elements: frozenset[int] = frozenset(core.elements)
        self.conjugation: bool = 2 * context.ring_dimension - 1 in self.elements
        self.tag: str = core.tag
        self.nbytes: int = core.nbytes

    def to_bytes(self) -> tuple[bytes, bytes]:
        """OpenFHE's two serialisations: of ``SerializeEvalMultKey`` and ``SerializeEvalAutomorphismKey``.

        Either is empty where there are no such keys.
        """
        return bytes(self._core.multiplication_bytes()), bytes(self._core.automorphism_bytes())

    @classmethod
    def from_bytes(
        cls, context: Context, multiplication: BytesLike = b"", automorphisms: BytesLike = b""
    ) -> EvaluationKeys:
        """Read OpenFHE's serialisations; as `Context.from_bytes`, from a writer you trust.

        Raises:
            MessageError: these are no such keys, keys of several secrets, or of another context.
        """
        parts = [
            require_message(data, "evaluation keys") if len(data) else b"" for data in (multiplication, automorphisms)
        ]
        core = library().EvaluationKeys.from_bytes(context._core, *parts)
        return cls(core, context)

    def save(self, multiplication: str | Path, automorphisms: str | Path) -> None:
        """Write the two parts of `to_bytes` to two files, as OpenFHE's examples do."""
        for path, data in zip((multiplication, automorphisms), self.to_bytes(), strict=True):
            write(path, data)

    @classmethod
    def load(
        cls, context: Context, multiplication: str | Path | None = None, automorphisms: str | Path | None = None
    ) -> EvaluationKeys:
        """Read files as `from_bytes` reads bytes."""
        parts = [b"" if path is None else read(path) for path in (multiplication, automorphisms)]
        return cls.from_bytes(context, *parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return (EvaluationKeys.from_bytes, (self.context, *self.to_bytes()))

    def __repr__(self) -> str:
        return (
            f"<OpenFHE evaluation keys: relinearisation {self.relinearisation}, conjugation {self.conjugation}, "
            f"{len(self.elements)} automorphisms, {self.nbytes / 1e6:.0f} MB>"
        )


class PublicKey(Immutable, Saved):
    """Encrypts without the secret."""

    def __init__(self, core: Any, context: Context) -> None:
        self._core, self.context = core, context
        self.tag: str = core.tag

    def encrypt(self, values: npt.ArrayLike, *, bound: float = 1.0, level: int | None = None) -> EncryptedTensor:
        """Encrypt as `SecretKey.encrypt` does, with more noise."""
        return _encrypt(self, values, bound, level, SIGMA * math.sqrt(1 + self.context.ring_dimension * 4 / 3))

    def to_bytes(self) -> bytes:
        """OpenFHE's binary serialisation."""
        return bytes(self._core.to_bytes())

    @classmethod
    def from_bytes(cls, context: Context, data: BytesLike) -> PublicKey:
        """Read OpenFHE's serialisation; as `Context.from_bytes`, from a writer you trust.

        Raises:
            MessageError: this is no public key of this context.
        """
        return cls(library().PublicKey.from_bytes(context._core, require_message(data, "public key")), context)

    def __reduce__(self) -> tuple[Any, ...]:
        return (PublicKey.from_bytes, (self.context, self.to_bytes()))

    @classmethod
    def load(cls, context: Context, path: str | Path) -> PublicKey:
        """Read a file as `from_bytes` reads bytes."""
        return cls.from_bytes(context, read(path))


class SecretKey:
    """A uniform ternary secret, drawn by OpenFHE. Not copied or pickled; wiped when released.

    Args:
        context: the context of the key.
    """

    def __init__(self, context: Context) -> None:
        self._core = library().SecretKey(context._core)
        self.context = context
        self.tag: str = self._core.tag

    def encrypt(self, values: npt.ArrayLike, *, bound: float = 1.0, level: int | None = None) -> EncryptedTensor:
        """Encrypt real values of shape (tokens, features), or (tokens,) for one feature.

        Complex values where the context is complex.

        Args:
            values: float or integer array; at most ``slots`` tokens.
            bound: |value| <= bound. **Public**: it travels with the tensor and errors are predicted from it, so declare
                what is known of the data, not its maximum.
            level: default the context's depth; a lower one is smaller and faster.

        Raises:
            CkksError: a value above the bound or not finite, more tokens than slots, a level that does not exist, or
                OpenFHE refuses.
            InputError: unusable shape, dtype or bound.
        """
        return _encrypt(self, values, bound, level, SIGMA)

    def decrypt(self, tensor: EncryptedTensor, *, complex: bool = False) -> Array:
        """Return the values, float64 (or complex128) of shape (tokens, features).

        OpenFHE adds noise of the size of the error, so that a decryption can be shown a few times; see its
        documentation of NOISE_FLOODING for more.

        Raises:
            CkksError: a value beyond the tensor's bound, or OpenFHE finds the error too large; a tensor of another key.
            InputError: complex values of a context that has none.
        """
        if complex and not self.context.complex:
            raise InputError("this context decrypts real parts only; make one with ckks_data_type='COMPLEX'")
        if not same_context(self.context, tensor.context):
            raise CkksError("the tensor is of another context than the key")
        if tensor.tag != self.tag:
            raise CkksError("the tensor was encrypted under another secret key")
        tokens = tensor.shape[0]
        # In a complex context OpenFHE does not add noise, and imaginary parts that are not asked for are left out.
        parts = self._core.decrypt(tensor._core, tokens, complex)
        slots = parts[0] + 1j * parts[1] if complex else parts
        values: Array = np.ascontiguousarray((slots * tensor.factor[:, None]).T)
        limit = tensor.bound + tensor.budget().error
        if not (np.abs(values) <= limit).all():
            raise CkksError(
                f"a decrypted value is beyond the tensor's bound {tensor.bound:.4g}: an input left the domain it was "
                "declared for, or a promise of assume was wrong"
            )
        return values

    def public_key(self) -> PublicKey:
        """A key for others to encrypt with.

        Raises:
            SecretError: the secret was read from bytes; its public key is in a file of its own.
        """
        core = self._core.public_key()
        if core is None:
            raise SecretError("OpenFHE makes both keys at once: load the public key that belongs to this secret")
        return PublicKey(core, self.context)

    def evaluation_keys(
        self,
        *,
        rotations: Iterable[int] = (),
        relinearisation: bool = True,
        conjugation: bool = False,
        sums: bool = False,
        bootstrapping: bool = False,
    ) -> EvaluationKeys:
        """Make the keys a circuit needs.

        Args:
            rotations: steps, any sign.
            relinearisation: for products of ciphertexts.
            conjugation: for complex conjugates.
            sums: for `Evaluator.sum_slots`, log2(slots) keys.
            bootstrapping: for `Evaluator.bootstrap`; after `Context.enable_bootstrapping`.

        Raises:
            InputError: bootstrapping of a context that was not prepared for it.
        """
        if bootstrapping and not self.context.bootstrapping:
            raise InputError("bootstrapping keys need context.enable_bootstrapping() first")
        elements = {self.context.galois_element(step) for step in rotations}
        if sums:
            slots = self.context.slots
            elements.update(self.context.galois_element(1 << i) for i in range(slots.bit_length() - 1))
        if conjugation:
            elements.add(2 * self.context.ring_dimension - 1)
        elements.discard(1)
        core = self._core.evaluation_keys(relinearisation, sorted(elements), bootstrapping)
        keys = EvaluationKeys(core, self.context)
        if bootstrapping:
            self.context.bootstrapping_elements = keys.elements - elements
        return keys

    def to_bytes(self) -> bytes:
        """OpenFHE's serialisation **of the secret**, unprotected: for a store that keeps secrets, never for a wire.

        The bytes, and what OpenFHE made them from, are not wiped.
        """
        return bytes(self._core.to_bytes())

    @classmethod
    def from_bytes(cls, context: Context, data: BytesLike) -> SecretKey:
        """Read OpenFHE's serialisation of a secret key.

        Raises:
            MessageError: this is no secret key of this context.
        """
        key = cls.__new__(cls)
        key._core = library().SecretKey.from_bytes(context._core, require_message(data, "secret key"))
        key.context, key.tag = context, key._core.tag
        return key

    def save(self, path: str | Path) -> None:
        """Write `to_bytes` to a file that only its owner may read."""
        write(path, self.to_bytes(), 0o600)

    @classmethod
    def load(cls, context: Context, path: str | Path) -> SecretKey:
        """Read a file as `from_bytes` reads bytes."""
        return cls.from_bytes(context, read(path))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecretError("a secret key is never copied or pickled: save it, or keep it in the process that made it")

    def __repr__(self) -> str:
        return f"<OpenFHE secret key, tag {self.tag}>"

"""Keys. The secret one stays with the data owner and has no serialised form; the others are public."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.ckks.parameters import BytesLike, Parameters
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.copies import Immutable
from privtuner.errors import CkksError, InputError, SecretError

__all__ = ["EvaluationKeys", "PublicKey", "SecretKey"]

Array = npt.NDArray[Any]


def as_values(values: npt.ArrayLike) -> tuple[Array, Array | None]:
    """Clear values of shape (tokens,) or (tokens, features) as float64 real and imaginary parts, two-dimensional."""
    array = np.asarray(values)
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"values of shape {array.shape}; pass (tokens, features) with at least one of each")
    if array.dtype.kind == "c":
        return np.ascontiguousarray(array.real, np.float64), np.ascontiguousarray(array.imag, np.float64)
    if array.dtype.kind not in "fiu":
        raise InputError(f"values of dtype {array.dtype}; pass real or complex numbers")
    return np.ascontiguousarray(array, np.float64), None


def as_scales(scale: npt.ArrayLike | None) -> Array:
    """One scale, one a feature, or none (the chain's), as the core takes them."""
    return np.zeros(0) if scale is None else np.atleast_1d(np.asarray(scale, np.float64))


def as_fresh(
    parameters: Parameters, values: npt.ArrayLike, bound: float, level: int | None, scale: npt.ArrayLike | None
) -> tuple[Array, Array | None, int, float, Array]:
    """Clear values, level, bound and scales of a fresh tensor, as the core takes them."""
    re, im = as_values(values)
    # What has the wrong type is found here: the core's own refusal would show all arguments, and so the values.
    if not isinstance(bound, (int, float, np.integer, np.floating)):
        raise InputError(f"bound is of type {type(bound).__name__}: give a number")
    if not isinstance(level, (int, np.integer, type(None))):
        raise InputError(f"level is of type {type(level).__name__}: give a whole number")
    at = parameters.depth if level is None else int(level)
    if not 0 <= at <= parameters.depth:
        raise CkksError(f"level {at} is outside [0, {parameters.depth}] of {parameters.name}")
    return re, im, at, float(bound), as_scales(scale)


class EvaluationKeys(Immutable):
    """What the server needs to compute: a relinearisation key, rotation keys. Public.

    Attributes:
        rotations: the steps there are keys for, in [1, slots). conjugation, relinearisation: whether there is one.
        nbytes: in memory; on the wire half of it or less, as the random halves travel as seeds.
    """

    def __init__(self, core: _core.CkksEvaluationKeys, parameters: Parameters, rotations: tuple[int, ...]) -> None:
        self._core = core
        self.parameters = parameters
        self.rotations = rotations
        self.relinearisation: bool = core.relinearisation
        self.conjugation: bool = parameters._core.conjugation_element in core.elements
        self.nbytes: int = core.nbytes

    def to_bytes(self) -> bytes:
        """Serialise, with a version, a parameter hash, lengths and a checksum."""
        return self._core.to_bytes()

    @classmethod
    def from_bytes(cls, parameters: Parameters, data: BytesLike, common: bytes | None = None) -> EvaluationKeys:
        """Read what `to_bytes` wrote.

        Args:
            parameters: the parameters of the keys.
            data: the message.
            common: the 32 bytes that the keys must have been made with, as `SecretKey.evaluation_keys` takes them; None
                for keys of any randomness.

        Raises:
            MessageError: malformed, truncated, corrupted, of another version, of other parameters, or of other
                randomness.
        """
        core = _core.CkksEvaluationKeys.from_bytes(parameters._core, data, common)
        return cls(core, parameters, rotations_of(parameters, core.elements))

    def __reduce__(self) -> tuple[Any, ...]:
        return (EvaluationKeys.from_bytes, (self.parameters, self.to_bytes()))

    def __repr__(self) -> str:
        return (
            f"<evaluation keys of {self.parameters.name}: relinearisation {self.relinearisation}, conjugation "
            f"{self.conjugation}, {len(self.rotations)} rotations, {self.nbytes / 1e6:.0f} MB>"
        )


def elements_of(parameters: Parameters, rotations: Iterable[int], conjugation: bool, packing: bool) -> set[int]:
    """The Galois elements whose keys `SecretKey.evaluation_keys` makes."""
    core = parameters._core
    elements = {core.galois_element(step) for step in rotations}
    if conjugation:
        elements.add(core.conjugation_element)
    if packing:
        elements.update(core.packing_elements)
    return elements - {1}


def rotations_of(parameters: Parameters, elements: Iterable[int]) -> tuple[int, ...]:
    """The steps whose Galois elements are among ``elements``."""
    wanted = set(elements)
    steps, element, order = [], 1, 2 * parameters.ring_dimension
    for step in range(parameters.slots):
        if step and element in wanted:
            steps.append(step)
        element = element * 5 % order
    return tuple(steps)


class PublicKey(Immutable):
    """Encrypts without the secret. Twice the bytes of what the secret key encrypts, and some 7 bits noisier."""

    def __init__(self, core: _core.CkksPublicKey, parameters: Parameters) -> None:
        self._core = core
        self.parameters = parameters

    def encrypt(
        self,
        values: npt.ArrayLike,
        *,
        bound: float = 1.0,
        level: int | None = None,
        scale: npt.ArrayLike | None = None,
    ) -> EncryptedTensor:
        """Encrypt as `SecretKey.encrypt` does."""
        fresh = as_fresh(self.parameters, values, bound, level, scale)
        return EncryptedTensor(self._core.encrypt(*fresh), self.parameters)

    def to_bytes(self) -> bytes:
        """Serialise, with a version, a parameter hash, lengths and a checksum."""
        return self._core.to_bytes()

    @classmethod
    def from_bytes(cls, parameters: Parameters, data: BytesLike, common: bytes | None = None) -> PublicKey:
        """Read what `to_bytes` wrote; ``common`` and errors as those of `EvaluationKeys.from_bytes`."""
        return cls(_core.CkksPublicKey.from_bytes(parameters._core, data, common), parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        return (PublicKey.from_bytes, (self.parameters, self.to_bytes()))


class SecretKey:
    """A uniform ternary secret. Never copied or pickled; wiped when released.

    Args:
        parameters: the set in force.
        seed: 32 bytes that decide the secret, to make it again in another process: whoever has them has the key. None
            draws it from the operating system.

    Raises:
        InputError: a seed of another length.
    """

    def __init__(self, parameters: Parameters, seed: bytes | None = None) -> None:
        self._core = _core.CkksSecretKey(parameters._core, seed)
        self.parameters = parameters

    def encrypt(
        self,
        values: npt.ArrayLike,
        *,
        bound: float = 1.0,
        level: int | None = None,
        scale: npt.ArrayLike | None = None,
    ) -> EncryptedTensor:
        """Encrypt real or complex values of shape (tokens, features), or (tokens,) for one feature.

        Args:
            values: float or integer array; at most ``slots`` tokens.
            bound: |value| <= bound. **Public**: it travels with the ciphertext and errors are predicted from it, so
                declare what is known of the data, not its maximum.
            level: default the parameters' depth; a lower one is smaller and faster.
            scale: one number or (features,); default the chain's.

        Raises:
            CkksError: a value above the bound or not finite, more tokens than slots, a level that does not exist.
            InputError: unusable shape, dtype, bound or scale.
        """
        fresh = as_fresh(self.parameters, values, bound, level, scale)
        return EncryptedTensor(self._core.encrypt(*fresh), self.parameters)

    def encrypt_packed(
        self,
        numbers: npt.ArrayLike,
        *,
        bound: float = 1.0,
        level: int | None = None,
        scale: npt.ArrayLike | None = None,
    ) -> EncryptedTensor:
        """Encrypt real numbers of shape (count, ciphertexts), or (count,), in the coefficients of as many ciphertexts.

        They stand as `Evaluator.pack_slot_sums` leaves sums, ready for `Evaluator.expand`: ``count`` is at most N.

        Args:
            numbers: float or integer array.
            bound: |number| <= bound, as that of `encrypt`.
            level: as there.
            scale: as there.

        Raises:
            CkksError, InputError: as `encrypt`.
        """
        values, im, at, most, scales = as_fresh(self.parameters, numbers, bound, level, scale)
        if im is not None:
            raise InputError("packed numbers are real; pack real and imaginary parts as two")
        return EncryptedTensor(self._core.encrypt_packed(values, at, most, scales), self.parameters)

    def decrypt_packed(self, tensor: EncryptedTensor, count: int) -> Array:
        """Return the ``count`` numbers packed in every ciphertext, float64 (count, ciphertexts).

        Raises:
            InputError: more numbers than coefficients. CkksError: as `decrypt`.
        """
        return self._core.decrypt_packed(tensor._core, count)

    def decrypt(self, tensor: EncryptedTensor, *, complex: bool = False) -> Array:
        """Return the values, float64 (or complex128) of shape (tokens, features).

        Keep them: a decryption carries the ciphertext's error, and who sees both learns of the secret (Li,
        Micciancio, EUROCRYPT 2021). What must be sent back goes through `decrypt_flooded`.

        Raises:
            CkksError: a value beyond the tensor's bound, so that an input left its declared domain or the values
                outgrew the modulus; a planned tensor; a tensor of other parameters.
        """
        return self._core.decrypt(tensor._core, complex)

    def decrypt_sums(self, tensor: EncryptedTensor, count: int) -> Array:
        """Return the sums that `Evaluator.pack_slot_sums` packed, float64 (count,).

        Args:
            tensor: packed sums.
            count: features of the tensor that was packed.

        Raises:
            InputError: ``count`` does not fit the tensor. CkksError: as `decrypt`.
        """
        return self._core.decrypt_sums(tensor._core, count)

    def decrypt_flooded(self, tensor: EncryptedTensor, *, sums: int | None = None, flood_bits: int = 12) -> Array:
        """Decrypt real values that others will see: with noise from the operating system that drowns the error.

        Uniform noise of up to ``2^flood_bits`` times the predicted worst error is added: a value then says at most
        2^-flood_bits (in statistical distance) about the error under it. The prediction is this side's: what
        `EncryptedTensor.from_bytes` expected.

        Args:
            tensor: what to decrypt.
            sums: as the ``count`` of `decrypt_sums`, for a tensor of packed sums; None decrypts slots.
            flood_bits: 1 to 40.
        """
        if not 1 <= flood_bits <= 40:
            raise InputError(f"flood_bits {flood_bits} is outside [1, 40]")
        values = self.decrypt(tensor) if sums is None else self.decrypt_sums(tensor, sums)
        words = np.empty(values.shape, np.uint64)
        _core.os_random(words.reshape(-1).view(np.uint8))
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
        flooded: Array = values + uniform * (tensor.budget().error * 2.0**flood_bits)
        for secret in (values, words, uniform):  # any of them takes the noise off again
            secret.fill(0)
        return flooded

    def refresh(self, message: BytesLike, level: int, count: int) -> bytes:
        """Answer a message of a `Refresher`: fresh ciphertexts of what its masked ones hold.

        Number and level come from a schedule that is this side's own, never from the message. What the ciphertexts hold
        decides nothing, and the steps taken are the same whatever it is.

        Args:
            message: masked ciphertexts.
            level: that of the fresh ones.
            count: how many the message has: ``parameters.refresh_batch(level)``, or the rest of a tensor's.

        Raises:
            MessageError: malformed, truncated, corrupted, of other parameters, or of another number of ciphertexts.
            CkksError: no refresh leads to that level. InputError: no message has so many ciphertexts.
        """
        return self._core.refresh(message, count, level)

    def open(self, masked: EncryptedTensor, noise: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Say what the packed numbers of a `privtuner.ckks.opening.Opening` are under its mask, with noise added.

        The steps taken are the same whatever they are. The other side takes the mask off, and has numbers and noise.

        Args:
            masked: at level 0.
            noise: int64 (count, ciphertexts), one for each number, in units of one over the tensor's scale. Its size
                is below 2^62.

        Returns:
            uint64 of the shape of ``noise``: each number plus noise, modulo the prime of level 0.

        Raises:
            InputError: noise of another shape, or a tensor that cannot be opened.
        """
        if noise.ndim != 2 or noise.shape[1] != masked.shape[1]:
            raise InputError(f"noise of shape {noise.shape} for {masked.shape[1]} ciphertexts of packed numbers")
        modulus = self.parameters.primes[0]
        words = self._core.open(masked._core, len(noise))
        opened: npt.NDArray[np.uint64] = (words + (noise % modulus).astype(np.uint64)) % np.uint64(modulus)
        return opened

    def public_key(self, common: bytes | None = None) -> PublicKey:
        """Make a key for others to encrypt with.

        Args:
            common: as that of `evaluation_keys`.
        """
        return PublicKey(self._core.public_key(common), self.parameters)

    def evaluation_keys(
        self,
        *,
        rotations: Iterable[int] = (),
        relinearisation: bool = True,
        conjugation: bool = False,
        packing: bool = False,
        common: bytes | None = None,
    ) -> EvaluationKeys:
        """Make the keys a circuit needs (`plan` lists them).

        Args:
            rotations: steps, any sign.
            relinearisation: for products of ciphertexts.
            conjugation: for complex conjugates.
            packing: for `Evaluator.pack_slot_sums` and `Evaluator.expand`, log2 N keys.
            common: 32 bytes from which the random halves of the keys are derived: a hash of random numbers of both
                sides, where the other one must know that this one did not choose them. None: from the operating system.

        Raises:
            CkksError: a key of the same kind was made of ``common``: both together would tell of the secret.
        """
        elements = elements_of(self.parameters, rotations, conjugation, packing)
        keys = self._core.evaluation_keys(relinearisation, sorted(elements), common)
        return EvaluationKeys(keys, self.parameters, rotations_of(self.parameters, elements))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecretError("a secret key is never copied or pickled: it stays in the process that made it")

    def __repr__(self) -> str:
        return f"<secret key of {self.parameters.name}>"

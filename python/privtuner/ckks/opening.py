"""Openings: the owner of the key says what packed numbers are, with noise, and learns nothing of them.

The ciphertext at level 0 is re-randomised and a mask is added, uniform modulo the one prime q in every coefficient, as
in a masked refresh: what `privtuner.ckks.keys.SecretKey.open` sees can be simulated without the numbers. It returns
numbers, mask and noise modulo q, of which the mask's maker takes the mask off. All is exact modulo q: nothing wraps
while numbers and noise together stay below q / 2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from privtuner import _core
from privtuner.ckks.keys import PublicKey
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.copies import Stays
from privtuner.errors import InputError, MessageError

__all__ = ["Opening"]

Array = npt.NDArray[np.float64]
BytesLike = bytes | bytearray | memoryview


class Opening(Stays):
    """One opening, from the side that holds the ciphertexts. Its mask is used once.

    Args:
        public_key: of the owner, of common randomness, as for a `privtuner.ckks.refresher.Refresher`.
        numbers: packed numbers at level 0.
        count: how many each ciphertext packs.

    Attributes:
        masked: goes to the owner of the key.

    Raises:
        InputError: a tensor that is not at level 0, or planned, or a count that it cannot hold.
    """

    stays = "an opening cannot be pickled: its mask is used once, where it was made"

    def __init__(self, public_key: PublicKey, numbers: EncryptedTensor, count: int) -> None:
        if numbers.level or numbers.planned:
            raise InputError(f"{numbers!r} cannot be opened: numbers at level 0 can")
        core, self._mask = _core.ckks_mask_opening(public_key._core, numbers._core, count)
        self.masked = EncryptedTensor(core, numbers.parameters)

    @property
    def answer_bytes(self) -> int:
        """Length of the answer."""
        return 8 * self._mask.size

    def numbers(self, answer: BytesLike) -> Array:
        """Return the noisy numbers, float64 (count, ciphertexts), and wipe the mask.

        Args:
            answer: the words of `SecretKey.open`, little-endian, row after row.

        Raises:
            MessageError: an answer of another length, or with words that are no residues.
        """
        modulus = self.masked.parameters.primes[0]
        if len(answer) != self.answer_bytes:
            raise MessageError(f"an opening was answered by {len(answer)} bytes, {self.answer_bytes} are due")
        words = np.frombuffer(answer, "<u8").reshape(self._mask.shape).astype(np.uint64)
        if (words >= modulus).any():
            raise MessageError("an opening was answered by words that are no residues")
        residues = ((words + (np.uint64(modulus) - self._mask)) % np.uint64(modulus)).astype(np.int64)
        self._mask.fill(0)
        centred = np.where(residues > modulus // 2, residues - modulus, residues)
        numbers: Array = centred / self.masked.scale
        return numbers

"""A data owner that needs no OpenFHE: numbers in the clear where its ciphertexts would stand."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from privtuner import linear
from privtuner.openfhe import messages
from privtuner.openfhe.messages import BLOCK, REQUEST, Head
from privtuner.openfhe.server import OpenFheServer
from privtuner.parties import LinearClient

N = 1024
MODULUS = 18014398509404161
"""Of 54 bits, 1 modulo 2,048."""

BITS = 24
"""Of the integers: with 8-bit weights and up to 65,536 features, products stay below half the modulus."""


def apply_blocks(prepared: linear.QuantisedWeight, request: bytes, block_rows: int = 256) -> Iterator[bytes]:
    """The blocks of a server's reply, so many outputs each."""
    head, residues = messages.read(request, REQUEST)
    return OpenFheServer().answer(prepared, request, block_rows * (residues.nbytes // head.features))


class ClearOwner(LinearClient):
    """A client of the scheme "openfhe" whose first components are rounded values, and second components their echo.

    A server that multiplies residues cannot tell them from ciphertexts. Both components must come back as the same
    product, or `decrypt` fails.
    """

    scheme = "openfhe"

    def encrypt(
        self, x: np.ndarray, spec: linear.LayerSpec, direction: linear.Direction = "forward"
    ) -> tuple[bytes, Any]:
        batch = linear.as_batch(x, spec, direction).astype(np.float64)
        if direction == "backward":
            batch = batch * spec.scale
        unit = max(np.abs(batch).max(), 1e-300) / 2**BITS
        integers = np.rint(batch / unit).astype(np.int64) % MODULUS
        head = Head(REQUEST, direction, spec.id, secrets.token_bytes(16), N, (MODULUS,), batch.shape[0], batch.shape[1])
        words = np.zeros(head.shape, np.uint64)
        for group, start in enumerate(range(0, head.tokens, N // 2)):
            some = integers[start : start + N // 2]
            words[group, 0, :, :, : len(some)] = some.T[:, None, :]
        return messages.write(head, [words]), (spec, head, unit)

    def decrypt(self, blocks: Iterable[bytes], secret: Any) -> np.ndarray:
        spec, asked, unit = secret
        parts = []
        for data in blocks:
            head, words = messages.read(data, BLOCK)
            assert (head.request, head.first) == (asked.request, sum(part.shape[1] for part in parts))
            assert (words[:, :, :, 0] == words[:, :, :, 1]).all()
            slots = words[:, 0, :, 0, : N // 2].transpose(0, 2, 1).reshape(-1, head.features)[: head.tokens]
            values = np.where(slots > MODULUS // 2, slots.astype(np.int64) - MODULUS, slots.astype(np.int64)) * unit
            if head.direction == "forward":
                values *= spec.scale[head.first : head.first + head.features]
            parts.append(values)
        return np.hstack(parts).astype(np.float32)

    def noise(self, spec: linear.LayerSpec, direction: linear.Direction) -> linear.Noise:
        """Half a unit a feature, for tokens of a length of at least a thousandth of the batch's largest value."""
        return linear.Noise(2.0**BITS / 1000, 0.0, 0.0, 0.5, 0.0)

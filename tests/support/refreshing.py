"""An owner of a key that refreshes, and what can be read out of the messages that it gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from privtuner import _core, ckks, wire


class Owner:
    """The owner's side of a refresher: answers at a level that is set beforehand, and keeps what it saw.

    Args:
        secret: the key.
        level: that of the answers.
    """

    def __init__(self, secret: Any, level: int) -> None:
        self.secret, self.level = secret, level
        self.messages: list[bytes] = []
        self.answers: list[bytes] = []

    def exchange(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """Answer every message, one after the other."""
        for message in messages:
            self.messages.append(message)
            self.answers.append(self.secret.refresh(message, self.level, wire.peek(message).features))
            yield self.answers[-1]


def masked_words(parameters: Any, message: bytes) -> list[np.ndarray]:
    """The words of a refresh, an array (ciphertexts, 2, N) of uint64 for each of the three primes, NTT domain."""
    head, body = wire.open("refresh", message)
    n = parameters.ring_dimension
    sizes = [(prime.bit_length() + 7) // 8 for prime in parameters.primes[:3]]
    rows = np.frombuffer(body, np.uint8).reshape(head.features, 2, n * sum(sizes))
    words, at = [], 0
    for size in sizes:
        padded = np.zeros((head.features, 2, n, 8), np.uint8)
        padded[..., :size] = rows[..., at : at + n * size].reshape(head.features, 2, n, size)
        words.append(padded.view(np.uint64)[..., 0])
        at += n * size
    return words


def owner_sees(secret: Any, message: bytes) -> np.ndarray:
    """What the owner decrypts of a refresh, over q: float64 (ciphertexts, N) in [-1/2, 1/2]."""
    parameters = secret.parameters
    words = np.stack(masked_words(parameters, message), axis=2)
    features = len(words)
    modulus = float(np.prod([float(prime) for prime in parameters.primes[:3]]))
    # Of the size of the modulus, to the bit; an error of the same size keeps any value from being refused.
    scale, noise = np.full(features, modulus), np.full(features, modulus)
    core = _core.CkksTensor.plan(parameters._core, parameters.slots, 2, 0.4999, scale, noise, noise)
    tensor = ckks.EncryptedTensor(core.with_words(np.ascontiguousarray(words)), parameters)
    return secret.decrypt_packed(tensor, parameters.ring_dimension).T

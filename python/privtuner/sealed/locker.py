"""Bytes that only their maker reads again: the training state while it is in the data owner's hands."""

from __future__ import annotations

import hashlib
import hmac
import secrets

import numpy as np

from privtuner.errors import MessageError

__all__ = ["Locker"]

_NONCE_BYTES = 16
_TAG_BYTES = 32


class Locker:
    """Encrypts and authenticates pieces: SHAKE-256 under a key as the stream, HMAC-SHA-256 over what comes of it.

    The adapters are ciphertexts under the owner's key, so an owner who kept them as they are could decrypt them, and
    learn from two steps' adapters of the activations that met in their gradients. Locked, they are the owner's to keep
    and not to read.

    Args:
        secret: 32 bytes that the model's owner alone can make.
        context: what the pieces are of: the same for `close` and `open`.
    """

    OVERHEAD = _NONCE_BYTES + _TAG_BYTES
    """Bytes that a locked piece is longer."""

    def __init__(self, secret: bytes, context: bytes) -> None:
        keys = hashlib.shake_256(b"privtuner: training state" + secret + context).digest(64)
        self._stream, self._tag = keys[:32], keys[32:]

    def close(self, number: int, data: bytes) -> bytes:
        """Lock piece ``number``."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        cipher = self._apply(nonce, data)
        return nonce + cipher + self._mac(number, nonce, cipher)

    def open(self, number: int, data: bytes | memoryview) -> bytes:
        """Unlock piece ``number``.

        Raises:
            MessageError: another key, context or number, or changed bytes.
        """
        data = bytes(data)
        nonce, cipher, tag = data[:_NONCE_BYTES], data[_NONCE_BYTES:-_TAG_BYTES], data[-_TAG_BYTES:]
        if len(data) < self.OVERHEAD or not hmac.compare_digest(tag, self._mac(number, nonce, cipher)):
            raise MessageError(
                "the training state was not saved by this server's model in this run: go on with the state and the "
                "weights that belong together, or begin a new run"
            )
        return self._apply(nonce, cipher)

    def _apply(self, nonce: bytes, data: bytes) -> bytes:
        stream = hashlib.shake_256(self._stream + nonce).digest(len(data))
        return (np.frombuffer(data, np.uint8) ^ np.frombuffer(stream, np.uint8)).tobytes()

    def _mac(self, number: int, nonce: bytes, cipher: bytes) -> bytes:
        head = nonce + number.to_bytes(8, "little") + len(cipher).to_bytes(8, "little")
        return hmac.new(self._tag, head + cipher, hashlib.sha256).digest()

"""The data owner's half of linear layers on OpenFHE: tokens in slots, one ciphertext a feature."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from privtuner.errors import CkksError, InputError, MessageError, SecretError
from privtuner.linear import Direction, LayerSpec, Noise, as_batch, require_finite
from privtuner.openfhe import messages
from privtuner.openfhe.context import Context
from privtuner.openfhe.estimate import SIGMA
from privtuner.openfhe.keys import SecretKey
from privtuner.openfhe.library import library
from privtuner.openfhe.messages import BytesLike, Head
from privtuner.parties import LinearClient

__all__ = ["OpenFheClient", "Pending"]

_LARGEST_ERROR = 64
"""Bound on an error or a rounding of OpenFHE's: 20 standard deviations."""


@dataclass
class Pending:
    """What the client keeps of one request to decrypt its reply."""

    spec: LayerSpec
    head: Head
    unit: npt.NDArray[np.float64] = field(repr=False)  # value = slot * unit, (tokens,): it tells of the values
    used: bool = False  # a decryption has begun

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise SecretError("what decrypts a reply is never copied or pickled: it stays in the process that asked")


class OpenFheClient(LinearClient):
    """Encrypts the requests of one training run under OpenFHE keys of its own, and decrypts the replies.

    A ring of 2,048 with one prime of 53 bits, the largest that OpenFHE's check of 128 bits allows there: products with
    integers need no level, no special prime and no evaluation key. Every token is scaled to length 1, and that to what
    the modulus holds, so that no output can leave it (Cauchy-Schwarz), whatever the values.

    Raises:
        EngineError: OpenFHE is missing; the message says what to install.
    """

    scheme = "openfhe"

    def __init__(self) -> None:
        self.context = Context.from_settings(
            0,
            ring_dim=2048,
            first_mod_size=53,
            scaling_mod_size=30,
            scaling_technique="FIXEDMANUAL",
            key_switch_technique="BV",
        )
        self._secret = SecretKey(self.context)

    def encrypt(
        self, x: npt.NDArray[np.float32], spec: LayerSpec, direction: Direction = "forward"
    ) -> tuple[bytes, Pending]:
        """Encrypt a batch for one layer.

        Args:
            x: activations (tokens, d_in) forward, or output gradients (tokens, d_out) backward, finite.
            spec: the description of the layer that will answer.
            direction: ``"forward"`` for ``x @ W.T``, ``"backward"`` for ``x @ W``.

        Returns:
            The request, 16 N bytes for each feature of N / 2 tokens, and what decrypts its reply.

        Raises:
            InputError: wrong shape or dtype, a value that is not finite in float32, or no tokens.
        """
        batch = as_batch(x, spec, direction).astype(np.float64)
        require_finite("x", batch)
        if direction == "backward":
            batch = batch * spec.scale
        tokens, features = batch.shape
        length = np.linalg.norm(batch, axis=1)
        slots, reach = self.context.slots, self._reach(spec, direction)
        scaled = batch * (reach / np.where(length == 0, 1.0, length))[:, None]
        head = Head(
            messages.REQUEST,
            direction,
            spec.id,
            secrets.token_bytes(16),
            self.context.ring_dimension,
            self.context.moduli,
            tokens,
            features,
        )
        residues = []
        for start in range(0, tokens, slots):
            core = self._secret._core.encrypt(np.ascontiguousarray(scaled[start : start + slots].T), None, 0)
            parts = [core.residues(0, component, 0, self.context.ring_dimension) for component in range(2)]
            residues.append(np.stack(parts, axis=1))
        return messages.write(head, residues), Pending(spec, head, length / reach)

    def decrypt(self, blocks: Iterable[BytesLike], secret: Pending) -> npt.NDArray[np.float32]:
        """Decrypt a reply, block by block as they arrive. Uses up ``secret``, whatever comes of it.

        Returns:
            float32 (tokens, d_out) forward, (tokens, d_in) backward.

        Raises:
            MessageError: a block is malformed, truncated, corrupted, out of order, or answers another request.
            SecretError: the secret was used.
        """
        if not isinstance(secret, Pending):
            raise InputError(f"secret is of type {type(secret).__name__}: expected what encrypt returned")
        if secret.used:
            raise SecretError("a reply to this request was decrypted already, or refused; encrypt again")
        secret.used = True
        asked, spec = secret.head, secret.spec
        forward = asked.direction == "forward"
        total = spec.d_out if forward else spec.d_in
        out = np.empty((asked.tokens, total), np.float32)
        done = 0
        for data in blocks:
            head, residues = messages.read(data, messages.BLOCK)
            self._require_answer(head, asked)
            if head.first != done or head.total != total:
                raise MessageError(
                    f"reply: features from {head.first} of {head.total} where those from {done} of {total} are due"
                )
            for group, words in enumerate(residues):
                rows = slice(group * self.context.slots, min(asked.tokens, (group + 1) * self.context.slots))
                slots = self._slots(words[0], rows.stop - rows.start)
                values = slots.T * secret.unit[rows, None]
                if forward:
                    values *= spec.scale[done : done + head.features]
                out[rows, done : done + head.features] = values
            done += head.features
        if done != total:
            raise MessageError(f"reply: it ends after {done} of {total} features; encrypt again")
        return out

    def noise(self, spec: LayerSpec, direction: Direction) -> Noise:
        """Return what products are off by; see `privtuner.parties.LinearClient`.

        A slot is the sum of the coefficients times cosines, whose squares sum up to N / 2. Decryption adds noise of
        sqrt(2) times the deviation that it finds in the slots' imaginary parts: that of a row's error, here with room
        for what a thousand slots miss it by.
        """
        n = self.context.ring_dimension
        deviation = SIGMA * math.sqrt(n / 2)
        return Noise(
            room=self._reach(spec, direction) * 2.0**self.context.scale_bits,
            deviation=deviation,
            largest=float(_LARGEST_ERROR * n),
            rounding=float(n),  # half a unit a coefficient, and again for the transforms in double precision
            dropped=0.0,
            added=2 * math.sqrt(2) * deviation * spec.norm(direction),
        )

    def _reach(self, spec: LayerSpec, direction: Direction) -> float:
        """Length of a token in slots for which no coefficient of a product can leave the modulus."""
        norm = spec.norm(direction)
        # |sum_j W[k, j] e_j| <= |W[k]| sqrt(features) |e|, for every coefficient.
        noise = _LARGEST_ERROR * norm * math.sqrt(spec.features(direction)[0])
        return float((self.context.moduli[0] / 2 - noise) / (norm * 2.0**self.context.scale_bits))

    def _slots(self, words: npt.NDArray[np.uint64], tokens: int) -> Any:
        builder = library().Builder(self._secret._core, len(words), 1)
        try:
            for component in range(2):
                builder.set(0, component, 0, np.ascontiguousarray(words[:, component]))
        except InputError as error:
            raise MessageError(f"reply: {error}") from error
        try:
            return self._secret._core.decrypt(builder.finish(), tokens, False)
        except CkksError as error:
            raise MessageError(f"reply: these are no products of what was sent: {error}") from error

    @staticmethod
    def _require_answer(head: Head, asked: Head) -> None:
        same = (head.direction, head.layer, head.request, head.tokens, head.ring_dimension, head.moduli)
        if same != (asked.direction, asked.layer, asked.request, asked.tokens, asked.ring_dimension, asked.moduli):
            raise MessageError("reply: it answers another request; encrypt again")

    def __repr__(self) -> str:
        return f"<client with OpenFHE keys, {self.context!r}>"

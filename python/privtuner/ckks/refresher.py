"""The way to the owner of the key, for ciphertexts to be refreshed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator

from privtuner import _core
from privtuner.ckks.keys import PublicKey
from privtuner.copies import Stays
from privtuner.errors import CkksError, InputError, MessageError

__all__ = ["REFRESH_LEVEL", "Exchange", "Refresher"]

REFRESH_LEVEL: int = _core.CKKS_REFRESH_LEVEL
"""The level at which ciphertexts are masked: three primes."""

Exchange = Callable[[Iterable[bytes]], Iterator[bytes]]
"""Carries masked ciphertexts to the owner of the key, and yields what `SecretKey.refresh` makes of each, in order."""


class Refresher(Stays):
    """What an evaluator refreshes and reveals ciphertexts with: the owner's public key and the way to the owner.

    ::

        refresher = ckks.Refresher(public_key, exchange)
        evaluator = ckks.Evaluator(parameters, keys, refresher)
        y = evaluator.refresh(x)

    Safe to use from several threads, whose refreshes take turns.

    Args:
        public_key: the owner's. Of common randomness (``PublicKey.from_bytes(..., common=...)``), if the owner is not
            to learn of the weights by a key of its choice.
        exchange: takes the messages of one refresh as an iterable, to be read ahead as far as there is room, and
            returns the iterator over their answers. A message that is sent again must be the same bytes again.
        refreshed: ciphertexts that were refreshed under this key before.

    Attributes:
        public_key: as given.
        session: 16 random bytes that all messages carry; their numbers count from 0.
        refreshed: ciphertexts that were refreshed under this key; at most `LIMIT`.
    """

    LIMIT: int = _core.CKKS_REFRESHES
    """For so many ciphertexts a wrong one is improbable: 1 in 2^40 that there is any."""
    stays = "a refresher cannot be pickled: make one in the other process, and tell it how far this one came"

    def __init__(self, public_key: PublicKey, exchange: Exchange, *, refreshed: int = 0) -> None:
        if not 0 <= refreshed <= self.LIMIT:
            raise InputError(f"refreshed {refreshed} is outside [0, {self.LIMIT}]")
        self.public_key = public_key
        self.session = os.urandom(16)
        self.refreshed = refreshed
        self._exchange = exchange
        self._number = 0
        self._lock = threading.Lock()

    def _refresh(self, x: _core.CkksTensor, fresh: _core.CkksTensor) -> _core.CkksTensor:
        """Fill ``fresh``, the room that the compiled evaluator made, with what the owner makes of ``x``.

        Raises:
            CkksError: too many ciphertexts for one key. MessageError: an answer that is none, or missing.
        """
        with self._lock:
            if self.refreshed + x.features > self.LIMIT:
                raise CkksError(
                    f"{self.refreshed} ciphertexts were refreshed under this key, and {self.LIMIT} is the most: go on "
                    "with another key"
                )
            self.refreshed += x.features
            masked = _core.CkksMaskedRefresh(self.public_key._core, x, fresh, self.session, self._number)
            self._number += masked.messages
            answers = self._exchange(masked.mask(i) for i in range(masked.messages))
            for i in range(masked.messages):
                answer = next(answers, None)
                if answer is None:
                    raise MessageError(f"the owner of the key answered {i} of {masked.messages} messages of a refresh")
                masked.unmask(i, answer)
            return masked.result()

    def __repr__(self) -> str:
        return f"<refresher of {self.public_key.parameters.name}: {self.refreshed} ciphertexts so far>"

"""Sending again what got lost: how often, for how long, and after which pauses."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from privtuner.errors import InputError, LostError

__all__ = ["Attempts", "Retries"]

_REMIND_SECONDS = 60.0
_DRAW = random.SystemRandom()  # of its own: the global generator's draws are part of a run


@dataclass(frozen=True)
class Retries:
    """How often a request that got lost is sent again.

    Pauses double, and each is shortened by up to a half at random: those who lost a server together do not all come
    back at once (M. Brooker, "Exponential Backoff and Jitter", 2015). Time and number count from the last progress.

    Attributes:
        seconds: longest time without progress; 0 sends nothing again.
        attempts: most repetitions without progress.
        first: seconds of the first pause.
        longest: seconds of the longest pause.

    Raises:
        privtuner.errors.InputError: a negative number, or pauses that do not grow.
    """

    seconds: float = 600.0
    attempts: int = 100
    first: float = 0.2
    longest: float = 15.0

    def __post_init__(self) -> None:
        if not (self.seconds >= 0 and self.attempts >= 0 and 0 <= self.first <= self.longest):
            raise InputError(
                f"retries for {self.seconds:g} s, {self.attempts} times, pauses from {self.first:g} to "
                f"{self.longest:g} s: give at least 0, and no longer pause first"
            )

    def begin(self, say: Callable[[str], object] = lambda _: None) -> Attempts:
        """Return the attempts of one request; ``say`` is told in a line what is waited for, and when it is there."""
        return Attempts(self, say)


class Attempts:
    """The repetitions of one request."""

    def __init__(self, retries: Retries, say: Callable[[str], object]) -> None:
        self._retries, self._say = retries, say
        self._count, self._since, self._told = 0, 0.0, 0.0

    def progress(self) -> None:
        """Say that something of the answer has arrived: what counts begins anew."""
        if self._count and self._told:
            self._say(f"going on after {time.monotonic() - self._since:.0f} s")
        self._count, self._told = 0, 0.0

    def wait(self, error: LostError, sleep: Callable[[float], object]) -> None:
        """Wait before the next attempt.

        Args:
            error: how the last one ended.
            sleep: called with seconds; what it raises ends the waiting.

        Raises:
            LostError: there were enough of them; says how many.
        """
        now, retries = time.monotonic(), self._retries
        if not self._count:
            self._since = now
        elapsed = now - self._since
        if self._count >= retries.attempts or elapsed >= retries.seconds:
            tried = f"; gave up after trying {self._count + 1} times in {elapsed:.0f} s" if self._count else ""
            raise LostError(f"{error}{tried}") from error
        pause = min(retries.longest, retries.first * 2.0 ** min(self._count, 64)) * _DRAW.uniform(0.5, 1.0)
        self._count += 1
        if not self._told:
            self._say(f"{error}; trying again for up to {retries.seconds:.0f} s")
            self._told = now
        elif now - self._told >= _REMIND_SECONDS:
            self._say(f"still waiting, {elapsed:.0f} s of {retries.seconds:.0f} s: {error}")
            self._told = now
        sleep(min(pause, max(0.0, retries.seconds - elapsed)))

"""Signs that a run is not learning: adapters that stay as they are, and a loss that only grows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from privtuner.errors import PrivtunerError

__all__ = ["LearningCheck"]

STILL_STEPS = 3
"""Steps after which adapters must have changed."""

GROWN_TIMES = 4.0
"""A loss above so many times that of guessing, or of the first step where that is more, is out of proportion."""

GROWN_STEPS = 10
"""Steps in a row with such a loss that end a run: a few may follow from odd batches."""


class LearningCheck:
    """Follows the steps of a run. Give it the run's steps in order, each after the optimiser took it.

    Args:
        adapters: what is trained below the head; nothing is asked of a run that has none.
    """

    def __init__(self, adapters: Sequence[torch.nn.Parameter]) -> None:
        self._adapters = adapters
        self._start = [adapter.detach().clone() for adapter in adapters]
        self._steps = self._grown = 0
        self._limit = math.nan

    @torch.no_grad()
    def check(self, loss: float, labels: int, gradient: float) -> None:
        """Look at the run after a step, while the gradients are still there.

        Args:
            loss: mean cross-entropy of the batch in nats, before the step.
            labels: number of classes.
            gradient: norm of the gradient of all that is trained.

        Raises:
            privtuner.errors.PrivtunerError: the adapters have not changed in `STILL_STEPS` steps although there was a
                gradient, or the loss was out of proportion for `GROWN_STEPS` steps in a row.
        """
        self._steps += 1
        if self._steps == 1:
            self._limit = GROWN_TIMES * max(loss, math.log(max(labels, 2)))
        self._grown = self._grown + 1 if loss > self._limit else 0
        if self._grown == GROWN_STEPS:
            raise PrivtunerError(
                f"the loss has been above {self._limit:.3g} for {GROWN_STEPS} steps, {GROWN_TIMES:g} times that of the "
                "first step or of guessing: the run diverges; use a lower learning rate"
            )
        if self._steps == STILL_STEPS and self._adapters and gradient > 0:
            self._require_change()

    def _require_change(self) -> None:
        if any(not torch.equal(now, start) for now, start in zip(self._adapters, self._start, strict=True)):
            return
        if any(adapter.grad is not None and bool(adapter.grad.any()) for adapter in self._adapters):
            raise PrivtunerError(
                f"the adapters are the same after {STILL_STEPS} steps although they have gradients: the learning rate "
                "is too small for their numbers to change; use a higher one"
            )
        raise PrivtunerError(
            f"the adapters are the same after {STILL_STEPS} steps: the head learns and no gradient reaches them; check "
            "that the head reads the layers that have adapters, and that the server answers backward requests"
        )

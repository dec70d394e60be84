"""Runs that learn nothing are named: adapters that stay as they are, and a loss that only grows."""

import math

import pytest
import torch

from privtuner.errors import PrivtunerError
from privtuner.train.learning import GROWN_STEPS, STILL_STEPS, LearningCheck


def losses(*values, first=1.0):
    check = LearningCheck([])
    for value in (first, *values):
        check.check(value, 3, 1.0)


def test_a_loss_that_stays_out_of_proportion_is_named():
    limit = 4 * math.log(3)
    assert limit > 4 * 1.0
    with pytest.raises(PrivtunerError, match=rf"above 4\.39 for {GROWN_STEPS} steps.*the run diverges; use a lower"):
        losses(*[limit + 0.01] * GROWN_STEPS)
    losses(*[limit + 0.01] * (GROWN_STEPS - 1), limit - 0.01, *[100.0] * (GROWN_STEPS - 1))
    losses(*[limit + 0.01] * 2 * GROWN_STEPS, first=1.2)
    with pytest.raises(PrivtunerError, match="above 4.8"):
        losses(*[4.81] * GROWN_STEPS, first=1.2)


def test_adapters_without_a_gradient_anywhere_have_learned_all_there_is():
    adapter = torch.nn.Parameter(torch.zeros(3))
    check = LearningCheck([adapter])
    for _ in range(2 * STILL_STEPS):
        check.check(0.0, 2, 0.0)


def test_one_adapter_that_changes_is_enough():
    adapters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    check = LearningCheck(adapters)
    for _ in range(2 * STILL_STEPS):
        adapters[1].data += 1
        check.check(1.0, 2, 1.0)

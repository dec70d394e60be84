"""Choosing refreshes: against all choices there are, and what a plan says against what a run does."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from encoders import small
from privtuner.ckks import Parameters, Timings
from privtuner.errors import CkksError
from privtuner.sealed.programme import REFRESH_FROM, Costs, Join, Programme, Stretch, _refresh_cost

PARAMETERS = Parameters.INSECURE(7)
COSTS = Costs(PARAMETERS)


def stretches(seed: int) -> list[Stretch]:
    """Three points behind the start, with depths, work, joins and floors as encoders have them, and what was saved."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(4):
        made.append(
            Stretch(
                f"p{index}",
                int(rng.integers(1, 9)),
                settles=bool(index and rng.integers(2)),
                anchor=index in (0, 2),
                takes=int(rng.integers(0, 4)),
                held=None if index in (0, 2) or rng.integers(2) else int(rng.integers(0, 3)),
                saved={"slope": int(rng.integers(0, 2))} if index == 2 else {},
                floor=int(rng.integers(2, 4)),
                join=Join(3, int(rng.integers(0, 3)), {"value": 1}) if index == 3 else None,
                work={("relinearise", int(rng.integers(0, 2))): float(rng.integers(1, 30))},
            )
        )
    return made


def saved(_point: str, kind: str) -> int:
    return {"slope": 5, "value": 4}[kind]


def cost_of(parts: list[Stretch], start: int, levels: dict[str, int]) -> float:
    """Of one choice; infinite where it cannot be."""
    level = anchor = start
    total = 0.0
    if start < parts[0].floor:
        return math.inf
    for before, here in itertools.pairwise(parts):
        total += before.cost(COSTS, level)
        arrival = min([before.end(level, anchor), *(saved("", kind) - below for kind, below in before.saved.items())])
        if here.name in levels:
            if arrival < REFRESH_FROM:
                return math.inf
            level = levels[here.name]
            total += _refresh_cost(COSTS, here.features, level)
        else:
            if arrival < 0:
                return math.inf
            level = arrival - here.settles
            if here.settles and level >= 0:
                work = {(kind, arrival + 1): float(here.features) for kind in ("term", "rescale")}
                total += COSTS.seconds(work)
        if level < here.floor:
            return math.inf
        if here.anchor:
            anchor = level
        if here.join is not None:
            there = min(anchor - here.join.held, saved("", "value") - 1)
            if there < min(level, REFRESH_FROM):
                return math.inf
            total += _refresh_cost(COSTS, here.join.features, level) if there < level else 0.0
    return total


def solve(parts: list[Stretch]):
    return Programme(PARAMETERS, COSTS, parts, lambda _: 0.0).solve(saved=saved)


def test_the_programme_finds_the_least_cost():
    found = 0
    for seed in range(6):
        parts = stretches(seed)
        options = [[None, *range(2, 8)] for _ in parts[1:]]
        best = math.inf
        for start in range(2, 8):
            for choice in itertools.product(*options):
                levels = {part.name: level for part, level in zip(parts[1:], choice, strict=True) if level is not None}
                best = min(best, cost_of(parts, start, levels))
        if math.isinf(best):
            with pytest.raises(CkksError, match="not deep enough"):
                solve(parts)
            continue
        choice = solve(parts)
        assert choice.cost == pytest.approx(best, rel=1e-12)
        assert cost_of(parts, choice.start, choice.levels) == pytest.approx(best, rel=1e-12)
        found += 1
    assert found >= 3


def test_what_cannot_be_done_is_refused():
    parts = stretches(0)
    parts[2].takes = 9
    parts[1].takes = 9
    with pytest.raises(CkksError, match="not deep enough"):
        solve(parts)


def test_costs():
    """Timings where there are some, and the price of bytes."""
    timings = Timings("any", 1, {"product": ((2, 8), (1.0, 7.0))})
    assert Costs(PARAMETERS, timings).seconds({("product", 5): 2.0}) == pytest.approx(8.0)
    assert Costs(PARAMETERS, price=1.0).traffic(3, 4) == 3 * 8 * 1024 * (6 + 5)
    assert COSTS.seconds({("relinearise", 8): 1.0}) > COSTS.seconds({("relinearise", 3): 1.0}) > 0


def test_a_plan_refreshes_only_where_levels_run_out():
    """Nothing arrives below what a refresh takes, and nothing is refreshed to less."""
    plan = small().model.plan
    for schedule in (plan.forward, plan.backward):
        refreshed = [(arrival, level) for _, _, arrival, level in schedule.table if level is not None]
        assert refreshed
        for arrival, level in refreshed:
            assert arrival >= REFRESH_FROM
            assert level >= arrival
        assert schedule.seconds > 0
        assert schedule.peak_bytes > 0
        assert {name for name, *_ in schedule.table} >= set(schedule.levels)

"""Devices that are alike: certified by their numbers, against brute force and the best split; limits on counts."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings

import numpy as np
import pytest

pytest.importorskip("scipy", reason="SciPy is not installed: the allocator needs it")

from loops import each
from privtuner import cli
from privtuner.wireless import Cell, UncertifiedWarning, allocate
from privtuner.wireless.branch import branch_and_bound
from privtuner.wireless.counts import Limit, Limits, tighten
from privtuner.wireless.dual import maximise
from privtuner.wireless.problem import Problem
from privtuner.wireless.whole import Whole
from wireless_cases import ROUNDING, check, random_system, with_deadlines

FEW = 40  # nodes; single devices as the only way to branch took more than 10,000


def fleet(devices, spread=0.0, classes=1, seed=3):
    """Copies of a few devices of a cell, each with its numbers off by up to ``spread``."""
    base = Cell(devices=6).draw(seed=seed)
    rng = np.random.default_rng(devices)
    names = ("gain", "capacitance", "power_max", "samples", "deadline", "privacy_weight")
    made = []
    for number in range(devices):
        one = base.devices[number % classes]
        off = 1 + spread * rng.uniform(-1, 1, len(names))
        values = {name: getattr(one, name) * factor for name, factor in zip(names, off, strict=True)}
        made.append(dataclasses.replace(one, name=f"phone-{number}", **values))
    part = devices / 30
    return dataclasses.replace(
        base,
        devices=tuple(made),
        channel=dataclasses.replace(base.channel, bandwidth=base.channel.bandwidth * part),
        server=dataclasses.replace(base.server, frequency=base.server.frequency * part),
    )


@each(spread=[0.0, 1e-9, 1e-6, 1e-3, 1e-2, 0.1], classes=[1, 2, 3])
def test_fleets_are_certified_in_few_nodes(spread, classes):
    found = allocate(fleet(30, spread, classes))
    check(found)
    assert found.certified
    assert found.relative_gap <= 1e-6
    assert found.iterations <= FEW


@each(devices=[100, 1000], spread=[0.0, 1e-6, 1e-3])
def test_large_fleets(devices, spread):
    found = allocate(fleet(devices, spread))
    assert found.certified
    assert found.iterations <= FEW


def test_equal_devices_reach_the_best_split():
    system = fleet(30)
    light, middle, _ = (tier.name for tier in system.tiers)
    splits = (allocate(system, tiers=[light] * number + [middle] * (30 - number)) for number in range(12, 20))
    best = min(splits, key=lambda split: split.objective)
    assert best.objective == pytest.approx(-104.038, abs=1e-3)
    found = allocate(system)
    assert found.objective <= best.objective + 1e-6 * found.energy
    assert found.bound <= best.objective


@each(seed=range(4), spread=[0.0, 1e-9, 1e-6, 1e-3, 1e-2])
def test_fleets_against_brute_force(seed, spread):
    system = fleet(5, spread, 1 + seed % 2, seed)
    found, best = allocate(system), allocate(system, "brute-force")
    assert found.certified
    assert found.objective <= best.objective + 1e-6 * found.energy
    assert found.bound <= best.objective + ROUNDING * (found.energy + abs(found.objective))


@each(seed=range(12), tolerance=[0.3, 0.03])
def test_the_bound_holds_at_any_tolerance(seed, tolerance):
    """Also for what was barred on the way because it gains less than the tolerance."""
    system = random_system(seed, 5, 3, tight=6)
    best = allocate(system, tolerance=1e-9)
    found = allocate(system, tolerance=tolerance)
    assert found.bound <= best.objective + ROUNDING * (best.energy + abs(best.objective))


def game(seed, devices=4, tiers=3):
    problem = Problem.of(random_system(seed, devices, tiers, tight=6))
    can = problem.possible()
    return Whole(problem, can)


def some_limits(rng, devices, tiers):
    """Limits that overlap, contradict, say the same, or leave one count only."""
    chosen = []
    for _ in range(rng.integers(1, 5)):
        group = np.sort(rng.choice(devices, rng.integers(2, devices + 1), replace=False))
        sign = int(rng.choice([-1, 1]))
        chosen.append(Limit(group, int(rng.integers(tiers)), int(rng.integers(1, len(group))), sign))
    if rng.random() < 0.5:
        chosen.append(dataclasses.replace(chosen[0], sign=-chosen[0].sign))
    return tuple(chosen)


def keeps(tiers, limits):
    return all(limit.sign * ((tiers[limit.group] == limit.tier).sum() - limit.count) <= 0 for limit in limits)


@each(seed=range(3))
def test_bounds_under_limits_hold(seed):
    """No allocation that keeps the limits costs less, whatever their groups are."""
    whole, rng = game(seed), np.random.default_rng(seed)
    devices, tiers = whole.offset.shape
    least = {}
    for choice in itertools.product(range(tiers), repeat=devices):
        chosen = np.array(choice)
        if np.isfinite(whole.offset[np.arange(devices), chosen]).all():
            one = whole.problem.take(chosen)
            least[choice] = branch_and_bound(Whole(one, np.ones(one.shape, dtype=bool)), tolerance=1e-9, max_nodes=1)
    close = 0
    for _ in range(4):
        limits = some_limits(rng, devices, tiers)
        kept = [found for choice, found in least.items() if keeps(np.array(choice), limits)]
        best = min(kept, key=lambda found: found.objective, default=None)
        tight = tighten(whole.offset, limits)
        if tight is None:
            assert best is None
            continue
        offset, left = tight
        bound = maximise(whole.market(), offset, limits=Limits(left) if left else None, accuracy=1e-6).value
        free = maximise(whole.market(), whole.offset, accuracy=1e-6).value
        if best is not None and np.isfinite(best.objective):
            size = best.energy + abs(best.objective)
            assert bound <= best.objective + 1e-9 * size
            assert bound >= free - 1e-5 * size
            close += bound > free + 1e-5 * size or bound >= best.objective - 1e-5 * size
    assert close


def test_prices_settle_where_the_limits_hold():
    """Counts at the limits that have a price; no price where a limit has room; between temperatures as at one."""
    rng = np.random.default_rng(1)
    for _ in range(40):
        devices, tiers = int(rng.integers(3, 9)), int(rng.integers(2, 5))
        limit = some_limits(rng, devices, tiers)[0]
        costs = rng.uniform(0, 1, (devices, tiers)) * 10.0 ** rng.integers(-3, 2)
        heat = 10.0 ** rng.uniform(-9, 0)
        limits = Limits([limit])
        limits.settle(costs, heat, np.ones(2))
        charged, income = limits.charge(costs)
        weights = np.exp(-(charged - charged.min(axis=1, keepdims=True)) / heat)
        weights /= weights.sum(axis=1, keepdims=True)
        room = limit.sign * (limit.count - weights[limit.group, limit.tier].sum())
        price = float(limits.price[0])
        assert income == pytest.approx(limit.sign * limit.count * price)
        # The barrier leaves room of heat / price, less what pulls the price back. Where a range of prices is as good,
        # Newton's method may stop within it.
        spread = np.ptp(costs[limit.group], axis=1).max()
        assert room == pytest.approx(heat / price - heat / (10 * max(spread, heat)), abs=1e-4 * len(limit.group))


def test_tighten_bars_what_has_no_room():
    offset = np.zeros((3, 2))
    everyone = np.arange(3)
    barred, left = tighten(offset, (Limit(everyone, 0, 0, 1),))
    assert np.isinf(barred[:, 0]).all()
    assert np.isfinite(barred[:, 1]).all()
    assert left == ()
    barred, left = tighten(offset, (Limit(everyone, 0, 3, -1),))
    assert np.isinf(barred[:, 1]).all()
    assert np.isfinite(barred[:, 0]).all()
    assert left == ()
    assert np.isfinite(offset).all()  # of the caller
    (kept,) = tighten(offset, (Limit(everyone, 0, 2, 1),))[1]
    assert (kept.group.tolist(), kept.tier, kept.count, kept.sign) == ([0, 1, 2], 0, 2, 1)
    assert tighten(offset, (Limit(everyone, 0, 3, 1), Limit(everyone, 1, 0, -1)))[1] == ()  # say nothing


def test_tighten_follows_one_limit_with_another():
    everyone = np.arange(3)
    first = np.array([[0.0, np.inf], [0.0, 0.0], [0.0, 0.0]])
    barred, left = tighten(first, (Limit(everyone, 0, 1, 1),))  # the first takes the only place
    np.testing.assert_array_equal(np.isinf(barred), [[False, True], [True, False], [True, False]])
    assert left == ()
    (kept,) = tighten(first, (Limit(everyone, 0, 2, -1),))[1]
    assert (kept.group.tolist(), kept.count) == ([1, 2], 1)
    assert tighten(first, (Limit(everyone, 1, 3, -1),)) is None
    assert tighten(first, (Limit(everyone, 0, 0, 1),)) is None
    assert tighten(first, (Limit(everyone, 0, 1, 1), Limit(everyone, 1, 1, 1))) is None  # three devices, two places


SHORT = ["--tolerance", "1e-10", "--max-nodes", "1"]


@pytest.fixture
def system_file(tmp_path):
    record = dataclasses.asdict(fleet(12, 0.01))
    del record["INSECURE_security_floor"]
    path = tmp_path / "system.json"
    path.write_text(json.dumps(record))
    return path


def test_the_command_says_what_is_not_certified(system_file, tmp_path, capsys):
    target = tmp_path / "a.json"
    assert cli.main(["allocate", str(system_file), *SHORT, "--json", str(target)]) == 3
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("privtuner: warning: not certified: the gap is ")
    assert "1e-10 was asked for" in line
    assert line.endswith("raise max_nodes or the tolerance")
    assert "\ncertified" not in out
    record = json.loads(target.read_text())
    assert (record["certified"], record["complete"], record["tolerance"]) == (False, False, 1e-10)
    assert record["relative_gap"] > 1e-10
    assert cli.main(["allocate", str(system_file), "--json", str(target)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\ncertified" in out
    record = json.loads(target.read_text())
    assert (record["certified"], record["complete"], record["tolerance"]) == (True, True, 1e-6)


def test_other_warnings_pass_through(system_file, monkeypatch, capsys):
    from privtuner import wireless

    def allocate_and_warn(*arguments, **options):
        warnings.warn("something else", RuntimeWarning, stacklevel=2)
        return allocate(*arguments, **options)

    monkeypatch.setattr(wireless, "allocate", allocate_and_warn)
    with pytest.warns(RuntimeWarning, match="something else"):
        assert cli.main(["allocate", str(system_file)]) == 0


def test_methods_without_a_bound_tell_when_their_search_was_cut():
    system, method = with_deadlines(random_system(22, 6, 3, tight=6), 2), "largest"
    even = dataclasses.replace(system, tiers=tuple(dataclasses.replace(t, ring_dimension=32768) for t in system.tiers))
    found = allocate(even, method)
    assert (found.complete, found.certified, found.doubt) == (True, False, None)
    with pytest.warns(UncertifiedWarning, match="a search of the method 'largest' ended at max_nodes"):
        assert not allocate(even, method, tolerance=1e-10, max_nodes=1).complete

"""Systems without an allocation: which constraint of which device fails, by how much, and what would mend it."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

pytest.importorskip("scipy", reason="SciPy is not installed: the allocator needs it")

from loops import each
from privtuner.errors import InfeasibleError
from privtuner.wireless import METHODS, Server, allocate
from wireless_cases import check, feasible, random_system, scaled, with_deadlines

RESOURCES = ("bandwidth", "server", "bandwidth and server")
SHORT_SEEDS = range(5, 13)


@each(seed=range(6), downlink=[False, True])
def test_a_deadline_too_short_for_a_device_alone(seed, downlink):
    system = random_system(seed, 3, 2, downlink=downlink)
    victim = dataclasses.replace(system.devices[1], deadline=system.devices[1].deadline / 30)
    devices = (system.devices[0], victim, system.devices[2])
    with pytest.raises(InfeasibleError, match="s too long") as caught:
        allocate(dataclasses.replace(system, devices=devices))
    error = caught.value
    assert (error.constraint, error.device) == ("deadline", victim.name)
    assert repr(victim.name) in str(error)
    assert f"{error.shortfall * victim.deadline:.4g} s too long" in str(error)
    for margin, enough in ((1e-6, True), (-1e-6, False)):
        longer = dataclasses.replace(victim, deadline=victim.deadline * (1 + error.shortfall) * (1 + margin))
        assert feasible(dataclasses.replace(system, devices=(longer,))) is enough


@each(method=METHODS)
def test_the_message_names_the_tier_that_was_asked_for(method):
    system = with_deadlines(random_system(3, 2, 3), 0.01)
    with pytest.raises(InfeasibleError) as caught:
        allocate(system, method, tiers="ring-32768")
    assert "'ring-32768'" in str(caught.value)
    assert "'ring-8192'" not in str(caught.value)


def short_of(system, resource):
    """The system with half of a resource again and again, until it is too little; None if one device alone needs it."""
    while True:
        system = scaled(system, **{name: 0.5 for name in ("bandwidth", "server") if name in resource})
        try:
            allocate(system)
        except InfeasibleError as error:
            return (system, error) if error.constraint != "deadline" else None


@functools.cache
def shortage(seed, resource):
    return short_of(random_system(seed, 2 + seed % 5, 1), resource)


@each(seed=SHORT_SEEDS, resource=RESOURCES)
def test_what_is_shared_is_too_little(seed, resource):
    """The factor is that by which what the error names has to grow."""
    case = shortage(seed, resource)
    if case is None:
        return  # `test_shortages_are_met` counts what is left
    system, error = case
    assert error.constraint in RESOURCES
    assert error.device in [device.name for device in system.devices]
    assert error.shortfall > 0
    for margin, enough in ((1e-3, True), (-1e-3, False)):
        factor = (1 + error.shortfall) * (1 + margin)
        named = {name: factor for name in ("bandwidth", "server") if name in error.constraint}
        assert feasible(scaled(system, **named)) is enough, error.constraint


def test_shortages_are_met():
    cases = [shortage(seed, resource) for seed in SHORT_SEEDS for resource in RESOURCES]
    assert sum(case is not None for case in cases) >= 15


@each(seed=[0, 2, 4, 7, 8, 9, 11, 20], resource=["bandwidth", "server"])
def test_allocations_exist_from_the_factor_on(seed, resource):
    """However little room there is: 1e-5 to 1e-2 more than the least of both."""
    case = shortage(seed, resource)
    if case is None:
        return
    system, error = case
    for margin in np.logspace(-5, -2, 7):
        factor = (1 + error.shortfall) * (1 + margin)
        check(allocate(scaled(system, factor, factor)))


def test_one_resource_in_plenty():
    """Where the server is no constraint, bandwidth is what is short, and the other way about."""
    system = scaled(random_system(1, 4, 1), server=1e6)
    system = dataclasses.replace(system, server=Server(system.server.frequency, 0.0))
    _, error = short_of(system, "bandwidth")
    assert error.constraint == "bandwidth"
    system = scaled(random_system(1, 4, 1), bandwidth=1e6)
    reached = [dataclasses.replace(device, gain=device.gain * 1e6) for device in system.devices]
    _, error = short_of(dataclasses.replace(system, devices=tuple(reached)), "server")
    assert error.constraint == "server"

"""The allocator against independent solvers: CVXPY with Clarabel, brute force, SLSQP and fractional programming.

Differences are stated as parts of the energy, for the objective has an arbitrary zero. No peer's convergence is relied
on: ours must not be worse than what the peer reached, and how far ours may be from the best is told by certificates,
the package's bound or one computed here from the formulas. `check` holds the allocations to every constraint.
"""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

cp = pytest.importorskip("cvxpy", reason="CVXPY is not installed: no second solver to compare with")
pytest.importorskip("clarabel", reason="Clarabel is not installed: no second solver to compare with")
minimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed: the allocator needs it").minimize

from loops import each  # noqa: E402
from privtuner.errors import InfeasibleError  # noqa: E402
from privtuner.wireless import METHODS, allocate  # noqa: E402
from privtuner.wireless.branch import branch_and_bound  # noqa: E402
from privtuner.wireless.problem import Problem, respond  # noqa: E402
from privtuner.wireless.stages import Computation, communicate  # noqa: E402
from wireless_cases import check, random_system  # noqa: E402
from wireless_oracles import ORDERS, Conic  # noqa: E402

WORSE = 1e-8  # Clarabel lets constraints slip by 1e-10, which multipliers of some tens turn into 4e-9 of the energy
TANGENT = 1e-6  # prices balance to 1e-9 or better, times slopes that are up to some hundreds of the energy
ROUNDING = 1e-12  # of sums of a few terms of the size of the energy


@each(seed=range(96))
def test_fixed_tiers(seed):
    system = random_system(seed, 1 + seed % 8, 1, downlink=seed % 3 == 0)
    found = allocate(system, tolerance=1e-9)
    check(found)
    _, objective = Conic.solvable(system, [0] * len(system.devices))
    assert found.objective - objective <= WORSE * found.energy
    assert found.bound <= objective + WORSE * found.energy
    assert found.relative_gap <= 1e-9


@settings(max_examples=2 * settings().max_examples)
@given(st.integers(0, 100_000), st.sampled_from([(2, 4), (3, 3), (4, 3), (5, 2), (6, 2)]))
@example(0, (6, 3))
@example(1, (6, 3))
def test_tiers_against_brute_force(seed, size):
    system = random_system(seed, *size, tight=6)
    found, best = allocate(system), allocate(system, "brute-force")
    assert found.relative_gap <= 1e-6
    assert found.bound - ROUNDING * found.energy <= best.objective
    assert found.objective - best.objective <= 1e-6 * found.energy
    # Brute force leaves nothing out, and solves each combination to the last digits.
    assert best.objective - found.objective <= ROUNDING * found.energy


@each(seed=range(6))
def test_tiers_against_every_cone_program(seed):
    system = random_system(seed, 2, 3, tight=6)
    found = allocate(system, tolerance=1e-9)
    best = min(conic_or_inf(system, list(tiers)) for tiers in itertools.product(range(3), repeat=2))
    check(found)
    assert found.objective - best <= WORSE * found.energy
    assert found.bound <= best + WORSE * found.energy
    assert found.relative_gap <= 1e-9


def conic_or_inf(system, tiers):
    """The objective, inf where Clarabel proves that there is none; fails where it says neither."""
    for order in ORDERS:
        conic = Conic(system, tiers, order)
        objective = conic.solve()
        if objective is not None:
            return objective
        if conic.problem.status == "infeasible":
            return math.inf
    raise AssertionError(f"Clarabel says neither optimal nor infeasible of tiers {tiers}")


@each(seed=range(40))
def test_no_method_beats_the_bound(seed):
    system = random_system(seed, 1 + seed % 5, 1 + seed % 3, tight=6)
    found = allocate(system, tolerance=1e-9)
    assert -math.inf < found.bound <= found.objective
    for method in METHODS:
        try:
            other = allocate(system, method, seed=seed)
        except InfeasibleError:
            assert method not in ("global", "brute-force")
            continue
        # Deadlines are met to 1e-9 of their length, which is worth about as much of the energy.
        assert found.bound <= other.objective + 1e-9 * found.energy, method


class Uploads:
    """Devices that upload within given times: sum (N0 B / g) (e^(k / (B t)) - 1) t, by the formulas alone."""

    def __init__(self, seed):
        self.system = system = random_system(seed, 2 + seed % 6, 1, tight=6)
        self.problem = Problem.of(system)
        count = len(system.devices)
        self.start = respond(self.problem, system.channel.bandwidth / count, system.server.frequency / count)
        (tier,), channel = system.tiers, system.channel
        samples, gain, power_max, deadline = (
            np.array([getattr(device, name) for device in system.devices])
            for name in ("samples", "gain", "power_max", "deadline")
        )
        computing = samples * (
            tier.encrypt_cycles / self.start.frequency[:, 0] + tier.evaluate_cycles / self.start.server[:, 0]
        )
        self.time = deadline - computing
        self.nats = samples * tier.upload_bits * math.log(2)
        self.noise = channel.noise_density / gain
        self.power_max, self.unit, self.count = power_max, channel.bandwidth / count, count
        # Bandwidth at which full power just does: bisection of a rate that grows with it.
        low, high = np.zeros(count), np.full(count, channel.bandwidth)
        for _ in range(200):
            middle = (low + high) / 2
            short = middle * np.log1p(power_max / (self.noise * middle)) * self.time < self.nats
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        self.least = high

    def energies(self, bandwidth):
        return self.noise * bandwidth * np.expm1(self.nats / (bandwidth * self.time)) * self.time

    def slopes(self, bandwidth):
        x = self.nats / (bandwidth * self.time)
        return self.noise * self.time * (np.expm1(x) - x * np.exp(x))

    def found(self):
        """The bandwidths and the energy that the package's second stage leads to."""
        choices = communicate(self.problem, self.start)
        bandwidth = choices.bandwidth[:, 0]
        assert bandwidth.sum() <= self.system.channel.bandwidth * (1 + ROUNDING)
        assert (bandwidth >= self.least * (1 - 1e-9)).all()
        np.testing.assert_allclose(choices.upload_time[:, 0], self.time, rtol=1e-12)
        energy = (choices.power * choices.upload_time)[:, 0]
        np.testing.assert_allclose(energy, self.energies(bandwidth), rtol=1e-9)  # full power is a cap to 1e-9
        return bandwidth, energy.sum()


def gap(shares, slopes, least, total):
    """By how much no other shares of at least ``least`` that add up to ``total`` can be better: the energy is convex.

    Tangents lie below it, and the lowest point of their sum gives all the room to the steepest.
    """
    return float(slopes @ (shares - least) - (total - least.sum()) * min(slopes.min(), 0.0))


@each(seed=range(20))
def test_uploads_against_slsqp(seed):
    uploads = Uploads(seed)
    bandwidth, energy = uploads.found()
    unit, room = uploads.unit, uploads.count - uploads.least.sum() / uploads.unit
    start = uploads.least / unit + room / uploads.count
    scale = uploads.energies(start * unit).sum()
    result = minimize(
        lambda b: uploads.energies(b * unit).sum() / scale,
        start,
        jac=lambda b: uploads.slopes(b * unit) * unit / scale,
        method="SLSQP",
        bounds=[(low / unit, None) for low in uploads.least],
        constraints={"type": "ineq", "fun": lambda b: uploads.count - b.sum(), "jac": lambda b: -np.ones_like(b)},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    # SLSQP keeps linear constraints to rounding; where it stops is its own affair.
    assert result.x.sum() <= uploads.count * (1 + ROUNDING)
    assert (result.x * unit >= uploads.least * (1 - ROUNDING)).all()
    assert energy <= result.fun * scale * (1 + 1e-9)
    assert (
        gap(bandwidth, uploads.slopes(bandwidth), uploads.least, uploads.system.channel.bandwidth) <= TANGENT * energy
    )


@each(seed=range(20))
def test_uploads_against_fractional_programming(seed):
    """Jong's iteration on sum p d / r: each round a convex problem, its parameters by Newton's step."""
    uploads = Uploads(seed)
    _, energy = uploads.found()
    assert energy <= jong(uploads) * (1 + WORSE)


@each(seed=range(20))
def test_computation_against_slsqp(seed):
    """The other half: processor and server share, in the time that given uploads leave."""
    system = random_system(seed, 2 + seed % 6, 1, tight=6)
    problem, count = Problem.of(system), len(system.devices)
    start = respond(problem, system.channel.bandwidth / count, system.server.frequency / count)
    game = Computation(problem, start.bandwidth, start.power)
    found = branch_and_bound(game, tolerance=1e-10, max_nodes=1)
    (tier,), server = system.tiers, system.server
    samples, deadline, kappa, low, high = (
        np.array([getattr(device, name) for device in system.devices])
        for name in ("samples", "deadline", "capacitance", "frequency_min", "frequency_max")
    )
    encrypt, evaluate = samples * tier.encrypt_cycles, samples * tier.evaluate_cycles
    sent, left = (start.power * start.upload_time)[:, 0], deadline - start.upload_time[:, 0]
    unit = server.frequency / count

    def energies(share):
        frequency = np.maximum(encrypt / (left - evaluate / (share * unit)), low)
        return kappa * encrypt * frequency**2 + server.capacitance * evaluate * (share * unit) ** 2 + sent

    def slopes(share):
        wish = encrypt / (left - evaluate / (share * unit))
        saved = np.where(wish > low, 2 * kappa * wish**3 * evaluate / (share * unit) ** 2, 0.0)
        return (2 * server.capacitance * evaluate * share * unit - saved) * unit

    scale = energies(start.server[:, 0] / unit).sum()
    result = minimize(
        lambda share: energies(share).sum() / scale,
        start.server[:, 0] / unit,
        jac=lambda share: slopes(share) / scale,
        method="SLSQP",
        bounds=[(least / unit, None) for least in evaluate / (left - encrypt / high)],
        constraints={"type": "ineq", "fun": lambda s: count - s.sum(), "jac": lambda s: -np.ones_like(s)},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert result.x.sum() <= count * (1 + ROUNDING)
    assert (result.x * unit >= (evaluate / (left - encrypt / high)) * (1 - ROUNDING)).all()
    assert found.energy <= result.fun * scale * (1 + 1e-9)  # as for the uploads
    share, least = found.solution.server[:, 0] / unit, evaluate / (left - encrypt / high) / unit
    assert share.sum() <= count * (1 + ROUNDING)
    assert found.energy == pytest.approx(energies(share).sum(), rel=1e-9)
    wish = encrypt / (left - evaluate / (share * unit))
    steep = slopes(share)
    # Processors at rest in a kink, at their slowest: any slope between those of the two sides is a tangent's.
    kink, flat = np.abs(wish / low - 1) <= 1e-8, 2 * server.capacitance * evaluate * share * unit**2
    side = flat - 2 * kappa * wish**3 * evaluate / (share**2 * unit)
    steep = np.where(kink, np.clip(-found.prices[0] * unit, side, flat), steep)
    assert gap(share, steep, least, count) <= TANGENT * found.energy
    assert found.bound <= found.objective


def jong(uploads):
    """Least sum of ratios nats p / r, from full power and an equal split of the room there is."""
    unit, count = uploads.unit, uploads.count
    reach = uploads.power_max / (uploads.noise * unit)
    required = uploads.nats / uploads.time / unit  # rate, in units of bandwidth
    ratio = uploads.energies(uploads.least + (unit * count - uploads.least.sum()) / count)
    b, q = cp.Variable(count, pos=True), cp.Variable(count, pos=True)  # bandwidth; power over p_max
    price, weight = cp.Parameter(count, pos=True), cp.Parameter(count, pos=True)
    rate = cp.multiply(np.log(reach), b) - cp.rel_entr(b, cp.multiply(1 / reach, b) + q)
    cost = cp.sum(cp.multiply(weight, q)) - cp.sum(cp.multiply(price, rate))
    problem = cp.Problem(cp.Minimize(cost), [rate >= required, q <= 1, cp.sum(b) <= count])
    rates = required
    numerator = uploads.nats / unit * uploads.power_max  # of the ratios, at full power
    for _ in range(50):
        weight.value, price.value = numerator / rates / ratio.sum(), ratio / rates / ratio.sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # says again what the status says
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
        assert problem.status in ("optimal", "optimal_inaccurate")
        rates, last = rate.value, ratio.sum()
        ratio = numerator * q.value / rates
        if abs(ratio.sum() - last) <= 1e-9 * last:
            return ratio.sum()
    raise AssertionError("no fixed point in 50 rounds")

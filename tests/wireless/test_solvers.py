"""The allocator's methods and the solvers under them, against the model's formulas written anew."""

from __future__ import annotations

import dataclasses
import math
import warnings

import mpmath
import numpy as np
import pytest

optimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed: the allocator needs it")

from loops import each  # noqa: E402
from privtuner.errors import InfeasibleError, InputError  # noqa: E402
from privtuner.wireless import METHODS, UncertifiedWarning, allocate  # noqa: E402
from privtuner.wireless.branch import branch_and_bound  # noqa: E402
from privtuner.wireless.priced import Priced, server_share  # noqa: E402
from privtuner.wireless.problem import Choices, Problem, excess, respond  # noqa: E402
from privtuner.wireless.roots import falling_root  # noqa: E402
from privtuner.wireless.stages import Computation, communicate  # noqa: E402
from wireless_cases import MISS, ROUNDING, check, columns, feasible, random_system, with_deadlines  # noqa: E402

WORKABLE = (0, 3, 5, 6, 10, 11, 12, 15)  # seeds of `mixed` for which every method finds an allocation
BRANCHING = (6, 10, 22, 30, 58)  # seeds of `branching` that one node does not settle
UNLUCKY = (0, 25)  # and where the first node finds no allocation


def mixed(seed):
    return random_system(seed, 1 + seed % 5, 1 + seed % 3, tight=6, downlink=seed % 4 == 0)


def single(seed):
    return random_system(seed, 2 + seed % 6, 1, tight=(1.06, 1.5, 6)[seed % 3])


@each(method=METHODS, seed=WORKABLE)
def test_allocations_keep_the_constraints(method, seed):
    check(allocate(mixed(seed), method, seed=seed))


@each(method=["computation", "alternating"], seed=[50, 212])
def test_prices_that_overshoot(method, seed):
    """Where the server's price goes so far that a second's worth underflows on the way."""
    check(allocate(mixed(seed), method))


@each(seed=range(40))
def test_prices_and_choices_agree(seed):
    """The conditions of Karush, Kuhn and Tucker, which suffice: the problem is convex."""
    system = single(seed)
    found = allocate(system, tolerance=1e-9)
    check(found)
    (tier,), channel, server = system.tiers, system.channel, system.server
    samples, gain, power_max, low, high, kappa = columns(
        system, "samples", "gain", "power_max", "frequency_min", "frequency_max", "capacitance"
    )
    nats, evaluate = samples * tier.upload_bits * math.log(2), samples * tier.evaluate_cycles
    mu, nu = found.bandwidth_price, found.server_price
    b, f, s, t = found.bandwidth, found.frequency, found.server_frequency, found.upload_time
    # Prices balance to 1e-12, and supply is scaled to fit; a second's worth moves by some tens of that, and where the
    # server hardly matters by the square root of what the dual resolves.
    close = {"rtol": 1e-5}
    second = 2 * server.capacitance * s**3 + nu * s**2 / evaluate  # worth of a second, J/s
    processor = 2 * kappa * f**3
    inside = (f > low * (1 + 1e-9)) & (f < high * (1 - 1e-9))
    np.testing.assert_allclose(processor[inside], second[inside], **close)
    assert (processor[f >= high * (1 - 1e-9)] <= second[f >= high * (1 - 1e-9)] * (1 + 1e-5)).all()
    assert (processor[f <= low * (1 + 1e-9)] >= second[f <= low * (1 + 1e-9)] * (1 - 1e-5)).all()
    x = nats / (b * t)
    slack = channel.noise_density * b / gain * (x * np.exp(x) - np.expm1(x))  # what power would pay for a second
    free = found.power < power_max * (1 - 1e-9)
    np.testing.assert_allclose(slack[free], second[free], **close)
    np.testing.assert_allclose(slack[free] * t[free] / b[free], mu, **close)
    reach = gain * power_max / channel.noise_density
    log = np.log1p(reach / b)
    shorter = nats * (log - reach / (b + reach)) / (b * log) ** 2  # -dt/dB at full power
    np.testing.assert_allclose(((second + power_max) * shorter)[~free], mu, **close)
    assert (slack[~free] <= second[~free] * (1 + 1e-5)).all()
    # What has a price is used up; what is left over has none.
    assert mu > 0
    assert b.sum() == pytest.approx(channel.bandwidth, rel=ROUNDING)
    assert nu >= 0
    if s.sum() < server.frequency * (1 - 1e-6):
        assert nu * server.frequency <= 1e-9 * found.energy


def test_the_conditions_cover_every_case():
    """Processors inside and at both ends of their range, full power or not, servers full or not."""
    inside, low, high, capped, spare = 0, 0, 0, 0, 0
    for seed in range(40):
        found = allocate(single(seed))
        least, most, power_max = columns(found.system, "frequency_min", "frequency_max", "power_max")
        low, high = low + (found.frequency == least).sum(), high + (found.frequency == most).sum()
        inside += ((found.frequency > least) & (found.frequency < most)).sum()
        capped += (found.power >= power_max * (1 - 1e-9)).sum()
        spare += found.server_frequency.sum() < 0.999 * found.system.server.frequency
    assert min(inside, low, high, capped, spare) >= 3


def test_the_upload_is_convex():
    """h(k / (B t)) is convex in (B, t): the exact Hessian, times B^2, B t, t^2, and midpoints."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        x = mpmath.mpf(10 ** rng.uniform(-6, 1.5))
        with mpmath.workdps(40):
            first = (x * mpmath.exp(x) - mpmath.expm1(x)) / x**2
            second = (mpmath.exp(x) - 2 * first) / x  # from x h = e^x - 1, differentiated twice
            same, cross = second * x**2 + 2 * first * x, second * x**2 + first * x
            assert same > 0
            assert same**2 - cross**2 > 0
    one, two = rng.uniform(0.05, 5, (2, 2, 20_000))

    def h(b, t):
        x = 1 / (b * t)
        return np.expm1(np.minimum(x, 700)) / x

    assert (h(*((one + two) / 2)) <= (h(*one) + h(*two)) / 2 * (1 + ROUNDING)).all()


def test_the_power_cap_is_convex():
    rng = np.random.default_rng(2)
    one, two = 10 ** rng.uniform(-2, 2, (2, 2, 20_000))
    reach = 10 ** rng.uniform(-2, 4, 20_000)

    def sent(b, t):
        return t * b * np.log1p(reach / b)

    # For k the smaller of the two, both are in the set.
    assert (sent(*((one + two) / 2)) >= np.minimum(sent(*one), sent(*two)) * (1 - ROUNDING)).all()


def test_the_best_within_shares_is_convex_in_the_shares():
    """Projection of a jointly convex problem, so that this holds for the whole of it."""
    rng = np.random.default_rng(3)
    compared = 0
    for seed in range(30):
        problem = Problem.of(random_system(seed, 6, 1, tight=6))
        shares = rng.dirichlet(np.full(6, 4.0), (2, 2))[..., None]
        ends = [respond(problem, b * problem.bandwidth, s * problem.server_frequency).energy for b, s in shares]
        middle = shares.mean(axis=0)
        between = respond(problem, middle[0] * problem.bandwidth, middle[1] * problem.server_frequency).energy
        both = np.isfinite(ends[0] + ends[1])
        compared += both.sum()
        assert (between[both] <= ((ends[0] + ends[1]) / 2)[both] * (1 + 1e-9)).all()
    assert compared > 60


@each(seed=range(40))
def test_choices_within_shares(seed):
    """Against a search over the seconds that go to the processor and to the server."""
    system = random_system(seed, 1, 1, tight=6)
    (device,), (tier,), channel, server = system.devices, system.tiers, system.channel, system.server
    found = respond(Problem.of(system), channel.bandwidth, server.frequency)
    cycles, work = device.samples * tier.encrypt_cycles, device.samples * tier.evaluate_cycles
    nats, noise = device.samples * tier.upload_bits * math.log(2), channel.noise_density / device.gain
    band = channel.bandwidth
    fastest = nats / (band * math.log1p(device.power_max / (noise * band)))
    encrypt_min, encrypt_max = cycles / device.frequency_max, cycles / device.frequency_min
    serve_min = work / server.frequency

    def energy(encrypt, serve):
        upload = device.deadline - encrypt - serve
        return (
            device.capacitance * cycles**3 / encrypt**2
            + noise * band * math.expm1(nats / (band * upload)) * upload
            + server.capacitance * work**3 / serve**2
        )

    def least(function, low, high):
        """Of a convex function, ends included."""
        if high <= low:
            return function(low)
        result = optimize.minimize_scalar(function, bounds=(low, high), method="bounded", options={"xatol": 1e-11})
        return min(result.fun, function(low), function(high))

    def best(serve):
        room = device.deadline - serve - fastest
        return least(lambda encrypt: energy(encrypt, serve), encrypt_min, min(encrypt_max, room))

    longest = device.deadline - fastest - encrypt_min
    searched = least(best, serve_min, longest if server.capacitance else serve_min)
    # The search places minima to 1e-8 of the seconds, the square root of rounding: 1e-10 of the energy where smooth.
    assert float(found.energy[0, 0]) == pytest.approx(searched, rel=1e-7)
    assert float(found.late[0, 0]) == 0
    assert device.frequency_min <= found.frequency[0, 0] <= device.frequency_max
    assert found.power[0, 0] <= device.power_max
    assert found.server[0, 0] <= server.frequency


def test_shares_that_are_too_small():
    system = random_system(5, 6, 1)
    problem = Problem.of(system)
    band, server = system.channel.bandwidth / 20, system.server.frequency / 20
    found = respond(problem, band, server)
    (tier,) = system.tiers
    samples, gain, power_max, frequency, deadline = columns(
        system, "samples", "gain", "power_max", "frequency_max", "deadline"
    )
    rate = band * np.log2(1 + gain * power_max / (system.channel.noise_density * band))
    needed = samples * (tier.encrypt_cycles / frequency + tier.upload_bits / rate + tier.evaluate_cycles / server)
    late = needed > deadline
    assert late.any()
    np.testing.assert_array_equal(np.isinf(found.energy[:, 0]), late)
    np.testing.assert_allclose(found.late[:, 0], np.maximum(needed - deadline, 0), rtol=1e-10, atol=1e-12)


@each(seed=range(12))
def test_answers_to_prices(seed):
    """Values are lower bounds at any accuracy, demands their derivatives, and slopes the derivatives of demands."""
    problem = Problem.of(random_system(seed, 4, 2, tight=6))
    problem = problem.without(~problem.possible())
    rng = np.random.default_rng(seed)
    rough = Priced(problem)
    centre = rough.start()
    for _ in range(6):
        prices = centre * 10 ** rng.uniform(-2, 2, 2)
        exact = Priced(problem).respond(prices)
        coarse = rough.respond(prices, 1e-2)
        assert (coarse.value <= exact.value * (1 + 1e-13)).all()
        # Coarse answers are close to second order: 1e-2 is the miss squared, times elasticities of some units.
        np.testing.assert_allclose(coarse.value, exact.value, rtol=0.1)
        for good in range(2):
            step = 1e-5
            up, down = (
                Priced(problem).respond(prices * np.where(np.arange(2) == good, 1 + sign * step, 1)) for sign in (1, -1)
            )
            # Central differences: rounding of the values over the step, 1e-13 / 1e-5, and the step's square.
            change = (up.value - down.value) / (2 * step)
            np.testing.assert_allclose(
                prices[good] * exact.demand[good], change, rtol=1e-6, atol=1e-7 * exact.value.max()
            )
            for other in range(2):
                change = (up.demand[other] - down.demand[other]) / (2 * step)
                # A kink within the step moves its difference by as much as the step: 1e-5 of the demand.
                np.testing.assert_allclose(
                    exact.slope[other][good] / exact.demand[other], change / exact.demand[other], rtol=1e-4, atol=1e-5
                )


@each(seed=range(10))
def test_values_are_the_least_cost_of_buying(seed):
    problem = Problem.of(random_system(seed, 1, 1, tight=6))
    market = Priced(problem)
    prices = market.start() * 10 ** np.random.default_rng(seed).uniform(-1, 1, 2)
    answer = market.respond(prices)
    bought = np.log([answer.demand[0][0, 0], answer.demand[1][0, 0]])

    def cost(point):
        b, s = np.exp(point)
        return float(respond(problem, b, s).energy[0, 0]) + prices @ [b, s]

    value = float(answer.value[0, 0])
    # `respond` meets the deadline to 1e-9, and demands lie on the edge where power is full.
    assert cost(bought + 1e-9) == pytest.approx(value, rel=1e-7)
    for angle in np.linspace(0, 2 * math.pi, 16, endpoint=False):
        for length in (1e-3, 1e-1, 1.0):
            assert cost(bought + length * np.array([math.cos(angle), math.sin(angle)])) >= value * (1 - 1e-9)


@each(seed=[*range(12), 40])  # of 40 the first round gains 7e-4 of the energy
def test_alternating_falls_to_a_fixed_point(seed):
    system = random_system(seed, 2 + seed % 4, 1 + seed % 3, tight=6)
    found = allocate(system, "alternating", tolerance=1e-9)
    history = np.array([objective for objective, _ in found.history])
    assert (np.diff(history) <= ROUNDING * found.energy).all()
    assert history[-1] == pytest.approx(found.objective, abs=ROUNDING * (found.energy + abs(found.objective)))
    assert history[0] == pytest.approx(allocate(system, "equal").objective, abs=ROUNDING * found.energy)
    assert found.iterations < 100
    assert history[-3] - history[-1] <= 2e-10 * found.energy  # of the last round
    # Another round gains what the last one gained at most, 1e-10 of the energy, and its search's 1e-11.
    problem = Problem.of(system)
    shares = (found.bandwidth, found.server_frequency, found.frequency, found.power, found.upload_time)
    energy = found.encrypt_energy + found.upload_energy + found.server_energy
    choices = Choices(*(share[:, None] for share in (*shares, energy, np.zeros_like(energy))))
    again = branch_and_bound(
        Computation(problem, choices.bandwidth, choices.power), tolerance=1e-10, max_nodes=10_000
    ).objective
    assert again >= found.objective - 1e-9 * found.energy
    assert communicate(problem.take(found.tier), choices).energy.sum() >= found.energy * (1 - 1e-9)


@each(seed=range(20))
def test_order_of_the_methods(seed):
    system = random_system(seed, 2 + seed % 4, 1 + seed % 3, tight=6)
    found = {
        name: allocate(system, name) for name in ("global", "equal", "communication", "computation", "alternating")
    }
    objective = {name: allocation.objective for name, allocation in found.items()}
    energy = found["global"].energy
    assert objective["communication"] <= objective["equal"] + ROUNDING * energy
    assert objective["computation"] <= objective["equal"] + ROUNDING * energy
    assert objective["alternating"] <= objective["computation"] + ROUNDING * energy  # its first half-round
    for name in found:
        assert objective[name] >= objective["global"] - 1e-6 * energy, name  # the tolerance
        assert objective[name] >= found["global"].bound - MISS * energy, name


def test_halves_do_something():
    """Optimising half gains on most systems; the whole gains on the halves."""
    gains = []
    for seed in range(12):
        system = random_system(seed, 4, 2, tight=6)
        names = ("equal", "communication", "computation", "alternating", "global")
        equal, *others = (allocate(system, name) for name in names)
        gains.append([(equal.objective - other.objective) / equal.energy for other in others])
    assert (np.median(gains, axis=0) > 0.001).all()
    assert (np.array(gains)[:, 3] > np.array(gains)[:, 2] + 1e-4).any()


@each(("method", "pick"), [("largest", max), ("smallest", min)], seed=[0, 3, 5, 6, 12, 15])
def test_extreme_rings(method, pick, seed):
    system = random_system(seed, 1 + seed % 5, 3, tight=6)
    found = allocate(with_deadlines(system, 4), method)
    for place, device in enumerate(found.system.devices):
        alone = dataclasses.replace(found.system, devices=(device,))
        can = [tier.ring_dimension for tier in system.tiers if feasible(alone, tiers=tier.name)]
        assert system.tiers[found.tier[place]].ring_dimension == pick(can)
    assert found.bound == -math.inf
    best = allocate(found.system, tiers=found.tier_names)
    assert found.objective == pytest.approx(best.objective, abs=1e-6 * best.energy)


def test_tiers_by_name():
    system = with_deadlines(random_system(4, 3, 3), 20)
    names = [tier.name for tier in system.tiers]
    free = allocate(system, tolerance=1e-9)
    assert allocate(system, tiers=names[1]).tier_names == [names[1]] * 3
    mixture = [names[2], names[0], names[1]]
    for method in METHODS:
        assert allocate(system, method, tiers=mixture).tier_names == mixture, method
    assert allocate(system, tiers=free.tier_names).objective == pytest.approx(free.objective, abs=2e-6 * free.energy)


def test_arguments_out_of_range(subtests):
    refused = [
        ({"tiers": "ring-1"}, "'ring-1'"),
        ({"tiers": ["ring-8192", "ring-7"]}, "'ring-7'"),
        ({"tiers": ["ring-8192"]}, "1 names for 2 devices"),
        ({"tiers": []}, "0 names for 2 devices"),
        ({"method": "best"}, "'best'"),
        *(({"tolerance": value}, f"tolerance = {value}") for value in (0.0, 9e-11, 1.5, math.nan)),
        *(({"max_nodes": value}, f"max_nodes = {value}") for value in (0, -3)),
        *(({"seed": value}, f"seed = {value!r}: must be an integer of at least 0") for value in (-1, 1.5, True, "1")),
    ]
    for options, words in refused:
        with subtests.test(**options):
            with pytest.raises(InputError) as caught:
                allocate(random_system(0, 2, 2), **options)
            assert words in str(caught.value)
            assert not isinstance(caught.value, InfeasibleError)


def branching(seed):
    return random_system(seed, 6, 3, tight=6)


@each(seed=BRANCHING)
def test_one_node_is_honest(seed):
    system = branching(seed)
    best = allocate(system, tolerance=1e-9)
    with pytest.warns(
        UncertifiedWarning, match="not certified: the gap is .* 1e-09 was asked for.* after 1 node: raise"
    ):
        cut = allocate(system, tolerance=1e-9, max_nodes=1)
    assert best.certified
    assert not cut.certified
    assert cut.iterations == 1 < best.iterations
    check(cut)
    assert cut.bound <= best.objective
    assert cut.objective >= best.bound
    assert cut.relative_gap > 1e-9


@each(seed=UNLUCKY)
def test_too_few_nodes_prove_nothing(seed):
    """A search that was cut short must not say that there is no allocation."""
    assert feasible(branching(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncertifiedWarning)
        try:
            found = allocate(branching(seed), max_nodes=1)
        except InfeasibleError as error:
            assert "max_nodes = 1" in str(error)  # noqa: PT017 - either is honest
        else:
            check(found)
            assert not found.certified


@each(seed=BRANCHING)
def test_progress(seed):
    calls = []
    found = allocate(branching(seed), tolerance=1e-9, progress=lambda *numbers: calls.append(numbers))
    objectives, bounds, nodes = map(list, zip(*calls, strict=True))
    assert objectives == sorted(objectives, reverse=True)
    assert bounds == sorted(bounds)
    assert nodes == sorted(set(nodes))
    assert nodes[-1] <= found.iterations
    assert list(zip(objectives, bounds, strict=True)) == list(found.history[: len(calls)])
    assert found.objective <= objectives[-1] + ROUNDING * found.energy
    assert found.bound >= bounds[-1] - ROUNDING * found.energy


def test_random_by_seed():
    system = with_deadlines(random_system(2, 4, 3), 4)
    one, same, other = (allocate(system, "random", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_allclose(one.bandwidth, same.bandwidth, rtol=ROUNDING)
    np.testing.assert_array_equal(one.tier, same.tier)
    assert one.objective == pytest.approx(same.objective, abs=ROUNDING * (one.energy + abs(one.objective)))
    assert np.abs(one.bandwidth / other.bandwidth - 1).max() > 0.01


def test_brute_force_has_limits():
    system = with_deadlines(random_system(1, 17, 2), 100)
    with pytest.raises(InputError, match="131072 combinations") as caught:
        allocate(system, "brute-force")
    assert not isinstance(caught.value, InfeasibleError)


def test_falling_root():
    rng = np.random.default_rng(4)
    at = rng.uniform(-30, 2.9, (50, 3))
    high = np.full(at.shape, 3.0)

    def steep(y):  # flat far below, where Newton's step leads out, and steep above
        return np.expm1(at) - np.expm1(y) + 1e-3 * (at - y), -np.exp(y) - 1e-3

    np.testing.assert_allclose(falling_root(steep, high, high, 1e-14), at, atol=1e-10)  # 1e-14 over a slope of 1e-3

    def kinked(y):
        return np.where(y < at, 10 * (at - y), 0.1 * (at - y)), np.where(y < at, -10.0, -0.1)

    np.testing.assert_allclose(falling_root(kinked, high - 5, high, 1e-13), at, atol=1e-12)
    np.testing.assert_array_equal(falling_root(lambda y: (5 - y, -np.ones_like(y)), high - 1, high, 1e-13), high)


@each(x=[*np.logspace(-300, -9, 8), *np.logspace(-8, 2.8, 60), 0.05 - 1e-16, 0.05, 0.05 + 1e-16])
def test_excess(x):
    with mpmath.workdps(700):
        exact = mpmath.mpf(x) * mpmath.exp(x) - mpmath.expm1(x)
        value = float(exact)
    computed = float(excess(np.array([x]), np.expm1([x]))[0])
    # x e^x - (e^x - 1) = x^2 / 2 at 0.05: a cancellation of 40 times rounding; e^x itself is right to x roundings.
    assert computed == pytest.approx(value, rel=2e-14, abs=0)


def test_server_share():
    rng = np.random.default_rng(5)
    unit, time_price = 10 ** rng.uniform(-30, -10, 300), 10 ** rng.uniform(-6, 4, 300)
    # Capacitances over the range in which either term matters: kappa^2 lambda about (nu / S)^3.
    for capacitance in (0.0, 1e-40, 1e-30, 1e-26, 1e-20):
        z, by_time, by_price = server_share(unit, capacitance, time_price)
        terms = time_price * z**3, unit * z, np.full_like(z, 2 * capacitance)
        np.testing.assert_allclose(terms[0], terms[1] + terms[2], rtol=1e-13)
        np.testing.assert_allclose(by_time, terms[0] / (2 * terms[1] + 3 * terms[2]), rtol=1e-10)
        np.testing.assert_allclose(by_price, terms[1] / (2 * terms[1] + 3 * terms[2]), rtol=1e-10, atol=1e-300)


def test_progress_of_a_search_that_ends_at_once():
    calls = []
    found = allocate(single(0), progress=lambda *numbers: calls.append(numbers))
    ((objective, bound, nodes),) = calls
    slip = ROUNDING * (found.energy + abs(found.objective))  # the allocation is summed up anew
    assert nodes == 1
    assert objective == pytest.approx(found.objective, abs=slip)
    assert bound == pytest.approx(found.bound, abs=slip)

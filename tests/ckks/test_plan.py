"""Dry runs: what they list is what the run takes."""

import math

import numpy as np
import pytest

from privtuner import ckks
from privtuner.errors import CkksError, InputError

PARAMETERS = ckks.Parameters.INSECURE(5)
SECRET = ckks.SecretKey(PARAMETERS)
SHAPES = ((20, 3), (20, 1))
CUBIC = ckks.Polynomial((0.1, 0.2, 0.3, 0.4))


def circuit(engine, x, y):
    products = engine.multiply(engine.add(x, y), y)
    turned = engine.rotate(products, [1, -3])
    total = engine.conjugate(engine.add(turned[0], turned[1]))
    return engine.polynomial(engine.assume(engine.multiply(total, 0.25), 1.0), CUBIC)


def inputs():
    rng = np.random.default_rng(0)
    return [SECRET.encrypt(rng.uniform(-1, 1, shape)) for shape in SHAPES]


@pytest.fixture(scope="module")
def timings():
    return ckks.measure_timings(PARAMETERS, repeats=2)


def test_what_a_circuit_takes():
    plan = ckks.plan(circuit, *SHAPES, parameters=PARAMETERS)
    assert plan.levels == 4
    assert plan.rotations == (1, 509)
    assert plan.conjugation
    assert plan.relinearisation
    assert plan.seconds is None
    (out,) = plan.outputs
    assert out.planned
    assert (out.shape, out.level) == ((20, 3), 1)


def test_a_plan_is_the_run():
    plan = ckks.plan(circuit, *SHAPES, parameters=PARAMETERS)
    keys = plan.keys(SECRET)
    assert (keys.rotations, keys.conjugation, keys.relinearisation) == ((1, 509), True, True)
    assert len(keys.to_bytes()) == plan.key_bytes
    encrypted = inputs()
    assert abs(sum(len(x.to_bytes()) for x in encrypted) - plan.input_bytes) <= 0.01 * plan.input_bytes
    result, measurement = plan.run(circuit, ckks.Evaluator(PARAMETERS, keys), *encrypted)
    (out,) = plan.outputs
    assert len(result.to_bytes()) == plan.output_bytes
    assert (result.shape, result.level, result.bound) == (out.shape, out.level, out.bound)
    assert (result.scale == out.scale).all()
    assert result.budget() == out.budget()
    assert measurement.plan is plan
    assert measurement.seconds > 0
    # Features of a polynomial run beside one another, as many as there are threads, and not in the plan.
    assert plan.peak_bytes / 2 <= measurement.peak_bytes <= 2 * plan.peak_bytes
    for text in (str(plan), str(measurement)):
        assert "memory" in text


def test_no_key_too_many():
    plan = ckks.plan(circuit, *SHAPES, parameters=PARAMETERS)
    complete = {"rotations": plan.rotations, "conjugation": True, "relinearisation": True}
    for less in ({"rotations": plan.rotations[1:]}, {"conjugation": False}, {"relinearisation": False}):
        engine = ckks.Evaluator(PARAMETERS, SECRET.evaluation_keys(**{**complete, **less}))
        with pytest.raises(CkksError, match="needs .* key"):
            circuit(engine, *inputs())


def test_a_circuit_without_keys():
    plan = ckks.plan(lambda engine, x: [engine.add(x, 1.0), engine.linear(x, np.eye(3))], (4, 3), parameters=PARAMETERS)
    assert (plan.levels, plan.rotations, plan.conjugation, plan.relinearisation) == (0, (), False, False)
    assert len(plan.outputs) == 2
    assert plan.key_bytes == len(SECRET.evaluation_keys(relinearisation=False).to_bytes())
    assert "none: " in str(plan)


def test_planned_inputs():
    engine = ckks.Evaluator(PARAMETERS)
    x = engine.planned(7, 2, bound=5.0, level=3, scale=[2.0**30, 2.0**31], public_key=True)
    y = SECRET.public_key().encrypt(np.ones((7, 2)), bound=5.0, level=3, scale=[2.0**30, 2.0**31])
    assert (x.shape, x.level, x.bound, x.nbytes) == (y.shape, y.level, y.bound, y.nbytes)
    assert x.budget() == y.budget()
    assert repr(x).startswith("<planned tensor (7, 2), level 3")
    plan = ckks.plan(lambda engine, x: engine.square(x), x, parameters=PARAMETERS)
    assert plan.levels == 1
    assert plan.outputs[0].level == 2
    assert ckks.plan(lambda e, x: e.square(x), (4, 1), parameters=PARAMETERS, bound=3.0).outputs[0].bound == 9


def test_peak_memory_is_that_of_the_tensors_alive():
    one = 2 * 6 * 1024 * 8

    def chain(engine, x):
        for _ in range(10):
            x = engine.negate(x)
        return x

    # The input, what is negated and its result.
    assert ckks.plan(chain, (4, 2), parameters=PARAMETERS).peak_bytes == 3 * 2 * one

    def keep(engine, x):
        return [engine.negate(x) for _ in range(10)]

    assert ckks.plan(keep, (4, 2), parameters=PARAMETERS).peak_bytes == 11 * 2 * one


def test_plans_that_cannot_be():
    def run(circuit, *shapes, **arguments):
        return ckks.plan(circuit, *shapes, parameters=PARAMETERS, **arguments)

    for tokens in (0, 513):
        with pytest.raises(CkksError, match=f"{tokens} tokens do not fit the 512 slots"):
            run(circuit, (tokens, 1), (tokens, 1))
        with pytest.raises(CkksError, match=f"{tokens} tokens do not fit the 512 slots"):
            ckks.Evaluator(PARAMETERS).planned(tokens, 1)
    with pytest.raises(InputError, match="0 features; pass 1 to 65536"):
        run(circuit, (4, 0), (4, 1))
    with pytest.raises(InputError, match="this one is encrypted"):
        run(circuit, *inputs())
    with pytest.raises(CkksError, match="may leave the domain"):
        run(lambda engine, x: engine.polynomial(x, CUBIC), (4, 1), bound=2.0)

    def deep(engine, x):
        for _ in range(6):
            x = engine.square(x)
        return x

    with pytest.raises(CkksError, match="choose parameters of larger depth"):
        run(deep, (4, 1))
    for bound in (0.0, math.nan):
        with pytest.raises(InputError, match="is not a positive number"):
            run(circuit, *SHAPES, bound=bound)
    with pytest.raises(CkksError, match="level 6 is outside \\[0, 5\\]"):
        ckks.Evaluator(PARAMETERS).planned(4, 1, level=6)


def test_seconds(timings):
    assert timings.parameters == PARAMETERS.name
    assert timings.threads >= 1
    for limbs, seconds in timings.seconds.values():
        assert limbs == tuple(sorted(limbs))
        assert len(seconds) == len(limbs)
        assert all(0 <= value < 1 for value in seconds)
    for work in ("term", "product", "rescale", "relinearise", "rotate", "decompose", "plain", "matrix"):
        assert work in timings.seconds
    # What takes milliseconds is measured; small differences of large times may come out as nothing.
    for work in ("term", "relinearise", "rotate", "matrix"):
        assert max(timings.seconds[work][1]) > 0
    plan = ckks.plan(circuit, *SHAPES, parameters=PARAMETERS, timings=timings)
    assert 0 < plan.seconds < 10
    assert "s predicted" in str(plan)
    limbs, seconds = timings.seconds["relinearise"]
    assert timings.seconds_of("relinearise", limbs[-1], 2.0) == 2 * seconds[-1]
    twice = ckks.plan(
        lambda e, x, y: [circuit(e, x, y), circuit(e, x, y)], *SHAPES, parameters=PARAMETERS, timings=timings
    )
    assert twice.seconds == pytest.approx(2 * plan.seconds)


def test_timings_of_other_sets(timings):
    other = ckks.Parameters.INSECURE(4)
    with pytest.raises(InputError, match=f"timings of {PARAMETERS.name} do not fit {other.name}; measure them again"):
        ckks.plan(lambda engine, x: x, (4, 1), parameters=other, timings=timings)
    with pytest.raises(InputError, match="depth 0 has no products to measure"):
        ckks.measure_timings(ckks.Parameters.INSECURE(0))

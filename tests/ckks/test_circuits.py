"""The circuits on ciphertexts: against numpy, within the formulas' error and the noise the plan predicts."""

import numpy as np
import pytest

from privtuner import ckks
from privtuner.ckks import circuits
from privtuner.errors import CkksError


def run(circuit, *inputs, depth, bounds, scale_bits=40):
    """Plan, make exactly the planned keys, run; check level, plan and bound. Returns values and predicted error."""
    parameters = ckks.Parameters.INSECURE(depth, scale_bits)
    dry = ckks.Evaluator(parameters)
    planned = [dry.planned(*x.shape, bound=bound) for x, bound in zip(inputs, bounds, strict=True)]
    plan = ckks.plan(circuit, *planned, parameters=parameters)
    secret = ckks.SecretKey(parameters)
    encrypted = [secret.encrypt(x, bound=bound) for x, bound in zip(inputs, bounds, strict=True)]
    result, _ = plan.run(circuit, ckks.Evaluator(parameters, plan.keys(secret)), *encrypted)
    (out,) = plan.outputs
    assert (result.shape, result.level, result.bound) == (out.shape, out.level, out.bound)
    assert result.budget() == out.budget()
    values = secret.decrypt(result)
    assert np.abs(values).max() <= result.bound + result.budget().error
    return values, plan


def slots(depth=1):
    return ckks.Parameters.INSECURE(depth).slots


@pytest.mark.parametrize(("low", "halvings", "degree"), [(-4.0, 0, 15), (-8.0, 2, 7)])
def test_exponential(low, halvings, degree):
    x = np.linspace(low, 0, slots())[:, None]
    depth = circuits.exponential_depth(halvings, degree)
    values, plan = run(
        lambda e, t: circuits.exponential(e, t, low, halvings, degree), x, depth=depth + 1, bounds=[-low]
    )
    assert plan.levels <= depth + 1  # one for a scale that is too large for the domain
    error = circuits.exponential_error(low, halvings, degree) * np.exp(x) + plan.outputs[0].budget().error
    assert (np.abs(values - np.exp(x)) <= error).all()
    assert plan.outputs[0].budget().error < 1e-5


@pytest.mark.parametrize(("degree", "steps", "gain"), [(15, 0, 1.0), (7, 2, 1.0), (7, 1, 3.0)])
def test_reciprocal(degree, steps, gain):
    domain = (0.5, 4.0)
    x = np.linspace(*domain, slots())[:, None]
    depth = circuits.reciprocal_depth(degree, steps)
    values, plan = run(
        lambda e, t: circuits.reciprocal(e, t, domain, degree, steps, gain), x, depth=depth + 1, bounds=[4]
    )
    assert plan.levels <= depth + 1
    assert (plan.rotations, plan.conjugation) == ((), False)
    want = gain / x
    error = circuits.reciprocal_error(domain, degree, steps) * want + plan.outputs[0].budget().error
    assert (np.abs(values - want) <= error).all()
    assert plan.outputs[0].budget().error < 1e-3


@pytest.mark.parametrize(("ratio", "degree", "steps"), [(33, 63, 0), (400, 255, 0), (400, 127, 1), (3000, 255, 1)])
def test_reciprocal_amplifies_noise_by_the_ratio_of_the_domain(ratio, degree, steps):
    parameters = ckks.Parameters.INSECURE(11, ring_dimension=8192)
    secret = ckks.SecretKey(parameters)
    evaluator = ckks.Evaluator(parameters, secret.evaluation_keys())
    x = np.geomspace(1 / ratio, 1.0, 4000)[:, None]
    encrypted = secret.encrypt(x)
    noise = float(np.std(secret.decrypt(evaluator.multiply(encrypted, 1.0)) - x))  # of a fresh tensor and a rescaling
    y = circuits.reciprocal(evaluator, encrypted, (1 / ratio, 1.0), degree, steps)
    error = np.abs(secret.decrypt(y) * x - 1).max()
    # Largest of some 4,000 Gaussian errors, from the input, the polynomial and the product of a step.
    exact = circuits.reciprocal_error((1 / ratio, 1.0), degree, steps)
    assert exact + noise * ratio / 4 <= error <= exact + np.sqrt(3) * 6 * noise * ratio


@pytest.mark.parametrize(("degree", "steps", "gain"), [(15, 0, 1.0), (7, 1, 1.0), (7, 2, 2.0)])
def test_inverse_square_root(degree, steps, gain):
    domain = (0.25, 2.0)
    x = np.linspace(*domain, slots())[:, None]
    depth = circuits.inverse_square_root_depth(degree, steps)
    values, plan = run(
        lambda e, t: circuits.inverse_square_root(e, t, domain, degree, steps, gain), x, depth=depth + 1, bounds=[2]
    )
    want = gain / np.sqrt(x)
    error = circuits.inverse_square_root_error(domain, degree, steps) * want + plan.outputs[0].budget().error
    assert (np.abs(values - want) <= error).all()
    assert plan.outputs[0].budget().error < 1e-2


@pytest.mark.parametrize(("shape", "period"), [((8, 8), None), ((5, 7), None), ((3, 2), 16), ((1, 1), None)])
def test_matrix_vector(shape, period):
    rng = np.random.default_rng(shape[0])
    matrix, vector = rng.uniform(-1, 1, shape), rng.uniform(-1, 1, shape[1])
    n = period or 1 << (max(shape) - 1).bit_length()
    size = slots()
    padded = np.zeros(n)
    padded[: shape[1]] = vector
    values, plan = run(
        lambda e, x: circuits.matrix_vector(e, x, matrix, period),
        np.tile(padded, size // n)[:, None],
        depth=2,
        bounds=[1],
    )
    assert plan.rotations == tuple(sorted(circuits.matrix_vector_steps(size, n)))
    assert plan.levels == circuits.MATRIX_VECTOR_DEPTH
    want = np.zeros(n)
    want[: shape[0]] = matrix @ vector
    assert np.abs(values[:, 0] - np.tile(want, size // n)).max() <= plan.outputs[0].budget().error < 1e-5


def test_circuits_run_out_of_levels():
    parameters = ckks.Parameters.INSECURE(3)
    for circuit in (
        lambda e, x: circuits.exponential(e, x, -1.0, 2, 7),
        lambda e, x: circuits.reciprocal(e, x, (0.5, 1.0), 7, 2),
    ):
        with pytest.raises(CkksError, match="level"):
            ckks.plan(circuit, (4, 2), parameters=parameters)

"""Copies, pickles and process pools: what is public goes anywhere unchanged, what is secret nowhere."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nn_cases import tiny_bert, tokens
from privtuner import ckks, linear
from privtuner.cpu import CpuClient
from privtuner.cuda.client import CudaClient
from privtuner.cuda.device import CudaDevice
from privtuner.cuda.evaluator import CudaEvaluator, DeviceTensor
from privtuner.cuda.linear.server import DeviceLayer
from privtuner.cuda.server import CudaServer
from privtuner.errors import InputError, PrivtunerError, SecretError
from privtuner.nn import Session, Traffic, TrafficMeter, build, split, traffic_of
from privtuner.schemes import LocalTransport
from privtuner.service import RemoteTransport, Server

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 9)).astype(np.float32)
PREPARED = {preset: linear.prepare(RNG.normal(size=(6, 9)), preset) for preset in linear.PRESETS}
PARAMETERS = ckks.Parameters.INSECURE(depth=6)
SECRET = ckks.SecretKey(PARAMETERS)
KEYS = SECRET.evaluation_keys(rotations=[1], conjugation=True)
TENSOR = SECRET.encrypt(RNG.uniform(-1, 1, (3, 2)))
MATRIX = ckks.Matrix(RNG.normal(size=(4, 2)), bits=16)


def again(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("duplicate", [again, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("preset", linear.PRESETS)
def test_prepared_layers(duplicate: Callable[[Any], Any], preset: str) -> None:
    prepared = PREPARED[preset]
    other = duplicate(prepared)
    assert other.spec == duplicate(prepared.spec) == prepared.spec
    assert np.array_equal(other.quantised(), prepared.quantised())
    request, _ = linear.encrypt(X, prepared.spec)
    assert linear.apply(other, request) == linear.apply(prepared, request)


@pytest.mark.parametrize("duplicate", [again, copy.copy, copy.deepcopy])
def test_ciphertexts_keys_and_matrices(duplicate: Callable[[Any], Any]) -> None:
    tensor, keys, matrix, parameters = map(duplicate, (TENSOR, KEYS, MATRIX, PARAMETERS))
    assert tensor.to_bytes() == TENSOR.to_bytes()
    assert (tensor.level, tensor.bound, tensor.budget()) == (TENSOR.level, TENSOR.bound, TENSOR.budget())
    assert keys.to_bytes() == KEYS.to_bytes()
    assert (keys.rotations, keys.conjugation, keys.relinearisation) == (KEYS.rotations, True, True)
    assert parameters == PARAMETERS
    spec = SECRET.public_key()
    assert duplicate(spec).to_bytes() == spec.to_bytes()
    assert np.array_equal(matrix.dequantised(), MATRIX.dequantised())
    # The same computation with duplicates of everything: bit for bit the same ciphertext.
    ours, theirs = ckks.Evaluator(PARAMETERS, KEYS), duplicate(ckks.Evaluator(PARAMETERS, KEYS))
    want = ours.square(ours.linear(TENSOR, MATRIX))
    assert theirs.square(theirs.linear(tensor, matrix)).to_bytes() == want.to_bytes()


@pytest.mark.parametrize("duplicate", [again, copy.copy, copy.deepcopy])
def test_caches_start_empty_with_a_mask_of_their_own(duplicate: Callable[[Any], Any]) -> None:
    prepared, owner = PREPARED["linear-w8"], CpuClient(1 << 20)
    request, secret = owner.encrypt(X, prepared.spec, "forward")
    owner.decrypt([linear.apply(prepared, request)], secret)
    assert owner._masks.bytes > 0
    other = duplicate(owner._masks)
    assert (other.bytes, other.max_bytes) == (0, 1 << 20)
    assert again(owner)._masks.bytes == 0
    request, secret = linear.encrypt(X, prepared.spec, masks=other)
    assert linear.decrypt(linear.apply(prepared, request), secret).shape == (3, 6)


def test_both_parts_of_a_model_and_its_counts() -> None:
    parts = split(tiny_bert())
    other = again(parts)
    model = build(other.bundle, Session(again(LocalTransport(other.server))))
    with torch.no_grad():
        got = model(tokens(2, 4))[0]
        want = build(parts.bundle, Session(LocalTransport(parts.server)))(tokens(2, 4))[0]
    assert torch.allclose(got, want, atol=2**-10)
    with pytest.raises(TypeError):
        again(LocalTransport(parts.server)).layers["more"] = None
    meter = traffic_of(model)
    for twin in (again(meter), copy.deepcopy(meter)):
        assert twin.snapshot() == meter.snapshot()
        twin.add("more", "forward", Traffic(requests=1))
        assert twin.total().requests == meter.total().requests + 1
    assert isinstance(again(TrafficMeter()), TrafficMeter)


@pytest.mark.parametrize("leave", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_decrypts_stays(leave: Callable[[Any], Any]) -> None:
    for secret in (linear.encrypt(X, PREPARED["linear-w8"].spec)[1], SECRET):
        with pytest.raises(SecretError, match="never copied or pickled"):
            leave(secret)


@pytest.mark.parametrize(
    "kind",
    [
        CudaDevice,
        CudaServer,
        CudaEvaluator,
        CudaClient,
        DeviceLayer,
        DeviceTensor,
        RemoteTransport,
        Server,
    ],
)
def test_what_is_bound_to_a_process_says_what_to_do(kind: type) -> None:
    # The refusal needs nothing of the object, so it is made without what it is bound to.
    thing = kind.__new__(kind)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        with pytest.raises(InputError, match="(cannot be pickled|stay in the process).*") as caught:
            pickle.dumps(thing, protocol)
    assert "\n" not in str(caught.value)
    assert copy.deepcopy([thing])[0] is thing


def test_planned_tensors_have_nothing_to_pickle() -> None:
    planned = ckks.Evaluator(PARAMETERS).planned(3, 2)
    with pytest.raises(PrivtunerError, match="planned"):
        pickle.dumps(planned)
    assert copy.deepcopy(planned) is planned


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_process_pools(method: str) -> None:
    """Other processes multiply, evaluate and encrypt; this one, which has the secrets, decrypts."""
    prepared = PREPARED["linear-w8"]
    asked = [linear.encrypt(X + number, prepared.spec) for number in range(4)]
    linear.apply(prepared, asked[0][0])  # threads have run here before
    evaluator = ckks.Evaluator(PARAMETERS, KEYS)
    with multiprocessing.get_context(method).Pool(2) as pool:
        replies = pool.starmap(linear.apply, [(prepared, request) for request, _ in asked])
        (square,) = pool.starmap(ckks.Evaluator.square, [(evaluator, TENSOR)])
        fresh = pool.starmap(ckks.PublicKey.encrypt, [(SECRET.public_key(), np.ones((3, 1)))] * 2)
    assert replies == [linear.apply(prepared, request) for request, _ in asked]
    for number, (reply, (_, secret)) in enumerate(zip(replies, asked, strict=True)):
        want = (X + number) @ (prepared.quantised() * prepared.spec.scale[:, None]).T
        bound = linear.error_bound(prepared.spec, X + number)
        assert (np.abs(linear.decrypt(reply, secret) - want) <= bound).all()
    assert square.to_bytes() == evaluator.square(TENSOR).to_bytes()
    assert fresh[0].to_bytes() != fresh[1].to_bytes()
    assert np.abs(SECRET.decrypt(fresh[0]) - 1).max() < fresh[0].budget().error

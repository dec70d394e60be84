"""On a GPU: every kernel test and contract again; then what a real device alone shows: streams, memory, DLPack."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import linear_cases as cases
from privtuner import ckks, cuda, linear
from privtuner.cuda.client import CudaClient
from privtuner.cuda.evaluator import CudaEvaluator
from privtuner.cuda.server import CudaServer
from privtuner.errors import EngineError

pytestmark = pytest.mark.skipif(not cuda.available(), reason=f"no GPU can be used: {cuda.status().reason}")
NEEDS_TORCH = pytest.mark.skipif(not torch.cuda.is_available(), reason="this PyTorch cannot use a GPU")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def device():
    return cuda.devices("cuda:0")[0]


def test_every_kernel_test_passes_on_the_gpu():
    mine = sorted(str(file) for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__))
    files = [*mine, *sorted(str(file) for file in (ROOT / "tests").glob("*/test_contract_*.py"))]
    environment = {**os.environ, "PRIVTUNER_TEST_GPU": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize("tokens", [3, 2500])
@pytest.mark.parametrize("preset", cases.PRESETS)
def test_replies_and_results_through_streams(device, preset, tokens):
    prepared = cases.layer(d_out=700, d_in=900, preset=preset)
    engine, owner = CudaServer([device]), CudaClient(device)
    cases.check_blocks(engine, owner, prepared, tokens, 64, device.download)
    engine.close()


def test_messages_lie_in_memory_that_is_used_again(device):
    prepared = cases.layer(d_out=700, d_in=900)
    engine, owner = CudaServer([device]), CudaClient(device)
    places, kept = [], []
    for turn in range(6):
        request, secret = owner.encrypt(cases.batch(400, 900, turn), prepared.spec, "forward")
        blocks = list(cases.blocks_of(engine, prepared, request, 64))
        owner.decrypt(blocks, secret)
        places.append(np.frombuffer(request, np.uint8).ctypes.data)
        if turn == 0:
            kept = [(message, bytes(message)) for message in (request, *blocks)]
        del request, blocks
    assert places[0] not in places[1:]  # somebody holds it
    assert len(set(places[1:])) < 5
    assert all(message == content for message, content in kept)
    engine.close()


def test_ciphertexts_are_the_native_ones(device):
    parameters = ckks.Parameters.secure(depth=5)
    secret = ckks.SecretKey(parameters)
    keys = secret.evaluation_keys(rotations=(1, 5), conjugation=True)
    native, engine = ckks.Evaluator(parameters, keys), CudaEvaluator(device, parameters, keys)
    values = np.random.default_rng(0).uniform(-1, 1, (2, parameters.slots, 3))
    x, y = (secret.encrypt(value) for value in values)
    a, b = engine.upload(x), engine.upload(y)
    matrix = np.random.default_rng(1).standard_normal((4, 3))
    polynomial = ckks.Polynomial((0.1, 0.5, 0.0, 0.2), "chebyshev", (-1.0, 1.0))
    for circuit in (
        lambda e, x, y: e.multiply(x, y),
        lambda e, x, y: e.rotate(x, [1, 5])[1],
        lambda e, x, y: e.conjugate(y),
        lambda e, x, y: e.linear(e.add(x, y), matrix),
        lambda e, x, y: e.polynomial(x, polynomial),
    ):
        assert engine.download(circuit(engine, a, b)).to_bytes() == circuit(native, x, y).to_bytes()


@NEEDS_TORCH
def test_tensors_are_exchanged_without_a_copy(device):
    prepared = cases.layer()
    owner, engine = CudaClient(device), CudaServer([device])
    x = torch.randn(5, prepared.spec.d_in, device="cuda:0")
    with device.active():
        assert device.xp.from_dlpack(x).data.ptr == x.data_ptr()
    request, secret = owner.encrypt(x, prepared.spec, "forward")
    y = owner.decrypt(engine.answer(prepared, request), secret)
    tensor = torch.from_dlpack(y)
    assert (tensor.data_ptr(), tensor.device.type) == (y.data.ptr, "cuda")
    error = np.abs(tensor.cpu().numpy() - cases.product(prepared, x.cpu().numpy()))
    assert (error <= linear.error_bound(prepared.spec, x.cpu().numpy())).all()
    engine.close()


def test_the_limit_of_memory_is_kept():
    (small,) = cuda.devices("cuda:0", memory_bytes=1 << 20)
    with pytest.raises(EngineError, match=r"takes \d+ bytes and cuda:0 has \d+ left, of a limit of 1048576"):
        CudaServer([small]).hold({"large": cases.layer(d_out=2048, d_in=2048)})

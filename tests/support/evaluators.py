"""Every evaluator of CKKS behind one way to make it, and operations and misuse that all of them are tested with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest

from cuda_host import ON_GPU, HostDevice
from privtuner import ckks, cuda, openfhe
from privtuner.cuda.evaluator import CudaEvaluator, DeviceTensor

NEEDS_OPENFHE = pytest.mark.skipif(
    not openfhe.available(), reason="needs OpenFHE; the first lines of this run say why it is absent"
)
DEVICES = ["host", *(["gpu"] if ON_GPU else [])]
"""A GPU's kernels compiled as C++, and a GPU where tests are to use it."""

ENCRYPTED = ["native", *DEVICES, pytest.param("openfhe", marks=NEEDS_OPENFHE)]
"""Evaluators on ciphertexts."""

ALL = [*ENCRYPTED, "clear"]
"""Every evaluator of the protocol."""


@cache
def device_of(name: str) -> Any:
    """The device of one of `DEVICES`, one for all tests."""
    return HostDevice() if name == "host" else cuda.devices("cuda:0")[0]


class Case:
    """An evaluator with keys: everything a circuit and whoever encrypts for it need.

    Args:
        name: one of `ALL`.
        parameters: the set in force.
        rotations: steps, or "sums" for those of a sum of slots.
        keys: what else to make keys of.
    """

    def __init__(self, name: str, parameters: Any, rotations: Iterable[int] | str = (), **keys: Any) -> None:
        self.name = name
        self.parameters = openfhe.Context.INSECURE(parameters) if name == "openfhe" else parameters
        self.slots = int(parameters.slots)
        self.secret = self.keys = None
        if name != "clear":
            steps = [1 << i for i in range(self.slots.bit_length() - 1)] if rotations == "sums" else rotations
            self.secret = (openfhe if name == "openfhe" else ckks).SecretKey(self.parameters)
            self.keys = self.secret.evaluation_keys(rotations=steps, **keys)
        self.evaluator = self.evaluator_with(self.keys)

    def evaluator_with(self, keys: Any) -> Any:
        """Another evaluator of the same parameters."""
        if self.name == "clear":
            return ckks.ClearEvaluator(self.parameters)
        if self.name in ("host", "gpu"):
            return CudaEvaluator(device_of(self.name), self.parameters, keys)
        return (openfhe if self.name == "openfhe" else ckks).Evaluator(self.parameters, keys)

    def encrypt(self, values: Any, with_public_key: bool = False, **options: Any) -> Any:
        """A tensor for the evaluator."""
        if self.name == "clear":
            return self.evaluator.tensor(values, **options)
        tensor = (self.secret.public_key() if with_public_key else self.secret).encrypt(values, **options)
        return self.evaluator.upload(tensor) if self.name in ("host", "gpu") else tensor

    def decrypt(self, tensor: Any, complex: bool = False) -> np.ndarray:
        """The values of a tensor of the evaluator."""
        if self.name == "clear":
            return tensor.values
        if self.name in ("host", "gpu"):
            tensor = self.evaluator.download(tensor)
        return self.secret.decrypt(tensor, complex=True) if complex else self.secret.decrypt(tensor)


def make(name: str, depth: int, *, scale_bits: int = 40, rotations: Iterable[int] | str = (), **keys: Any) -> Case:
    """An insecure set of this depth and an evaluator with keys."""
    return Case(name, ckks.Parameters.INSECURE(depth, scale_bits), rotations, **keys)


TOKENS, FEATURES = 5, 3
_RNG = np.random.default_rng(0)
VALUES = _RNG.uniform(-1, 1, (TOKENS, FEATURES))
WEIGHT = _RNG.normal(size=(4, FEATURES))
NUMBERS = np.array([0.25, -1.5, 0.0])
ANGLES = np.exp(2j * np.pi * _RNG.uniform(size=(TOKENS, FEATURES)))

OPERATIONS: dict[str, Callable[..., Any]] = {
    # x and y have three features, one has one, low is two levels lower.
    "add": lambda e, x, y, one, low: e.add(x, y),
    "add itself": lambda e, x, y, one, low: e.add(x, x),
    "add one feature": lambda e, x, y, one, low: e.add(x, one),
    "add to one feature": lambda e, x, y, one, low: e.add(one, x),
    "add a lower level": lambda e, x, y, one, low: e.add(low, x),
    "add at another level, of the same scale": lambda e, x, y, one, low: e.add(e.drop_level(x, 2), y),
    "add a product": lambda e, x, y, one, low: e.add(x, e.multiply(y, 0.5)),
    "add a number": lambda e, x, y, one, low: e.add(x, 0.5),
    "add numbers": lambda e, x, y, one, low: e.add(x, NUMBERS),
    "subtract": lambda e, x, y, one, low: e.subtract(x, y),
    "subtract from one feature": lambda e, x, y, one, low: e.subtract(one, x),
    "subtract numbers": lambda e, x, y, one, low: e.subtract(x, NUMBERS),
    "negate": lambda e, x, y, one, low: e.negate(x),
    "multiply": lambda e, x, y, one, low: e.multiply(x, y),
    "multiply one feature": lambda e, x, y, one, low: e.multiply(one, x),
    "multiply by one feature": lambda e, x, y, one, low: e.multiply(x, one),
    "multiply a lower level": lambda e, x, y, one, low: e.multiply(x, low),
    "multiply a number": lambda e, x, y, one, low: e.multiply(x, -0.3),
    "multiply numbers": lambda e, x, y, one, low: e.multiply(x, NUMBERS),
    "square": lambda e, x, y, one, low: e.square(x),
    "square at level 1": lambda e, x, y, one, low: e.square(low),
    "multiply_plain": lambda e, x, y, one, low: e.multiply_plain(x, VALUES),
    "multiply_plain, a value a token": lambda e, x, y, one, low: e.multiply_plain(x, VALUES[:, 0]),
    "multiply_plain, complex": lambda e, x, y, one, low: e.multiply_plain(x, ANGLES),
    "multiply_plain, complex, a value a token": lambda e, x, y, one, low: e.multiply_plain(x, VALUES[:, 0] * 1j + 0.5),
    "dot": lambda e, x, y, one, low: e.dot(x, y),
    "dot of one feature": lambda e, x, y, one, low: e.dot(one, one),
    "sum_features": lambda e, x, y, one, low: e.sum_features(x),
    "concatenate": lambda e, x, y, one, low: e.concatenate([x, low, one]),
    "concatenate a product": lambda e, x, y, one, low: e.concatenate([x, one, e.square(y)]),
    "select": lambda e, x, y, one, low: e.select(x, slice(1, 3)),
    "select the first": lambda e, x, y, one, low: e.select(x, slice(0, 2)),
    "assume": lambda e, x, y, one, low: e.assume(x, 0.95),
    "assume of errors": lambda e, x, y, one, low: e.square(e.assume(x, 0.95, 1e-12)),
    "assume of a product": lambda e, x, y, one, low: e.assume(e.multiply(x, y), 1.0),
    "drop_level": lambda e, x, y, one, low: e.drop_level(x, 1),
    "linear, 8 bits": lambda e, x, y, one, low: e.linear(x, WEIGHT),
    "linear, 16 bits": lambda e, x, y, one, low: e.linear(x, ckks.Matrix(WEIGHT, bits=16)),
    "linear, 8 bits transposed": lambda e, x, y, one, low: e.linear(
        x, ckks.Matrix(WEIGHT.T, per_row=False), transpose=True
    ),
    "linear, 16 bits transposed": lambda e, x, y, one, low: e.linear(
        x, ckks.Matrix(WEIGHT.T, bits=16, per_row=False), transpose=True
    ),
    "linear_combination": lambda e, x, y, one, low: e.linear_combination([x, y], [0.5, -0.25]),
    "linear_combination a feature": lambda e, x, y, one, low: e.linear_combination(
        [x, y], [VALUES[0], VALUES[1]], VALUES[2]
    ),
    "linear_combination of many": lambda e, x, y, one, low: e.linear_combination(
        [x, y, one, low, x, y, one, y, x], np.linspace(-1, 1, 27).reshape(9, 3), NUMBERS
    ),
    "polynomial": lambda e, x, y, one, low: e.polynomial(x, ckks.approximate("gelu", (-1.0, 3.0), 3)),
    "polynomials at shared powers": lambda e, x, y, one, low: e.polynomials(
        x, [ckks.approximate("gelu", (-1.0, 3.0), 3), ckks.approximate("gelu", (-1.0, 3.0), 3).derivative()]
    ),
    "polynomial in powers": lambda e, x, y, one, low: e.polynomial(x, ckks.Polynomial((0.1, -0.2, 0.0, 0.3), "power")),
    "rotate": lambda e, x, y, one, low: e.rotate(x, -3),
    "rotate by several steps": lambda e, x, y, one, low: e.rotate(x, [1, 0, -3]),
    "rotate by none": lambda e, x, y, one, low: e.rotate(x, [0]),
    "conjugate": lambda e, x, y, one, low: e.conjugate(low),
    "conjugate, complex": lambda e, x, y, one, low: e.conjugate(e.multiply_plain(x, ANGLES)),
    "sum_slots": lambda e, x, y, one, low: e.sum_slots(one),
    "pack_slot_sums": lambda e, x, y, one, low: e.pack_slot_sums(x),
    "expand": lambda e, x, y, one, low: e.expand(e.pack_slot_sums(x), 3),
    "expand, some of many": lambda e, x, y, one, low: e.expand(
        e.pack_slot_sums(e.concatenate([x] * 7)), 21, slice(1, None, 3)
    ),
    "a view in a sum and a product": lambda e, x, y, one, low: e.add(
        e.multiply(e.select(x, slice(1, 3)), e.select(y, slice(0, 2))), e.select(x, slice(2, 3))
    ),
    "views in a rotation and a matrix": lambda e, x, y, one, low: e.linear(
        e.rotate(e.select(x, slice(1, 3)), [1])[0], WEIGHT[:, :2]
    ),
}


def assert_same_words(evaluator: CudaEvaluator, found: DeviceTensor, expected: ckks.EncryptedTensor) -> None:
    """A device's tensor holds the words of the native one, and is the same message once it is downloaded."""
    assert isinstance(found, DeviceTensor)
    assert found.nbytes == found.words.nbytes
    down = evaluator.download(found)
    assert isinstance(down, ckks.EncryptedTensor)
    assert np.array_equal(down._core.noise, expected._core.noise)
    assert np.array_equal(down._core.words(), expected._core.words())
    # A fresh tensor's message has a seed in place of half of its words; a device gives back words.
    assert down.to_bytes() == expected._core.as_planned().with_words(expected._core.words()).to_bytes()
    if down.message_bytes == expected.message_bytes:
        assert down.to_bytes() == expected.to_bytes()

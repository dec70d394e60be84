"""Both CKKS engines behind one way to make them, for tests that run over both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from privtuner import ckks, openfhe

NEEDS_OPENFHE = pytest.mark.skipif(
    not openfhe.available(), reason="needs OpenFHE; the first lines of this run say why it is absent"
)

BOTH = [pytest.param("native"), pytest.param("openfhe", marks=NEEDS_OPENFHE)]
"""Parameters of a test that runs over both engines."""


@dataclass(frozen=True)
class Case:
    """An engine with keys: everything a circuit and its owner need."""

    name: str
    parameters: Any
    secret: Any
    keys: Any
    engine: Any

    @property
    def slots(self) -> int:
        """Values in a ciphertext."""
        return int(self.parameters.slots)

    def without_keys(self) -> Any:
        """An engine that has none."""
        return evaluator(self.name, self.parameters, None)


def evaluator(name: str, parameters: Any, keys: Any) -> Any:
    """The engine of one of the two."""
    return ckks.Evaluator(parameters, keys) if name == "native" else openfhe.Evaluator(parameters, keys)


def make(name: str, depth: int, *, scale_bits: int = 40, rotations: Iterable[int] | str = (), **keys: Any) -> Case:
    """An insecure set of this depth and its keys. rotations: steps, or "sums" for those of a sum of slots."""
    native = ckks.Parameters.INSECURE(depth, scale_bits)
    parameters = native if name == "native" else openfhe.Context.INSECURE(native)
    secret = ckks.SecretKey(native) if name == "native" else openfhe.SecretKey(parameters)
    steps = [1 << i for i in range(native.slots.bit_length() - 1)] if rotations == "sums" else rotations
    made = secret.evaluation_keys(rotations=steps, **keys)
    return Case(name, parameters, secret, made, evaluator(name, parameters, made))

"""Approximate arithmetic on encrypted tensors: RNS-CKKS with tokens in slots and one ciphertext a feature.

::

    parameters = ckks.parameters(depth=7)
    secret = ckks.SecretKey(parameters)                       # data owner
    keys = secret.evaluation_keys()                           # public, to the server
    x = secret.encrypt(activations, bound=8.0)                # (tokens, features)

    engine = ckks.Evaluator(parameters, keys)                 # server
    y = engine.polynomial(engine.linear(x, weight), ckks.gelu())

    secret.decrypt(y)                                         # data owner

`plan` runs a circuit without keys or ciphertexts and says what it takes; circuits of several operations are in
``privtuner.ckks.circuits``.
"""

from . import approximations, circuits
from .approximations import (
    Polynomial,
    exp,
    fit,
    gelu,
    inverse,
    inverse_sqrt,
    relu,
    sigmoid,
    silu,
    tanh,
)
from .evaluator import Evaluator, Matrix
from .keys import EvaluationKeys, PublicKey, SecretKey
from .parameters import INSECURE_parameters, Parameters, parameters
from .plan import Calibration, Measurement, Plan, calibrate, plan
from .tensor import Budget, EncryptedTensor

__all__ = [
    "Budget",
    "Calibration",
    "EncryptedTensor",
    "EvaluationKeys",
    "Evaluator",
    "INSECURE_parameters",
    "Matrix",
    "Measurement",
    "Parameters",
    "Plan",
    "Polynomial",
    "PublicKey",
    "SecretKey",
    "approximations",
    "calibrate",
    "circuits",
    "exp",
    "fit",
    "gelu",
    "inverse",
    "inverse_sqrt",
    "parameters",
    "plan",
    "relu",
    "sigmoid",
    "silu",
    "tanh",
]

"""Approximate arithmetic on encrypted tensors: RNS-CKKS with tokens in slots and one ciphertext a feature.

::

    parameters = ckks.Parameters.secure(depth=7)
    secret = ckks.SecretKey(parameters)                       # data owner
    keys = secret.evaluation_keys()                           # public, to the server
    x = secret.encrypt(activations, bound=8.0)                # (tokens, features)

    evaluator = ckks.Evaluator(parameters, keys)              # server
    y = evaluator.polynomial(evaluator.linear(x, weight), ckks.approximate("gelu"))

    secret.decrypt(y)                                         # data owner

`plan` runs a circuit without keys or ciphertexts and says what it takes; circuits of several operations are in
``privtuner.ckks.circuits``.
"""

from privtuner.ckks import circuits
from privtuner.ckks.clear import ClearEvaluator, ClearTensor
from privtuner.ckks.evaluator import Evaluator, Matrix
from privtuner.ckks.functions import approximate
from privtuner.ckks.keys import EvaluationKeys, PublicKey, SecretKey
from privtuner.ckks.parameters import Parameters
from privtuner.ckks.planning import Measurement, Plan, Refresh, plan
from privtuner.ckks.polynomial import Polynomial
from privtuner.ckks.refresher import Refresher
from privtuner.ckks.remez import fit
from privtuner.ckks.tensor import Budget, EncryptedTensor
from privtuner.ckks.timing import Timings, measure_timings

__all__ = [
    "Budget",
    "ClearEvaluator",
    "ClearTensor",
    "EncryptedTensor",
    "EvaluationKeys",
    "Evaluator",
    "Matrix",
    "Measurement",
    "Parameters",
    "Plan",
    "Polynomial",
    "PublicKey",
    "Refresh",
    "Refresher",
    "SecretKey",
    "Timings",
    "approximate",
    "circuits",
    "fit",
    "measure_timings",
    "plan",
]

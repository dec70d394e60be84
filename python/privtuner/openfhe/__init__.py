"""CKKS of OpenFHE: its keys, ciphertexts and parameters, and privtuner's products and training on them.

The same names and the same steps as `privtuner.ckks`::

    context = openfhe.Context(ckks.Parameters.secure(depth=3))  # or Context.from_settings(...), Context.load(path)
    secret = openfhe.SecretKey(context)                        # data owner
    keys = secret.evaluation_keys()                            # public, to the server
    x = secret.encrypt(activations, bound=8.0)                 # (tokens, features), one ciphertext a feature

    evaluator = openfhe.Evaluator(context, keys)               # server
    y = evaluator.linear(x, weight)                            # an exact integer product of the residues: no level

    secret.decrypt(y)                                          # data owner

Needs a privtuner that was built where OpenFHE 1.2 or newer is installed; importing this package does not.
"""

from privtuner.openfhe.client import OpenFheClient
from privtuner.openfhe.context import Context
from privtuner.openfhe.evaluator import Evaluator
from privtuner.openfhe.keys import EvaluationKeys, PublicKey, SecretKey
from privtuner.openfhe.library import available, num_threads, set_num_threads, status
from privtuner.openfhe.server import OpenFheServer
from privtuner.openfhe.tensor import EncryptedTensor

__all__ = [
    "Context",
    "EncryptedTensor",
    "EvaluationKeys",
    "Evaluator",
    "OpenFheClient",
    "OpenFheServer",
    "PublicKey",
    "SecretKey",
    "available",
    "num_threads",
    "set_num_threads",
    "status",
]

"""The sealed model: a server evaluates and trains a whole encoder on ciphertexts.

The server holds the weights and sees ciphertexts alone; the data owner holds the one secret key, refreshes masked
ciphertexts and decrypts pooled vectors alone.
"""

from privtuner.sealed.domains import Domains, LayerDomains
from privtuner.sealed.exact import ExactEncoder
from privtuner.sealed.model import EncryptedAdapters, SealedModel
from privtuner.sealed.plan import Plan
from privtuner.sealed.public import Keys, Public, Refresh
from privtuner.sealed.shape import Shape
from privtuner.sealed.weights import Weights

__all__ = [
    "Domains",
    "EncryptedAdapters",
    "ExactEncoder",
    "Keys",
    "LayerDomains",
    "Plan",
    "Public",
    "Refresh",
    "SealedModel",
    "Shape",
    "Weights",
]

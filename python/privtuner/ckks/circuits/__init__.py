"""Circuits on encrypted tensors: attention, softmax, layer norm, activations, their gradients, and what they need.

Written against `privtuner.ckks.protocol.EvaluatorProtocol` alone, so that they run on every evaluator. Each states the
levels it takes, which are known beforehand, and, where it rotates, the steps that the rotation keys must cover (the
``..._steps`` functions). Softmax, layer norm and activations are planned objects of public constants: polynomials,
domains, errors.

A domain or a bound that a circuit is given is the caller's promise about values nobody can see: outside it results are
wrong, and may be huge. Slots that are not in use hold 0; that is outside the domain of a reciprocal or an inverse
square root, but the polynomials stay moderate there, and the bounds that the circuits declare hold there too. Softmax
and layer norm take an encrypted mask of the tokens there are, and give 0 elsewhere.

What is *wide* has a ciphertext a feature or a pair of tokens; row sums, means and variances are *narrow*, a few
ciphertexts. Circuits refresh what is narrow by themselves, as often as levels run out, and leave to their caller what
is wide.

Accuracies are those of the formulas in exact arithmetic; the noise of the ciphertexts comes on top.
"""

from privtuner.ckks.circuits.activation import Activation
from privtuner.ckks.circuits.attention import (
    ATTENTION_DEPTH,
    attention_scores,
    attention_scores_backward,
    attention_steps,
    attention_values,
    attention_values_backward,
    attention_values_transposed,
    pair_mask,
)
from privtuner.ckks.circuits.functions import (
    exponential,
    exponential_depth,
    exponential_error,
    inverse_square_root,
    inverse_square_root_depth,
    inverse_square_root_error,
    reciprocal,
    reciprocal_depth,
    reciprocal_error,
)
from privtuner.ckks.circuits.layer_norm import LayerNorm, Normed
from privtuner.ckks.circuits.matrices import MATRIX_VECTOR_DEPTH, matrix_vector, matrix_vector_steps
from privtuner.ckks.circuits.softmax import SquaringSoftmax, Stage, softmax_backward

__all__ = [
    "ATTENTION_DEPTH",
    "MATRIX_VECTOR_DEPTH",
    "Activation",
    "LayerNorm",
    "Normed",
    "SquaringSoftmax",
    "Stage",
    "attention_scores",
    "attention_scores_backward",
    "attention_steps",
    "attention_values",
    "attention_values_backward",
    "attention_values_transposed",
    "exponential",
    "exponential_depth",
    "exponential_error",
    "inverse_square_root",
    "inverse_square_root_depth",
    "inverse_square_root_error",
    "matrix_vector",
    "matrix_vector_steps",
    "pair_mask",
    "reciprocal",
    "reciprocal_depth",
    "reciprocal_error",
    "softmax_backward",
]

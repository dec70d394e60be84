"""Clipping on ciphertexts: the packed gradient of a batch, scaled to a norm that stays below one whatever the batch.

With u the gradient over the clipping norm, ``clip`` computes ``GAIN u / sqrt(1 + |u|^2)``: nearly linear for small
gradients, of a constant norm for large ones (as the normalised steps of Bu et al., "Automatic Clipping", NeurIPS 2023),
and smooth, so that a polynomial and Newton steps do, where min(1, 1 / |u|) has a corner. The square of the norm is the
constant coefficient of u(X) u(1/X), summed over ciphertexts: conjugation, one product, a sum over slots.
"""

from __future__ import annotations

import numpy as np

from privtuner.ckks import circuits
from privtuner.ckks.circuits.common import SLACK, raised, renewed
from privtuner.ckks.keys import SecretKey
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.ckks.tensor import EncryptedTensor
from privtuner.errors import CkksError, InputError
from privtuner.sealed.adapters import ERROR, GRADIENT_BOUND

__all__ = ["GAIN", "NORM_FLOOD", "NORM_LEVEL", "OPENED_LEVEL", "WIDEST", "check_norm", "clip"]

WIDEST = 32.0
"""Gradients of up to so many times the clipping norm are clipped."""
GAIN = 0.875
"""What the norm stays below, so that it is known to be below one from its square with noise."""
NORM_FLOOD = 2.0**-4
"""The noise on that square: its owner learns some three bits about it."""
_MOST_SQUARE = 0.9

_LEVEL = 5  # after the refresh: one for the division, one for the factor, two for the square that is checked
NORM_LEVEL = _LEVEL - 4
"""The level of the revealed square."""
OPENED_LEVEL = _LEVEL - 2
"""The level whose scale the clipped numbers have; they are brought down to level 0."""
_DEGREE, _STEPS = 15, 2
"""Of the inverse root, never too large after a Newton step (`circuits.inverse_square_root`): then nor is the norm."""
_TOP = (1 + WIDEST**2) * (1 + SLACK)
_DOMAIN = ((1 - SLACK) / _TOP, 1.0)


def clip(ev: EvaluatorProtocol[Tensor], gradients: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return the clipped gradient over the clipping norm, and its squared norm, ready to be decrypted by the owner.

    Args:
        ev: computes, with refreshes.
        gradients: packed, (slots, ciphertexts), at level 2 or above.
        limit: the clipping norm, positive. A gradient's norm is at most `WIDEST` times that; for larger ones the
            results are no numbers, which `check_norm` notices.

    Returns:
        Packed numbers at level 0, of the scale of `OPENED_LEVEL`, of norm below `GAIN`; and one packed number at
        `NORM_LEVEL`.

    Raises:
        InputError: a norm that is not positive. CkksError: as the evaluator's operations.
    """
    if not 0 < limit < np.inf:
        raise InputError(f"the clipping norm is {limit:g}: give a positive number")
    g = ev.multiply(ev.refresh(gradients, _LEVEL, packed=True), 1 / limit)
    g = ev.assume(g, WIDEST, ERROR * GRADIENT_BOUND / limit)  # no number is above the norm
    square = ev.expand(_squared_norm(ev, g, WIDEST**2), 1)
    if square.level < 4:  # for the combination, and a refresh after it
        square = renewed(ev, square)
    inside = ev.linear_combination([square], [1 / _TOP], 1 / _TOP)
    factor = circuits.inverse_square_root(ev, inside, _DOMAIN, _DEGREE, _STEPS, GAIN / _TOP**0.5, narrow=True)
    clipped = ev.multiply(g, raised(ev, factor, g.level))
    clipped = ev.assume(clipped, 1.0, ERROR * (GRADIENT_BOUND / limit + 1))
    norm = ev.assume(_squared_norm(ev, clipped, 1.0), 1.0, NORM_FLOOD / 2)
    # Slots and coefficients have errors of different size; what is asked for is that the flood is `NORM_FLOOD`.
    bits = max(1, min(40, int(np.floor(np.log2(NORM_FLOOD / norm.budget().error)))))
    return ev.drop_level(clipped, 0), ev.reveal(norm, bits, error=1.0, packed=True)


def _squared_norm(ev: EvaluatorProtocol[Tensor], packed: Tensor, most: float) -> Tensor:
    """The sum of the squares of all packed numbers, one packed number, two levels below; it is at most ``most``."""
    # The slots of u(X) u(1/X) are those of u times their conjugates. Their mean is the constant coefficient, and no
    # other coefficient is larger.
    square = ev.assume(ev.dot(packed, ev.conjugate(packed)), most)
    return ev.assume(ev.multiply(ev.pack_slot_sums(square), 1 / ev.slots), most)


def check_norm(secret: SecretKey, square: EncryptedTensor) -> None:
    """Refuse what is not known to have a norm up to one.

    Args:
        secret: the owner's key.
        square: the squared norm, of `clip`: off by `NORM_FLOOD`, and by some 2^-10.

    Raises:
        CkksError: it is too large, or no number.
    """
    try:
        value = float(secret.decrypt_packed(square, 1)[0, 0])
    except CkksError:  # values that outgrew the modulus, or their bound
        value = np.inf
    if not value <= _MOST_SQUARE:
        raise CkksError(
            f"the gradient of this batch cannot be clipped: it is more than {WIDEST:g} times the clipping norm, or an "
            "input left the domain that the server calibrated its model on. Nothing of it was opened; take a larger "
            "--clip, or leave out texts unlike those of the calibration"
        )

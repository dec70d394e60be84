"""How many operations the best known lattice attacks need: the estimate behind every statement of "bits" here.

Two attacks on learning with errors are costed, each with its best number of samples and block size:

* primal (unique shortest vector): Bai and Galbraith's embedding, the secret scaled up to the size of the error, with
  the success condition of Alkim, Ducas, Poeppelmann and Schwabe ("Post-quantum key exchange: a new hope", USENIX
  Security 2016, 6.3): sqrt(beta) sigma <= root_hermite^(2 beta - d - 1) volume^(1/d).
* dual (distinguishing): a vector of length l of the dual lattice, the secret's half scaled likewise; the advantage is
  exp(-2 pi^2 sigma^2 l^2 / q^2), repeated 1 / advantage^2 times with the 2^(0.2075 beta) vectors that one sieve yields
  (Albrecht, "On dual lattice attacks against small-secret LWE", EUROCRYPT 2017).

Each block size is costed twice: *core-SVP*, 2^(0.292 beta), which charges one sieve and leaves out every polynomial
factor, and *sieve*, 2^(0.292 beta + 16.4 + log2(8 d)) (Becker, Ducas, Gama, Laarhoven, SODA 2016, with eight tours),
the model of the Homomorphic Encryption Standard (2018, table 1), whose 128, 192 and 256-bit columns it gives back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privtuner.errors import InputError

__all__ = ["SIGMA_TERNARY", "Estimate", "bits", "dual", "primal", "root_hermite"]

SIGMA_TERNARY = math.sqrt(2 / 3)
"""Standard deviation of a uniform ternary secret."""
_LARGEST_BETA = 8192
_TOURS = 8
_LEAST_SIGMA, _LARGEST_SIGMA = 0.5, 1e9
_LARGEST_LOG2 = 500.0  # of a ratio whose square must be finite

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """The cheapest instance found of one attack.

    Attributes:
        attack: ``"primal"`` or ``"dual"``.
        beta: block size of the lattice reduction.
        samples: samples of learning with errors that it uses.
        core_svp, sieve: log2 of the number of operations in either model.
    """

    attack: str
    beta: int
    samples: int
    core_svp: float
    sieve: float


def root_hermite(beta: npt.ArrayLike) -> FloatArray:
    """The root Hermite factor that block size ``beta`` (at least 50) reaches (Chen, 2013)."""
    beta = np.asarray(beta, dtype=np.float64)
    factor: FloatArray = ((math.pi * beta) ** (1 / beta) * beta / (2 * math.pi * math.e)) ** (1 / (2 * (beta - 1)))
    return factor


def primal(n: int, log2_q: float, sigma: float, sigma_secret: float = SIGMA_TERNARY) -> Estimate:
    """The smallest block size at which the planted vector stands out, with the best number of samples.

    Where 8192, some 2,400 bits, is too small a block it stands for all larger ones.

    Args:
        n: ring dimension.
        log2_q: of the largest modulus anything is encrypted under, special primes included.
        sigma: standard deviation of the error, of a coefficient.
        sigma_secret: standard deviation of the secret.

    Raises:
        InputError: a value is out of range.
    """
    beta, log2_root, scale = _reduction(n, log2_q, sigma, sigma_secret)
    # The margin is concave in the dimension d; this is where its derivative vanishes.
    dim = np.clip(np.sqrt((n * (log2_q - scale) + log2_q) / log2_root), n + 2, 3 * n)
    log2_volume = (dim - n - 1) * log2_q + n * scale
    margin = (2 * beta - dim - 1) * log2_root + log2_volume / dim - np.log2(np.sqrt(beta) * sigma)
    best = int(np.argmax(margin >= 0)) if margin[-1] >= 0 else len(margin) - 1
    return _estimate("primal", beta[best], dim[best] - n - 1, dim[best], 0.0)


def dual(n: int, log2_q: float, sigma: float, sigma_secret: float = SIGMA_TERNARY) -> Estimate:
    """The block size with the least total cost of distinguishing, with the best number of samples.

    Arguments and errors as of `primal`.
    """
    beta, log2_root, scale = _reduction(n, log2_q, sigma, sigma_secret)
    dim = np.clip(np.sqrt(n * (log2_q - scale) / log2_root), n + 1, 3 * n)  # the shortest vector's dimension
    log2_ratio = dim * log2_root + n * (log2_q - scale) / dim + math.log2(sigma) - log2_q
    log2_advantage = -2 * math.pi**2 * 4 ** np.minimum(log2_ratio, _LARGEST_LOG2) * math.log2(math.e)
    repeats = np.maximum(0.0, -2 * log2_advantage - 0.2075 * beta)
    best = int(np.argmin(0.292 * beta + repeats + np.log2(dim)))
    return _estimate("dual", beta[best], dim[best] - n, dim[best], repeats[best])


def bits(n: int, log2_q: float, sigma: float, sigma_secret: float = SIGMA_TERNARY) -> float:
    """Classical security in bits: the cheaper of the two attacks in the standard's model (`Estimate.sieve`).

    Arguments and errors as of `primal`.
    """
    return min(attack(n, log2_q, sigma, sigma_secret).sieve for attack in (primal, dual))


def _reduction(n: int, log2_q: float, sigma: float, sigma_secret: float) -> tuple[FloatArray, FloatArray, float]:
    """Every block size, log2 of its root Hermite factor, and log2 of the factor that evens out secret and error."""
    if not isinstance(n, int) or not 256 <= n <= 1 << 20:
        raise InputError(f"n = {n}: the estimate holds for ring dimensions in [256, 1048576]")
    for name, value in (("sigma", sigma), ("sigma_secret", sigma_secret)):
        if not _LEAST_SIGMA <= value <= _LARGEST_SIGMA:  # below, coefficients are mostly zero, and other attacks win
            raise InputError(f"{name} = {value}: must be in [{_LEAST_SIGMA:g}, {_LARGEST_SIGMA:g}]")
    scale = math.log2(sigma / sigma_secret)
    if not max(4.0, scale + 1) <= log2_q <= n:
        raise InputError(f"log2_q = {log2_q}: must be from {max(4.0, scale + 1):.3g} to n = {n}")
    beta = np.arange(50.0, _LARGEST_BETA + 1)
    return beta, np.log2(root_hermite(beta)), scale


def _estimate(attack: str, beta: float, samples: float, dim: float, repeats: float) -> Estimate:
    core = 0.292 * beta + repeats
    return Estimate(attack, int(beta), round(samples), core, core + 16.4 + math.log2(_TOURS * dim))

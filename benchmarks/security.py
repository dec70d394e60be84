"""What is the security margin of the parameters? Prints the table of SECURITY.md.

Two lattice attacks on learning with errors are costed, each with its best number of samples and block size:

* primal (unique shortest vector): Bai and Galbraith's embedding, the ternary secret scaled up to the size of
  the error, with the success condition of Alkim, Ducas, Poeppelmann and Schwabe ("Post-quantum key exchange: a
  new hope", USENIX Security 2016, 6.3): sqrt(beta) sigma <= root_hermite^(2 beta - d - 1) volume^(1/d).
* dual (distinguishing): a vector of length l of the dual lattice, the secret's half scaled likewise; the
  advantage is exp(-2 pi^2 sigma^2 l^2 / q^2), repeated 1 / advantage^2 times with the 2^(0.2075 beta) vectors
  that one sieve yields (Albrecht, "On dual lattice attacks against small-secret LWE", EUROCRYPT 2017).

Each block size is costed twice: *core-SVP*, 2^(0.292 beta), which charges one sieve and leaves out every
polynomial factor, and *sieve*, 2^(0.292 beta + 16.4 + log2(8 d)) (Becker, Ducas, Gama, Laarhoven, SODA 2016,
with eight tours), the model behind the 128-bit column of the Homomorphic Encryption Standard (2018, table 1),
which allows log2 q <= 54 at N = 2048 with ternary secrets.

Run: python benchmarks/security.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SIGMA_TERNARY = math.sqrt(2 / 3)
SIGMA_CBD21 = math.sqrt(21 / 2)
STANDARD_LOG2_Q = {1024: 27, 2048: 54, 4096: 109, 8192: 218}
"""The standard's largest log2 q for 128 bits (classical, ternary secret), by ring dimension."""
CKKS_LOG2_QP = {8192: 214, 16384: 430, 32768: 868}
"""The largest log2(QP) the CKKS engine accepts in its usual rings (Bossuat et al., IACR ePrint 2024/463)."""


@dataclass(frozen=True)
class Estimate:
    """The cheapest instance found of one attack; the last two are log2 of the number of operations."""

    attack: str
    beta: int
    samples: int
    core_svp: float
    sieve: float


def root_hermite(beta: int) -> float:
    """The root Hermite factor that block size `beta` (at least 50) reaches (Chen, 2013)."""
    return float(((math.pi * beta) ** (1 / beta) * beta / (2 * math.pi * math.e)) ** (1 / (2 * (beta - 1))))


def costs(beta: int, dim: int) -> tuple[float, float]:
    """log2 of the core-SVP and the sieve cost of a reduction with block size `beta` in dimension `dim`."""
    core = 0.292 * beta
    return core, core + 16.4 + math.log2(8 * dim)


def primal(n: int, log2_q: float, sigma: float, sigma_secret: float = SIGMA_TERNARY) -> Estimate:
    """The smallest block size at which the planted vector stands out, over every number of samples."""
    scale = math.log2(sigma / sigma_secret)

    def margin(beta: int, samples: int) -> float:
        dim = n + samples + 1
        log2_volume = samples * log2_q + n * scale
        right = (2 * beta - dim - 1) * math.log2(root_hermite(beta)) + log2_volume / dim
        return right - math.log2(math.sqrt(beta) * sigma)

    for beta in range(50, n):
        samples = max(range(64, 2 * n, max(1, n // 256)), key=lambda m: margin(beta, m))
        if margin(beta, samples) >= 0:
            return Estimate("primal", beta, samples, *costs(beta, n + samples + 1))
    raise ValueError(f"no block size below {n} suffices for n={n}, log2 q={log2_q}")


def dual(n: int, log2_q: float, sigma: float, sigma_secret: float = SIGMA_TERNARY) -> Estimate:
    """The block size with the least total cost of distinguishing, over every number of samples."""
    scale = math.log2(sigma / sigma_secret)
    best: Estimate | None = None
    for beta in range(60, min(n, 1200), 4):
        log2_root = math.log2(root_hermite(beta))
        for samples in range(n // 2, 2 * n, max(1, n // 128)):
            dim = n + samples
            log2_length = dim * log2_root + n * (log2_q - scale) / dim
            log2_ratio = log2_length + math.log2(sigma) - log2_q
            if log2_ratio > 8:  # no advantage that a double could hold
                continue
            log2_advantage = -2 * math.pi**2 * 4**log2_ratio * math.log2(math.e)
            repeats = max(0.0, -2 * log2_advantage - 0.2075 * beta)
            core, sieve = costs(beta, dim)
            if best is None or core + repeats < best.core_svp:
                best = Estimate("dual", beta, samples, core + repeats, sieve + repeats)
    assert best is not None
    return best


def main() -> None:
    """Print SECURITY.md's table: the presets, and the standard's own limit as the yardstick."""
    sets = (
        ("linear-w8", 2048, math.log2(4293918721), SIGMA_CBD21),
        ("linear-w16", 2048, 50.0, SIGMA_CBD21),
        ("limit of the standard", 2048, STANDARD_LOG2_Q[2048], 3.19),
        *((f"ckks, N = {n}, largest modulus", n, float(log2_q), SIGMA_CBD21) for n, log2_q in CKKS_LOG2_QP.items()),
    )
    print("| parameters | log2 q | attack | beta | core-SVP | sieve |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, n, log2_q, sigma in sets:
        for best in (primal(n, log2_q, sigma), dual(n, log2_q, sigma)):
            bits = f"{best.core_svp:.0f} | {best.sieve:.0f}"
            print(f"| {name} | {log2_q:.0f} | {best.attack} | {best.beta} | {bits} |")


if __name__ == "__main__":
    main()

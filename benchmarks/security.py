"""What is the security margin of the parameters? Prints the table of SECURITY.md.

The attacks and the two cost models are those of `privtuner.security`.

Run: python benchmarks/security.py
"""

from __future__ import annotations

import math

from privtuner import linear
from privtuner.security import dual, primal

SIGMA_CBD21 = math.sqrt(21 / 2)
STANDARD_LOG2_Q = {1024: 27, 2048: 54, 4096: 109, 8192: 218}
"""The standard's largest log2 q for 128 bits (classical, ternary secret), by ring dimension."""
CKKS_LOG2_QP = {8192: 214, 16384: 430, 32768: 868}
"""The largest log2(QP) the CKKS engine accepts in its usual rings (Bossuat et al., IACR ePrint 2024/463)."""


def main() -> None:
    """Print SECURITY.md's table: the presets, and the standard's own limit as the yardstick."""
    sets = (
        *((preset, n, math.log2(q), SIGMA_CBD21) for preset in linear.PRESETS for n, q in [linear.ring(preset)]),
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

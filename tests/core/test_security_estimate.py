"""The security estimate, held to published figures, and the table of SECURITY.md, held to the estimate."""

import importlib.util
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loops import each
from privtuner import security
from privtuner.errors import InputError

ROOT = Path(__file__).parents[2]
STANDARD = {
    1024: (27, 19, 14),
    2048: (54, 37, 29),
    4096: (109, 75, 58),
    8192: (218, 152, 118),
    16384: (438, 305, 237),
    32768: (881, 611, 476),
}
"""Homomorphic Encryption Standard (2018), table 1, classical, uniform ternary secret: log2 q for 128, 192, 256 bits."""
BOSSUAT = {4096: 106, 8192: 214, 16384: 430, 32768: 868, 65536: 1747, 131072: 3523}
"""Bossuat et al., IACR ePrint 2024/463: largest log2 q for 128 bits."""
STEP = 0.292  # bits that one block size is worth


def test_root_hermite_factor_of_known_block_sizes():
    # Chen's thesis (2013): block sizes 168 and 286 reach 1.007 and 1.005.
    assert security.root_hermite(168) == pytest.approx(1.0070, abs=1e-4)
    assert security.root_hermite(286) == pytest.approx(1.0050, abs=1e-4)


@each(("rank", "eta", "core_svp"), [(2, 3, 118), (3, 2, 182), (4, 2, 256)])  # Kyber512, 768, 1024
def test_primal_matches_the_kyber_specification(rank, eta, core_svp):
    # Classical core-SVP of the round-3 specification, table 4. The secret has the distribution of the error.
    sigma = math.sqrt(eta / 2)
    estimate = security.primal(256 * rank, math.log2(3329), sigma, sigma)
    assert abs(estimate.core_svp - core_svp) <= 1


@each(("column", "level"), enumerate((128, 192, 256)), n=STANDARD)
def test_the_standards_limits_are_limits(n, column, level):
    # The largest modulus of a level, in whole bits, has that level, and one bit more has not; to one block size.
    log2_q = STANDARD[n][column]
    assert security.bits(n, log2_q, 3.19) >= level - STEP
    assert security.bits(n, log2_q + 1, 3.19) < level + STEP


@each(("n", "log2_q"), BOSSUAT.items())
def test_newer_limits_are_met(n, log2_q):
    # They cover attacks that this estimate leaves out, so they are below the standard's: by up to 3 % of the modulus.
    assert 128 <= security.bits(n, log2_q, 3.19) <= 128 * 1.035


rings = st.integers(10, 16).map(lambda exponent: 1 << exponent)
parts = st.floats(0.01, 0.05)  # log2 q as a part of N


@given(rings, parts, st.floats(1.01, 1.5))
def test_more_modulus_never_raises_security(n, part, factor):
    # At the same block size the dimension, whose logarithm counts too, may differ by a little.
    assert security.bits(n, part * n * factor, 3.2) <= security.bits(n, part * n, 3.2) + 0.01


@given(rings, parts)
def test_a_larger_ring_never_lowers_security(n, part):
    # At the same modulus, in the range that the estimate covers.
    assert security.bits(2 * n, part * n, 3.2) >= security.bits(n, part * n, 3.2)


@given(rings, parts, st.floats(1.05, 4))
def test_a_larger_error_never_lowers_security(n, part, factor):
    for attack in (security.primal, security.dual):
        more = attack(n, part * n, 3.2 * factor)
        assert more.core_svp >= attack(n, part * n, 3.2).core_svp - STEP


def test_bits_is_the_cheaper_attack():
    for n, log2_q in BOSSUAT.items():
        attacks = security.primal(n, log2_q, 3.2), security.dual(n, log2_q, 3.2)
        assert security.bits(n, log2_q, 3.2) == min(attack.sieve for attack in attacks)
        assert [attack.attack for attack in attacks] == ["primal", "dual"]
        assert all(attack.sieve > attack.core_svp for attack in attacks)


def test_what_no_attack_reaches_counts_as_the_largest_block_size():
    assert security.primal(1 << 20, 30.0, 3.2).beta == 8192
    assert security.bits(1 << 20, 30.0, 3.2) > 2000


@each(
    ("arguments", "message"),
    [
        ((128, 20, 3.2), r"n = 128: .*\[256, 1048576\]"),
        ((1 << 21, 20, 3.2), "n = 2097152"),
        ((1024.5, 20, 3.2), "n = 1024.5"),
        ((2048, 54, 0.0), "sigma = 0.0"),
        ((2048, 54, 0.4), r"sigma = 0.4: must be in \[0.5, 1e\+09\]"),
        ((2048, 54, math.nan), "sigma = nan"),
        ((2048, 54, 3.2, math.inf), "sigma_secret = inf"),
        ((2048, 3.0, 3.2), "log2_q = 3.0: must be from 4 to n = 2048"),
        ((2048, 2049.0, 3.2), "log2_q = 2049.0"),
        ((2048, math.nan, 3.2), "log2_q = nan"),
    ],
    estimate=[security.primal, security.dual, security.bits],
)
def test_arguments_out_of_range(estimate, arguments, message):
    with pytest.raises(InputError, match=message):
        estimate(*arguments)


def test_security_md_quotes_what_the_script_prints(capsys):
    spec = importlib.util.spec_from_file_location("security_script", ROOT / "benchmarks" / "security.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 14
    text = (ROOT / "SECURITY.md").read_text()
    assert [row for row in rows if row not in text] == []

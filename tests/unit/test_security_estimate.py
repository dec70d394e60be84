"""The estimates quoted in SECURITY.md, held to published figures for other schemes."""

import math
from pathlib import Path

import pytest

import security

SECURITY_MD = Path(__file__).parents[2] / "SECURITY.md"


def test_root_hermite_factor_of_known_block_sizes():
    # Chen's thesis (2013): block sizes 168 and 286 reach 1.007 and 1.005.
    assert security.root_hermite(168) == pytest.approx(1.0070, abs=1e-4)
    assert security.root_hermite(286) == pytest.approx(1.0050, abs=1e-4)


@pytest.mark.parametrize(
    ("rank", "eta", "core_svp"),
    [(2, 3, 118), (3, 2, 182), (4, 2, 256)],
    ids=["Kyber512", "Kyber768", "Kyber1024"],
)
def test_primal_matches_the_kyber_specification(rank, eta, core_svp):
    # Classical core-SVP of the round-3 specification, table 4. The secret has the distribution of the error.
    sigma = math.sqrt(eta / 2)
    estimate = security.primal(256 * rank, math.log2(3329), sigma, sigma)
    assert abs(estimate.core_svp - core_svp) <= 1


def test_the_standards_limit_gives_its_128_bits():
    # The yardstick: the model must reproduce the standard's own statement at its own parameters.
    for n in (1024, 2048):
        bits = min(
            security.primal(n, security.STANDARD_LOG2_Q[n], 3.19).sieve,
            security.dual(n, security.STANDARD_LOG2_Q[n], 3.19).sieve,
        )
        assert 128 <= bits <= 134


def test_one_bit_more_of_modulus_costs_security():
    assert security.primal(2048, 33, 3.24).beta < security.primal(2048, 32, 3.24).beta
    assert security.dual(2048, 33, 3.24).core_svp < security.dual(2048, 32, 3.24).core_svp


def test_security_md_quotes_what_the_script_prints(capsys):
    security.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 14
    text = SECURITY_MD.read_text()
    assert [row for row in rows if row not in text] == []

"""The tools that run the tests on the code paths of other processors do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

import paths

TESTS = Path(__file__).parents[1]
SUPPORT = TESTS / "support"


def test_jitter_moves_results_by_one_unit():
    code = """
import numpy as np
x = np.linspace(0.1, 3, 3000)
exact = np.exp(x), np.exp(x[::2]), np.float32(0.3) + np.zeros(0)
import jitter
off = (np.exp(x) - exact[0]) / np.spacing(exact[0]), (np.exp(x[::2]) - exact[1]) / np.spacing(exact[1])
assert set(off[0]) == {-1, 0, 1}
assert (off[0][::2] != off[1]).any()
assert np.exp(0.0) == 1 and np.log2([8.0, 0.5]).tolist() == [3, -1] and np.log(1j).imag > 1
assert isinstance(np.exp(0.3), float) and np.exp(np.float32(0.3)).dtype == np.float32
out = np.zeros(3)
assert np.exp(x[:3], out=out) is out and out.all()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=SUPPORT, check=True, timeout=60)


def test_numpy_accepts_what_it_is_asked_to_leave_out():
    features = paths.numpy_features()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import paths; print(paths.numpy_features())"],
        cwd=SUPPORT,
        env={"NPY_DISABLE_CPU_FEATURES": " ".join(features)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")


def test_every_path_of_the_kernels_is_run_or_named():
    ways = {way.name: way for way in paths.paths()}
    assert {"avx2", "sse", "jitter", "isa-portable", "isa-avx2", "isa-amx"} <= set(ways)
    assert all(way.kernels == way.name.startswith("isa-") for way in ways.values())
    assert not ways["isa-portable"].obstacle
    for pattern in paths.KERNELS:
        assert list(TESTS.glob(pattern)), pattern


@pytest.mark.parametrize("variables", [{"NPY_DISABLE_CPU_FEATURES": "NO_SUCH"}, {"ATEN_CPU_CAPABILITY": "nonsense"}])
def test_a_path_that_cannot_be_taken_is_left_out(variables):
    result = paths.run(paths.Way("x", variables), ["tests/no_such_file.py"], None)
    assert result.startswith("left out: ")


def test_a_failing_path_fails(monkeypatch, capsys, tmp_path):
    failing = tmp_path / "test_it.py"
    failing.write_text("def test(): assert False")
    monkeypatch.setattr(sys, "argv", ["paths.py", "isa-portable", "--tests", str(failing)])
    assert paths.main() == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("isa-portable    FAILED")
    failing.write_text("def test(): pass")
    assert paths.main() == 0
    monkeypatch.setattr(sys, "argv", ["paths.py", "isa-nothing"])
    with pytest.raises(SystemExit):
        paths.main()
    assert "no path is called isa-nothing; there are avx2, sse, jitter" in capsys.readouterr().err

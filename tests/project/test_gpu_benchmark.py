"""The GPU benchmark runs through, at small sizes on the host in place of a GPU, and says when there is none."""

import json
import sys
from pathlib import Path

import pytest

import gpu
from cuda_host import HostDevice
from privtuner.cuda import device


class Host(gpu.Gpu):
    """Runs everything that is to be timed twice, and calls it a millisecond."""

    def __init__(self):
        self.device, self.torch = HostDevice(), None
        self.memory, self.bytes_multiplied, self.integers = 1e12, 1e15, 1e13

    def milliseconds(self, run, runs=7):
        run()
        run()
        return 1.0


PARTS = {
    "linear": lambda: gpu.linear_part(Host(), size=32, tokens=64),
    "bytes": lambda: gpu.bytes_part(Host(), size=32, tokens=64, steps={"tiny": (2, 16, ((32, 8), (8, 32)))}),
    "llama": lambda: gpu.llama_part(Host(), {"tiny": (2, ((32, 8), (8, 32)))}, tokens=64),
    "ntt": lambda: gpu.ntt_part(Host(), n=1 << 14, rows=8),
    "ckks": lambda: gpu.ckks_part(Host(), ((1 << 13, 3, (1.0, None)),)),
    "chebyshev": lambda: gpu.chebyshev_part(Host(), ring=1 << 14, count=1, times=2),
}


@pytest.mark.parametrize("part", gpu.PARTS)
def test_parts_run_and_compare_their_results(part):
    records = list(PARTS[part]())
    assert records
    for record in records:
        assert record.value is not None
        assert record.value > 0
        if record.bytes is not None:
            assert record.bytes > 0
            assert record.of_roof == pytest.approx(1e3 * max(record.bytes / 1e12, record.operations / peak(record)))


def peak(record):
    return 1e13 if "NTT" in record.name or "limbs" in record.name else 1e15


def test_replies_of_several_blocks_are_compared_block_by_block():
    gpu.check_linear(Host(), 260)


def test_primes_are_the_largest_ones():
    primes = gpu._primes(61, 1 << 16, 4)
    assert primes == sorted(primes, reverse=True)
    assert all(prime.bit_length() == 61 and prime % (1 << 17) == 1 for prime in primes)


def test_results_say_what_was_measured_on_which_card():
    results = json.loads((Path(gpu.__file__).parent / "results" / "gpu-h200.json").read_text())
    assert (results["card"], results["software"]) == ("NVIDIA H200", {"CuPy": "14.2", "driver": "580"})
    for record in results["records"]:
        assert list(record) == ["name", "measured", "asked", "unit", "note"]
        assert record["measured"] > 0
        assert record["asked"] is None or record["asked"] > 0
        assert record["unit"] in ("ms", "s", "times", "tokens/s")
    assert len({record["name"] for record in results["records"]}) == len(results["records"])


def test_without_a_gpu_every_part_is_said_to_be_unmeasured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(device, "_cupy", lambda: "CuPy is gone")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--all", "--json", str(tmp_path / "gpu.json")])
    assert gpu.main() == 1
    records = json.loads((tmp_path / "gpu.json").read_text())
    assert [record["name"] for record in records] == list(gpu.PARTS)
    assert all(record["value"] is None and record["note"] == "CuPy is gone" for record in records)
    assert capsys.readouterr().out.count("not measured") == len(gpu.PARTS)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "everything"])
    with pytest.raises(SystemExit):
        gpu.main()

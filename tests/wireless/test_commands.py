"""allocate, wireless-study and calibrate: what they print and write, and one line for every mistake."""

import csv
import dataclasses
import json
import platform
import sys

import pytest
from matplotlib import image

from loops import each
from privtuner import calibration, cli
from privtuner.errors import InputError
from privtuner.system import get_num_threads
from privtuner.wireless import METHODS, Cell, allocate, default_tiers, load_tiers, study
from privtuner.wireless.figures import draw_allocation
from privtuner.wireless.report import plan, summary, table
from privtuner.wireless.sweeps import SWEEPS
from wireless_cases import PHONE_TOML, TABLET_TOML

SYSTEM = PHONE_TOML + TABLET_TOML


@pytest.fixture
def system(tmp_path):
    path = tmp_path / "system.toml"
    path.write_text(SYSTEM)
    return path


@pytest.fixture(scope="module")
def found():
    return allocate(Cell(devices=4).draw(1))


def run(capsys, *line):
    """Exit status, standard output, standard error."""
    status = cli.main([str(part) for part in line])
    return status, *capsys.readouterr()


def complaint(capsys, *line):
    status, out, err = run(capsys, *line)
    assert (status, out) == (2, "")
    (text,) = err.splitlines()
    return text.removeprefix("privtuner: error: ")


def test_allocate_prints_a_table_and_a_certificate(capsys, system):
    status, out, err = run(capsys, "allocate", system)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["device", "tier"]
    assert [line.split()[0] for line in lines[1:3]] == ["phone", "tablet"]
    assert [line.split()[0] for line in lines[4:]] == ["method", "energy", "privacy", "objective", "certified"]


def test_plan_says_seconds_joules_megabytes_and_bits(capsys, system):
    _, out, _ = run(capsys, "allocate", system, "--plan")
    head = " ".join(out.splitlines()[0].split())
    assert head == "device tier time, s deadline, s energy, J up, MB down, MB security, bits"
    phone = out.splitlines()[1].split()
    tier = default_tiers()[0]
    assert phone[:4] == ["phone", tier.name, "120", "120"]
    assert phone[5:] == [f"{64 * tier.upload_bits / 8e6:.4g}", f"{64 * tier.download_bits / 8e6:.4g}", "232"]


def test_allocation_is_written_and_drawn(capsys, system, tmp_path):
    target, figure = tmp_path / "a.json", tmp_path / "a.png"
    status, *_ = run(capsys, "allocate", system, "--method", "equal", "--json", target, "--plot", figure)
    assert status == 0
    record = json.loads(target.read_text())
    assert record["method"] == "equal"
    assert record["bound_j"] is None  # an equal split certifies nothing
    assert [row["device"] for row in record["devices"]] == ["phone", "tablet"]
    assert record["energy_j"] == pytest.approx(sum(row["total_j"] for row in record["devices"]), rel=1e-12)
    assert image.imread(figure).std() > 0


def test_tiers_of_another_file_take_the_place_of_the_systems(capsys, system, tmp_path):
    run(capsys, "calibrate", "--out", tmp_path / "t.toml", "--width", 2, "--tokens", 1, "--batch", 1, "--runs", 1)
    measured = {tier.name: tier for tier in load_tiers(tmp_path / "t.toml")}
    _, out, _ = run(capsys, "allocate", system, "--tiers", tmp_path / "t.toml", "--plan")
    phone = out.splitlines()[1].split()
    assert phone[5] == f"{64 * measured[phone[1]].upload_bits / 8e6:.4g}"


def test_mistakes_are_named_in_a_line(capsys, system, tmp_path):
    assert "choose one of global, alternating" in complaint(capsys, "allocate", system, "--method", "best")
    assert "cannot read" in complaint(capsys, "allocate", tmp_path / "none.toml")
    assert "cannot write" in complaint(capsys, "allocate", system, "--json", tmp_path / "none" / "a.json")
    assert "figures can be drawn as" in complaint(capsys, "allocate", system, "--plot", tmp_path / "a.xyz")
    assert "tolerance = 0.0" in complaint(capsys, "allocate", system, "--tolerance", 0)
    system.write_text(SYSTEM.replace("gain = 4e-13", "gain = -1"))
    assert "devices[1].gain = -1: must be a number in (0, inf)" in complaint(capsys, "allocate", system)
    system.write_text(SYSTEM.replace("deadline = 120", "deadline = 0.5"))
    assert "cannot meet its deadline of 0.5 s" in complaint(capsys, "allocate", system)


def test_missing_library_says_what_to_install(capsys, system, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("privtuner.wireless")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    status, out, err = run(capsys, "allocate", system)
    assert (status, out) == (1, "")
    assert "needs scipy" in err
    assert "pip install '.[wireless]' in a checkout of privtuner, or pip install scipy" in err


def test_report_of_a_method_without_a_bound():
    equal = allocate(Cell(devices=3).draw(1), "equal")
    assert "certified" not in summary(equal)
    assert len(table(equal).splitlines()) == len(plan(equal).splitlines()) == 4


def test_figures_of_few_and_of_many_devices(found, tmp_path):
    many = allocate(Cell(devices=40, bandwidth=8e7, server_frequency=4e10).draw(1), "equal")
    for name, allocation in (("few.png", found), ("few.pdf", found), ("few.svg", found), ("many.png", many)):
        draw_allocation(allocation, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000, name


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study with a linear and a logarithmic sweep of two values each."""
    folder = tmp_path_factory.mktemp("study")
    lines = []
    few = [sweep for sweep in SWEEPS if sweep.name in ("power", "devices")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            study, "SWEEPS", [dataclasses.replace(one, values=one.values[:: len(one.values) - 1]) for one in few]
        )
        return folder, study.run_study(folder, seeds=2, progress=lambda *step: lines.append(step)), lines


def test_study_writes_a_table_and_two_figures_of_each_experiment(written):
    folder, files, lines = written
    names = ["power", "devices", "convergence", "sets"]
    assert files == [folder / f"{name}{suffix}" for name in names for suffix in (".csv", ".png", ".pdf")]
    assert all(file.stat().st_size > 200 for file in files)
    done, totals, whats = zip(*lines, strict=True)
    assert list(done) == list(range(len(lines)))
    # Known beforehand but for the cells that are passed over.
    assert 0 <= len(lines) - totals[0] < len(METHODS)
    assert all(before < total for before, total in zip(done, totals, strict=True))
    assert {what.split()[0] for what in whats} == {"cell", *names[:-1], "parameter"}
    assert image.imread(folder / "power.png").std() > 0


def test_sweeps_of_the_study_are_of_cells(subtests):
    assert [one.name for one in SWEEPS] == ["bandwidth", "power", "server", "devices", "privacy", "deadline"]
    assert len({one.field for one in SWEEPS}) == len(SWEEPS)
    for sweep in SWEEPS:
        with subtests.test(sweep=sweep.name):
            assert list(sweep.values) == sorted(set(sweep.values))
            for value in sweep.values:
                cell = Cell(**{sweep.field: value})
                assert getattr(cell, sweep.field) == value
                assert (cell.draw(0) == Cell().draw(0)) == (value == getattr(Cell(), sweep.field))


def test_no_method_of_the_study_is_better_than_global(written):
    folder, _, _ = written
    with (folder / "devices.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["feasible"] == "1"]
    best = {(row["devices"], row["seed"]): float(row["objective_j"]) for row in rows if row["method"] == "global"}
    assert {row["method"] for row in rows} >= {"global", "alternating", "equal", "smallest", "brute-force"}
    for row in rows:
        least = best[row["devices"], row["seed"]]
        assert float(row["objective_j"]) >= least - 1e-6 * float(row["energy_j"])


def test_study_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(InputError, match=r"seeds = 0: must be an integer in \[1, 10000\]"):
        study.run_study(tmp_path, seeds=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        study.run_study(tmp_path / "file", seeds=1)


SMALL = calibration.Workload(width=4, layers=3, tokens=2, batch=4, runs=1)


def test_calibration_measures_every_set():
    calls = []
    tiers = calibration.measure(SMALL, frequency=1e9, progress=lambda *call: calls.append(call))
    assert [tier.name for tier in tiers] == ["linear-w8", "linear-w16", "ckks-8192", "ckks-16384", "ckks-32768"]
    done, totals, names = zip(*calls, strict=True)
    assert len(set(names)) == 1 + len(tiers)
    assert len(calls) == 1 + (1 + SMALL.runs) * len(tiers)
    assert list(done) == sorted(set(done))
    assert (done[0], done[-1], set(totals)) == (0, 100, {100})
    assert done[-2] < 100
    assert [tier.ring_dimension for tier in tiers] == [2048, 2048, 8192, 16384, 32768]
    assert all(tier.encrypt_cycles > 0 and tier.evaluate_cycles > 0 for tier in tiers)
    # A ciphertext's size is its ring's; there are two of a batch, and three layers of four samples.
    assert tiers[3].upload_bits / tiers[2].upload_bits == pytest.approx(2, rel=0.01)
    assert tiers[4].download_bits / tiers[3].download_bits == pytest.approx(2, rel=0.01)


def test_calibrated_bytes_are_those_of_the_messages():
    import numpy as np

    from privtuner import linear

    prepared = linear.prepare(np.eye(4), "linear-w8")
    masks, batch, sizes = linear.MaskCache(), np.ones((8, 4), np.float32), []
    for direction in ("forward", "backward", "forward", "backward"):
        request, secret = linear.encrypt(batch, prepared.spec, direction, masks)
        reply = linear.apply(prepared, request)
        linear.decrypt(reply, secret)
        sizes.append((len(request), len(reply)))
    up, down = (8 * sum(size[side] for size in sizes[2:]) * 3 / 4 for side in (0, 1))
    tier = calibration.measure(SMALL, frequency=1e9)[0]
    assert (tier.upload_bits, tier.download_bits) == (round(up), round(down))


def test_calibration_restores_the_threads():

    before = get_num_threads()
    calibration.measure(SMALL, frequency=1e9)
    assert get_num_threads() == before


def test_packaged_table_is_of_the_sets_as_they_are():
    measured = calibration.measure(SMALL, frequency=1e9)
    kept = ("name", "ring_dimension", "log2_modulus", "error_sigma", "secret", "security")
    for packaged, tier in zip(default_tiers(), measured, strict=True):
        assert [getattr(packaged, name) for name in kept] == [getattr(tier, name) for name in kept]


def test_workload_out_of_range(subtests):
    for field, value in (("width", 0), ("layers", 0), ("tokens", 5000), ("batch", True), ("runs", 1.5)):
        message = rf"{field} = {value}: must be an integer in \[1, \d+\]"
        with subtests.test(field=field), pytest.raises(InputError, match=message):
            calibration.Workload(**{field: value})
    with pytest.raises(InputError, match=r"tokens \* batch = 8192: one ciphertext of the smallest ring holds 4096"):
        calibration.Workload(tokens=64, batch=128)


@each(frequency=[0.0, -1.0, float("inf"), float("nan")])
def test_frequency_out_of_range(frequency):
    with pytest.raises(InputError, match="must be a number in"):
        calibration.measure(SMALL, frequency=frequency)


def test_frequency_that_the_system_does_not_tell(tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr("privtuner.system._CPUINFO", path)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert calibration.processor_name() == "unknown"
    with pytest.raises(InputError, match=r"does not tell the processor's frequency.*--frequency 2\.6e9"):
        calibration.processor_frequency()
    path.write_text("model name\t: A processor\ncpu MHz\t\t: 1200.5\ncpu MHz\t\t: 2600.0\n")
    assert calibration.processor_frequency() == 2.6e9
    assert calibration.processor_name() == "A processor"


def test_calibrate_leaves_an_old_table_until_it_is_done(capsys, tmp_path, monkeypatch):
    path = tmp_path / "t.toml"
    path.write_text("old")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "measure", interrupted)
    assert run(capsys, "calibrate", "--out", path)[0] == 130
    assert path.read_text() == "old"


def test_calibrate_complains_before_it_measures(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: pytest.fail("measured"))
    assert "cannot write" in complaint(capsys, "calibrate", "--out", tmp_path / "none" / "t.toml")
    assert "must end in .toml or .json" in complaint(capsys, "calibrate", "--out", tmp_path / "t.txt")

"""Systems and tables of tiers in files: what is written is read, and every mistake is named with its place."""

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loops import each
from privtuner.errors import InputError
from privtuner.wireless import Cell, Tier, default_tiers, load_system, load_tiers, save_tiers
from wireless_cases import PHONE_TOML


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "system.toml"
    path.write_text(PHONE_TOML)
    return path


@each(suffix=[".toml", ".json", ".TOML"])
def test_tables_of_tiers_come_back(tmp_path, suffix):
    path = tmp_path / f"tiers{suffix}"
    save_tiers(path, default_tiers(), "two\nlines")
    assert load_tiers(path) == default_tiers()
    assert path.read_text().startswith("{" if suffix == ".json" else "# two\n# lines\n\n[[tiers]]\n")


names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)
costs = st.floats(1e-3, 1e15, allow_subnormal=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(st.tuples(names, costs, costs), min_size=1, max_size=3, unique_by=lambda entry: entry[0]))
def test_any_table_comes_back(tmp_path, entries):
    tiers = tuple(Tier(name, 8192, 200.0, cost, cost, other, other) for name, cost, other in entries)
    for suffix in (".toml", ".json"):
        save_tiers(tmp_path / f"tiers{suffix}", tiers)
        assert load_tiers(tmp_path / f"tiers{suffix}") == tiers


def test_toml_and_json_say_the_same(path, tmp_path):
    made = Cell(devices=3).draw(0)
    record = dataclasses.asdict(made)
    del record["INSECURE_security_floor"]
    (tmp_path / "system.json").write_text(json.dumps(record))
    assert load_system(tmp_path / "system.json") == made
    system = load_system(path)
    assert system.devices[0].name == "phone"
    assert system.tiers == default_tiers()
    assert system.privacy_price == 0.02


def test_tiers_inline_beside_the_file_or_as_an_argument(path, tmp_path):
    few = default_tiers()[:2]
    save_tiers(tmp_path / "tiers.toml", few)
    path.write_text('tiers = "tiers.toml"\n' + PHONE_TOML)
    assert load_system(path).tiers == few
    assert load_system(path, tiers=few[:1]).tiers == few[:1]
    path.write_text(PHONE_TOML + (tmp_path / "tiers.toml").read_text())
    assert load_system(path).tiers == few


def test_a_lower_floor_is_read(path):
    weak = '[[tiers]]\nname = "weak"\nring_dimension = 4096\nlog2_modulus = 200\n' + "".join(
        f"{name} = 1e6\n" for name in ("encrypt_cycles", "evaluate_cycles", "upload_bits")
    )
    path.write_text(PHONE_TOML + weak)
    with pytest.raises(InputError, match=r"system\.toml: tier 'weak' has \d+ bits"):
        load_system(path)
    path.write_text("INSECURE_security_floor = 40\n" + PHONE_TOML + weak)
    assert load_system(path).tiers[0].security < 128


def changed(old, new):
    assert old in PHONE_TOML
    return PHONE_TOML.replace(old, new)


MISTAKES = {
    "unknown field, close": (changed("gain", "gian"), r"devices\[0\]\.gian is no known field; did you mean 'gain'\?"),
    "unknown field": ("zzz = 1\n" + PHONE_TOML, "zzz is no known field; known are devices, tiers, server, channel"),
    "missing field": (changed("deadline = 120\n", ""), r"devices\[0\]\.deadline is missing, in s"),
    "missing name": (changed('name = "phone"\n', ""), r"devices\[0\]\.name is missing"),
    "missing table": (changed("[server]\nfrequency = 5_000_000_000\ncapacitance = 1e-28\n", ""), "server is missing"),
    "out of range": (changed("3e-12", "-1"), r"devices\[0\]\.gain = -1: must be a number in \(0, inf\)"),
    "text for a number": (changed("4e6", '"wide"'), r"channel\.bandwidth = 'wide': must be a number"),
    "text for a table": (
        'server = "fast"\n' + changed("[server]\nfrequency = 5_000_000_000\ncapacitance = 1e-28\n", ""),
        r"server = 'fast': must be a table of fields",
    ),
    "huge": (changed("64", "1" + 400 * "0"), r"devices\[0\]\.samples = 10+: must be a number"),
    "own field": (changed("0.02", "-1"), r"privacy_price = -1: must be a number in \[0, inf\)"),
    "table for a list": (
        changed("[[devices]]", "[devices]"),
        r"devices = .*: must be a list of tables, \[\[devices\]\]",
    ),
    "number for a list": ("tiers = 3\n" + PHONE_TOML, r"tiers = 3: must be a list of tables"),
    "number in a list": ("tiers = [3]\n" + PHONE_TOML, r"tiers\[0\] = 3: must be a table of fields"),
    "no devices": (PHONE_TOML.split("[[devices]]")[0].replace("privacy", "devices = []\nprivacy"), "devices is empty"),
    "malformed": ("= 3", "is not valid TOML"),
}


@each(("text", "message"), MISTAKES.values())
def test_mistakes_are_named_with_file_and_field(path, text, message):
    path.write_text(text)
    with pytest.raises(InputError, match=rf"system\.toml.*({message})"):
        load_system(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.toml: No such file"):
        load_system(tmp_path / "none.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        load_system(tmp_path / "folder.toml")
    with pytest.raises(InputError, match=r"system\.yaml: the name must end in \.toml or \.json"):
        load_system(tmp_path / "system.yaml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not valid TOML"):
        load_system(tmp_path / "bytes.toml")


@each(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must hold one table of fields, not list"),
        ('{"tiers": [], "rings": 1}', "rings is no known field"),
        ("{}", "tiers is missing"),
    ],
)
def test_json_that_is_no_table(tmp_path, text, message):
    path = tmp_path / "tiers.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"tiers\.json.*{message}"):
        load_tiers(path)


def test_files_that_are_too_large(path, monkeypatch):
    from privtuner.wireless import files

    monkeypatch.setattr(files, "_LARGEST", 100)
    with pytest.raises(InputError, match=r"system\.toml is larger than 100 bytes$"):
        load_system(path)


def test_mistakes_in_the_table_beside_are_named_with_its_file(path, tmp_path):
    path.write_text('tiers = "tiers.toml"\n' + PHONE_TOML)
    with pytest.raises(InputError, match=r"cannot read .*tiers\.toml"):
        load_system(path)
    save_tiers(tmp_path / "tiers.toml", default_tiers())
    text = (tmp_path / "tiers.toml").read_text()
    (tmp_path / "tiers.toml").write_text(text.replace("ring_dimension = 8192", "ring_dimension = 8191"))
    with pytest.raises(InputError, match=r"tiers\.toml: tiers\[2\]\.ring_dimension = 8191: must be a power of two"):
        load_system(path)


def test_comments_cannot_spoil_the_table(tmp_path):
    save_tiers(tmp_path / "tiers.toml", default_tiers(), "kept\na\x07bell\ntoo")
    assert load_tiers(tmp_path / "tiers.toml") == default_tiers()
    assert (tmp_path / "tiers.toml").read_text().startswith("# kept\n# too\n")


def test_a_table_without_tiers(tmp_path):
    with pytest.raises(InputError, match="tiers is empty: a table has at least one"):
        save_tiers(tmp_path / "tiers.toml", [])


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*tiers\.toml: No such file or directory"):
        save_tiers(tmp_path / "none" / "tiers.toml", default_tiers())
    with pytest.raises(InputError, match=r"must end in \.toml or \.json"):
        save_tiers(tmp_path / "tiers.csv", default_tiers())

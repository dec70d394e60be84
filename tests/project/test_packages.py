"""The parts of the package as attributes of it, and what is said where a third-party package is missing."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import privtuner
from privtuner import packages
from privtuner.errors import MissingPackageError, PrivtunerError

ROOT = Path(__file__).parents[2]
PARTS = sorted(privtuner._PARTS)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_parts_are_reached_through_the_package():
    # In a fresh process: here they have been imported already.
    code = f"import privtuner\nfor part in {PARTS}: print(getattr(privtuner, part).__name__)"
    *parts, transport = run(f"{code}\nprint(privtuner.service.RemoteTransport.__name__)").split()
    assert parts == [f"privtuner.{part}" for part in PARTS]
    assert transport == "RemoteTransport"  # what the README takes the model from


def test_every_part_is_named():
    inner = {"cli", "commands", "copies", "errors", "foreign", "linear", "packages", "parties", "paths", "retries"}
    inner |= {"turns", "wire"}
    found = {
        path.stem
        for path in Path(privtuner.__file__).parent.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and not path.stem.startswith("_")
    }
    assert found - inner == set(PARTS)
    assert set(PARTS) <= set(dir(privtuner))
    assert set(privtuner.__all__) <= set(dir(privtuner))
    assert "importlib" not in dir(privtuner)


def test_other_names_are_no_attributes():
    assert not hasattr(privtuner, "nonsense")
    with pytest.raises(AttributeError, match="module 'privtuner' has no attribute 'nonsense'"):
        privtuner.nonsense  # noqa: B018


MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import privtuner
for statement in ("privtuner.{part}", "from privtuner import {part}", "hasattr(privtuner, '{part}')"):
    try:
        exec(statement)
    except ModuleNotFoundError as error:
        print(type(error).__name__, error.name.partition(".")[0], error, sep="; ")
"""


@pytest.mark.parametrize(
    ("part", "package", "extra", "name"),
    [
        ("nn", "torch", "train", "torch"),
        ("service", "grpc", "service", "grpcio"),
        ("wireless", "scipy", "wireless", "scipy"),
    ],
)
def test_a_part_whose_package_is_missing_says_so(part, package, extra, name):
    advice = f"pip install '.[{extra}]' in a checkout of privtuner, or pip install {name}"
    line = f"MissingPackageError; {package}; privtuner.{part} needs {package}: {advice}"
    assert run(MISSING.format(package=package, part=part)).splitlines() == [line] * 3


def test_a_missing_module_of_ours_stays_what_it_is(monkeypatch):
    monkeypatch.delitem(sys.modules, "privtuner.security", raising=False)
    monkeypatch.delattr(privtuner, "security", raising=False)
    monkeypatch.setitem(sys.modules, "privtuner.security", None)
    with pytest.raises(ModuleNotFoundError, match="privtuner.security") as caught:
        privtuner.security  # noqa: B018
    assert not isinstance(caught.value, MissingPackageError)
    assert packages.missing(ModuleNotFoundError("?"), "this command") is None


def test_the_error_is_ours_and_what_python_expects():
    error = packages.missing(ModuleNotFoundError("No module named 'grpc'", name="grpc"), "this command")
    assert isinstance(error, PrivtunerError)
    assert isinstance(error, ImportError)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.name) == (MissingPackageError, str(error), "grpc")


def test_advice_names_what_the_extras_hold():
    text = (
        (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("[project.")[0]
    )
    extras = {
        extra: {re.split(r"[<>=;]", requirement)[0] for requirement in re.findall(r'"([^"]+)"', body)}
        for extra, body in re.findall(r'^(\w+) = \[((?:[^"\]]|"[^"]*")*)\]$', text, re.MULTILINE)
    }
    for extra, package in packages._PACKAGES.values():
        assert package.strip("'") in extras[extra], package
    brought = {package.strip("'") for _, package in packages._PACKAGES.values()}
    for extra in ("train", "service", "wireless", "cuda13"):
        assert extras[extra] <= brought


def test_nobody_is_sent_to_an_index_that_lacks_the_package():
    files = [*(ROOT / "python").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    files += [ROOT / name for name in ("CONTRIBUTING.md", "README.md", "SECURITY.md")]
    advised = re.compile(r"pip install[^\n]*[ '\"]privtuner(?=[\[ '\"=]|$)", re.MULTILINE)
    assert advised.search("pip install 'privtuner[train]'")
    assert advised.search("pip install --force-reinstall privtuner")
    assert not advised.search("pip install '.[train]' in a checkout of privtuner.")
    for file in files:
        if file not in (Path(__file__), ROOT / "python" / "privtuner" / "packages.py"):
            assert not advised.search(file.read_text()), file

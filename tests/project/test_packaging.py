"""What is in the wheel, what it says of itself, and that it carries no code for one processor."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import privtuner
from privtuner import _core

ROOT = Path(__file__).parents[2]
INSTALLED = Path(privtuner.__file__).parent
STUBS = INSTALLED / "_core"


@pytest.fixture(scope="module")
def distribution():
    return importlib.metadata.distribution("privtuner")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Names of the files in a wheel, but for the compiled modules, which take minutes to build."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder]
    environment = {**os.environ, "SKBUILD_WHEEL_CMAKE": "false"}
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, ROOT], env=environment, check=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def project_field(name: str) -> str:
    (value,) = re.findall(rf'^{name} = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return value


def build_files() -> list[Path]:
    names = ("CMakeLists.txt", "Makefile", "pyproject.toml", "constraints.txt", ".ci/run")
    return [ROOT / name for name in names] + sorted((ROOT / "cmake").iterdir())


def test_the_one_version_number(distribution):
    assert distribution.version == project_field("version") == privtuner.__version__ == _core.__version__


def test_no_other_file_states_the_version():
    version = project_field("version")
    for file in [*build_files(), *(ROOT / "python").rglob("*.py"), *(ROOT / "cpp").rglob("*.?pp")]:
        if file.name not in ("pyproject.toml", "constraints.txt"):
            assert f'"{version}"' not in file.read_text(), file


def test_the_wheel_holds_the_package_and_nothing_else(files):
    for name in ("__init__.py", "py.typed", "_core/__init__.pyi", "_core/wire.pyi"):
        assert f"privtuner/{name}" in files
    assert [name for name in files if re.fullmatch(r"privtuner/data/\w+\.csv", name)]
    assert "privtuner/wireless/tiers.toml" in files
    kernels = (ROOT / "python" / "privtuner" / "cuda" / "kernels").iterdir()
    assert {f"privtuner/cuda/kernels/{file.name}" for file in kernels} <= files
    assert [name for name in files if name.endswith("licenses/LICENSE")]
    tops = {name.split("/")[0] for name in files if not name.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"privtuner"}
    assert not [name for name in files if name.endswith((".hpp", ".cpp", ".h", ".a"))]


def test_every_source_file_is_in_the_wheel(files):
    sources = (ROOT / "python").rglob("*.py")
    assert {file.relative_to(ROOT / "python").as_posix() for file in sources} <= files


def test_what_is_compiled_is_installed_beside_it(distribution):
    modules = [Path(_core.__file__), *Path(_core.__file__).parent.glob("_openfhe.*")]
    assert {module.parent.name for module in modules} == {"privtuner"}
    assert re.search(
        r"install\(TARGETS \$\{extensions\} DESTINATION privtuner\b", (ROOT / "CMakeLists.txt").read_text()
    )


def test_numpy_is_the_only_hard_requirement(distribution):
    hard = [requirement for requirement in distribution.requires if "extra ==" not in requirement]
    assert [re.split(r"[<>=!~ ;]", requirement)[0] for requirement in hard] == ["numpy"]


def test_extras(distribution):
    extras = set(distribution.metadata.get_all("Provides-Extra"))
    assert extras == {"train", "service", "dp", "wireless", "cuda12", "cuda13", "demo", "test", "bench", "lint"}


def test_constraints_pin_every_direct_requirement(distribution):
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = {re.split(r"[<>=!~ ;\[]", requirement)[0] for requirement in distribution.requires} - {"privtuner"}
    assert names <= pinned


def test_no_build_file_compiles_for_the_machine_it_runs_on():
    for file in build_files():
        assert not re.search(r"-m(arch|tune|cpu)=", file.read_text()), file


def test_the_command_is_installed(distribution):
    command = Path(sys.executable).with_name("privtuner")
    result = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    for name in ("info", "serve", "train"):
        assert name in result.stdout


def public(names) -> set[str]:
    return {name for name in names if not name.startswith("_") or name == "__version__"}


def stub_names(body: list[ast.stmt]) -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname for alias in node.names if alias.asname is not None)
    return public(names)


def stubs(name: str) -> list[ast.stmt]:
    return ast.parse((STUBS / f"{name}.pyi").read_text()).body


def test_stubs_name_what_the_modules_have():
    assert stub_names(stubs("__init__")) == public(dir(_core))
    submodules = {name for name in public(dir(_core)) if isinstance(getattr(_core, name), ModuleType)}
    assert {file.stem for file in STUBS.iterdir()} == submodules | {"__init__"}
    for name in submodules:
        assert stub_names(stubs(name)) == public(dir(getattr(_core, name))), name


def test_stubs_name_the_members_of_every_class():
    for module, file in [(_core, "__init__"), (_core.steps, "steps")]:
        classes = {name for name in public(dir(module)) if isinstance(getattr(module, name), type)}
        declared = [node for node in stubs(file) if isinstance(node, ast.ClassDef)]
        assert {stub.name for stub in declared} == classes
        for stub in declared:
            assert stub_names(stub.body) == public(vars(getattr(module, stub.name))), stub.name

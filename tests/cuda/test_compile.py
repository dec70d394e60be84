"""Every kernel compiles for the GPUs it is meant for, without a warning and without a GPU at hand."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from privtuner.cuda import device, sources

ARCHITECTURES = ("sm_80", "sm_90")
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")  # it adds them behind ours, and the last one counts
MOST_REGISTERS = 65536  # of a multiprocessor: a block that needs more cannot be launched


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def nvrtc() -> Path | None:
    """The run-time compiler of the package nvidia-cuda-nvrtc, which CuPy's own extra installs."""
    for name in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        for folder in spec.submodule_search_locations or () if spec else ():
            for library in Path(folder).glob("lib/libnvrtc.so.*"):
                return library
    return None


def inexact(ptx: str) -> list[str]:
    """Instructions that do not give the processor's bits: they take subnormal numbers for zero, or approximate."""
    return re.findall(r"\S*\.(?:ftz|approx|full)\S*", ptx)


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed: put CUDA's bin folder on PATH, or set CUDA_HOME")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", sources.units())
def test_nvcc(unit, architecture, tmp_path):
    source = tmp_path / f"{unit}.cu"
    source.write_text(sources.source(unit))
    command = [nvcc(), f"-arch={architecture}", *device.OPTIONS, "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [
        "-ftz=true",
        "-keep",
        "-keep-dir",
        tmp_path,
        "-diag-suppress",
        "177",
    ]  # a constant of a header that this unit has no use for
    done = subprocess.run([*command, "-cubin", "-o", tmp_path / "out.cubin", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    (ptx,) = tmp_path.glob("*.ptx")
    assert inexact(ptx.read_text()) == []
    kernels = {name: kernel for name, kernel in sources.kernels().items() if kernel.unit == unit}
    assert {name for name, *_ in found} == set(kernels)
    for name, _, spilled, registers in found:
        assert int(spilled) == 0, f"{name} spills {spilled} bytes"
        assert int(registers) * kernels[name].max_threads <= MOST_REGISTERS, name


@pytest.mark.skipif(nvrtc() is None, reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", sources.units())
def test_nvrtc(unit, architecture):
    path = nvrtc()
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))
    library = ctypes.CDLL(str(path))
    program = ctypes.c_void_p()
    assert (
        library.nvrtcCreateProgram(ctypes.byref(program), sources.source(unit).encode(), b"unit.cu", 0, None, None) == 0
    )
    given = (f"-arch={architecture}", *device.OPTIONS, *CUPY_OPTIONS, "-diag-suppress=177")
    options = [option.encode() for option in given]
    failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    assert not log.value.strip(), log.value.decode()
    assert library.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    assert size.value > 0
    library.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    library.nvrtcGetPTX(program, ptx)
    assert inexact(ptx.value.decode()) == []
    library.nvrtcDestroyProgram(ctypes.byref(program))


def test_an_unknown_type_or_include_would_be_noticed(tmp_path):
    """The sources that are compiled are whole: nothing is left to be found on an include path."""
    for unit in sources.units():
        assert '#include "' not in sources.source(unit)
        assert "PT_KERNEL(" in sources.source(unit)

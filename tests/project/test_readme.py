"""The scripts in README.md run as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluators import NEEDS_OPENFHE
from minilm import find_minilm
from privtuner import cuda

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_eight_scripts():
    assert len(SCRIPTS) == README.count("```python") == 8


def test_from_nothing_to_a_trained_adapter(tmp_path):
    """The section's commands, in the clear and for two steps, and then what uses the adapter."""
    shutil.copytree(find_minilm(), tmp_path / "model")
    (line,) = re.findall(r"^    privtuner train --server 127.0.0.1:50051 ((?:.*\\\n)*.*)$", README, re.MULTILINE)
    words = line.replace("\\\n", " ").partition("#")[0].split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    options |= {"--steps": "2", **{name: str(ROOT / options[name]) for name in ("--data", "--eval")}}
    line = ["train", "--plain", "--model", "model", *(word for option in options.items() for word in option)]
    run(f"import sys; from privtuner.cli import main; sys.exit(main({line!r}))", tmp_path)
    assert re.fullmatch(r"\['\w+', '\w+'\]\n", run(SCRIPTS[0], tmp_path))


def test_the_training_loop_learns_and_leaves_an_adapter(tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", run(SCRIPTS[1], tmp_path))]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_sealed_models_functions(tmp_path):
    run(SCRIPTS[2], tmp_path)  # what they call is tested with a server that takes minutes


def test_the_four_functions(tmp_path):
    run(SCRIPTS[3], tmp_path)


def test_the_encrypted_circuit(tmp_path):
    assert "levels      6 used, 1 left" in run(SCRIPTS[4], tmp_path)


@NEEDS_OPENFHE
def test_openfhe(tmp_path):
    off, predicted = map(float, re.findall(r"[\d.]+e-\d+", run(SCRIPTS[5], tmp_path)))
    assert off < predicted < 1e-3


def test_the_gpu(tmp_path):
    """On the host in place of a GPU, where there is none."""
    folder = ROOT / "tests" / "support"
    host = f"import sys; sys.path.append({str(folder)!r}); import cuda_host; from privtuner import cuda\n"
    stand_in = "" if cuda.available() else host + "cuda.devices = lambda *_: [cuda_host.HostDevice()]\n"
    (off,) = map(float, re.findall(r"[\d.]+e-\d+", run(stand_in + SCRIPTS[6], tmp_path)))
    assert off < 1e-3


def test_the_wireless_cell(tmp_path):
    certified, better = (
        float(word) for word in re.findall(r"([\d.e-]+) J(?: better|$)", run(SCRIPTS[7], tmp_path), re.M)
    )
    assert 0 <= certified <= 1e-5
    assert better > 0


def test_the_wireless_system(tmp_path):
    (system,) = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "system.toml").write_text(system)
    code = "from privtuner.cli import main; main(['allocate', 'system.toml', '--plan'])"
    assert re.search(r"^tablet .* 232$", run(code, tmp_path), re.MULTILINE)


@pytest.mark.parametrize("command", ["serve", "train", "prepare", "embed", "allocate", "certs", "token"])
def test_the_command_lines_use_options_that_exist(command):
    lines = re.findall(rf"^    privtuner {command} ((?:.*\\\n)*.*)$", README, re.MULTILINE)
    assert len(lines) == {"allocate": 2, "serve": 6, "train": 7}.get(command, 1)
    help_text = run(f"from privtuner.cli import main; main(['{command}', '--help'])", Path())
    options = {option for line in lines for option in re.findall(r"--[\w-]+", line)}
    assert options
    assert options <= set(re.findall(r"--[\w-]+", help_text))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_make_targets_exist(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"(?:^    |`)make (?:\w+=\S+ )?([a-z-]+)", text, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named
    assert named <= set(phony.split())


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((\w[\w./-]*)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()

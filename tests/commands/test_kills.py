"""Server and owner killed with -9 at random moments: no step is lost or done twice, and the result is the same bits.

A few kills here; ``PRIVTUNER_KILLS=200`` for many.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kills
from text_cases import environment

KILLS = int(os.environ.get("PRIVTUNER_KILLS", "6"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, for randomness that can be repeated")
def test_kills_leave_no_trace(tmp_path):
    source, library = Path(kills.__file__).with_name("entropy.c"), tmp_path / "entropy.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, kills.__file__, str(tmp_path), str(KILLS), "1"],
        capture_output=True,
        text=True,
        check=False,
        # One code path of PyTorch's libraries, whatever the memory's alignment.
        env={**environment(), "LD_PRELOAD": str(library), "MKL_CBWR": "COMPATIBLE", "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(done.stdout)
    assert sum(found["kills"].values()) == KILLS
    assert found["runs with other losses"] == 0, found
    assert found["runs with another adapter"] == 0, found
    assert found["went on"] > 0

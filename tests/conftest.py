"""Settings of the property tests (quick and repeatable, or HYPOTHESIS_PROFILE=thorough), and fixtures of many tests."""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from backends import ALL, LINEAR, Backend, backend_of
from privtuner import openfhe

settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

_NUMBERS = itertools.count()


def pytest_report_header() -> str:
    """Whether OpenFHE is under test."""
    status = openfhe.status()
    return f"OpenFHE: {'tested' if status.available else 'absent, its tests are skipped'}: {status.reason}"


@pytest.fixture(params=LINEAR)
def backend(request: pytest.FixtureRequest) -> Backend:
    """The linear scheme on one device."""
    return backend_of(request.param)


@pytest.fixture(params=ALL)
def any_backend(request: pytest.FixtureRequest) -> Backend:
    """A scheme on one device."""
    return backend_of(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread: for tests of models so small that more of them only wait for each other."""
    from text_cases import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny classifier with its tokenizer."""
    from text_cases import tiny_model_directory

    return tiny_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _own_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep each test, and the processes it starts, from the user's known bundles and token, and from another test's."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / f"configuration-{next(_NUMBERS)}"))
    monkeypatch.delenv("PRIVTUNER_TOKEN", raising=False)


def pytest_configure():
    """Take the signals that nohup and scripts ignore: what is tested here, and every process it starts, needs them."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Whether OpenFHE is there, and what is said where it is not: nothing here needs it."""

import importlib

import pytest

from privtuner import _core, ckks, openfhe
from privtuner.commands import info
from privtuner.errors import EngineError, InputError
from privtuner.openfhe import library
from privtuner.schemes import SCHEMES, scheme


@pytest.fixture
def missing(monkeypatch, request):
    """OpenFHE's module cannot be imported."""
    genuine = importlib.import_module

    def import_module(name, *rest):
        if name == "privtuner._openfhe":
            raise request.param
        return genuine(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)
    library._module.cache_clear()
    yield request.param
    library._module.cache_clear()


ABSENT = ModuleNotFoundError("No module named 'privtuner._openfhe'", name="privtuner._openfhe")
BROKEN = ImportError("libOPENFHEpke.so.1: cannot open shared object file")


@pytest.mark.parametrize("missing", [ABSENT], indirect=True)
def test_a_build_without_it_says_where_it_looked_and_what_to_install(missing):
    assert not openfhe.available()
    status = openfhe.status()
    assert (status.available, status.version) == (False, "")
    assert _core.openfhe_status in status.reason
    assert "install OpenFHE 1.2 or newer" in status.reason
    assert "CMAKE_PREFIX_PATH=<its prefix> pip install --force-reinstall --no-deps . in a checkout" in status.reason
    (entry,) = [
        device for scheme in info.collect()["schemes"] if scheme["name"] == "openfhe" for device in scheme["devices"]
    ]
    assert (entry["available"], entry["reason"]) == (False, status.reason)
    assert "    cpu         absent: " in info.render(info.collect())


@pytest.mark.parametrize("missing", [BROKEN], indirect=True)
def test_libraries_that_do_not_load(missing):
    assert "libOPENFHEpke.so.1: cannot open" in openfhe.status().reason
    assert "put OpenFHE back, or build again" in openfhe.status().reason


@pytest.mark.parametrize("missing", [ABSENT, BROKEN], indirect=True)
def test_every_use_is_refused(missing):
    for use in (
        lambda: openfhe.Context(ckks.Parameters.secure(1)),
        lambda: openfhe.Context.from_settings(1),
        lambda: openfhe.Context.INSECURE(ckks.Parameters.INSECURE(1)),
        lambda: openfhe.Context.from_bytes(b"bytes"),
        openfhe.num_threads,
        lambda: openfhe.set_num_threads(1),
        openfhe.OpenFheClient,
        lambda: scheme("openfhe").client(),
    ):
        with pytest.raises(EngineError, match="OpenFHE is not available: "):
            use()


def test_the_build_says_what_it_found():
    assert _core.openfhe_status
    if openfhe.available():
        assert openfhe.status().reason == f"OpenFHE {openfhe.status().version} in {library.library().library}"
        assert openfhe.status().version >= "1.2"


def test_names_of_owners():
    assert scheme("linear").client().scheme == "linear"
    with pytest.raises(InputError, match="unknown scheme 'seal'; choose linear or openfhe"):
        scheme("seal").client()
    for name in SCHEMES:
        with pytest.raises(InputError, match="-1"):
            scheme(name).client(mask_cache_bytes=-1)

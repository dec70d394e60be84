"""The backends that the contract of the linear scheme holds for."""

import pytest

from backends import ALL, LINEAR, Backend, backend_of


@pytest.fixture(params=LINEAR)
def backend(request) -> Backend:
    """The linear scheme on one device."""
    return backend_of(request.param)


@pytest.fixture(params=ALL)
def any_backend(request) -> Backend:
    """A scheme on one device."""
    return backend_of(request.param)

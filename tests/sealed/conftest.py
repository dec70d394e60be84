"""Owner and server of a small sealed model, in one process or over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from privtuner.sealed.owner import SealedOwner
from sealed_cases import TinyModel, served


@pytest.fixture(params=["local", "grpc"])
def pair(request) -> Iterator[Callable[..., tuple[SealedOwner, Any]]]:
    """Makes an owner and the service that it talks to: ``pair(model, owner options, service options)``."""
    with ExitStack() as stack:

        def make(model=None, owner=None, service=None):
            model = model or TinyModel()
            transport, running = stack.enter_context(served(request.param, model, **(service or {})))
            made = SealedOwner(model.public, transport, allow_insecure=True, **(owner or {}))
            return stack.enter_context(made), running

        yield make

"""Calls as a server would report them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from privtuner.service.counts import Account, Counter


@contextmanager
def calling(counter: Counter, tenant: str, caller: bytes = b"", *, name: str = "Apply") -> Iterator[Account]:
    """The account of one call by ``tenant``."""
    with counter.account(name) as account:
        account.caller(tenant, caller)
        yield account

"""STAND-IN until branch core is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any


class Refresher:
    def __init__(self, public_key: Any, exchange: Callable[[Iterable[bytes]], Iterator[bytes]]) -> None:
        self.public_key, self.exchange = public_key, exchange

"""One test that runs many cases, where an id of its own for each would say nothing more."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["each"]


def each(**values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test with each combination of the values, as subtests that a failure names; fixtures are shared."""
    combinations = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(subtests: Any, **fixtures: Any) -> None:
            for case in combinations:
                with subtests.test(**case):
                    test(**fixtures, **case)

        kind = inspect.Parameter.KEYWORD_ONLY
        names = ["subtests", *(name for name in inspect.signature(test).parameters if name not in values)]
        run.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate

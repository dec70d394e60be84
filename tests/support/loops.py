"""One test that runs many cases, where an id of its own for each would say nothing more."""

from __future__ import annotations

import functools
import inspect
import itertools
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["each"]


def each(
    names: Sequence[str] = (), rows: Iterable[Sequence[Any]] = ((),), /, **values: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test with each row of arguments and each combination of the values: subtests that a failure names.

    All other arguments are fixtures, which the cases share.
    """
    cases = [
        dict(zip(names, row, strict=True)) | dict(zip(values, combination, strict=True))
        for row in rows
        for combination in itertools.product(*values.values())
    ]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)  # pytest shows the place of the test
        def run(subtests: Any, **fixtures: Any) -> None:
            for place, case in enumerate(cases):
                named = {name: reprlib.repr(value) for name, value in case.items()}
                with subtests.test(f"case {place}", **named):
                    test(**fixtures, **case)

        fixtures = [name for name in inspect.signature(test).parameters if name not in cases[0]]
        kind = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("subtests", *fixtures)])
        run.__signature__ = signature  # type: ignore[attr-defined]
        return run

    return decorate

"""What ``copy`` and ``pickle``, hence process pools, do with objects: share them, rebuild them, or refuse in a line."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from privtuner.errors import InputError

__all__ = ["Immutable", "Stays"]


class Immutable:
    """An object that never changes. Copies are the object itself, like those of strings."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class Stays:
    """Something bound to its process: deep copies of what holds it go on using it, and pickling it is refused."""

    stays: ClassVar[str]
    """Text of the refusal."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise InputError(self.stays)

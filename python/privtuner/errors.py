"""Every exception privtuner raises on purpose.

All derive from `PrivtunerError`, so one ``except`` clause separates them from bugs. Each also derives from the
built-in that Python code expects in its place (`ValueError` for bad values, `RuntimeError` for bad states,
`ModuleNotFoundError` for packages that are not installed).
Messages name the offending value and what to do about it, and never contain key material or clear activations.
"""

from __future__ import annotations

__all__ = [
    "CkksError",
    "EngineError",
    "InfeasibleError",
    "InputError",
    "IntegrityError",
    "LostError",
    "MessageError",
    "MissingPackageError",
    "PrivtunerError",
    "SecretError",
    "ServiceError",
    "WeightWithheldError",
]


class PrivtunerError(Exception):
    """Base class of every exception raised by privtuner."""


class InputError(PrivtunerError, ValueError):
    """An argument is unusable: wrong shape, dtype or name, or values that are not finite."""


class InfeasibleError(InputError):
    """A resource allocation that meets every constraint does not exist.

    Attributes:
        constraint: what fails: ``"deadline"``, ``"bandwidth"``, ``"server"``, ``"bandwidth and server"``, or
            ``"max_nodes"`` where the search ended before it could tell.
        device: name of the device that cannot meet its deadline even alone, or that asks for most of what is short.
        shortfall: how much is missing, as a part of what there is (of the deadline, or of the shared resource).
    """

    def __init__(self, message: str, constraint: str, device: str, shortfall: float) -> None:
        super().__init__(message)
        self.constraint, self.device, self.shortfall = constraint, device, shortfall

    def __reduce__(self) -> tuple[type[InfeasibleError], tuple[str, str, str, float]]:
        return type(self), (str(self), self.constraint, self.device, self.shortfall)


class MessageError(PrivtunerError, ValueError):
    """A message is malformed, truncated, corrupt, of another version, or meant for another layer."""


class IntegrityError(PrivtunerError, RuntimeError):
    """What the server returned is not what it was asked to compute."""


class MissingPackageError(PrivtunerError, ModuleNotFoundError):
    """A third-party package that this part of privtuner needs is not installed; says how to install it."""


class CkksError(PrivtunerError, RuntimeError):
    """An operation on ciphertexts cannot be done: no level left, scales that disagree, a missing key, a bound passed.

    Also raised on decryption when values are beyond their bound, or cannot be told from others modulo q.
    """


class SecretError(PrivtunerError, RuntimeError):
    """A one-time key is used a second time, or a secret is copied or serialised."""


class EngineError(PrivtunerError, RuntimeError):
    """A device, library or instruction set that was asked for is missing on this machine, or cannot do the task."""


class ServiceError(PrivtunerError, RuntimeError):
    """The other party cannot be reached, or answered with a fault."""


class LostError(ServiceError):
    """The connection was lost, or the server is busy: the same request may be sent again."""


class WeightWithheldError(PrivtunerError, RuntimeError):
    """An operation needs the values of a frozen weight, and those stay with the server."""

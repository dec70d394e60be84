"""Every exception privtuner raises on purpose.

All derive from :class:`PrivtunerError`, so one ``except`` clause separates them from bugs. Each also derives from the
built-in that Python code expects in its place (`ValueError` for bad values, `RuntimeError` for bad states).
Messages name the offending value and what to do about it, and never contain key material or clear activations.
"""

from __future__ import annotations

__all__ = [
    "CkksError",
    "EngineError",
    "InputError",
    "MessageError",
    "PrivtunerError",
    "SecretError",
    "ServiceError",
    "WeightWithheldError",
]


class PrivtunerError(Exception):
    """Base class of every exception raised by privtuner."""


class InputError(PrivtunerError, ValueError):
    """An argument is unusable: wrong shape, dtype or name, or values that are not finite."""


class MessageError(PrivtunerError, ValueError):
    """A message is malformed, truncated, corrupt, of another version, or meant for another layer."""


class CkksError(PrivtunerError, RuntimeError):
    """An operation on ciphertexts cannot be done: no level left, scales that disagree, a missing key, a bound passed.

    Also raised on decryption when values are beyond their bound, or cannot be told from others modulo q.
    """


class SecretError(PrivtunerError, RuntimeError):
    """A one-request secret is used a second time, copied or serialised."""


class EngineError(PrivtunerError, RuntimeError):
    """A compute engine or an instruction set that was asked for is missing on this machine, or cannot do the task."""


class ServiceError(PrivtunerError, RuntimeError):
    """The other party cannot be reached, or answered with a fault."""


class WeightWithheldError(PrivtunerError, RuntimeError):
    """An operation needs the values of a frozen weight, and those stay with the server."""

"""Private, parameter-efficient fine-tuning: frozen layers evaluated on encrypted activations.

``privtuner.linear`` is the encrypted matrix product, bytes in and bytes out. ``privtuner.nn`` (PyTorch),
``privtuner.train`` (PEFT), ``privtuner.service`` (gRPC) and the other parts are loaded when they are first used:
``import privtuner`` needs NumPy alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors, linear
from ._core import __version__
from .errors import (
    CkksError,
    EngineError,
    InfeasibleError,
    InputError,
    MessageError,
    MissingPackageError,
    PrivtunerError,
    SecretError,
    ServiceError,
    WeightWithheldError,
)
from .packages import missing
from .system import active_isa, get_num_threads, set_isa, set_num_threads

if TYPE_CHECKING:
    from . import calibration as calibration
    from . import ckks as ckks
    from . import cpu as cpu
    from . import cuda as cuda
    from . import held as held
    from . import nn as nn
    from . import openfhe as openfhe
    from . import schemes as schemes
    from . import sealed as sealed
    from . import security as security
    from . import service as service
    from . import train as train
    from . import wireless as wireless

__all__ = [
    "CkksError",
    "EngineError",
    "InfeasibleError",
    "InputError",
    "MessageError",
    "MissingPackageError",
    "PrivtunerError",
    "SecretError",
    "ServiceError",
    "WeightWithheldError",
    "__version__",
    "active_isa",
    "errors",
    "get_num_threads",
    "linear",
    "set_isa",
    "set_num_threads",
]

_PARTS = frozenset(
    {
        "calibration",
        "ckks",
        "cpu",
        "cuda",
        "held",
        "nn",
        "openfhe",
        "schemes",
        "sealed",
        "security",
        "service",
        "train",
        "wireless",
    }
)


def __getattr__(name: str) -> Any:
    """Load the part of the package called ``name`` (PEP 562).

    Raises:
        AttributeError: there is none.
        MissingPackageError: it needs a package that is not installed.
    """
    if name not in _PARTS:
        raise AttributeError(f"module 'privtuner' has no attribute {name!r}")
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        explained = missing(error, f"privtuner.{name}")
        if explained is None:
            raise
        raise explained from error


def __dir__() -> list[str]:
    return sorted([*__all__, *_PARTS])

"""Private, parameter-efficient fine-tuning: frozen layers evaluated on encrypted activations.

Four functions are the encrypted matrix product, bytes in and bytes out: `prepare`, `encrypt`, `apply`, `decrypt`
(`privtuner.linear` has the rest of it). `privtuner.nn` (PyTorch), `privtuner.ckks` and the other parts are loaded when
they are first used: ``import privtuner`` needs NumPy alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from privtuner import errors, linear
from privtuner._core import __version__
from privtuner.linear import apply, decrypt, encrypt, prepare
from privtuner.packages import missing

if TYPE_CHECKING:
    from privtuner import calibration as calibration
    from privtuner import ckks as ckks
    from privtuner import cpu as cpu
    from privtuner import cuda as cuda
    from privtuner import nn as nn
    from privtuner import openfhe as openfhe
    from privtuner import schemes as schemes
    from privtuner import sealed as sealed
    from privtuner import security as security
    from privtuner import service as service
    from privtuner import system as system
    from privtuner import train as train
    from privtuner import wireless as wireless

__all__ = ["__version__", "apply", "decrypt", "encrypt", "errors", "linear", "prepare"]

_PARTS = frozenset(
    {
        "calibration",
        "ckks",
        "cpu",
        "cuda",
        "nn",
        "openfhe",
        "schemes",
        "sealed",
        "security",
        "service",
        "system",
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
    return sorted({*__all__, *_PARTS})

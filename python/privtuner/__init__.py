"""Private, parameter-efficient fine-tuning: frozen layers evaluated on encrypted activations.

``privtuner.linear`` is the encrypted matrix product, bytes in and bytes out. ``privtuner.nn`` (PyTorch),
``privtuner.lora`` (PEFT) and ``privtuner.service`` (gRPC) stand on it and are imported by name.
"""

from . import errors, linear
from ._core import __version__
from .errors import (
    CkksError,
    EngineError,
    InfeasibleError,
    InputError,
    MessageError,
    PrivtunerError,
    SecretError,
    ServiceError,
    WeightWithheldError,
)
from .system import active_isa, get_num_threads, set_isa, set_num_threads

__all__ = [
    "CkksError",
    "EngineError",
    "InfeasibleError",
    "InputError",
    "MessageError",
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

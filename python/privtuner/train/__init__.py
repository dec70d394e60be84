"""Low-rank adapters on encrypted layers, and classifiers to train them in."""

from __future__ import annotations

from privtuner.train.classifier import clear_classifier, load_classifier, owner_classifier
from privtuner.train.peft_adapter import add_lora, check_lora_config, trainable_heads

__all__ = [
    "add_lora",
    "check_lora_config",
    "clear_classifier",
    "load_classifier",
    "owner_classifier",
    "trainable_heads",
]

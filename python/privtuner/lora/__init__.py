"""Low-rank adapters on encrypted layers."""

from __future__ import annotations

from privtuner.lora.peft_adapter import add_lora, check_lora_config, trainable_heads

__all__ = ["add_lora", "check_lora_config", "trainable_heads"]

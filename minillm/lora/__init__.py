"""Low-rank adapters (LoRA and its kin) on any linear and embedding: float, int8 or NF4.

Reading order: config, choice, layer, init, patterns, targets, inject, merge, peft_config, sites, fused, peft_format.
"""

from minillm.lora.config import ALL_LINEAR, LoraConfig
from minillm.lora.inject import activate, adapters, add, config_of, disabled, for_rows, parameters, remove
from minillm.lora.merge import Merged, merged
from minillm.lora.peft_format import load, save

__all__ = [
    "ALL_LINEAR",
    "LoraConfig",
    "Merged",
    "activate",
    "adapters",
    "add",
    "config_of",
    "disabled",
    "for_rows",
    "load",
    "merged",
    "parameters",
    "remove",
    "save",
]

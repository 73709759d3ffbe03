"""Public operators: arrays in, arrays out."""

from .gla import gated_linear_attention, gated_linear_attention_step

__all__ = ["gated_linear_attention", "gated_linear_attention_step"]

"""Gated linear attention: one operator, several implementations of it."""

from .api import Choice, choose, gated_linear_attention, gated_linear_attention_step

__all__ = ["Choice", "choose", "gated_linear_attention", "gated_linear_attention_step"]

"""Gated linear attention on Hopper GPUs: README.md draws the walk."""

from .operator import gated_linear_attention, unsupported

__all__ = ["gated_linear_attention", "unsupported"]

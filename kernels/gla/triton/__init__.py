"""Gated linear attention by Triton, for NVIDIA GPUs of compute capability 8.0 and later: see README.md."""

from .operator import gated_linear_attention, unsupported

__all__ = ["gated_linear_attention", "unsupported"]

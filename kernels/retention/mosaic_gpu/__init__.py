"""Retention on Hopper GPUs: `walk` is the kernel, used for the output and for each gradient."""

from .operator import retention, unsupported

__all__ = ["retention", "unsupported"]

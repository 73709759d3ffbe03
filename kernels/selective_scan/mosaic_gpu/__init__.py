"""The selective scan on Hopper GPUs: `forward` and `backward` say how."""

from .operator import selective_scan, unsupported

__all__ = ["selective_scan", "unsupported"]

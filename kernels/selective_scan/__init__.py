"""Selective scan: the recurrence of Mamba, one operator, several implementations of it."""

from .api import choose, selective_scan, selective_scan_step

__all__ = ["choose", "selective_scan", "selective_scan_step"]

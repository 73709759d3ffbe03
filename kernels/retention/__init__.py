"""Retention: linear attention with a scalar decay, one operator, several implementations of it."""

from .api import choose, retention, retention_step

__all__ = ["choose", "retention", "retention_step"]

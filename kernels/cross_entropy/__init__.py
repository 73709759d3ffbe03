"""Softmax cross entropy over a large vocabulary."""

from .api import softmax_cross_entropy

__all__ = ["softmax_cross_entropy"]

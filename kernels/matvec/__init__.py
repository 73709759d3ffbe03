"""A few rows times a large matrix, with what comes before and after it in a decode step."""

from .api import matvec

__all__ = ["matvec"]

"""One token of a GLA layer, between its projections."""

from .api import gla_decode

__all__ = ["gla_decode"]

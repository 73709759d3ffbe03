"""Operators on sequences whose tokens are shared out over a mesh axis; to be called inside `jax.shard_map`."""

from .convolution import short_convolution_over
from .linear_attention import linear_attention_over
from .selective_scan import selective_scan_over
from .softmax_attention import softmax_attention_over

__all__ = [
    "linear_attention_over",
    "selective_scan_over",
    "short_convolution_over",
    "softmax_attention_over",
]

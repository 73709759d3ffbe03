"""Public operators: arrays in, arrays out."""

from .cross_entropy import softmax_cross_entropy
from .gla import gated_linear_attention, gated_linear_attention_step
from .gla_decode import gla_decode
from .matvec import matvec
from .retention import retention, retention_step
from .selective_scan import selective_scan, selective_scan_step
from .short_conv import short_convolution

__all__ = [
    "gated_linear_attention",
    "gated_linear_attention_step",
    "gla_decode",
    "matvec",
    "retention",
    "retention_step",
    "selective_scan",
    "selective_scan_step",
    "short_convolution",
    "softmax_cross_entropy",
]

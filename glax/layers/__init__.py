"""Layers of the models. A token mixer has ``__call__`` for all tokens at once, ``init_state`` and ``step`` for one."""

from glax.layers.gated_linear_attention import FEATURE_MAPS, GatedLinearAttention
from glax.layers.linear import Linear, RMSNorm
from glax.layers.sharding import constrain, parameter
from glax.layers.short_convolution import ShortConvolution
from glax.layers.softmax_attention import SoftmaxAttention
from glax.layers.swiglu import SwiGLU

__all__ = [
    "FEATURE_MAPS",
    "GatedLinearAttention",
    "Linear",
    "RMSNorm",
    "ShortConvolution",
    "SoftmaxAttention",
    "SwiGLU",
    "constrain",
    "parameter",
]

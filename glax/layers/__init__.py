"""Layers of the models. A token mixer has ``__call__`` for all tokens at once, ``init_state`` and ``step`` for one."""

from glax.layers.embedding import embed
from glax.layers.gated_linear_attention import FEATURE_MAPS, Gate, GatedLinearAttention
from glax.layers.linear import Linear, RMSNorm
from glax.layers.mamba import Mamba
from glax.layers.retention import MultiScaleRetention
from glax.layers.sharding import constrain, parameter
from glax.layers.short_convolution import ShortConvolution
from glax.layers.softmax_attention import SoftmaxAttention, SoftmaxAttentionState
from glax.layers.swiglu import SwiGLU

__all__ = [
    "FEATURE_MAPS",
    "Gate",
    "GatedLinearAttention",
    "Linear",
    "Mamba",
    "MultiScaleRetention",
    "RMSNorm",
    "ShortConvolution",
    "SoftmaxAttention",
    "SoftmaxAttentionState",
    "SwiGLU",
    "constrain",
    "embed",
    "parameter",
]

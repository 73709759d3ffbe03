"""The gated MLP of every block."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from glax.layers.linear import Linear


class SwiGLU(nnx.Module):
    """(swish(x W_gate) * (x W_up)) W_down, without biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, mlp_size: int, *, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
        options = {"std": std, "dtype": dtype, "rngs": rngs}
        self.gate_proj = Linear(hidden_size, mlp_size, axes=("embed", "mlp"), **options)
        self.up_proj = Linear(hidden_size, mlp_size, axes=("embed", "mlp"), **options)
        self.down_proj = Linear(mlp_size, hidden_size, axes=("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))

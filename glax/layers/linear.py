"""Linear maps and the norm: float32 parameters, computation in a given dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from glax.layers.sharding import Axes, parameter


class Linear(nnx.Module):
    """y = x W + b, W ``[in, out]`` drawn from N(0, std), b zero at first and absent unless asked for."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: Axes,
        std: float,
        dtype: DTypeLike,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        self.kernel = parameter(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes)
        self.bias = parameter(jnp.zeros(out_features, jnp.float32), axes[1:]) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B in"], dtype: DTypeLike | None = None) -> Float[Array, "*B out"]:
        """Operands have the layer's dtype; the product comes out, and b is added, in ``dtype`` (None: the layer's)."""
        dtype = self.dtype if dtype is None else dtype
        y = jnp.dot(x.astype(self.dtype), self.kernel[...].astype(self.dtype), preferred_element_type=dtype)
        return y if self.bias is None else y + self.bias[...].astype(dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32; the result in ``dtype``."""

    def __init__(self, size: int, *, axes: Axes = (None,), eps: float, dtype: DTypeLike):
        self.weight = parameter(jnp.ones(size, jnp.float32), axes)
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), -1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.eps) * self.weight[...]).astype(self.dtype)

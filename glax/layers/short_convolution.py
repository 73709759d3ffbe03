"""The short convolution that a mixer may put before its queries, keys and values."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glax.layers.sequence_parallel import convolution
from glax.layers.sharding import parameter


class ShortConvolution(nnx.Module):
    """SiLU of a causal depthwise convolution of ``width`` taps, plus a bias, zero at first, where asked for.

    Its weights are uniform with variance 1 / (3 width), as PyTorch's convolutions: N(0, 0.02) would all but silence it.
    """

    def __init__(
        self, channels: int, width: int, *, axis: str | None, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        bound = width**-0.5
        weight = jax.random.uniform(rngs.params(), (channels, width), jnp.float32, -bound, bound)
        self.weight = parameter(weight, (axis, None))
        self.bias = parameter(jnp.zeros(channels, jnp.float32), (axis,)) if bias else None
        self.axis = axis
        self.dtype = dtype

    def init_state(self, batch: int) -> Float[Array, "B past C"]:
        channels, width = self.weight.shape[-2:]  # stacked blocks have an axis of layers in front
        return jnp.zeros((batch, width - 1, channels), self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T C"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        state: Float[Array, "B past C"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B past C"] | None]:
        """y, and the last tokens of each row for the tokens to come where ``state``, those before, is given."""
        bias = None if self.bias is None else self.bias[...]
        options = {"axis": self.axis, "segment_ids": segment_ids, "lengths": lengths}
        y, state = convolution(x, self.weight[...], bias=bias, state=state, **options)
        return jax.nn.silu(y), state

"""From the width of a layer to its heads, and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glax.layers.linear import Linear, RMSNorm


def split_heads(x: Float[Array, "B T _"], heads: int) -> Float[Array, "B T H _"]:
    """Heads lie side by side in the last axis."""
    return x.reshape(*x.shape[:-1], heads, -1)


def gated_output(
    o: Float[Array, "B T H V"], x: Float[Array, "B T D"], norm: RMSNorm, gate: Linear | None, projection: Linear
) -> Float[Array, "B T D"]:
    """y = (swish(x W_r) * norm(o)) W_O, with W_r the gate's and W_O the projection's; the norm is over each head's V.

    Without a gate y = norm(o) W_O.
    """
    o = norm(o).reshape(*x.shape[:-1], -1)
    if gate is not None:
        o = o * jax.nn.silu(gate(x).astype(jnp.float32))
    return projection(o)

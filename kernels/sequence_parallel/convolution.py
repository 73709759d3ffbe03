"""The short convolution over a sharded sequence: each shard asks the one before for its last W - 1 tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..short_conv import short_convolution
from .exchange import tokens_before


def short_convolution_over(
    axis_name: str,
    x: Float[Array, "B T C"],
    weight: Float[Array, "C W"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    **options,
) -> Float[Array, "B T C"]:
    """`kernels.short_convolution` of a sequence whose shards of T tokens lie along the mesh axis `axis_name`.

    Inside a `jax.shard_map` in which the axis is manual. Raises ValueError where a shard has fewer than W - 1 tokens.
    """
    past = weight.shape[1] - 1
    before = None
    if past and jax.lax.axis_size(axis_name) > 1:
        before = tokens_before(x, past, axis_name)
        if segment_ids is not None:
            same = tokens_before(segment_ids, past, axis_name) == segment_ids[:, :1]
            # An id that comes back after another one in between starts a new segment.
            connected = jnp.flip(jnp.cumprod(jnp.flip(same, 1), 1), 1).astype(bool)
            before = jnp.where(connected[..., None], before, 0)
    return short_convolution(x, weight, initial_state=before, segment_ids=segment_ids, **options)

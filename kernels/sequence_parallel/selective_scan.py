"""The selective scan over a sharded sequence: scanned from zero, then from the state that enters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dispatch import vary_alike
from ..selective_scan import selective_scan
from .exchange import entering_state, first_tokens_continue


def selective_scan_over(
    axis_name: str,
    x: Float[Array, "B T E"],
    dt: Float[Array, "B T E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    D: Float[Array, "E"],
    *,
    initial_state: Float[Array, "B E N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_final_state: bool = False,
    **options,
) -> Float[Array, "B T E"] | tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """`kernels.selective_scan` of a sequence whose shards of T tokens lie along the mesh axis `axis_name`, exactly.

    As `linear_attention_over`, but what a shard builds from zero is no single product here: it takes a scan of its own,
    so a shard's work is twice that of T tokens on one device.
    """
    arrays = vary_alike(x, dt, A, B, C, D, initial_state, segment_ids)
    *operands, initial_state, segment_ids = arrays
    shards = jax.lax.axis_size(axis_name)
    if shards == 1:
        states = {"initial_state": initial_state, "return_final_state": return_final_state}
        return selective_scan(*operands, segment_ids=segment_ids, **states, **options)
    index = jax.lax.axis_index(axis_name)
    x, dt, A, *_ = operands
    dtype = jnp.result_type(jnp.float32, *operands)
    zero, _ = vary_alike(jnp.zeros((x.shape[0], *A.shape), dtype), x)
    states = {"initial_state": zero, "return_final_state": True}
    _, own = selective_scan(*operands, segment_ids=segment_ids, **states, **options)
    decay = jnp.exp(jnp.sum(dt, 1, dtype=own.dtype)[..., None] * A)
    continues = None
    if segment_ids is not None:
        continues = first_tokens_continue(segment_ids, axis_name)
        whole = continues & jnp.all(segment_ids == segment_ids[:, :1], 1)
        decay = jnp.where(whole[:, None, None], decay, 0.0)
    if initial_state is not None:
        own = own + jnp.where(index == 0, decay * initial_state, 0.0)
    entering = entering_state(decay, own, axis_name)
    if initial_state is not None:
        entering = jnp.where(index == 0, initial_state, entering)
    if continues is not None:
        entering = jnp.where(continues[:, None, None], entering, 0.0)
    states = {"initial_state": entering, "return_final_state": return_final_state}
    out = selective_scan(*operands, segment_ids=segment_ids, **states, **options)
    if not return_final_state:
        return out
    y, final_state = out
    return y, jax.lax.psum(jnp.where(index == shards - 1, final_state, 0.0), axis_name)

"""Gated linear attention, retention and their kin over a sharded sequence, around any implementation of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dispatch import vary_alike
from .exchange import entering_state, first_tokens_continue


def linear_attention_over(
    axis_name: str,
    operator: Callable,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G K"] | Float[Array, "B T H"] | Float[Array, "H"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    return_final_state: bool = False,
    **options,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """`operator` on a sequence whose shards of T tokens lie along the mesh axis `axis_name`, exactly.

    Each shard's own state, U = sum_t exp(sum_{s > t} log_decay_s) k_t^T v_t, is one product over its tokens; one
    exchange gives the state that enters it; the operator runs once, from there. The backward pass is the mirror image:
    the operator's own backward from zero, one exchange of the gradients of states, and their share in k, v and
    log_decay. An axis of size 1 exchanges nothing.

    Args:
      axis_name: of the mesh, inside a `jax.shard_map` in which it is manual.
      operator: `kernels.gated_linear_attention`, `kernels.retention`, or another S_t = diag(d_t) S_{t-1} + k_t^T v_t
        with their arguments; query head h reads key/value head h // (H / G).
      q, k, v, log_decay, segment_ids: this shard's tokens. log_decay <= 0 is per key channel, per head and token, or
        per head; segments may straddle shards, and an id that comes back in the next shard continues.
      initial_state: before the sequence, the same in all shards.
      return_final_state: also return the state after the sequence, the same in all shards.
      options: passed on (scale, implementation).
    """
    q, k, v, log_decay, initial_state, segment_ids = vary_alike(q, k, v, log_decay, initial_state, segment_ids)
    options = {"segment_ids": segment_ids, "return_final_state": return_final_state, **options}
    shards = jax.lax.axis_size(axis_name)
    if shards == 1:
        return operator(q, k, v, log_decay, initial_state=initial_state, **options)
    index = jax.lax.axis_index(axis_name)
    continues = None if segment_ids is None else first_tokens_continue(segment_ids, axis_name)

    decay, own = _own_state(q, k, v, log_decay, segment_ids, continues)
    if initial_state is not None:
        # Before the first shard: what it leaves behind is part of what that shard hands on.
        own = own + jnp.where(index == 0, decay * initial_state, 0.0)
    entering = entering_state(decay, own, axis_name)
    if initial_state is not None:
        entering = jnp.where(index == 0, initial_state, entering)
    if continues is not None:
        entering = jnp.where(continues[:, None, None, None], entering, 0.0)
    out = operator(q, k, v, log_decay, initial_state=entering, **options)
    if not return_final_state:
        return out
    o, final_state = out
    return o, jax.lax.psum(jnp.where(index == shards - 1, final_state, 0.0), axis_name)


def _own_state(q, k, v, log_decay, segment_ids, continues):
    """(decay over all tokens [B, H, K or 1, 1], state from zero [B, H, K, V]), 0 and cut where a segment starts."""
    batch, length, groups, _ = k.shape
    heads = q.shape[2]
    dtype = jnp.result_type(jnp.float32, q.dtype, k.dtype, v.dtype)
    gates = log_decay.astype(dtype)
    if gates.ndim < 4:
        gates = jnp.broadcast_to(gates, (batch, length, heads))[..., None]
    if segment_ids is not None:
        starts = jnp.concatenate([~continues[:, None], segment_ids[:, 1:] != segment_ids[:, :-1]], 1)
        gates = jnp.where(starts[:, :, None, None], -jnp.inf, gates)
    # Sums of the gates after each token, never differences of sums: exact for -inf, and no exponent is positive.
    after = jnp.pad(gates[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    after = jax.lax.cumsum(after, axis=1, reverse=True)
    decay = jnp.exp(after[:, 0] + gates[:, 0])
    own = _product("btgk,btgv->bgkv", k * jnp.exp(after), k, v, dtype)
    own, decay = (jnp.repeat(x, heads // groups, 1) for x in (own, decay))
    return decay[..., None], own


def _product(equation, weighted, k, v, dtype):
    """Operands bfloat16 where k and v are, else `dtype` in full precision; sums in `dtype`."""
    operand = jnp.bfloat16 if k.dtype == v.dtype == jnp.bfloat16 else dtype
    weighted, v = weighted.astype(operand), v.astype(operand)
    return jnp.einsum(equation, weighted, v, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)

"""Gated linear attention as the recurrence it is defined by: the oracle of every faster form, and the decode step."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dispatch import vary_alike

EXACT = jax.lax.Precision.HIGHEST


def unsupported(q, k, v, log_alpha, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    """None: a scan over tokens runs everywhere."""


def state_dtype(*inputs) -> jnp.dtype:
    """float32, or float64 where an input is."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in inputs))


def gated_linear_attention_step(
    q_t: Float[Array, "B H K"],
    k_t: Float[Array, "B G K"],
    v_t: Float[Array, "B G V"],
    log_alpha_t: Float[Array, "B G K"],
    state: Float[Array, "B H K V"],
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of Eq. 3: state' = diag(alpha_t) state + k_t^T v_t, o_t = scale * q_t state'.

    H is a multiple of G; query head h reads key/value head h // (H / G). `scale` defaults to K^-0.5. Computes in
    the state's dtype, float32 or float64. Returns o_t in v_t's dtype, and the new state.
    """
    batch, heads, key_width = q_t.shape
    groups, value_width = v_t.shape[1:]
    scale = key_width**-0.5 if scale is None else scale
    dtype = state.dtype
    q_t, k_t, v, log_alpha_t = (x.astype(dtype) for x in (q_t, k_t, v_t, log_alpha_t))
    grouped = state.reshape(batch, groups, heads // groups, key_width, value_width)
    update = k_t[..., None] * v[..., None, :]
    grouped = jnp.exp(log_alpha_t)[:, :, None, :, None] * grouped + update[:, :, None]
    q_t = scale * q_t.reshape(batch, groups, heads // groups, key_width)
    o_t = jnp.einsum("bgrk,bgrkv->bgrv", q_t, grouped, precision=EXACT)
    return o_t.reshape(batch, heads, value_width).astype(v_t.dtype), grouped.reshape(state.shape)


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """True where the id differs from the token before; a row's first token continues its initial state."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def gated_linear_attention(q, k, v, log_alpha, *, scale, initial_state, segment_ids, return_final_state):
    """Eq. 3, token by token; shapes as in `kernels.gated_linear_attention`.

    Computes, and returns the state, in float32, or in float64 where an input is. The backward pass is JAX's own; it
    keeps about 2 sqrt(T) states at a time and recomputes the others.
    """
    batch, length, heads, key_width = q.shape
    value_width = v.shape[-1]
    dtype = state_dtype(q, k, v, log_alpha)
    if initial_state is None:
        initial_state, _ = vary_alike(jnp.zeros((batch, heads, key_width, value_width), dtype), k)
    starts = jnp.zeros((batch, length), bool) if segment_ids is None else segment_starts(segment_ids)

    block = math.isqrt(length - 1) + 1
    padding = -length % block  # tokens with k = 0 and log_alpha = 0 leave the state as it is

    def in_blocks(x):
        x = jnp.pad(jnp.moveaxis(x, 1, 0), ((0, padding),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(-1, block, *x.shape[1:])

    def token(state, inputs):
        q_t, k_t, v_t, log_alpha_t, start = inputs
        state = jnp.where(start[:, None, None, None], 0, state)
        o_t, state = gated_linear_attention_step(q_t, k_t, v_t, log_alpha_t, state, scale=scale)
        return state, o_t

    inputs = tuple(in_blocks(x) for x in (q, k, v, log_alpha, starts))
    tokens = jax.checkpoint(lambda state, block_inputs: jax.lax.scan(token, state, block_inputs))
    state, o = jax.lax.scan(tokens, initial_state.astype(dtype), inputs)
    o = jnp.moveaxis(o.reshape(-1, *o.shape[2:])[:length], 0, 1)
    return (o, state) if return_final_state else o

"""The selective scan as the recurrence it is defined by: the oracle of every faster form, and the decode step."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..dispatch import vary_alike
from ..gla.recurrence import segment_starts, state_dtype


def unsupported(x, dt, A, B, C, D, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    """None: a scan over tokens runs everywhere."""


def selective_scan_step(
    x_t: Float[Array, "B E"],
    dt_t: Float[Array, "B E"],
    A: Float[Array, "E N"],
    B_t: Float[Array, "B N"],
    C_t: Float[Array, "B N"],
    D: Float[Array, "E"],
    state: Float[Array, "B E N"],
) -> tuple[Float[Array, "B E"], Float[Array, "B E N"]]:
    """One token: state' = exp(dt_t A) state + dt_t B_t x_t, y_t = C_t state' + D x_t.

    Computes in the state's dtype, float32 or float64. Returns y_t in x_t's dtype, and the new state.
    """
    x, dt, A, B, C, D = (array.astype(state.dtype) for array in (x_t, dt_t, A, B_t, C_t, D))
    state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, None]
    return (jnp.sum(C[:, None] * state, -1) + D * x).astype(x_t.dtype), state


def selective_scan(x, dt, A, B, C, D, *, initial_state, segment_ids, return_final_state):
    """Token by token; shapes as in `kernels.selective_scan`.

    Computes, and returns the state, in float32, or in float64 where an input is. The backward pass is JAX's own; it
    keeps about 2 sqrt(T) states at a time and recomputes the others.
    """
    batch, length, channels = x.shape
    dtype = state_dtype(x, dt, A, B, C, D)
    if initial_state is None:
        initial_state, _ = vary_alike(jnp.zeros((batch, channels, A.shape[1]), dtype), x)
    starts = jnp.zeros((batch, length), bool) if segment_ids is None else segment_starts(segment_ids)

    block = math.isqrt(length - 1) + 1
    padding = -length % block  # tokens with dt = 0 leave the state as it is

    def in_blocks(x):
        x = jnp.pad(jnp.moveaxis(x, 1, 0), ((0, padding),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(-1, block, *x.shape[1:])

    def token(state, inputs):
        x_t, dt_t, B_t, C_t, start = inputs
        state = jnp.where(start[:, None, None], 0, state)
        y_t, state = selective_scan_step(x_t, dt_t, A, B_t, C_t, D, state)
        return state, y_t

    tokens = jax.checkpoint(lambda state, inputs: jax.lax.scan(token, state, inputs))
    state, y = jax.lax.scan(tokens, initial_state.astype(dtype), tuple(in_blocks(x) for x in (x, dt, B, C, starts)))
    y = jnp.moveaxis(y.reshape(-1, *y.shape[2:])[:length], 0, 1)
    return (y, state) if return_final_state else y

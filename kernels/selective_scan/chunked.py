"""The selective scan by chunks, in jax.numpy with its own derivative: runs on any device.

Within a chunk of tokens the states of all of them come from an associative scan of (decay, input) pairs; from chunk to
chunk the last state is carried. The forward keeps nothing else. The backward walks the chunks once more, keeping the
state that enters each, and then from the last to the first: with g_t the gradient of h_t,

    g_t = C_t dy_t + a_{t+1} g_{t+1}        a_t = exp(dt_t A), 0 where a segment starts

is the same scan in reverse, and everything else is a sum of products of h and g. All in float32. Only the states of
one chunk are ever held for every token.
"""

import jax
import jax.numpy as jnp

from ..dispatch import vary_alike
from ..gla.recurrence import segment_starts

CHUNK = 32


def unsupported(x, dt, A, B, C, D, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    for name, array in {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D}.items():
        if array.dtype == jnp.float64:
            return f"{name} is float64; it computes in float32"
    return None


def selective_scan(x, dt, A, B, C, D, *, initial_state, segment_ids, return_final_state):
    """Shapes as in `kernels.selective_scan`."""
    if initial_state is None:
        initial_state, _ = vary_alike(jnp.zeros((x.shape[0], *A.shape), jnp.float32), x)
    starts = jnp.zeros(x.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)
    y, final_state = _scan(x, dt, A, B, C, D, initial_state, starts)
    return (y, final_state) if return_final_state else y


@jax.custom_vjp
def _scan(x, dt, A, B, C, D, initial_state, starts):
    def step(state, inputs):
        x, dt, B, C, starts = inputs
        _, h = _states(state, x, dt, A, B, starts)
        y = jnp.sum(h * C[:, :, None], -1) + D * x
        return h[-1], y

    state, y = jax.lax.scan(step, initial_state, _chunks(x, dt, B, C, starts))
    return _tokens(y, x.shape[1]).astype(x.dtype), state


def _scan_forward(*inputs):
    return _scan(*inputs), inputs


def _scan_backward(inputs, cotangents):
    x, dt, A, B, C, D, initial_state, starts = inputs
    dy, d_state = cotangents

    def advance(state, inputs):
        x, dt, B, starts = inputs
        _, h = _states(state, x, dt, A, B, starts)
        return h[-1], state

    def step(carry, inputs):
        d_state, dA, dD = carry
        state, x, dt, B, C, starts, dy = inputs
        decay, h = _states(state, x, dt, A, B, starts)
        before = jnp.concatenate([state[None], h[:-1]])
        g = dy[..., None] * C[:, :, None]
        g = g.at[-1].add(d_state)
        later = jnp.concatenate([decay[1:], jnp.zeros_like(decay[:1])])
        _, g = jax.lax.associative_scan(_then, (later, g), reverse=True)
        d_exponent = decay * g * before
        d_input = jnp.sum(g * B[:, :, None], -1)  # of dt * x
        dx = dt * d_input + D * dy
        d_dt = x * d_input + jnp.sum(d_exponent * A, -1)
        dB = jnp.sum((dt * x)[..., None] * g, 2)
        dC = jnp.sum(dy[..., None] * h, 2)
        dA += jnp.sum(dt[..., None] * d_exponent, (0, 1))
        dD += jnp.sum(x * dy, (0, 1))
        return (decay[0] * g[0], dA, dD), (dx, d_dt, dB, dC)

    *chunks, dy_chunks = _chunks(x, dt, B, C, starts, dy)
    x_chunks, dt_chunks, B_chunks, _, starts_chunks = chunks
    _, states = jax.lax.scan(advance, initial_state, (x_chunks, dt_chunks, B_chunks, starts_chunks))
    sums = jnp.zeros_like(A), jnp.zeros_like(D)
    carry, gradients = jax.lax.scan(step, (d_state, *sums), (states, *chunks, dy_chunks), reverse=True)
    d_initial, dA, dD = carry
    dx, d_dt, dB, dC = (_tokens(g, x.shape[1]).astype(a.dtype) for g, a in zip(gradients, (x, dt, B, C), strict=True))
    return dx, d_dt, dA, dB, dC, dD, d_initial, None


_scan.defvjp(_scan_forward, _scan_backward)


def _states(state, x, dt, A, B, starts):
    """Decays and states of a chunk's tokens, [chunk, B, E, N] both, from the state that enters it."""
    decay = jnp.where(starts[..., None, None], 0, jnp.exp(dt[..., None] * A))
    h = (dt * x)[..., None] * B[:, :, None]
    h = h.at[0].add(decay[0] * state)
    return decay, jax.lax.associative_scan(_then, (decay, h))[1]


def _then(one, other):
    """h -> a1 h + b1, followed by h -> a2 h + b2."""
    return one[0] * other[0], other[0] * one[1] + other[1]


def _chunks(*arrays):
    """[B, T, ...] to [chunks, chunk, B, ...], float32, padded with zeros: tokens with dt = 0 leave the state alone."""
    length = arrays[0].shape[1]
    chunk = min(CHUNK, length)

    def chunked(x):
        x = jnp.moveaxis(x if x.dtype == bool else x.astype(jnp.float32), 1, 0)
        x = jnp.pad(x, ((0, -length % chunk),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    return tuple(chunked(x) for x in arrays)


def _tokens(x, length):
    """[chunks, chunk, B, ...] to [B, T, ...]"""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)

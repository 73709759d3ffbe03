"""Retention by chunks, in jax.numpy with its own derivative: runs on any device.

A chunk of C tokens reads the state before it and its own tokens. With D_ij = g_{j+1} + ... + g_i, g the log decays (a
row's sum from the chunk's start: into_i; to its end: out_j; of all of it: total):

    o_i = exp(into_i) q_i S + sum over j <= i of exp(D_ij) (q_i k_j) v_j
    S' = exp(total) S + sum over j of exp(out_j) k_j^T v_j

Decays are scalars, so the [C, C] exponents are made as sums of the very gates between two tokens: none is positive, no
two sums are subtracted, and -inf stays -inf. A segment starts with a gate of -inf. The state walks the chunks in a
scan; the backward pass walks it again, then walks back with its gradient.

Arrays are chunk-major, [N, B, H, C, width].
"""

import functools

import jax
import jax.numpy as jnp

from ..dispatch import vary_alike
from ..gla.chunked import Products
from ..gla.recurrence import segment_starts

CHUNK = 64


def unsupported(q, k, v, log_gamma, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    for name, x in {"q": q, "k": k, "v": v, "log_gamma": log_gamma}.items():
        if x.dtype == jnp.float64:
            return f"{name} is float64; it computes in float32"
    return None


def retention(q, k, v, log_gamma, *, scale, initial_state, segment_ids, return_final_state):
    """Shapes as in `kernels.retention`, log_gamma [B, T, H].

    Products take bfloat16 operands when q, k and v are all bfloat16, else float32 in full precision; sums, gates and
    states are float32.
    """
    if segment_ids is not None:
        log_gamma = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, log_gamma)
    if initial_state is None:
        initial_state, _ = vary_alike(jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), jnp.float32), q)
    o, final_state = _attend(scale, q, k, v, log_gamma, initial_state)
    return (o, final_state) if return_final_state else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, log_gamma, initial_state):
    product = Products(q, k, v)

    def step(state, inputs):
        q, k, v, gates = inputs
        decays = _Decays(gates)
        p = scale * decays.between * product("bhik,bhjk->bhij", q, k)
        o = product("bhij,bhjv->bhiv", p, v)
        o += scale * decays.into * product("bhik,bhkv->bhiv", q, state)
        return _next_state(state, k, v, decays, product), o.astype(v.dtype)

    state, o = jax.lax.scan(step, initial_state, _chunks(q, k, v, log_gamma))
    return _tokens(o, q.shape[1]), state


def _attend_forward(scale, *inputs):
    return _attend(scale, *inputs), inputs


def _attend_backward(scale, inputs, cotangents):
    q, k, v, log_gamma, initial_state = inputs
    do, d_state = cotangents
    product = Products(q, k, v)
    q_chunks, k_chunks, v_chunks, gates, do_chunks = _chunks(q, k, v, log_gamma, do)

    def advance(state, inputs):
        k, v, gates = inputs
        return _next_state(state, k, v, _Decays(gates), product), state

    def step(d_state, inputs):
        state, q, k, v, gates, do = inputs
        decays = _Decays(gates)
        # What each pair (i, j), and each end of it, has to do with the chunk's own tokens ...
        p = scale * decays.between * product("bhik,bhjk->bhij", q, k)
        dp = product("bhiv,bhjv->bhij", do, v)
        d_scores = scale * decays.between * dp
        dq, dk = product("bhij,bhjk->bhik", d_scores, k), product("bhij,bhik->bhjk", d_scores, q)
        dv = product("bhij,bhiv->bhjv", p, do)
        d_exponents = p * dp
        # ... and with the tokens before and after it.
        dq_in = scale * decays.into * product("bhiv,bhkv->bhik", do, state)
        dk_out = decays.out_of * product("bhjv,bhkv->bhjk", v, d_state)
        dv_out = decays.out_of * product("bhjk,bhkv->bhjv", k, d_state)
        d_into, d_out_of = jnp.sum(q * dq_in, -1), jnp.sum(k * dk_out, -1)
        decayed = decays.whole * d_state
        d_gates = _within(d_exponents) + _from(d_into) + _before(d_out_of) + jnp.sum(state * decayed, (2, 3))[..., None]
        d_state = decayed + product("bhik,bhiv->bhkv", q * (scale * decays.into), do)
        gradients = dq + dq_in, dk + dk_out, dv + dv_out, d_gates[..., None]
        return d_state, tuple(x.astype(y.dtype) for x, y in zip(gradients, (q, k, v, log_gamma), strict=True))

    _, states = jax.lax.scan(advance, initial_state, (k_chunks, v_chunks, gates))
    inputs = states, q_chunks, k_chunks, v_chunks, gates, do_chunks
    d_initial, gradients = jax.lax.scan(step, d_state, inputs, reverse=True)
    dq, dk, dv, d_gates = (_tokens(x, q.shape[1]) for x in gradients)
    return dq, dk, dv, d_gates[..., 0], d_initial


_attend.defvjp(_attend_forward, _attend_backward)


class _Decays:
    """exp of the sums of gates [B, H, C] of one chunk that its tokens need; each is of 0 or more gates, and <= 1."""

    def __init__(self, gates):
        chunk = gates.shape[-1]
        i, j = jnp.arange(chunk)[:, None], jnp.arange(chunk)
        between = jnp.cumsum(jnp.where(i > j, gates[..., :, None], 0), -2)  # over t: gates after j, up to i
        self.between = jnp.exp(jnp.where(i >= j, between, -jnp.inf))  # [B, H, C, C]
        self.into = jnp.exp(jnp.cumsum(gates, -1))[..., None]  # [B, H, C, 1]
        self.out_of = jnp.swapaxes(self.between[..., -1:, :], -1, -2)  # [B, H, C, 1]
        self.whole = self.into[..., -1:, :]  # [B, H, 1, 1]


def _within(d_exponents):
    """The gate at t has a share in every pair j < t <= i: the sum over those. [B, H, C, C] to [B, H, C]."""
    i, j = jnp.arange(d_exponents.shape[-1])[:, None], jnp.arange(d_exponents.shape[-1])
    return jnp.sum(jnp.where(i > j, jnp.flip(jnp.cumsum(jnp.flip(d_exponents, -2), -2), -2), 0), -1)


def _from(x):
    """Sums over i >= t."""
    return jnp.flip(jnp.cumsum(jnp.flip(x, -1), -1), -1)


def _before(x):
    """Sums over j < t."""
    return jnp.cumsum(jnp.pad(x[..., :-1], ((0, 0), (0, 0), (1, 0))), -1)


def _next_state(state, k, v, decays, product):
    return decays.whole * state + product("bhjk,bhjv->bhkv", k * decays.out_of, v)


def _chunks(q, k, v, log_gamma, *more):
    """[N, B, H, C, width] of each, padded with zeros: tokens that neither write to the state nor decay it."""
    length = q.shape[1]
    chunk = min(CHUNK, length)

    def chunked(x):
        batch, _, heads, width = x.shape
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
        return jnp.transpose(x.reshape(batch, -1, chunk, heads, width), (1, 0, 3, 2, 4))

    q, k, v, gates, *more = (chunked(x) for x in (q, k, v, log_gamma.astype(jnp.float32)[..., None], *more))
    return q, k, v, gates[..., 0], *more


def _tokens(x, length):
    """[N, B, H, C, width] -> [B, T, H, width]"""
    count, batch, heads, chunk, width = x.shape
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(batch, count * chunk, heads, width)[:, :length]

"""Gated linear attention by chunks (Listing 1), in jax.numpy with its own derivative: runs on any device.

A chunk of C tokens reads the state before it and its own tokens (b: sums of gates from its start, row i included):

    o = (q * exp(b)) S + P v        S' = diag(exp(b_C)) S + (k * exp(b_C - b))^T v

P comes from the levels of `halving`, for all chunks at once; the state walks the chunks in a scan. The backward pass
recomputes P and walks the states twice, keeping about 2 sqrt(T/C) of them; nothing per token but rows is ever held.

Axes: N chunks, B, G key/value heads, R = H/G query heads each, C, K, V; arrays are chunk-major, [N, B, G, (R,) C,
width]. A state is [B, G, s, K, V]: s = R when there is an initial state, else 1, since the query heads of a group then
share it.
"""

import functools
import math

import jax
import jax.numpy as jnp

from ..dispatch import vary_alike
from . import halving
from .recurrence import segment_starts


def chunk_size_for(length, key_width, value_width) -> int:
    """A power of two: longer where a state is wide, so that it is read and written less often."""
    chunk = 128 if key_width * value_width >= 128 * 128 else 64
    return min(chunk, 1 << (length - 1).bit_length())


def unsupported(q, k, v, log_alpha, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    for name, x in {"q": q, "k": k, "v": v, "log_alpha": log_alpha}.items():
        if x.dtype == jnp.float64:
            return f"{name} is float64; it computes in float32"
    return None


def gated_linear_attention(
    q, k, v, log_alpha, *, scale, initial_state, segment_ids, return_final_state, chunk_size=None
):
    """Shapes as in `kernels.gated_linear_attention`; `chunk_size`, a power of two, is for tuning.

    Products take bfloat16 operands when q, k and v are all bfloat16, else float32 in full precision; sums, gates and
    states are float32.
    """
    starts = None if segment_ids is None else segment_starts(segment_ids)
    chunk_size = chunk_size or chunk_size_for(q.shape[1], k.shape[-1], v.shape[-1])
    o, final_state = _attend(chunk_size, scale, q, k, v, log_alpha, initial_state, starts)
    return (o, final_state) if return_final_state else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(chunk, scale, q, k, v, log_alpha, initial_state, starts):
    batch, length, heads, key_width = q.shape
    groups, value_width = v.shape[2:]
    count = -(-length // chunk)
    product = Products(q, k, v)
    q_chunks, k_chunks, v_chunks, gates, _ = _chunks(q, k, v, log_alpha, starts, chunk, count)
    q_in, k_out, decay = _across_chunks(scale, q_chunks, k_chunks, gates, product)
    p = _intra_weights(scale, q_chunks, k_chunks, gates, product)
    state = _grouped_state(initial_state, k, value_width)
    s = _state_axis(state)

    def step(state, chunk_inputs):
        q_in, k_out, v, decay, p = chunk_inputs
        o = product(f"bgrck,bg{s}kv->bgrcv", q_in, state) + product("bgrij,bgjv->bgriv", p, v)
        return _next_state(state, k_out, v, decay, product), o.astype(v.dtype)

    state, o = jax.lax.scan(step, state, (q_in, k_out, v_chunks, decay, p))
    state = jnp.broadcast_to(state, (batch, groups, heads // groups, key_width, value_width))
    return _tokens(o, length), state.reshape(batch, heads, key_width, value_width)


def _attend_forward(chunk, scale, *inputs):
    return _attend(chunk, scale, *inputs), inputs


def _attend_backward(chunk, scale, inputs, cotangents):
    q, k, v, log_alpha, initial_state, starts = inputs
    do, d_state = cotangents
    batch, length, heads, key_width = q.shape
    groups, value_width = v.shape[2:]
    outer, inner = _nesting(-(-length // chunk))
    product = Products(q, k, v)
    q_chunks, k_chunks, v_chunks, gates, segments = _chunks(q, k, v, log_alpha, starts, chunk, outer * inner)
    do_chunks = _chunked(do, chunk, outer * inner, groups)
    q_in, k_out, decay = _across_chunks(scale, q_chunks, k_chunks, gates, product)

    p, dq, dk, d_exponents = _intra_gradients(scale, q_chunks, k_chunks, v_chunks, gates, do_chunks, product)
    state = _grouped_state(initial_state, k, value_width)
    s = _state_axis(state)
    d_state = d_state.reshape(batch, groups, heads // groups, key_width, value_width)
    if s == "z":
        d_state = d_state.sum(2, keepdims=True)

    def advance(state, chunk_inputs):
        return _next_state(state, *chunk_inputs, product), state

    def step(d_state, chunk_inputs):
        state, q_in, k_out, v, decay, p, do = chunk_inputs
        dq_in = product(f"bgrcv,bg{s}kv->bgrck", do, state)
        dk_out = product(f"bgcv,bg{s}kv->bgck", v, d_state)
        dv = product(f"bgck,bg{s}kv->bgcv", k_out, d_state) + product("bgrij,bgriv->bgjv", p, do)
        decayed = decay[:, :, None, :, None] * d_state
        crossing = jnp.sum(state * decayed, (2, 4))
        update = product("bgrck,bgrcv->bgrkv" if s == "r" else "bgrck,bgrcv->bgkv", q_in, do)
        return decayed + update.reshape(d_state.shape), (dq_in, dk_out, dv.astype(v.dtype), crossing)

    def group_step(d_state, group_inputs):
        state, *chunk_inputs = group_inputs
        _, k_out, v, decay, _, _ = chunk_inputs
        _, states = jax.lax.scan(advance, state, (k_out, v, decay))
        return jax.lax.scan(step, d_state, (states, *chunk_inputs), reverse=True)

    grouped = [x.reshape(outer, inner, *x.shape[1:]) for x in (q_in, k_out, v_chunks, decay, p, do_chunks)]
    last, states = jax.lax.scan(
        lambda state, group: (jax.lax.scan(advance, state, group)[0], state), state, [x[:-1] for x in grouped[1:4]]
    )
    states = jnp.concatenate([states, last[None]])
    d_state, across = jax.lax.scan(group_step, d_state, (states, *grouped), reverse=True)
    dq_in, dk_out, dv, crossing = (x.reshape(-1, *x.shape[2:]) for x in across)

    into = product.sums(halving.prefix_sums(chunk), gates)
    out_of = product.sums(halving.suffix_sums(chunk), gates)
    dq = scale * (dq + dq_in * jnp.exp(into)[:, :, :, None])
    dk = dk + dk_out * jnp.exp(out_of)
    # The gate of token t has a share in every pair j < t <= i: within the chunk, from earlier chunks into it, out of it
    # into later ones, and across all of it. The rounded operands enter here, so that what a pair adds at i is exactly
    # what it takes off at j.
    d_into = d_exponents + jnp.sum(q_in * dq_in, 3)
    d_gates = product.sums(halving.prefix_sums(chunk).T, d_into, segments)
    d_gates += product.sums(halving.suffix_sums(chunk).T, k_out * dk_out) + crossing[..., None, :]
    d_gates = jnp.where(gates > halving.FLOOR, d_gates, 0)

    d_inputs = [_tokens(x, length).astype(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v), (d_gates, log_alpha))]
    d_initial = None if initial_state is None else d_state.reshape(initial_state.shape)
    return *d_inputs, d_initial, None


_attend.defvjp(_attend_forward, _attend_backward)


def _next_state(state, k_out, v, decay, product):
    return decay[:, :, None, :, None] * state + product("bgck,bgcv->bgkv", k_out, v)[:, :, None]


def _across_chunks(scale, q, k, gates, product):
    """Queries decayed from the start of their chunk, keys decayed to its end, decays [N, B, G, K] of whole chunks."""
    chunk = k.shape[-2]
    into = product.sums(halving.prefix_sums(chunk), gates)
    out_of = product.sums(halving.suffix_sums(chunk), gates)
    q_in = q * (scale * jnp.exp(into))[:, :, :, None]
    return product.operand(q_in), product.operand(k * jnp.exp(out_of)), jnp.exp(into[..., -1, :])


def _level(scale, q, k, gates, half, product):
    """A level's decays [N, B, G, C, K], and its operands: right query rows and left key rows."""
    decays = jnp.exp(product.sums(halving.anchored_sums(k.shape[-2], half), gates))
    q_right = halving.right_rows(q, half) * (scale * halving.right_rows(decays, half))[:, :, :, None]
    k_left = halving.left_rows(k, half) * halving.left_rows(decays, half)
    return decays, product.operand(q_right), product.operand(k_left)


def _intra_weights(scale, q, k, gates, product):
    """P [N, B, G, R, C, C], zero above the diagonal, as an operand."""
    chunk = k.shape[-2]
    p = jnp.eye(chunk) * jnp.sum(scale * q.astype(jnp.float32) * k[:, :, :, None], -1, keepdims=True)
    for half in halving.half_widths(chunk):
        _, q_right, k_left = _level(scale, q, k, gates, half, product)
        p += halving.from_pairs(product("nbgrik,nbgjk->nbgrij", q_right, k_left), half)
    return product.operand(p)


def _intra_gradients(scale, q, k, v, gates, do, product):
    """P again, and the gradients through it: of scale * q, of k, and of b (what a pair adds at i it takes off at j)."""
    chunk = k.shape[-2]
    dp = product("nbgriv,nbgjv->nbgrij", do, v)
    d_diagonal = jnp.sum(dp * jnp.eye(chunk), -1, keepdims=True)
    scaled_q = scale * q.astype(jnp.float32)
    p = jnp.eye(chunk) * jnp.sum(scaled_q * k[:, :, :, None], -1, keepdims=True)
    dq = d_diagonal * k[:, :, :, None]
    dk = jnp.sum(d_diagonal * scaled_q, 3)
    d_exponents = jnp.zeros(gates.shape, jnp.float32)
    for half in halving.half_widths(chunk):
        decays, q_right, k_left = _level(scale, q, k, gates, half, product)
        p += halving.from_pairs(product("nbgrik,nbgjk->nbgrij", q_right, k_left), half)
        dp_half = halving.pairs(dp, half)
        dq_right = product.in_limbs("nbgjk,nbgrij->nbgrik", k_left, -2, dp_half, -1)
        dk_left = product.in_limbs("nbgrik,nbgrij->nbgjk", q_right, -2, dp_half, -2)
        dq += halving.from_right_rows(dq_right * halving.right_rows(decays, half)[:, :, :, None], half)
        dk += halving.from_left_rows(dk_left * halving.left_rows(decays, half), half)
        d_exponents += halving.from_right_rows(jnp.sum(q_right * dq_right, 3), half)
        d_exponents -= halving.from_left_rows(k_left * dk_left, half)
    return product.operand(p), dq, dk, d_exponents


class Products:
    """Products with float32 sums: operands bfloat16 when all inputs are, else float32 in full precision."""

    def __init__(self, *inputs):
        self.dtype = jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in inputs) else jnp.float32

    def operand(self, x):
        """x in the operands' dtype. Rounded first: XLA may drop a cast there and back, and uses must round alike."""
        if self.dtype == jnp.bfloat16 and x.dtype == jnp.float32:
            x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return x.astype(self.dtype)

    def __call__(self, equation, x, y):
        x, y = self.operand(x), self.operand(y)
        return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    def in_limbs(self, equation, x, axis, y, y_axis):
        """A product summed over `axis` of x and `y_axis` of y: 16 bits of a float32 y, as two limbs beside bfloat16."""
        if self.dtype == jnp.bfloat16 and y.dtype == jnp.float32:
            high = jax.lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)
            x, y = jnp.concatenate([x, x], axis), jnp.concatenate([high, y - high], y_axis)
        return self(equation, x, y)

    def sums(self, matrix, x, segments=None):
        """Sums of rows of x [N, B, G, C, K], those that a 0/1 matrix [C, C] picks, within `segments` [N, B, C]."""
        matrix = jnp.asarray(matrix)
        if segments is not None:
            matrix = matrix & (segments[:, :, None, :, None] == segments[:, :, None, None, :])
        matrix = jnp.broadcast_to(matrix, (*x.shape[:3], *matrix.shape[-2:]))
        return self.in_limbs("nbgit,nbgtk->nbgik", matrix, -1, x, -2)


def _chunks(q, k, v, log_alpha, starts, chunk, count):
    """Chunk-major inputs; gates, FLOOR at resets and segment starts; and each token's segment [N, B, C] or None."""
    groups = k.shape[2]
    gates = log_alpha if log_alpha.dtype == jnp.bfloat16 else log_alpha.astype(jnp.float32)
    gates = jnp.maximum(gates, halving.FLOOR)
    segments = None
    if starts is not None:
        gates = jnp.where(starts[:, :, None, None], jnp.asarray(halving.FLOOR, gates.dtype), gates)
        segments = jnp.cumsum(starts, 1, dtype=jnp.int32)
        segments = _chunked(segments[:, :, None, None], chunk, count, 1)[:, :, 0, 0, :, 0]
    k, v, gates = (_chunked(x, chunk, count, groups)[:, :, :, 0] for x in (k, v, gates))
    return _chunked(q, chunk, count, groups), k, v, gates, segments


def _chunked(x, chunk, count, groups):
    """[B, T, H, W] -> [N, B, G, R, C, W], padded with zeros: tokens that neither write to the state nor decay it."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
    x = x.reshape(batch, count, chunk, groups, heads // groups, width)
    return jnp.transpose(x, (1, 0, 3, 4, 2, 5))


def _tokens(x, length):
    """[N, B, G, (R,) C, W] -> [B, T, H, W]"""
    count, batch, *_, chunk, width = x.shape
    x = x.reshape(count, batch, -1, chunk, width)
    return jnp.transpose(x, (1, 0, 3, 2, 4)).reshape(batch, count * chunk, -1, width)[:, :length]


def _grouped_state(initial_state, k, value_width):
    batch, _, groups, key_width = k.shape
    if initial_state is None:
        return vary_alike(jnp.zeros((batch, groups, 1, key_width, value_width), jnp.float32), k)[0]
    return initial_state.reshape(batch, groups, -1, key_width, value_width)


def _state_axis(state):
    """The einsum letter of a state's third axis: r where each query head has its own, else z, of size 1."""
    return "z" if state.shape[2] == 1 else "r"


def _nesting(count):
    """(outer, inner), outer * inner >= count chunks: little padding first, then few states held (outer + inner)."""
    root = math.isqrt(count)
    inner = min(range(max(1, root // 2), 2 * root + 1), key=lambda n: (-(-count // n) * n + -(-count // n) + n, n))
    return -(-count // inner), inner

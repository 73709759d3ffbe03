"""Causal softmax attention over a sharded sequence: keys and values are gathered, and read in blocks."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Keys that are scored at a time: of the T x T scores, those of a block are all that is ever held.
BLOCK = 1024


def softmax_attention_over(
    axis_name: str,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    segments: Int[Array, "B T"] | None = None,
    window: int | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T H V"]:
    """softmax(K^-0.5 q k^T) v of a sequence whose shards of T tokens lie along the mesh axis `axis_name`, exactly.

    A token sees itself and the tokens before it that have the same number in `segments`, at most `window` of them;
    numbers must not come back. Query head h reads key/value head h // (H / G). Inside a `jax.shard_map` in which the
    axis is manual.

    Every shard gathers all keys and values, so bytes grow with T, unlike the linear kin's, and takes them a block at a
    time with a running softmax in float32; blocks after its last token are scored too, and masked. The backward pass
    scores the blocks again (Dao et al. 2022, arXiv 2205.14135). Operands of products are v's dtype.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    gathered = (k, v) if segments is None else (k, v, segments)
    k, v, *key_segments = jax.lax.all_gather(gathered, axis_name, axis=1, tiled=True)
    if k.shape[1] % block:
        block = math.gcd(k.shape[1], block)
    positions = jax.lax.axis_index(axis_name) * length + jnp.arange(length)
    q = q.reshape(batch, length, groups, heads // groups, width)
    key_segments = key_segments[0] if key_segments else None
    o = _attend(block, window, q, k, v, positions, segments, key_segments)
    return o.reshape(batch, length, heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(block, window, q, k, v, positions, segments, key_segments):
    """o [B, T, G, R, V] of q [B, T, G, R, K]; k, v [B, S, G, width]."""
    return _forward(block, window, q, k, v, positions, segments, key_segments)[0]


def _forward(block, window, *inputs):
    q, k, v, positions, segments, key_segments = inputs

    def step(carry, block_inputs):
        largest, total, mixed = carry
        first, k, v, key_segments = block_inputs
        scores = _scores(window, first, q, k, positions, segments, key_segments)
        new_largest = jnp.maximum(largest, jnp.max(scores, -1))
        shift = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
        weights = jnp.exp(scores - shift[..., None])
        kept = jnp.exp(largest - shift)
        mixed = kept[..., None] * mixed + _product("bgrts,bsgv->bgrtv", weights.astype(v.dtype), v)
        return (new_largest, kept * total + jnp.sum(weights, -1), mixed), None

    zero = _zero_like(jnp.sum(q, -1, dtype=jnp.float32).transpose(0, 2, 3, 1))
    carry = (zero - jnp.inf, zero, jnp.broadcast_to(zero[..., None], (*zero.shape, v.shape[-1])))
    (largest, total, mixed), _ = jax.lax.scan(step, carry, _blocks(block, k, v, key_segments))
    o = (mixed / total[..., None]).transpose(0, 3, 1, 2, 4).astype(v.dtype)
    return o, (*inputs, o, largest + jnp.log(total))


def _backward(block, window, residuals, do):
    q, k, v, positions, segments, key_segments, o, log_total = residuals
    along = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1).transpose(0, 2, 3, 1)
    scale = q.shape[-1] ** -0.5

    def step(dq, block_inputs):
        first, k, v, key_segments = block_inputs
        scores = _scores(window, first, q, k, positions, segments, key_segments)
        p = jnp.exp(scores - log_total[..., None])
        dv = _product("bgrts,btgrv->bsgv", p.astype(v.dtype), do)
        dp = _product("btgrv,bsgv->bgrts", do, v)
        ds = (scale * p * (dp - along[..., None])).astype(k.dtype)
        dk = _product("bgrts,btgrk->bsgk", ds, q)
        return dq + _product("bgrts,bsgk->btgrk", ds, k), (dk.astype(k.dtype), dv.astype(v.dtype))

    zero = _zero_like(q.astype(jnp.float32))
    dq, (dk, dv) = jax.lax.scan(step, zero, _blocks(block, k, v, key_segments))
    dk, dv = (jnp.moveaxis(x, 0, 1).reshape(y.shape) for x, y in ((dk, k), (dv, v)))
    return dq.astype(q.dtype), dk, dv, None, None, None


_attend.defvjp(_forward, _backward)


def _scores(window, first, q, k, positions, segments, key_segments):
    """Scaled scores [B, G, R, T, block] of the keys from position `first` on, -inf where they are out of sight."""
    scores = q.shape[-1] ** -0.5 * _product("btgrk,bsgk->bgrts", q, k)
    back = positions[:, None] - (first + jnp.arange(k.shape[1]))
    visible = back >= 0 if window is None else (back >= 0) & (back < window)
    visible = visible[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == key_segments[:, None])
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


def _blocks(block, *arrays):
    """Position of each block's first key, and the arrays [B, S, ...] as [S / block, B, block, ...] (None stays)."""
    count = arrays[0].shape[1] // block
    split = [
        None if x is None else jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0) for x in arrays
    ]
    return (block * jnp.arange(count), *split)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _zero_like(x):
    """Zeros that vary over the mesh as x does, which a scan inside shard_map wants of its carry."""
    return jnp.where(x == x, 0.0 * jnp.isfinite(x), 0.0)

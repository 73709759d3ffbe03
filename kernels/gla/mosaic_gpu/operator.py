"""`implementation="mosaic_gpu"`: the Hopper walks behind a custom derivative, with padding and grouping around them."""

import functools

import jax
import jax.numpy as jnp

from ...dispatch import hopper_obstacle
from ...once import wait_for_kernels
from ..partition import shard_over_batch_and_heads
from .anchors import CHUNK
from .backward import backward
from .forward import forward
from .pieces import decay_sums, own_gradients, own_states
from .tables import codes, matrices
from .tiles import backward_tiles, forward_tiles, is_wide, padded_widths
from .wide_operator import attend as attend_wide

CONSTANTS = ["X Y Z", "M Z", "N Z"]  # axes of codes, matrices and decay_sums


def unsupported(q, k, v, log_alpha, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    """Why this implementation cannot run the call, naming the argument; None when it can."""
    for name, x in (("q", q), ("k", k), ("v", v), ("log_alpha", log_alpha)):
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            return (
                f"{name} is {x.dtype.name}; the Hopper kernels take bfloat16 and float16 (their products are bfloat16)"
            )
    if q.shape[-1] > 256:
        return f"q has K = {q.shape[-1]} key channels; the Hopper kernels take up to 256"
    return hopper_obstacle("q", platform)


def gated_linear_attention(
    q, k, v, log_alpha, *, scale, initial_state=None, segment_ids=None, return_final_state=False, interpret=None
):
    """`kernels.gated_linear_attention` by the Hopper kernels; `interpret` runs them in Pallas' interpreter, on any
    device: InterpretGPUParams, with inline_mgpu="ignore"."""
    (_, T, _, K), V, dtype = q.shape, v.shape[-1], v.dtype
    padded_K, padded_V = padded_widths(K, V)
    padded_T = -(-T // CHUNK) * CHUNK

    def padded(x, width):
        x = x.astype(jnp.bfloat16)
        return jnp.pad(x, ((0, 0), (0, padded_T - T), (0, 0), (0, width - x.shape[-1])))

    state = initial_state
    if state is not None:
        state = jnp.pad(state, ((0, 0), (0, 0), (0, padded_K - K), (0, padded_V - V)))
    documents = None
    if (
        segment_ids is not None
    ):  # numbers that do not come back, so that equal means connected; the padding joins the last document
        documents = jnp.cumsum(jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1, dtype=jnp.int32)
        documents = jnp.pad(documents, ((0, 0), (0, padded_T - T)), mode="edge")
    attend = attend_wide if is_wide(padded_K, padded_V) else _attend
    o, final_state = attend(
        scale, return_final_state, interpret, padded(q, padded_K), padded(k, padded_K), padded(v, padded_V),
        padded(log_alpha, padded_K), state, documents,
    )  # fmt: skip
    o = o[:, :T, :, :V].astype(dtype)
    return (o, final_state[:, :, :K, :V]) if return_final_state else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, return_final_state, interpret, q, k, v, log_alpha, state, documents):
    o, final_state, _ = _forward(scale, return_final_state, interpret, False, q, k, v, log_alpha, state, documents)
    return o, final_state


def _attend_forward(scale, return_final_state, interpret, *inputs):
    o, final_state, states = _forward(scale, return_final_state, interpret, True, *inputs)
    return (o, final_state), (inputs, states)


def _attend_backward(scale, return_final_state, interpret, residuals, cotangents):
    (q, k, v, log_alpha, state, documents), saved = residuals
    do, d_final = cotangents
    names = ["B T H K", "B T G K", "B T G V", "B T G K", "B T H V", *CONSTANTS]
    arrays = [q, k, v, log_alpha, do, *map(jnp.asarray, (codes(), matrices(), decay_sums(reverse=True)))]
    names, arrays = [*names, "B H C", *["B T H V"] * (len(saved) - 1)], [*arrays, *saved]
    if return_final_state:
        names, arrays = [*names, "B H K V"], [*arrays, d_final]
    if documents is not None:
        names, arrays = [*names, "B T"], [*arrays, documents]

    outputs = ["B T H K", "B T G K", "B T G V", "B T G K", "B H K V"]
    run = functools.partial(_gradients, scale, return_final_state, interpret)
    dq, dk, dv, dg, d_state = _sharded(run, names, outputs, interpret)(*arrays)
    return dq, dk, dv, dg, (None if state is None else d_state), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(scale, return_final_state, interpret, save_states, q, k, v, log_alpha, state, documents):
    """o, the final state, and the states that enter each chunk (None unless they are to be saved), per shard."""
    names, arrays = ["B T H K", "B T G K", "B T G V", "B T G K", *CONSTANTS], [q, k, v, log_alpha]
    arrays += map(jnp.asarray, (codes(), matrices(), decay_sums(reverse=False)))
    if state is not None:
        names, arrays = [*names, "B H K V"], [*arrays, state]
    if documents is not None:
        names, arrays = [*names, "B T"], [*arrays, documents]

    def run(q, k, v, log_alpha, codes, matrices, sums, *rest):
        rest = list(rest)
        initial_state = rest.pop(0) if state is not None else None
        options = {"documents": rest.pop(0) if rest else None, "interpret": interpret}
        tiles = forward_tiles(q.shape, v.shape)
        pieces = own_states(k, v, log_alpha, sums, cut=tiles.cut, **options) if tiles.cut.pieces > 1 else None
        o, final_state, states = forward(
            q, k, v, log_alpha, codes, matrices, scale=scale, tiles=tiles, initial_state=initial_state, pieces=pieces,
            save_states=save_states, **options,
        )  # fmt: skip
        if interpret is None and not save_states:
            o = wait_for_kernels(o)
        return o, final_state, *states

    outputs = ["B T H V", "B H K V"] + (["B H C"] + ["B T H V"] * (q.shape[-1] // 64) if save_states else [])
    o, final_state, *states = _sharded(run, names, outputs, interpret)(*arrays)
    return o, final_state, states


def _gradients(scale, return_final_state, interpret, q, k, v, log_alpha, do, codes, matrices, sums, *rest):
    """dq, dk, dv, dlog_alpha and the initial state's, of a device's share. `rest`: what the forward saved, the gradient
    of the final state if that is returned, documents if there are any."""
    tiers_of_chunks, *rest = rest
    states, rest = rest[: q.shape[-1] // 64], rest[q.shape[-1] // 64 :]
    final_gradient = rest.pop(0) if return_final_state else None
    options = {"scale": scale, "documents": rest.pop(0) if rest else None, "interpret": interpret}
    tiles = backward_tiles(q.shape, v.shape)
    pieces = own_gradients(q, do, log_alpha, sums, cut=tiles.cut, **options) if tiles.cut.pieces > 1 else None
    dq, dk, dg, dv, d_initial = backward(
        q, k, v, log_alpha, do, tiers_of_chunks, states, codes, matrices, tiles=tiles, final_gradient=final_gradient,
        pieces=pieces, **options,
    )  # fmt: skip
    if interpret is None:
        dq = wait_for_kernels(dq)
    G = k.shape[2]
    return _summed(dq, q.shape[2]), _summed(dk, G), _summed(dv[None], G), _summed(dg, G), d_initial


def _sharded(run, inputs, outputs, interpret):
    """`run` on each device's share; the interpreter's callbacks cannot be partitioned."""
    return run if interpret is not None else shard_over_batch_and_heads(run, inputs, outputs)


def _summed(parts, heads):
    """[blocks, B, T, H, d], a part per block of the other width and per query head, to [B, T, heads, d]."""
    blocks, B, T, H, d = parts.shape
    if blocks == 1 and heads == H:
        return parts[0]
    return parts.reshape(blocks, B, T, heads, H // heads, d).sum((0, 4), dtype=jnp.float32).astype(parts.dtype)

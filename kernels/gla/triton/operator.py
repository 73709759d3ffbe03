"""`implementation="triton"`: four kernels behind a custom derivative, with padding and documents around them."""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from ..partition import shard_over_batch_and_heads
from ..recurrence import segment_starts
from .tiles import padded_width

CHUNK = 64
OLDEST = 8.0  # compute capability


def unsupported(q, k, v, log_alpha, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    """Why this implementation cannot run the call, naming the argument; None when it can."""
    for name, x in (("q", q), ("k", k), ("v", v), ("log_alpha", log_alpha)):
        if x.dtype == jnp.float64:
            return f"{name} is float64; the Triton kernels compute in float32"
    for name, x, most in (("q", q, 256), ("v", v, 512)):
        if x.shape[-1] > most:
            return f"{name} has {x.shape[-1]} channels per head; the Triton kernels take up to {most}"
    if platform != "gpu":
        return f"q is on platform {platform!r}; the Triton kernels run on NVIDIA GPUs of compute capability >= {OLDEST}"
    capability = _capability()
    if capability is None or capability < 10 * OLDEST:
        return f"the GPU has compute capability {_device_capability()}; the Triton kernels want {OLDEST} or later"
    if importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("triton") is None:
        return "jax_triton is not installed; it comes with the extra `triton` (pip install 'jax-triton' 'triton')"
    return None


def gated_linear_attention(q, k, v, log_alpha, *, scale, initial_state, segment_ids, return_final_state):
    """`kernels.gated_linear_attention` by the Triton kernels."""
    (_, T, _, K), V = q.shape, v.shape[-1]
    padded_K, padded_V, padded_T = padded_width(K), padded_width(V), -(-T // CHUNK) * CHUNK
    documents = None
    if segment_ids is not None:  # numbers that do not come back; each starts with a reset
        starts = segment_starts(segment_ids)
        log_alpha = jnp.where(starts[:, :, None, None], jnp.asarray(-jnp.inf, log_alpha.dtype), log_alpha)
        documents = jnp.pad(jnp.cumsum(starts, 1, dtype=jnp.int32), ((0, 0), (0, padded_T - T)), mode="edge")

    def padded(x, width):  # tokens with k = 0 and log_alpha = 0 leave the state as it is
        return jnp.pad(x, ((0, 0), (0, padded_T - T), (0, 0), (0, width - x.shape[-1])))

    state = initial_state
    if state is not None:
        state = jnp.pad(state, ((0, 0), (0, 0), (0, padded_K - K), (0, padded_V - V)))
    o, final_state = _attend(
        scale, return_final_state, padded(q, padded_K), padded(k, padded_K), padded(v, padded_V),
        padded(log_alpha, padded_K), state, documents,
    )  # fmt: skip
    o = o[:, :T, :, :V]
    return (o, final_state[:, :, :K, :V]) if return_final_state else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, return_final_state, q, k, v, log_alpha, state, documents):
    o, final_state, _ = _forward(scale, q, k, v, log_alpha, state)
    return o, final_state


def _attend_forward(scale, return_final_state, q, k, v, log_alpha, state, documents):
    o, final_state, states = _forward(scale, q, k, v, log_alpha, state)
    return (o, final_state), (q, k, v, log_alpha, state, documents, states)


def _forward(scale, q, k, v, log_alpha, state):
    """o, the final state, and the states that enter each chunk."""

    def run(q, k, v, log_alpha, state=None):
        kernels = _kernels(scale, q, k, v, log_alpha)
        q_in, k_out, decay, p = kernels.prepare(q, k, log_alpha)
        states, final_state = kernels.states(k_out, v, decay, state)
        return kernels.rows(q_in, states, p, v, v.dtype), final_state, states

    names, arrays = ["B T H K", "B T G K", "B T G V", "B T G K"], [q, k, v, log_alpha]
    if state is not None:
        names, arrays = [*names, "B H K V"], [*arrays, state]
    return shard_over_batch_and_heads(run, names, ["B T H V", "B H K V", "B H C K V"])(*arrays)


def _attend_backward(scale, return_final_state, residuals, cotangents):
    q, k, v, log_alpha, state, documents, states = residuals
    do, d_final = cotangents

    def run(q, k, v, log_alpha, do, states, *rest):
        rest = list(rest)
        d_final = rest.pop(0) if return_final_state else None
        documents = rest.pop(0) if rest else None
        grouped = q.shape[2] != k.shape[2]
        dtypes = [q.dtype, *(jnp.float32 if grouped else x.dtype for x in (k, log_alpha))]
        kernels = _kernels(scale, q, k, v, log_alpha)
        q_in, k_out, decay, p = kernels.prepare(q, k, log_alpha)
        d_states, d_initial = kernels.states(q_in, do, decay, d_final, reverse=True)
        dv = kernels.rows(k_out, d_states, p, do, jnp.float32 if grouped else v.dtype, transposed=True)
        dp = kernels.products(do, v)
        dq, dk, dg = kernels.gradients(q, k, v, log_alpha, do, dp, states, d_states, documents, dtypes)
        dk, dv, dg = (_summed(part, x) for part, x in ((dk, k), (dv, v), (dg, log_alpha)))
        return dq, dk, dv, dg, d_initial

    names = ["B T H K", "B T G K", "B T G V", "B T G K", "B T H V", "B H C K V"]
    arrays = [q, k, v, log_alpha, do, states]
    if return_final_state:
        names, arrays = [*names, "B H K V"], [*arrays, d_final]
    if documents is not None:
        names, arrays = [*names, "B T"], [*arrays, documents]
    outputs = ["B T H K", "B T G K", "B T G V", "B T G K", "B H K V"]
    dq, dk, dv, dg, d_state = shard_over_batch_and_heads(run, names, outputs)(*arrays)
    return dq, dk, dv, dg, (None if state is None else d_state), None


_attend.defvjp(_attend_forward, _attend_backward)


def _kernels(scale, q, k, v, log_alpha):
    """jax_triton is an extra, and its import is slow: only for who gets here."""
    from .launch import Kernels

    return Kernels(q, k, v, log_alpha, scale, _capability())


def _summed(parts, like):
    """[B, T, H, d], a part per query head, to the [B, T, G, d] of `like`."""
    B, T, G, d = like.shape
    return parts if parts.shape[2] == G else parts.reshape(B, T, G, -1, d).sum(3).astype(like.dtype)


def _capability() -> int | None:
    """80 for 8.0; None where the GPU has none (AMD's)."""
    major, _, minor = _device_capability().partition(".")
    return 10 * int(major) + int(minor) if major.isdigit() and minor.isdigit() else None


def _device_capability() -> str:
    return str(getattr(jax.devices("gpu")[0], "compute_capability", None))

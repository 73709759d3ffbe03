"""`implementation="mosaic_gpu"`: walks behind a custom derivative, the gradients of decays, padding and partitioning.

The gradient of a token's decay weighs every pair (i, j) of tokens with j < t <= i. Added up over all i >= t, what pairs
give at i is q dq and what they take at j is k dk, each without the pair of a token and itself. That is done within
ANCHOR chunks, so that rounding cannot pile up along the sequence: at the end of each such span, the sum over all pairs
that cross it is the product of the state there with its gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ...dispatch import hopper_obstacle
from ...gla.partition import shard_over_batch_and_heads
from ...gla.recurrence import segment_starts
from .walk import CHUNK, walk

ANCHOR = 2
FLOOR = -110.0  # exp of it is 0 in float32; a reset


def unsupported(q, k, v, log_gamma, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    """Why this implementation cannot run the call, naming the argument; None when it can."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.bfloat16, jnp.float16):
            return (
                f"{name} is {x.dtype.name}; the Hopper kernels take bfloat16 and float16 (their products are bfloat16)"
            )
    if log_gamma.dtype == jnp.float64:
        return "log_gamma is float64; the Hopper kernels compute in float32"
    return hopper_obstacle("q", platform)


def retention(
    q, k, v, log_gamma, *, scale, initial_state=None, segment_ids=None, return_final_state=False, interpret=None
):
    """`kernels.retention` by the Hopper kernels, log_gamma [B, T, H]; `interpret` runs them in Pallas' interpreter, on
    any device."""
    (_, T, _, K), V, dtype = q.shape, v.shape[-1], v.dtype
    log_gamma = log_gamma.astype(jnp.float32)
    if segment_ids is not None:
        log_gamma = jnp.where(segment_starts(segment_ids)[..., None], -jnp.inf, log_gamma)

    def padded(x):
        x = x.astype(jnp.bfloat16)
        return jnp.pad(x, ((0, 0), (0, -T % CHUNK), (0, 0), (0, -x.shape[-1] % 64)))

    log_gamma = jnp.pad(log_gamma, ((0, 0), (0, -T % CHUNK), (0, 0)))
    state = initial_state
    if state is not None:
        state = jnp.pad(state, ((0, 0), (0, 0), (0, -K % 64), (0, -V % 64)))
    o, final_state = _attend(scale, interpret, padded(q), padded(k), padded(v), log_gamma, state)
    o = o[:, :T, :, :V].astype(dtype)
    return (o, final_state[:, :, :K, :V]) if return_final_state else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, interpret, q, k, v, log_gamma, state):
    def run(q, k, v, log_gamma, state=None):
        entering = None if state is None else state.swapaxes(2, 3)
        factors = _factors(log_gamma, scale, reverse=False)
        o, leaving = walk(v, k, q, factors, scale=scale, reverse=False, entering=entering, interpret=interpret)
        return _summed(o), leaving.swapaxes(2, 3)

    names, arrays = ["B T H K", "B T H K", "B T H V", "B T H"], [q, k, v, log_gamma]
    if state is not None:
        names, arrays = [*names, "B H K V"], [*arrays, state]
    return _sharded(run, names, ["B T H V", "B H K V"], interpret)(*arrays)


def _attend_forward(scale, interpret, *inputs):
    log_gamma = inputs[3]
    values = tuple(x if x is None else x.value for x in inputs)
    o, final_state = _attend(scale, interpret, *values)
    # The end of what the gradient of decays is summed from; fixed decays, as RetNet's are, have none.
    return (o, final_state), (values, final_state if log_gamma.perturbed else None)


def _attend_backward(scale, interpret, residuals, cotangents):
    (q, k, v, log_gamma, state), final_state = residuals
    do, d_final = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    do = jnp.zeros(v.shape, v.dtype) if do is None else do
    fixed = final_state is None

    def run(q, k, v, log_gamma, do, final_state=None, d_final=None, state=None):
        forward, backward = (_factors(log_gamma, scale, reverse=reverse) for reverse in (False, True))
        options = {"scale": scale, "interpret": interpret}
        d_final_T = None if d_final is None else d_final.swapaxes(2, 3)
        dv, _ = walk(do, q, k, backward, reverse=True, entering=d_final_T, **options)
        if fixed:
            dq, _ = walk(k, v, do, forward, reverse=False, entering=state, **options)
            dk, d_state = walk(q, do, v, backward, reverse=True, entering=d_final, **options)
            return _summed(dq), _summed(dk), _summed(dv), d_state
        options["every"] = ANCHOR
        dq, _, given, *kept = walk(k, v, do, forward, reverse=False, entering=state, totals_with=q, **options)
        kept = kept[0] if kept else None
        dk, d_state, taken, *crossing = walk(
            q, do, v, backward, reverse=True, entering=d_final, totals_with=k, kept=kept, **options
        )
        at_end = jnp.zeros((*final_state.shape[:2], 1))
        if d_final is not None:
            rounded = jax.lax.reduce_precision(d_final, exponent_bits=8, mantissa_bits=7)  # as the walk reads it
            at_end = jnp.sum(final_state * rounded, (2, 3))[..., None]
        crossing = [x.sum((0, -1)) for x in crossing] + [at_end]
        d_gates = _gate_gradient(log_gamma, given.sum((0, 1)) - taken.sum((0, 1)), jnp.concatenate(crossing, 2))
        return _summed(dq), _summed(dk), _summed(dv), d_state, d_gates

    axes = {"q": "B T H K", "k": "B T H K", "v": "B T H V", "log_gamma": "B T H", "do": "B T H V"}
    axes |= dict.fromkeys(("final_state", "d_final", "state"), "B H K V")
    arrays = {"q": q, "k": k, "v": v, "log_gamma": log_gamma, "do": do}
    arrays |= {"final_state": final_state, "d_final": d_final, "state": state}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    outputs = ["B T H K", "B T H K", "B T H V", "B H K V", *([] if fixed else ["B T H"])]
    call = lambda *given: run(**dict(zip(arrays, given, strict=True)))
    dq, dk, dv, d_state, *d_gates = _sharded(call, [axes[name] for name in arrays], outputs, interpret)(
        *arrays.values()
    )
    return dq, dk, dv, (None if fixed else d_gates[0]), (None if state is None else d_state)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _factors(log_gamma, scale, *, reverse):
    """What decays [B, T, H] are to a walk: [B, H, T / 64, FACTORS, 64]."""
    gates = jnp.moveaxis(jnp.maximum(log_gamma, FLOOR), 1, 2)
    gates = gates.reshape(*gates.shape[:2], -1, CHUNK)
    b = jnp.cumsum(gates, -1)
    into = scale * jnp.exp(b)
    out_of = jnp.exp(b[..., -1:] - b)
    reading, writing = (out_of, into) if reverse else (into, out_of)
    return jnp.stack([b, reading, writing, jnp.broadcast_to(jnp.exp(b[..., -1:]), b.shape)], -2)


def _gate_gradient(log_gamma, change, crossing):
    """[B, T, H], from what pairs give less what they take, [B, H, T], and the sums of those that cross the end of each
    span of ANCHOR chunks, [B, H, spans].

    Sums stop at resets: across them there are no pairs, and rounding must not suggest any.
    """
    B, T, H = log_gamma.shape
    span, spans = ANCHOR * CHUNK, crossing.shape[2]
    resets = jnp.cumsum(log_gamma <= FLOOR, 1, dtype=jnp.int32)
    padding = spans * span - T
    stretch = jnp.pad(jnp.moveaxis(resets, 1, 2), ((0, 0), (0, 0), (0, padding)), mode="edge").reshape(
        B, H, spans, span
    )
    change = jnp.pad(change, ((0, 0), (0, 0), (0, padding))).reshape(B, H, spans, span)
    # The number of the stretch that the token after each span belongs to: that of the state with the crossing pairs.
    after = jnp.concatenate([stretch[:, :, 1:, 0], stretch[:, :, -1:, -1]], 2)

    def then(later, earlier):
        """Sums that stop where the stretch changes: (stretch, sum) of later tokens, then of an earlier one."""
        return earlier[0], earlier[1] + jnp.where(later[0] == earlier[0], later[1], 0)

    last = jnp.where(stretch[..., -1] == after, crossing, 0)
    change = change.at[..., -1].add(last)
    _, sums = jax.lax.associative_scan(then, (stretch, change), reverse=True, axis=3)
    sums = jnp.moveaxis(sums.reshape(B, H, -1)[:, :, :T], 1, 2)
    return jnp.where(log_gamma > FLOOR, sums, 0)


def _summed(parts):
    return parts[0] if parts.shape[0] == 1 else parts.sum(0, dtype=jnp.float32).astype(parts.dtype)


def _sharded(run, inputs, outputs, interpret):
    """`run` on each device's share; the interpreter's callbacks cannot be partitioned."""
    return run if interpret is not None else shard_over_batch_and_heads(run, inputs, outputs)

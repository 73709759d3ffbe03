"""`implementation="mosaic_gpu"`: the two walks behind a custom derivative, padding and partitioning around them."""

import functools

import jax
import jax.numpy as jnp

from ...dispatch import hopper_obstacle
from ...gla.partition import shard_over_batch_and_heads
from ...gla.recurrence import segment_starts
from .backward import backward
from .forward import CHUNK, forward
from .warpgroup import CHANNELS, STATES


def unsupported(x, dt, A, B, C, D, *, initial_state, segment_ids, return_final_state, platform) -> str | None:
    """Why this implementation cannot run the call, naming the argument; None when it can."""
    for name, array in {"x": x, "dt": dt, "B": B, "C": C}.items():
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {array.dtype.name}; the Hopper kernels take bfloat16 and float32"
    if A.shape[1] > STATES:
        return f"A has N = {A.shape[1]} states; the Hopper kernels take up to {STATES}"
    return hopper_obstacle("x", platform)


def selective_scan(
    x, dt, A, B, C, D, *, initial_state=None, segment_ids=None, return_final_state=False, interpret=None
):
    """`kernels.selective_scan` by the Hopper kernels; `interpret` runs them in Pallas' interpreter, on any device.

    States are padded to 16, and tokens to a multiple of 32 with some that do nothing (dt = 0).
    """
    rows, T, E = x.shape
    N = A.shape[1]
    of_tokens, of_states, none = (0, -T % CHUNK), (0, STATES - N), (0, 0)
    starts = None
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids).astype(jnp.float32), (none, of_tokens))
    state = initial_state if initial_state is None else jnp.pad(initial_state, (none, none, of_states))
    # A and D for each row: their gradients then leave the kernels per row, and rows stay apart over devices.
    A = jnp.broadcast_to(jnp.pad(A, (none, of_states)), (rows, E, STATES))
    D = jnp.broadcast_to(D, (rows, E))
    x, dt = (jnp.pad(array, (none, of_tokens, none)) for array in (x, dt))
    B, C = (jnp.pad(array, (none, of_tokens, of_states)) for array in (B, C))
    y, final_state = _scan(interpret, x, dt, A, B, C, D, state, starts)
    return (y[:, :T], final_state[..., :N]) if return_final_state else y[:, :T]


NAMES = ["B T H", "B T H", "B H N", "B T N", "B T N", "B H"]  # H: channels, as heads are to the partitioning


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(interpret, x, dt, A, B, C, D, state, starts):
    y, final_state, _ = _forward(interpret, False, x, dt, A, B, C, D, state, starts)
    return y, final_state


def _scan_forward(interpret, *inputs):
    y, final_state, states = _forward(interpret, True, *inputs)
    return (y, final_state), (inputs, states)


def _scan_backward(interpret, residuals, cotangents):
    (x, dt, A, B, C, D, state, starts), states = residuals
    dy, d_final = cotangents
    # Terms of dB and dC are bf16 where that is what their sums are rounded to.
    limbs = 1 if B.dtype == C.dtype == jnp.bfloat16 else 2

    def run(x, dt, A, B, C, D, dy, states, final_gradient, starts=None):
        B, C = B.astype(jnp.float32), C.astype(jnp.float32)
        return backward(
            x, dt, A, B, C, D, dy, states,
            final_gradient=final_gradient, starts=starts, limbs=limbs, interpret=interpret,
        )  # fmt: skip

    names = [*NAMES, "B T H", "B S H N", "B H N"]
    arrays = [x, dt, A, B, C, D, dy, states, d_final]
    if starts is not None:
        names, arrays = [*names, "B T"], [*arrays, starts]
    outputs = ["B T H", "B T H", "B H N", "B T N", "B T N", "B H", "B H N"]
    dx, ddt, dA, dB, dC, dD, d_state = _sharded(run, names, outputs, interpret)(*arrays)
    return dx, ddt, dA, dB.astype(B.dtype), dC.astype(C.dtype), dD, (None if state is None else d_state), None


_scan.defvjp(_scan_forward, _scan_backward)


def _forward(interpret, save_states, x, dt, A, B, C, D, state, starts):
    """y, the final state, and the states that the backward wants (None unless they are to be saved), per shard."""
    names, arrays = [*NAMES], [x, dt, A, B, C, D]
    if state is not None:
        names, arrays = [*names, "B H N"], [*arrays, state]
    if starts is not None:
        names, arrays = [*names, "B T"], [*arrays, starts]

    def run(x, dt, A, B, C, D, *rest):
        rest = list(rest)
        initial_state = rest.pop(0) if state is not None else None
        starts = rest.pop(0) if rest else None
        B, C = B.astype(jnp.float32), C.astype(jnp.float32)
        options = {"initial_state": initial_state, "starts": starts, "save_states": save_states}
        y, final_state, states = forward(x, dt, A, B, C, D, **options, interpret=interpret)
        return (y, final_state, states) if save_states else (y, final_state)

    outputs = ["B T H", "B H N"] + (["B S H N"] if save_states else [])
    y, final_state, *states = _sharded(run, names, outputs, interpret)(*arrays)
    return y, final_state, (states[0] if save_states else None)


def _sharded(run, inputs, outputs, interpret):
    """`run` on each device's share, of channels that are padded to whole blocks; the interpreter's callbacks cannot be
    partitioned."""

    def in_blocks(*arrays):
        E = arrays[0].shape[inputs[0].split().index("H")]
        widths = ([(0, -E % CHANNELS if axis == "H" else 0) for axis in axes.split()] for axes in inputs)
        results = run(*(jnp.pad(x, width) for x, width in zip(arrays, widths, strict=True)))
        ends = ([slice(E if axis == "H" else None) for axis in axes.split()] for axes in outputs)
        return tuple(x[tuple(end)] for x, end in zip(results, ends, strict=True))

    return in_blocks if interpret is not None else shard_over_batch_and_heads(in_blocks, inputs, outputs)

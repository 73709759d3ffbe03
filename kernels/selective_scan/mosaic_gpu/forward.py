"""The forward walk: the states of 128 channels in registers, over the tokens of one row.

One block of threads owns one (row, 128 channels). A thread owns a channel and all its states, so a token costs it, per
state, one exponential and four multiply-adds, and nothing is exchanged. TMA brings tiles of CHUNK tokens of x, dt, B,
C, STAGES ahead. A forward that will be differentiated writes the state entering each SAVED tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .warpgroup import (
    CHANNEL,
    CHANNELS,
    F32,
    LOG2_E,
    STATE,
    STATE_ROW,
    STATES,
    load,
    of_channels,
    of_states,
    over_states,
)

CHUNK = 32  # tokens of one tile
SAVED = 16  # tokens between saved states
UNROLL = 4
STAGES = 3


def forward(x, dt, A, B, C, D, *, initial_state=None, starts=None, save_states=False, interpret=None):
    """y, final states and (on request) the states that enter each SAVED tokens.

    Args:
      x, dt: [B, T, E] bf16 or float32; T a multiple of CHUNK, E of CHANNELS.
      A: [B, E, STATES] float32. D: [B, E] float32.
      B, C: [B, T, STATES] float32.
      initial_state: [B, E, STATES] float32, or None for zero.
      starts: [B, T] float32, 1 where the state restarts, else 0; or None.
      save_states: also return states [B, T / SAVED, E, STATES] float32.
    """
    rows, T, E = x.shape
    has_state, packed = initial_state is not None, starts is not None
    chunks = T // CHUNK

    def kernel(*refs):
        refs = list(refs)
        x_g, dt_g, A_g, B_g, C_g, D_g = refs[:6]
        del refs[:6]
        initial_g = refs.pop(0) if has_state else None
        starts_g = refs.pop(0) if packed else None
        y_g, final_g = refs[:2]
        del refs[:2]
        saved_g = refs.pop(0) if save_states else None
        x_s, dt_s, B_s, C_s, arrived, *rest = refs
        starts_s = rest.pop(0) if packed else None

        row, channels = lax.axis_index("row"), pl.ds(lax.axis_index("block") * CHANNELS, CHANNELS)

        def fetch(chunk):
            slot, tokens = lax.rem(chunk, STAGES), pl.ds(chunk * CHUNK, CHUNK)
            plgpu.copy_gmem_to_smem(x_g.at[row, tokens, channels], x_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(dt_g.at[row, tokens, channels], dt_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(B_g.at[row, tokens], B_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(C_g.at[row, tokens], C_s.at[slot], arrived.at[slot])
            if packed:
                plgpu.copy_gmem_to_smem(starts_g.at[row, tokens], starts_s.at[slot], arrived.at[slot])

        for chunk in range(min(STAGES, chunks)):
            fetch(jnp.int32(chunk))

        A = load(A_g.at[row, channels], STATE) * LOG2_E
        D = load(D_g.at[row, channels], CHANNEL)

        def walk(chunk, h):
            slot = lax.rem(chunk, STAGES)
            plgpu.barrier_wait(arrived.at[slot])

            def some(i, h):
                if save_states:

                    @pl.when(lax.rem(i, SAVED // UNROLL) == 0)
                    def _():
                        saved_g[row, chunk * (CHUNK // SAVED) + i // (SAVED // UNROLL), channels] = h

                for n in range(UNROLL):
                    t = i * UNROLL + n
                    x, dt = load(x_s.at[slot, t], CHANNEL), load(dt_s.at[slot, t], CHANNEL)
                    decay = jnp.exp2(of_channels(dt) * A)
                    if packed:
                        decay = decay * (1.0 - starts_s[slot, t])
                    h = decay * h + of_channels(dt * x) * of_states(load(B_s.at[slot, t], STATE_ROW))
                    y = over_states(h * of_states(load(C_s.at[slot, t], STATE_ROW))) + D * x
                    y_g[row, chunk * CHUNK + t, channels] = y.astype(y_g.dtype)
                return h

            h = lax.fori_loop(0, CHUNK // UNROLL, some, h)
            plgpu.commit_smem()  # all threads have read the tile

            @pl.when(chunk + STAGES < chunks)
            def _():
                fetch(chunk + STAGES)

            return h

        zeros = plgpu.layout_cast(jnp.zeros((CHANNELS, STATES), F32), STATE)
        h = load(initial_g.at[row, channels], STATE) if has_state else zeros
        final_g[row, channels] = lax.fori_loop(0, chunks, walk, h)

    state = jax.ShapeDtypeStruct((rows, E, STATES), F32)
    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype), state]
    if save_states:
        out_type.append(jax.ShapeDtypeStruct((rows, T // SAVED, E, STATES), F32))
    scratch = [
        plgpu.SMEM((STAGES, CHUNK, CHANNELS), x.dtype),
        plgpu.SMEM((STAGES, CHUNK, CHANNELS), dt.dtype),
        plgpu.SMEM((STAGES, CHUNK, STATES), F32),
        plgpu.SMEM((STAGES, CHUNK, STATES), F32),
        plgpu.Barrier(num_arrivals=5 if packed else 4, num_barriers=STAGES),
    ]
    scratch += [plgpu.SMEM((STAGES, CHUNK), F32)] if packed else []
    operands = [x, dt, A, B, C, D]
    operands += [initial_state] if has_state else []
    operands += [starts] if packed else []
    outputs = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(rows, E // CHANNELS),
        grid_names=("row", "block"),
        # Threads share only tiles that TMA writes, and meet before those are filled again.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **({"interpret": interpret} if interpret is not None else {}),
    )(*operands)
    return *outputs[:2], (outputs[2] if save_states else None)

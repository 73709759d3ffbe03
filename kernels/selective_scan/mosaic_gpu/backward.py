"""The backward walk: all gradients of 128 channels of one row, in one pass over its tokens, last to first.

With g_t the gradient of h_t and a_t = exp(dt_t A):

    g_t = C_t dy_t + a_{t+1} g_{t+1}        d(dt x)_t = sum over states of g_t B_t        d(dt A)_t = g_t a_t h_{t-1}

A tile of CHUNK tokens starts from the state that the forward saved there. Its states are made once more in two steps: a
walk over the tile that keeps, in shared memory, the state entering every pair of tokens; then, from the last pair to
the first, both tokens with their states and decays in registers, and back over them with g.

dB_t and dC_t are sums over channels, of g dt x and of h dy: `channel_sums` takes them. Each block of channels leaves a
part for the caller to add: no atomics, so the same inputs give the same bits.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import channel_sums
from .forward import SAVED
from .warpgroup import (
    CHANNEL,
    CHANNELS,
    F32,
    LN_2,
    LOG2_E,
    STATE,
    STATE_ROW,
    STATES,
    load,
    of_channels,
    of_states,
    over_states,
)

CHUNK = SAVED  # tokens of one tile
PAIR = channel_sums.TOKENS
PAIRS = CHUNK // PAIR
assert PAIRS == channel_sums.COLUMNS
STAGES = 2
LINE = 128 // 4  # numbers in a line of shared memory
SWIZZLED = plgpu.TilingTransform((8, STATES)), plgpu.SwizzleTransform(4 * STATES)  # rows of states, no bank conflicts


def backward(x, dt, A, B, C, D, dy, states, *, final_gradient=None, starts=None, limbs=1, interpret=None):
    """Gradients of the arguments of `forward`, from dy and the states that it saved.

    Args:
      x, dt, A, B, C, D, starts: as in `forward`. dy: [B, T, E], of x's dtype.
      states: [B, T / SAVED, E, STATES] float32.
      final_gradient: [B, E, STATES] float32, gradient of the final state, or None.
      limbs: 1 or 2, how many bf16 numbers a term of dB and dC is.

    Returns:
      dx, ddt, of the dtypes of x and dt; float32: dA [B, E, STATES]; dB and dC [B, T, STATES]; dD [B, E];
      d_initial_state [B, E, STATES].
    """
    rows, T, E = x.shape
    has_final, packed = final_gradient is not None, starts is not None
    interpreted = interpret is not None
    chunks = T // CHUNK

    def kernel(*refs):
        refs = list(refs)
        x_g, dt_g, A_g, B_g, C_g, D_g, dy_g, states_g, ones_g = refs[:9]
        del refs[:9]
        final_g = refs.pop(0) if has_final else None
        starts_g = refs.pop(0) if packed else None
        dx_g, ddt_g, dA_g, totals_g, dD_g, initial_g = refs[:6]
        del refs[:6]
        x_s, dt_s, dy_s, B_s, C_s, entering_s, arrived, ones_arrived, sums_s, *rest = refs
        starts_s = rest.pop(0) if packed else None

        row, block = lax.axis_index("row"), lax.axis_index("block")
        channels = pl.ds(block * CHANNELS, CHANNELS)

        def fetch(step):
            slot, tokens = lax.rem(step, STAGES), pl.ds((chunks - 1 - step) * CHUNK, CHUNK)
            plgpu.copy_gmem_to_smem(x_g.at[row, tokens, channels], x_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(dt_g.at[row, tokens, channels], dt_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(dy_g.at[row, tokens, channels], dy_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(B_g.at[row, tokens], B_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(C_g.at[row, tokens], C_s.at[slot], arrived.at[slot])
            if packed:
                starts_of_tile = starts_s.at[slot, pl.ds(0, CHUNK)]
                plgpu.copy_gmem_to_smem(starts_g.at[row, tokens], starts_of_tile, arrived.at[slot])

        plgpu.copy_gmem_to_smem(ones_g, sums_s[1], ones_arrived)
        for step in range(min(STAGES, chunks)):
            fetch(jnp.int32(step))
        plgpu.barrier_wait(ones_arrived)

        A = load(A_g.at[row, channels], STATE) * LOG2_E
        D = load(D_g.at[row, channels], CHANNEL)
        zeros = lambda shape, layout: plgpu.layout_cast(jnp.zeros(shape, F32), layout)

        def advance(slot, t, h):
            """The decay of token t, and the state after it."""
            dt = load(dt_s.at[slot, t], CHANNEL)
            decay = jnp.exp2(of_channels(dt) * A)
            if packed:
                decay = decay * (1.0 - starts_s[slot, t])
            written = of_channels(dt * load(x_s.at[slot, t], CHANNEL)) * of_states(load(B_s.at[slot, t], STATE_ROW))
            return decay, decay * h + written

        def tile(step, carry):
            slot, chunk = lax.rem(step, STAGES), chunks - 1 - step
            saved = lambda: load(states_g.at[row, chunk, channels], STATE)
            plgpu.barrier_wait(arrived.at[slot])

            def enter(pair, h):
                for n in range(PAIR):
                    _, h = advance(slot, pair * PAIR + n, h)
                entering_s.at[pair][...] = h
                return h

            lax.fori_loop(0, PAIRS - 1, enter, saved())

            def back(accumulator, carry=carry):
                sums = channel_sums.ChannelSums(accumulator, *sums_s)

                def pair_back(i, carry):
                    g, dA, dD = carry
                    pair = PAIRS - 1 - i
                    kept_h = lambda: plgpu.load(entering_s.at[jnp.maximum(pair - 1, 0)], layout=STATE)
                    h = lax.cond(pair == 0, saved, kept_h)
                    kept = []
                    for n in range(PAIR):
                        decay, after = advance(slot, pair * PAIR + n, h)
                        kept.append((h, decay, after))
                        h = after
                    sums.ready()
                    for n in reversed(range(PAIR)):
                        h, decay, after = kept[n]
                        t = pair * PAIR + n
                        x, dt, dy = (load(ref.at[slot, t], CHANNEL) for ref in (x_s, dt_s, dy_s))
                        g = g + of_channels(dy) * of_states(load(C_s.at[slot, t], STATE_ROW))
                        sums.put(n, g * of_channels(dt * x), after * of_channels(dy))
                        d_written = over_states(g * of_states(load(B_s.at[slot, t], STATE_ROW)))
                        g = g * decay
                        d_exponent = g * h
                        dA = dA + d_exponent * of_channels(dt)
                        d_dt = LN_2 * over_states(d_exponent * A) + x * d_written
                        dx_g[row, chunk * CHUNK + t, channels] = (dt * d_written + D * dy).astype(dx_g.dtype)
                        ddt_g[row, chunk * CHUNK + t, channels] = d_dt.astype(ddt_g.dtype)
                        dD = dD + x * dy
                    sums.add(pair)
                    return g, dA, dD

                return lax.fori_loop(0, PAIRS, pair_back, carry), sums.totals()

            carry, totals = back(None) if interpreted else channel_sums.with_accumulator(back)
            totals_g.at[block, row, chunk][...] = totals
            plgpu.commit_smem()  # all threads have read the tile

            @pl.when(step + STAGES < chunks)
            def _():
                fetch(step + STAGES)

            return carry

        g = load(final_g.at[row, channels], STATE) if has_final else zeros((CHANNELS, STATES), STATE)
        carry = g, zeros((CHANNELS, STATES), STATE), zeros((CHANNELS,), CHANNEL)
        g, dA, dD = lax.fori_loop(0, chunks, tile, carry)
        initial_g[row, channels] = g
        dA_g[row, channels] = dA
        dD_g[row, channels] = dD

    state = jax.ShapeDtypeStruct((rows, E, STATES), F32)
    totals = (E // CHANNELS, rows, chunks, channel_sums.ROWS, channel_sums.COLUMNS)
    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(x.shape, dt.dtype)]
    out_type += [state, jax.ShapeDtypeStruct(totals, F32), jax.ShapeDtypeStruct((rows, E), F32), state]
    scratch = [
        plgpu.SMEM((STAGES, CHUNK, CHANNELS), x.dtype),
        plgpu.SMEM((STAGES, CHUNK, CHANNELS), dt.dtype),
        plgpu.SMEM((STAGES, CHUNK, CHANNELS), dy.dtype),
        plgpu.SMEM((STAGES, CHUNK, STATES), F32),
        plgpu.SMEM((STAGES, CHUNK, STATES), F32),
        plgpu.SMEM((PAIRS - 1, CHANNELS, STATES), F32, transforms=SWIZZLED),
        plgpu.Barrier(num_arrivals=6 if packed else 5, num_barriers=STAGES),
        plgpu.Barrier(),
        channel_sums.shared(limbs, interpreted),
    ]
    scratch += [plgpu.SMEM((STAGES, LINE), F32)] if packed else []  # TMA writes from whole lines on
    operands = [x, dt, A, B, C, D, dy, states, channel_sums.matrices()]
    operands += [final_gradient] if has_final else []
    operands += [starts] if packed else []
    dx, ddt, dA, totals, dD, initial = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(rows, E // CHANNELS),
        grid_names=("row", "block"),
        # Threads share tiles that TMA writes and terms that `wgmma` reads, and meet where those are written again.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **({"interpret": interpret} if interpreted else {}),
    )(*operands)
    dB, dC = channel_sums.of_tokens(totals.sum(0))
    return dx, ddt, dA, dB, dC, dD, initial

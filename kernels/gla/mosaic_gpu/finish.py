"""The gradients of q, k and log_alpha, from what the walks found between chunks and what is left to do within them.

With b the running sum of log_alpha within a chunk of 64 tokens, S the state before it, dS the gradient of the state
after it, and dP = do v^T:

    dq = scale (exp(b) S do + sum_j dP_ij k_j exp(b_i - b_j))      dk = exp(b_63 - b) dS v + scale sum_i dP_ij q_i ...

`walk` has made dq~ = S do and dk~ = dS v. The gate at t weighs every pair (i, j) of tokens with j < t <= i:

    dlog_alpha_t = sum over i >= t in the chunk of (q dq - k dk) + sum over v of S' dS'

with S' and dS' at the end of the chunk. Added up that way along the sequence, rounding would pile up; here pairs are
added up by where they lie:

    j in the chunk, i in the chunk    sum over i >= t of (q dq - k dk), rounded alike on both sides, no diagonal
    j before it,    i in the chunk    sum over i >= t of q~ dq~
    j in the chunk, i after it        sum over j < t of k~ dk~
    j before it,    i after it        decay sum over v of S dS, the same for every t: `across`
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .anchors import CHUNK, FIRST, FLOOR, PREFIX, SECOND, beyond_limit, constant_rows
from .prepare import anchor_matrix, level_pairs
from .warpgroup import BF16, COLUMN, F32, ROW, TILE, WGMMA, Products, along_columns, along_rows, iota, load, pin, shared

STAGES = 2
CHUNKS = 8  # of one head, worked through by one block of threads
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


@functools.partial(jax.jit, static_argnames="interpret")
def pair_gradients(do, v, *, documents=None, interpret=None):
    """dP = do v^T within chunks: its strict lower triangle, mirrored to a symmetric matrix, and its diagonal.

    Args:
      do [B, T, H, V], v [B, T, G, V]: bf16, T and V multiples of 64.
      documents: `Documents` (pairs of different ones get 0), or None.

    Returns:
      [B, H, T / 64, 64, 64] bf16 and [B, H, T / 64, 64] float32.
    """
    B, T, H, V = do.shape
    chunks, slices, group = T // CHUNK, V // 64, H // v.shape[2]
    packed, interpreted = documents is not None, interpret is not None
    stages = min(4, slices)

    def kernel(*refs):
        refs = list(refs)
        do_g, v_g = refs[:2]
        del refs[:2]
        together_g = refs.pop(0) if packed else None
        pairs_g, diagonal_g, do_s, v_s, below_s, above_s, arrived = refs
        index = lax.axis_index("block")
        chunk, index = index % chunks, index // chunks
        h, b = index % H, index // H
        tokens = pl.ds(chunk * CHUNK, CHUNK)

        def fetch(step):
            slot, values = lax.rem(step, stages), pl.ds(step * 64, 64)
            plgpu.copy_gmem_to_smem(do_g.at[b, tokens, h, values], do_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(v_g.at[b, tokens, h // group, values], v_s.at[slot], arrived.at[slot])

        for step in range(stages):
            fetch(step)

        def body(step, dP):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(arrived.at[slot])
            dP = Products(below_s if interpreted else None)(do_s.at[slot], v_s.at[slot].T, TILE, onto=dP)

            @pl.when(step + stages < slices)
            def _():
                fetch(step + stages)

            return dP

        dP = lax.fori_loop(0, slices, body, plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA))
        row, column = iota(0), iota(1)
        diagonal_g.at[b, h, chunk][...] = jnp.sum(jnp.where(row == column, dP, 0.0), axis=1)
        below = jnp.where(column < row, dP, 0.0)
        if packed:
            below = below * load(together_g.at[b, chunk], optimized=False).astype(F32)
        below = below.astype(BF16)
        above_s.T[...] = plgpu.layout_cast(below, TRANSPOSED)
        plgpu.commit_smem()
        below_s[...] = below + load(above_s)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(below_s, pairs_g.at[b, h, chunk])
        plgpu.wait_smem_to_gmem(0)

    scratch = [shared((stages, CHUNK, 64)), shared((stages, CHUNK, 64)), shared(TILE), shared(TILE)]
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), BF16),
            jax.ShapeDtypeStruct((B, H, chunks, CHUNK), F32),
        ],
        scratch_types=[*scratch, plgpu.Barrier(num_arrivals=2, num_barriers=stages)],
        grid=(B * H * chunks,),
        grid_names=("block",),
        kernel_name="gla_pair_gradients",
        **({"interpret": interpret} if interpreted else {}),
    )(do, v, *((documents.together,) if packed else ()))


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def finish(q, k, log_alpha, pairs, diagonal, dq_carried, dk_carried, across, *, scale, documents=None, interpret=None):
    """dq, dk, dlog_alpha: [B, T, H, K] bf16, per query head.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K]: bf16, as `prepare` had them.
      pairs, diagonal: of `pair_gradients`.
      dq_carried, dk_carried: [., B, T, H, K] bf16, the parts of dq~ and dk~, to be added up.
      across: [B, H, T / 64, K] float32, what pairs around the whole chunk give to its gates.
      scale, documents: as in `prepare`.
    """
    B, T, H, K = q.shape
    chunks, slices, group = T // CHUNK, K // 64, H // k.shape[2]
    blocks, parts = -(-chunks // CHUNKS), dq_carried.shape[0]
    packed, interpreted = documents is not None, interpret is not None

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, g_g, pairs_g, diagonal_g, dq_carried_g, dk_carried_g, across_g, constants_g = refs[:9]
        del refs[:9]
        reached_g, reaching_g, goes_on_g = (refs.pop(0), refs.pop(0), refs.pop(0)) if packed else (None,) * 3
        dq_g, dk_g, dg_g, q_s, k_s, g_s, pairs_s, highs, lows, constants_s = refs[:10]
        worst_s, before_s, after_s, zero_s, arrived, ready, *rest = refs[10:]
        product = Products(rest.pop(0) if interpreted else None)

        index = lax.axis_index("block")
        block, index = index % blocks, index // blocks
        h, b = index % H, index // H
        g, first = h // group, block * CHUNKS
        steps = jnp.minimum(CHUNKS, chunks - first) * slices
        place = lambda step: (first + lax.div(step, slices), lax.rem(step, slices))
        row, column = lambda: iota(0) + zero_s[0], lambda: iota(1) + zero_s[0]

        def fetch(step):
            slot = lax.rem(step, STAGES)
            chunk, c = place(step)
            tokens, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(c * 64, 64)
            plgpu.copy_gmem_to_smem(g_g.at[b, tokens, g, channels], g_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(q_g.at[b, tokens, h, channels], q_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(k_g.at[b, tokens, g, channels], k_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(pairs_g.at[b, h, chunk], pairs_s.at[slot], arrived.at[slot])

        zero_s[0] = jnp.int32(0)
        plgpu.copy_gmem_to_smem(constants_g, constants_s, ready)
        fetch(0)
        plgpu.barrier_wait(ready)
        around_middle, up_to = constants_s.at[pl.ds(0, 64)], constants_s.at[pl.ds(PREFIX, 64)]

        def body(step, _):
            slot = lax.rem(step, STAGES)
            chunk, c = place(step + zero_s[0])
            tokens, channels = pl.ds(chunk * CHUNK, CHUNK), pl.ds(c * 64, 64)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(step + 1 < steps)
            def _():
                fetch(step + 1)

            plgpu.barrier_wait(arrived.at[slot])
            high_s, low_s = highs.at[zero_s[0]], lows.at[zero_s[0]]
            q_c, k_c, g_c, pairs_c = q_s.at[slot], k_s.at[slot], g_s.at[slot], pairs_s.at[slot]
            raw_q, raw_k = lambda: load(q_c).astype(F32) * scale, lambda: load(k_c).astype(F32)

            def of_rows(ref):
                """Multiplies rows by [B, T] float32 factors."""
                return lambda x: x * along_rows(load(ref.at[b, tokens], ROW, optimized=False), TILE)

            reached, reaching, goes_on = (
                map(of_rows, (reached_g, reaching_g, goes_on_g)) if packed else (lambda x: x,) * 3
            )

            def diagonal():
                return along_rows(load(diagonal_g.at[b, h, chunk], ROW, optimized=False), TILE)

            def carried(ref):
                parts_of = [load(ref.at[i, b, tokens, h, channels], optimized=False).astype(F32) for i in range(parts)]
                return functools.reduce(jnp.add, parts_of)

            def masked_pairs(mask):
                return jnp.where(mask, load(pairs_c).astype(F32), 0.0).astype(BF16)

            D = product(around_middle, g_c, TILE)
            worst_s[...] = beyond_limit(D)
            plgpu.commit_smem()
            within = (worst_s[0] == 0.0) & (worst_s[63] == 0.0)

            def tier_1():
                half = lambda start: jnp.exp(
                    jnp.max(product(g_c.T, constants_s.at[pl.ds(start, 8)].T, (64, 8)), axis=1)
                )
                before_s[...], after_s[...] = half(FIRST), half(SECOND)
                high_s[...] = (raw_q() * jnp.exp(D)).astype(BF16)
                low_s[...] = (raw_k() * jnp.exp(-D)).astype(BF16)
                plgpu.commit_smem()
                of_q = product(masked_pairs(column() < row()), low_s, TILE)
                change = load(high_s).astype(F32) * of_q
                from_before = reached(carried(dq_carried_g)) * along_columns(load(before_s, COLUMN), TILE)
                weight = jnp.exp(product(around_middle, g_c, TILE))
                change = change + raw_q() * (from_before * weight)
                dq = (of_q + from_before) * weight * scale + diagonal() * raw_k() * scale
                change, dq = pin(change), pin(dq.astype(BF16))
                of_k = product(masked_pairs(column() > row()), high_s, TILE)
                change = change - load(low_s).astype(F32) * of_k
                from_after = reaching(carried(dk_carried_g)) * along_columns(load(after_s, COLUMN), TILE)
                weight = jnp.exp(-product(around_middle, g_c, TILE))
                later = raw_k() * (from_after * weight)
                dk = (of_k + from_after) * weight + diagonal() * raw_q()
                return dq, pin(dk.astype(BF16)), pin(change), pin(later.astype(BF16))

            def tiers_2_and_3():
                g_c[...] = jnp.maximum(load(g_c), jnp.asarray(FLOOR, BF16))
                plgpu.commit_smem()
                dq, dk, change = within_chunk(
                    product, raw_q, raw_k, g_c, masked_pairs, high_s, low_s, worst_s, row, column
                )
                ones = lambda mask: jnp.where(mask, 1.0, 0.0).astype(BF16)
                weight = jnp.exp(product(ones(column() <= row()), g_c, TILE))
                from_before = reached(carried(dq_carried_g)) * weight
                change = pin(change + raw_q() * from_before)
                dq = pin(((dq + from_before + diagonal() * raw_k()) * scale).astype(BF16))
                weight = jnp.exp(product(ones(column() > row()), g_c, TILE))
                from_after = reaching(carried(dk_carried_g)) * weight
                later = (raw_k() * from_after).astype(BF16)
                dk = (dk + from_after + diagonal() * raw_q()).astype(BF16)
                return dq, dk, change, later

            dq, dk, change, later = lax.cond(within, tier_1, tiers_2_and_3)
            q_c[...], k_c[...] = dq, dk
            # Sums within the chunk are products with ones, in two bf16 limbs where terms of both signs cancel.
            high = change.astype(BF16)
            high_s[...], low_s[...] = high, (change - high.astype(F32)).astype(BF16)
            plgpu.commit_smem()
            dg = product.total([(up_to.T, high_s), (up_to.T, low_s)], TILE)
            high_s[...] = later
            plgpu.commit_smem()
            dg = product(jnp.where(column() < row(), 1.0, 0.0).astype(BF16), high_s, TILE, onto=dg)
            dg = dg + along_columns(load(across_g.at[b, h, chunk, channels], COLUMN, optimized=False), TILE)
            dg = lax.cond(within, lambda: dg, lambda: jnp.where(load(g_c).astype(F32) > FLOOR, dg, 0.0))
            g_c[...] = goes_on(dg).astype(BF16)
            plgpu.commit_smem()
            for tile, out in ((q_c, dq_g), (k_c, dk_g), (g_c, dg_g)):
                plgpu.copy_smem_to_gmem(tile, out.at[b, tokens, h, channels])
            return ()

        lax.fori_loop(0, steps, body, ())
        plgpu.wait_smem_to_gmem(0)

    tile = lambda: shared((STAGES, CHUNK, 64))
    scratch = [tile(), tile(), tile(), tile(), shared((1, CHUNK, 64)), shared((1, CHUNK, 64)), shared((144, 64))]
    scratch += [plgpu.SMEM((64,), F32)] * 3 + [plgpu.SMEM((1,), jnp.int32)]
    scratch += [plgpu.Barrier(num_arrivals=4, num_barriers=STAGES), plgpu.Barrier()]
    scratch += [shared(TILE)] if interpreted else []
    operands = [q, k, log_alpha, pairs, diagonal, dq_carried, dk_carried, across, constant_rows()]
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((B, T, H, K), BF16)] * 3,
        scratch_types=scratch,
        grid=(B * H * blocks,),
        grid_names=("block",),
        kernel_name="gla_finish",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpreted else {}),
    )(*operands, *((documents.reached, documents.reaching, documents.goes_on) if packed else ()))


def within_chunk(product, raw_q, raw_k, g_c, masked_pairs, high_s, low_s, worst_s, row, column):
    """Pairs within the chunk, in tiers 2 and 3: what they give to dq / scale and dk, and q dq - k dk of them."""
    anchored = lambda half: product(anchor_matrix(half, row(), column()), g_c, TILE)
    worst_s[...] = beyond_limit(anchored(8))
    plgpu.commit_smem()
    bounded = jnp.bool_(True)
    for start in range(0, 64, 16):
        bounded &= (worst_s[start] == 0.0) & (worst_s[start + 15] == 0.0)
    zeros = plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA)

    def level(i, carry):
        dq, dk, change = carry
        half = 32 >> i
        weight = jnp.exp(-jnp.abs(anchored(half)))
        right = lambda: (row() & half) != 0
        high_s[...] = (jnp.where(right(), raw_q(), raw_k()) * weight).astype(BF16)
        plgpu.commit_smem()
        mirror = level_pairs(half, row(), column()) | level_pairs(half, column(), row())
        Y = product(masked_pairs(mirror), high_s, TILE)
        signed = Y * load(high_s).astype(F32)
        change = pin(change + jnp.where(right(), signed, -signed))
        Y = Y * weight
        return pin(dq + jnp.where(right(), Y, 0.0)), pin(dk + jnp.where(right(), 0.0, Y)), change

    dq, dk, change = lax.fori_loop(0, jnp.where(bounded, 2, 6), level, (zeros,) * 3)

    def blocks():
        """Bounded blocks of 16 rows; single rows, in tier 3, have no pairs."""
        D = anchored(8)
        high_s[...], low_s[...] = (raw_q() * jnp.exp(D)).astype(BF16), (raw_k() * jnp.exp(-D)).astype(BF16)
        plgpu.commit_smem()
        block = lambda: (row() ^ column()) < 16
        of_q = product(masked_pairs(block() & (column() < row())), low_s, TILE)
        of_k = product(masked_pairs(block() & (column() > row())), high_s, TILE)
        moved = change + load(high_s).astype(F32) * of_q - load(low_s).astype(F32) * of_k
        return dq + of_q * jnp.exp(D), dk + of_k * jnp.exp(-D), moved

    return lax.cond(bounded, blocks, lambda: (dq, dk, change))

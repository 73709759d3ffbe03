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

from ...once import once
from .anchors import CHUNK, FLOOR
from .documents import GOES_ON, REACHING, SIZE, of_rows, reached, together
from .gating import halves, right_rows
from .halving import PREFIX, SUFFIX, WHOLE, by_halves, indicator, matrix, table, triangles
from .tables import LOG2_E
from .warpgroup import (
    BF16,
    COLUMN,
    F32,
    ROW,
    TILE,
    WGMMA,
    Products,
    along_columns,
    along_rows,
    in_a_block,
    iota,
    launch,
    load,
    pin,
    settle,
    shared,
    split,
    store,
    where,
)

STAGES = 2

# Tiles of shared memory. Parts of dq~ come in DQ and after; once read, chosen pairs and factors of queries lie there.
PAIRS, KEYS, DQ = 0, 1, 2
CHOSEN, QUERIES = DQ, DQ + 1


def of_halves(n, right, left) -> jax.Array:
    """One of two numbers for rows in the right halves of blocks of 2^(n + 1) rows, and in the left. [64] float32."""
    return right_rows(n).astype(F32) * (left - right) + left


@once
def pair_gradients(do, v, *, documents=None, interpret=None):
    """dP = do v^T within chunks: its strict lower triangle, and its diagonal.

    Args:
      do [B, T, H, V], v [B, T, G, V]: bf16, T and V multiples of 64.
      documents: `documents.factors` (pairs of different ones get 0), or None.

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
        factors_g = refs.pop(0) if packed else None
        pairs_g, diagonal_g, do_s, v_s, below_s, arrived, *rest = refs
        (chunk, h), b = split(lax.axis_index("block"), chunks, H)
        g = lax.div(h, group)
        tokens = pl.ds(chunk * CHUNK, CHUNK)

        def fetch(step):
            slot, values = lax.rem(step, stages), pl.ds(step * 64, 64)
            plgpu.copy_gmem_to_smem(do_g.at[b, tokens, h, values], do_s.at[slot], arrived.at[slot])
            plgpu.copy_gmem_to_smem(v_g.at[b, tokens, g, values], v_s.at[slot], arrived.at[slot])

        for step in range(stages):
            fetch(step)
        if packed:
            factors_s, factors_arrived = rest
            plgpu.copy_gmem_to_smem(factors_g.at[b, chunk], factors_s, factors_arrived)

        def body(step, dP):
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(arrived.at[slot])
            dP = Products(below_s if interpreted else None)(do_s.at[slot], v_s.at[slot].T, TILE, onto=dP)
            settle()

            @pl.when(step + stages < slices)
            def _():
                fetch(step + stages)

            return dP

        dP = lax.fori_loop(0, slices, body, plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA))
        row, column = iota(0), iota(1)
        diagonal_g.at[b, h, chunk][...] = jnp.sum(where(row == column, dP, 0.0), axis=1)
        below = where(column < row, dP, 0.0)
        if packed:
            plgpu.barrier_wait(factors_arrived)
            below = below * together(factors_s)
        store(below_s, below.astype(BF16))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(below_s, pairs_g.at[b, h, chunk])
        plgpu.wait_smem_to_gmem(0)

    scratch = [shared((stages, CHUNK, 64)), shared((stages, CHUNK, 64)), shared(TILE)]
    scratch += [plgpu.Barrier(num_arrivals=2, num_barriers=stages)]
    scratch += [plgpu.SMEM((SIZE,), F32), plgpu.Barrier()] if packed else []
    return launch(
        kernel,
        name="gla_pair_gradients",
        blocks=B * H * chunks,
        out_type=[
            jax.ShapeDtypeStruct((B, H, chunks, CHUNK, CHUNK), BF16),
            jax.ShapeDtypeStruct((B, H, chunks, CHUNK), F32),
        ],
        scratch_types=scratch,
        interpret=interpret,
    )(do, v, *([documents] if packed else []))


@once
def finish(
    q, k, log_alpha, pairs, diagonal, dq_carried, dk_carried, across, *, scale, documents=None, chunks_per_block=8,
    interpret=None,
):  # fmt: skip
    """dq, dk and dlog_alpha, each [B, T, H, K] bf16, per query head.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K]: bf16, T and K multiples of 64.
      pairs, diagonal: of `pair_gradients`.
      dq_carried, dk_carried: [parts, B, T, H, K] bf16, dq~ and dk~ of `walk`, to be added up over the parts.
      across: [B, H, T / 64, K] float32, decay times the sum over v of S dS, each chunk's own.
      scale: multiplies q.
      documents: `documents.factors`, or None.
      chunks_per_block: of one head, worked through by one block of threads.
    """
    B, T, H, K = q.shape
    chunks, slices, group = T // CHUNK, K // 64, H // k.shape[2]
    blocks, parts = -(-chunks // chunks_per_block), dq_carried.shape[0]
    DK = DQ + max(parts, 2)
    packed, interpreted = documents is not None, interpret is not None

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, g_g, pairs_g, diagonal_g, dq_carried_g, dk_carried_g, across_g, table_g = refs[:9]
        del refs[:9]
        factors_g = refs.pop(0) if packed else None
        dq_g, dk_g, dg_g, inputs_s, tiles_s, tables_s, *refs = refs
        diagonal_s, across_s, worst_s, zero_s, arrived, dq_arrived, dk_arrived, pairs_arrived, ready, *rest = refs
        factors_s = rest.pop(0) if packed else None
        product = Products(rest.pop(0) if interpreted else None)

        (block, h), b = split(lax.axis_index("block"), blocks, H)
        g, first = lax.div(h, group), block * chunks_per_block
        steps = jnp.minimum(chunks_per_block, chunks - first) * slices
        place = lambda step: (first + lax.div(step, slices), lax.rem(step, slices))

        def of_step(step):
            chunk, c = place(step)
            return chunk, pl.ds(chunk * CHUNK, CHUNK), pl.ds(c * 64, 64)

        def fetch(step):
            slot = lax.rem(step, STAGES)
            chunk, tokens, channels = of_step(step)
            copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, arrived.at[slot])
            copy(g_g.at[b, tokens, g, channels], inputs_s.at[slot * 3 + 2])
            copy(q_g.at[b, tokens, h, channels], inputs_s.at[slot * 3])
            copy(k_g.at[b, tokens, g, channels], inputs_s.at[slot * 3 + 1])
            copy(diagonal_g.at[b, h, chunk], diagonal_s.at[slot])
            copy(across_g.at[b, h, chunk, channels], across_s.at[slot])
            if packed:
                copy(factors_g.at[b, chunk], factors_s.at[slot])

        def fetch_carried(step, source, start, barrier):
            _, tokens, channels = of_step(step)
            for i in range(parts):
                plgpu.copy_gmem_to_smem(source.at[i, b, tokens, h, channels], tiles_s.at[start + i], barrier)

        def fetch_pairs(chunk):
            plgpu.copy_gmem_to_smem(pairs_g.at[b, h, chunk], tiles_s.at[PAIRS], pairs_arrived)

        zero_s[0] = jnp.int32(0)
        fetch(0)
        fetch_carried(0, dq_carried_g, DQ, dq_arrived)
        plgpu.copy_gmem_to_smem(table_g, tables_s.at[0], ready)
        fetch_pairs(first)
        fetch_carried(0, dk_carried_g, DK, dk_arrived)
        plgpu.barrier_wait(ready)

        def body(step, _):
            slot, c = lax.rem(step, STAGES), lax.rem(step, slices)
            chunk, tokens, channels = of_step(step)
            q_c, k_c, g_c = (inputs_s.at[slot * 3 + i] for i in range(3))
            # A zero that the compiler cannot see through: addresses are made where they are used, and wait nowhere.
            tile, table_s = lambda i: tiles_s.at[zero_s[0] + i], tables_s.at[zero_s[0]]
            raw_q, raw_k = lambda: load(q_c).astype(F32), lambda: load(k_c).astype(F32)
            own_factors = factors_s.at[slot] if packed else None
            diagonal = lambda: along_rows(load(diagonal_s.at[slot], ROW), TILE)

            def carried(start, arrived, bit, mask):
                """What pairs around the chunk's boundary give, gated."""
                plgpu.barrier_wait(arrived)
                weight = pin(jnp.exp(product(matrix(table_s, bit), g_c, TILE)))
                whole = functools.reduce(jnp.add, [load(tile(start + i)).astype(F32) for i in range(parts)])
                whole = whole * mask() if packed else whole
                return pin(whole * weight)

            plgpu.barrier_wait(arrived.at[slot])
            store(g_c, jnp.maximum(load(g_c), jnp.asarray(FLOOR, BF16)))
            plgpu.commit_smem()
            dq = carried(DQ, dq_arrived, PREFIX, lambda: reached(own_factors))
            change = pin(raw_q() * dq)

            @pl.when(step + 1 < steps)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # and all warps for each other
                fetch(step + 1)

            @pl.when(c == 0)
            def _():
                plgpu.barrier_wait(pairs_arrived)

            zeros = plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA)

            def choose_pairs(bits):
                store(tile(CHOSEN), load(tile(PAIRS)) * indicator(table_s, bits))

            def bounded(n, exponents, dq, dk, change):
                @pl.when(n < WHOLE)
                def _():
                    choose_pairs((1 << (n + 1)) - 1)

                e = exponents * along_rows(of_halves(n, LOG2_E, -LOG2_E), TILE)
                of_q, of_k = pin(jnp.exp2(e)), pin(jnp.exp2(-e))
                queries, keys = tile(QUERIES), tile(KEYS)
                store(queries, (raw_q() * of_q).astype(BF16))
                store(keys, (raw_k() * of_k).astype(BF16))
                plgpu.commit_smem()
                pairs = tile(jnp.where(n < WHOLE, CHOSEN, PAIRS))

                def give_q(c):
                    dq, change = c
                    for_q = product(pairs, keys, TILE)
                    return dq + for_q * of_q, change + load(queries).astype(F32) * for_q

                dq, change = in_a_block(zero_s, give_q, (dq, change))
                for_k = product(pairs.T, queries, TILE)
                return dq, dk + for_k * of_k, change - load(keys).astype(F32) * for_k

            def level(n, exponents, dq, dk, change):
                weight, keys = jnp.exp(exponents), tile(KEYS)
                store(keys, (halves(q_c, k_c, n).astype(F32) * weight).astype(BF16))
                choose_pairs(1 << n)
                plgpu.commit_smem()
                pairs = tile(CHOSEN)
                Y = product.total([(pairs, keys), (pairs.T, keys)], TILE)
                change = pin(change + Y * load(keys).astype(F32) * along_rows(of_halves(n, 1.0, -1.0), TILE))
                Y = Y * weight
                dq = pin(dq + Y * along_rows(of_halves(n, 1.0, 0.0), TILE))
                return dq, pin(dk + Y * along_rows(of_halves(n, 0.0, 1.0), TILE)), change

            dq, dk, change = by_halves(
                product, g_c, table_s, worst_s, bounded, level, (dq, zeros, change), down_to=0
            )  # fmt: skip

            plgpu.commit_smem()  # and not `settle`: tiles that were written as factors are TMA's again

            @pl.when(step + 1 < steps)
            def _():
                fetch_carried(step + 1, dq_carried_g, DQ, dq_arrived)

                @pl.when(c == slices - 1)
                def _():
                    fetch_pairs(chunk + 1)

            # Sums within the chunk are products with ones, in two bf16 limbs where terms of both signs cancel. All that
            # is to be summed goes where its own rows have been read.
            high_s = tile(KEYS)
            change = change * scale
            high = change.astype(BF16)
            store(high_s, high)
            low = pin((change - high.astype(F32)).astype(BF16))
            dq = pin(((dq + diagonal() * raw_k()) * scale).astype(BF16))
            table_s = tables_s.at[zero_s[0]]
            from_after = carried(DK, dk_arrived, SUFFIX, lambda: of_rows(own_factors, REACHING))
            low_s, later_s = tile(DK), q_c
            store(low_s, low)
            later = pin((raw_k() * from_after).astype(BF16))
            store(k_c, ((dk + diagonal() * raw_q()) * scale + from_after).astype(BF16))
            store(later_s, later)
            plgpu.commit_smem()
            before, from_here = triangles(table_s)
            dg = along_columns(load(across_s.at[slot], COLUMN), TILE)
            dg = product.total([(from_here, high_s), (from_here, low_s), (before, later_s)], TILE, onto=dg)
            settle()

            @pl.when(step + 1 < steps)
            def _():
                fetch_carried(step + 1, dk_carried_g, DK, dk_arrived)

            dg = where(load(g_c) > jnp.asarray(FLOOR, BF16), dg, 0.0)
            dg = dg * of_rows(own_factors, GOES_ON) if packed else dg
            store(q_c, dq)
            store(g_c, dg.astype(BF16))
            plgpu.commit_smem()
            for of_chunk, out in ((q_c, dq_g), (k_c, dk_g), (g_c, dg_g)):
                plgpu.copy_smem_to_gmem(of_chunk, out.at[b, tokens, h, channels])
            return ()

        lax.fori_loop(0, steps, body, ())
        plgpu.wait_smem_to_gmem(0)

    tiles = lambda count: shared((count, CHUNK, 64))
    scratch = [tiles(3 * STAGES), tiles(DQ + max(parts, 2) + parts)]
    scratch += [shared((1, CHUNK, 64), jnp.int16), plgpu.SMEM((STAGES, 64), F32), plgpu.SMEM((STAGES, 64), F32)]
    scratch += [plgpu.SMEM((64,), F32), plgpu.SMEM((1,), jnp.int32)]
    scratch += [plgpu.Barrier(num_arrivals=5 + packed, num_barriers=STAGES)]
    scratch += [plgpu.Barrier(num_arrivals=parts), plgpu.Barrier(num_arrivals=parts), plgpu.Barrier(), plgpu.Barrier()]
    scratch += [plgpu.SMEM((STAGES, SIZE), F32)] if packed else []
    scratch += [shared(TILE)] if interpreted else []
    operands = [q, k, log_alpha, pairs, diagonal, dq_carried, dk_carried, across, jnp.asarray(table())]
    return launch(
        kernel,
        name="gla_finish",
        blocks=B * H * blocks,
        out_type=[jax.ShapeDtypeStruct((B, T, H, K), BF16)] * 3,
        scratch_types=scratch,
        interpret=interpret,
    )(*operands, *([documents] if packed else []))

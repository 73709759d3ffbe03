"""The forward walk: a block per (batch, head, value block, piece of the sequence), one pass, state in registers.

Per chunk of 64 tokens (equations of kernels/gla/chunked.py, anchors of anchors.py):

    o  = (q exp(b)) S + tril(P) v          S' = exp(b_63) S + (k exp(b_63 - b))^T v

In tier 1 q and k are gated once, around the middle anchor m, and serve every product: the state is kept in the same
frame by S_hat = exp(b_m) S, so that S' = exp(b_63 - b_m) (S_hat + k~^T v) costs one multiply of the state and no
further exponentials. S_hat in bf16 is also what the backward needs of the forward, so it can be written out from
shared memory as it stands.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .anchors import (
    ANCHORS,
    CHUNK,
    DEPTHS,
    FIRST,
    FLOOR,
    PREFIX,
    RESIDENT,
    SECOND,
    SUFFIX,
    beyond_limit,
    bounded_pairs,
    constant_rows,
    in_right_half,
    level_pairs,
)
from .warpgroup import BF16, COLUMN, F32, ROW, TILE, WGMMA, Products, along_columns, along_rows, load, meet, pin, shared


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile choices of one forward launch."""

    value_block: int  # columns of v per block: 64 or 128
    warpgroups: int  # each owns K / warpgroups rows of the state and value_block / warpgroups columns of o
    stages: int  # chunks of q, k, v, log_alpha in shared memory
    segments: int = 1  # pieces of the sequence walked side by side, each from its own initial state


def forward(
    q,
    k,
    v,
    log_alpha,
    *,
    scale,
    tiles: ForwardTiles,
    initial_state=None,
    documents=None,
    save_states=False,
    interpret=None,
):
    """o, final states and (on request) the states that enter each chunk.

    Args:
      q: [B, T, H, K] bf16, T a multiple of 64 * tiles.segments; K 64, 128 or 256.
      k, log_alpha: [B, T, G, K] bf16. v: [B, T, G, V] bf16, V a multiple of tiles.value_block.
      scale: multiplies q.
      initial_state: [B, H, N, K, V] float32, the state that enters each of the N = tiles.segments pieces, or None for
        zero.
      documents: [B, T] int32, a number that changes, and never comes back, where the state restarts; or None.
      save_states: also return the states entering each chunk, [B, H, T / 64, K, V] bf16, in the frame that the
        chunk's tier uses.

    Returns:
      o [B, T, H, V] bf16, the state that leaves each piece, [B, H, N, K, V] float32, and the chunk states or None.
    """
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    N, W, VB, stages = tiles.segments, tiles.warpgroups, tiles.value_block, tiles.stages
    KW, VW, blocks = K // W, max(VB // W, 64), V // VB
    steps = T // CHUNK // N
    slices = [pl.ds(c, 64) for c in range(0, KW, 64)]
    has_state, packed = initial_state is not None, documents is not None
    interpreted = interpret is not None

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, v_g, g_g, constants_g = refs[:5]
        del refs[:5]
        state_g = refs.pop(0) if has_state else None
        documents_g = refs.pop(0) if packed else None
        o_g, final_g, parked_g = refs[:3]
        del refs[:3]
        saved_g = refs.pop(0) if save_states else None
        q_s, k_s, v_s, g_s, states_s, o_s, constants_s, zero_s, worst, arrived, constants_arrived, met, *rest = refs
        documents_s = rest.pop(0) if packed else None
        spare = rest.pop(0) if interpreted else None

        w = lax.axis_index("warpgroup")
        program = lax.axis_index("block")
        index = program
        block, index = index % blocks, index // blocks
        piece, index = index % N, index // N
        h, b = index % H, index // H
        g = h // (H // G)
        first = piece * steps
        columns = pl.ds(block * VB, VB)
        mine = lambda c: pl.ds(w * KW + c.start, 64)  # this warpgroup's key columns
        own_rows, own_values = pl.ds(w * KW, KW), pl.ds(w * VW, VW) if VB >= 64 * W else pl.ds(0, VW)
        product = Products(None if spare is None else spare.at[w])
        barrier = met if W > 1 else None

        def fetch(step):
            slot = lax.rem(step, stages)
            rows = pl.ds((first + step) * CHUNK, CHUNK)

            @pl.when(w == 0)
            def _():
                plgpu.copy_gmem_to_smem(g_g.at[b, rows, g], g_s.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(q_g.at[b, rows, h], q_s.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(k_g.at[b, rows, g], k_s.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(v_g.at[b, rows, g, columns], v_s.at[slot], arrived.at[slot])
                if packed:
                    plgpu.copy_gmem_to_smem(documents_g.at[b, rows], documents_s.at[slot], arrived.at[slot])

        @pl.when(w == 0)
        def _():
            zero_s[0] = jnp.int32(0)
            plgpu.copy_gmem_to_smem(constants_g.at[pl.ds(0, RESIDENT)], constants_s.at[0], constants_arrived)

        for step in range(min(stages, steps)):
            fetch(step)
        plgpu.barrier_wait(constants_arrived)
        meet(barrier)

        def chunk(step, carry):
            S, document = carry
            slot = lax.rem(step, stages)
            q_c, k_c, v_c, g_c = q_s.at[slot], k_s.at[slot], v_s.at[slot], g_s.at[slot]
            plgpu.barrier_wait(arrived.at[slot])
            # A zero that the compiler cannot see through: what it indexes is not hoisted out of the loop into scarce
            # registers.
            zero = zero_s[0]
            S_s, constants = states_s.at[zero], constants_s.at[zero]
            depths = lambda: load(constants.at[pl.ds(DEPTHS, 64)]).astype(F32)

            if packed:
                own_document = load(documents_s.at[slot], ROW)
                opens, closes = documents_s[slot, 0], documents_s[slot, 63]
                S = tuple(s * (opens == document).astype(F32) for s in S)
                document = closes

            def totals(c, start):
                """exp of the gates summed over one half of the chunk, per row of the state. [64]."""
                sums = product(g_c.at[:, mine(c)].T, constants.at[pl.ds(start, 8)].T, (64, 8))
                return jnp.exp(jnp.max(sums, axis=1))

            # Gate as tier 1 would, and note by how much the gates exceed it: rows 0 and 63 hold the largest exponents.
            exceeded = plgpu.layout_cast(jnp.zeros((64,), F32), ROW)
            for c in slices:
                D = product(constants.at[pl.ds(0, 64)], g_c.at[:, mine(c)], TILE)
                q_c.at[:, mine(c)][...] = (load(q_c.at[:, mine(c)]).astype(F32) * (jnp.exp(D) * scale)).astype(BF16)
                k_c.at[:, mine(c)][...] = (load(k_c.at[:, mine(c)]).astype(F32) * jnp.exp(-D)).astype(BF16)
                exceeded = jnp.maximum(exceeded, beyond_limit(D))
            worst.at[w][...] = exceeded
            before = [totals(c, FIRST) for c in slices]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for c, s, decay in zip(slices, S, before, strict=True):
                S_s.at[mine(c)][...] = (s * along_rows(decay, (64, VB))).astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            within = jnp.bool_(True)
            for i in range(W):
                within &= (worst[i, 0] == 0.0) & (worst[i, 63] == 0.0)

            def tier_1():
                P = jnp.where(bounded_pairs(depths(), 6), product(q_c, k_c.T, TILE), 0.0)
                return (pin(P.astype(BF16)), *S, *before, *(totals(c, SECOND) for c in slices))

            def tiers_2_and_3():
                P, kept = hard_chunk(step, S, S_s, depths, q_c, k_c, g_c)
                whole = [totals(c, FIRST) * totals(c, SECOND) for c in slices]
                return (P, *kept, *whole, *(jnp.ones_like(x) for x in whole))

            P, *rest = lax.cond(within, tier_1, tiers_2_and_3)
            n = len(slices)
            S, before, after = rest[:n], rest[n : 2 * n], rest[2 * n :]

            if packed:
                P = jnp.where(
                    along_rows(own_document, TILE) == along_columns(load(documents_s.at[slot], COLUMN), TILE),
                    P,
                    jnp.zeros((), BF16),
                )
                before = [x * (opens == closes).astype(F32) for x in before]

            if saved_g is not None:
                plgpu.copy_smem_to_gmem(S_s.at[own_rows], saved_g.at[b, h, first + step, own_rows, columns])

            @pl.when((w == 0) | (VB >= 64 * W))  # 64 columns are one warpgroup's work
            def _():
                if packed:  # the state that enters belongs to the rows of the chunk's first document
                    o = product(q_c, S_s.at[:, own_values], (64, VW))
                    o = jnp.where(along_rows(own_document, (64, VW)) == opens, o, 0.0)
                    o = product(P, v_c.at[:, own_values], (64, VW), onto=o)
                else:
                    o = product.total([(q_c, S_s.at[:, own_values]), (P, v_c.at[:, own_values])], (64, VW))
                o_s.at[w][...] = o.astype(BF16)
                plgpu.commit_smem()
                out = pl.ds(block * VB + own_values.start, VW)
                plgpu.copy_smem_to_gmem(o_s.at[w], o_g.at[b, pl.ds((first + step) * CHUNK, CHUNK), h, out])

            if packed:  # and only rows of its last document go into the state that leaves

                @pl.when(opens != closes)
                def _():
                    meet(barrier)
                    for c in slices:
                        keys = k_c.at[:, mine(c)]
                        keys[...] = jnp.where(along_rows(own_document, TILE) == closes, load(keys), jnp.zeros((), BF16))
                    plgpu.commit_smem()

            moved = []
            for c, s, m, e in zip(slices, S, before, after, strict=True):
                s = product(k_c.at[:, mine(c)].T, v_c, (64, VB), onto=s * along_rows(m, (64, VB)))
                moved.append(s * along_rows(e, (64, VB)))
            plgpu.commit_smem()
            meet(barrier)

            @pl.when(step + stages < steps)
            def _():
                fetch(step + stages)

            return tuple(moved), document

        def hard_chunk(step, S, S_s, depths, q_c, k_c, g_c):
            """Tiers 2 and 3: P and the state, with q_c and k_c gated from the chunk's start and to its end, and S_s
            the state itself."""
            for c, s in zip(slices, S, strict=True):  # the state waits in device memory: the registers are needed here
                parked_g.at[program, mine(c)][...] = s
            rows = pl.ds((first + step) * CHUNK, CHUNK)
            raw_q = lambda c: load(q_g.at[b, rows, h, mine(c)], optimized=False).astype(F32) * scale
            raw_k = lambda c: load(k_g.at[b, rows, g, mine(c)], optimized=False).astype(F32)
            meet(barrier)
            matrix = lambda row: load(constants_g.at[pl.ds(row, 64)], optimized=False)
            exceeded = plgpu.layout_cast(jnp.zeros((64,), F32), ROW)
            for c in slices:
                gates = g_c.at[:, mine(c)]
                gates[...] = jnp.maximum(load(gates), jnp.asarray(FLOOR, BF16))
                plgpu.commit_smem()
                exceeded = jnp.maximum(exceeded, beyond_limit(product(matrix(ANCHORS + 64 * 2), gates, TILE)))
            worst.at[w][...] = exceeded
            plgpu.commit_smem()
            meet(barrier)
            within = jnp.bool_(True)
            for i in range(W):
                for row in range(0, 64, 16):
                    within &= (worst[i, row] == 0.0) & (worst[i, row + 15] == 0.0)
            levels = jnp.where(within, 2, 6)

            def gate(exponents):
                """Writes this warpgroup's columns of q and k, times exp of what `exponents` gives for each."""
                for c in slices:
                    of_q, of_k = exponents(g_c.at[:, mine(c)])
                    q_c.at[:, mine(c)][...] = (raw_q(c) * jnp.exp(of_q)).astype(BF16)
                    k_c.at[:, mine(c)][...] = (raw_k(c) * jnp.exp(of_k)).astype(BF16)
                plgpu.commit_smem()
                meet(barrier)

            def level(i, P):
                half = 32 >> i
                right = in_right_half(half)
                D = matrix(ANCHORS + 64 * i)
                for c in slices:
                    e = jnp.exp(-jnp.abs(product(D, g_c.at[:, mine(c)], TILE)))
                    q_c.at[:, mine(c)][...] = (jnp.where(right, raw_q(c), raw_k(c)) * e).astype(BF16)
                plgpu.commit_smem()
                meet(barrier)
                P = pin(P + jnp.where(level_pairs(depths(), (5 - i).astype(F32)), product(q_c, q_c.T, TILE), 0.0))
                meet(barrier)
                return P

            def around_middle(gates):
                D = product(matrix(ANCHORS + 64 * 2), gates, TILE) * within.astype(F32)  # 0 in tier 3: single rows
                return D, -D

            P = lax.fori_loop(0, levels, level, plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA))
            gate(around_middle)
            P = pin(
                (
                    P + jnp.where(bounded_pairs(depths(), (6 - levels).astype(F32)), product(q_c, k_c.T, TILE), 0.0)
                ).astype(BF16)
            )
            meet(barrier)
            gate(lambda gates: (product(matrix(PREFIX), gates, TILE), product(matrix(SUFFIX), gates, TILE)))
            S = tuple(load(parked_g.at[program, mine(c)], optimized=False) for c in slices)
            for c, s in zip(slices, S, strict=True):
                S_s.at[mine(c)][...] = s.astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            return P, S

        if has_state:
            S = tuple(
                plgpu.load(state_g.at[b, h, piece, mine(c), columns], layout=WGMMA, optimized=False) for c in slices
            )
        else:
            S = tuple(plgpu.layout_cast(jnp.zeros((64, VB), F32), WGMMA) for _ in slices)
        document = documents_g[b, jnp.maximum(first * CHUNK - 1, 0)] if packed else jnp.int32(0)
        S, _ = lax.fori_loop(0, steps, chunk, (S, document))

        for c, s in zip(slices, S, strict=True):
            final_g.at[b, h, piece, mine(c), columns][...] = s

        plgpu.wait_smem_to_gmem(0)

    out_type = [jax.ShapeDtypeStruct((B, T, H, V), BF16), jax.ShapeDtypeStruct((B, H, N, K, V), F32)]
    out_type.append(jax.ShapeDtypeStruct((B * H * N * blocks, K, VB), F32))  # where states are parked
    if save_states:
        out_type.append(jax.ShapeDtypeStruct((B, H, T // CHUNK, K, V), BF16))
    operands = [q, k, v, log_alpha, constant_rows()]
    operands += [initial_state] if has_state else []
    operands += [documents] if packed else []
    copies = 5 if packed else 4
    scratch = [
        shared((stages, CHUNK, K)),
        shared((stages, CHUNK, K)),
        shared((stages, CHUNK, VB)),
        shared((stages, CHUNK, K)),
        shared((1, K, VB)),
        shared((W, CHUNK, VW)),
        shared((1, RESIDENT, 64)),
        plgpu.SMEM((1,), jnp.int32),
        plgpu.SMEM((W, 64), F32),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=W),
    ]
    scratch += [plgpu.SMEM((stages, CHUNK), jnp.int32)] if packed else []
    scratch += [shared((W, 64, 64))] if interpreted else []
    outputs = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(B * H * N * blocks,),
        grid_names=("block",),
        num_threads=W,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpreted else {}),
    )(*operands)
    o, final_state, _, *states = outputs
    return o, final_state, (states[0] if save_states else None)

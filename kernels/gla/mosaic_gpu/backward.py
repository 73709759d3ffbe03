"""The backward walk: all gradients of one block of a head in one pass over its chunks, last to first.

The forward leaves the states that enter each chunk (S_hat, in the frame of the chunk's tier), so one kernel sees S and its gradient dS
together, and nothing but the gradients themselves is written:

    dq = exp(b) (do S^T + tril(dP) k~)     dk = exp(b_63 - b) (v dS^T) + exp(-b) tril(dP)^T q~     dv = P^T do + (k exp(b_63 - b)) dS

with dP = do v^T. The gate at t weighs every pair (i, j) of tokens with j < t <= i, and the closed form sum of (q dq - k dk) over i >= t finds
them as a difference of large sums. Here they are added up by where i and j lie, so that rounding cannot pile up along the sequence:

    dlog_alpha_t = [both in the chunk] sum over i >= t of (q dq - k dk), operands rounded alike on both sides, the diagonal left out
                 + [j before the chunk] sum over i >= t of q (do S^T)      + [i after it] sum over j < t of k (v dS^T)
                 + [j before, i after] exp(b_63) sum over v of S dS
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .anchors import (
    ANCHORS,
    BEFORE,
    CHUNK,
    DEPTHS,
    DEPTHS_T,
    FIRST,
    FLOOR,
    FROM,
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
from .warpgroup import BF16, COLUMN, F32, ROW, WGMMA, Products, along_columns, along_rows, load, meet, shared

TILE = (64, 64)


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile choices of one backward launch."""

    key_block: int  # key channels per block: 64 for each warpgroup
    value_block: int  # value channels per block: 64 or 128
    segments: int = 1  # pieces of the sequence walked side by side

    @property
    def warpgroups(self) -> int:
        return self.key_block // 64


def backward(q, k, v, log_alpha, do, states, *, scale, tiles: BackwardTiles, final_gradient=None, documents=None, interpret=None):
    """Gradients, summed over nothing: one part per value block (dq, dk, dlog_alpha) or key block (dv), for the caller to add up.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K], v [B, T, G, V], do [B, T, H, V]: bf16, as the forward had them.
      states: [B, H, T / 64, K, V] bf16, the chunk states that `forward` saved.
      final_gradient: [B, H, N, K, V] float32, gradient of the state that leaves each of the N = tiles.segments pieces, or None.
      documents: [B, T] int32 as in `forward`, or None.

    Returns:
      dq, dk, dlog_alpha: [V / value_block, B, T, H, K] bf16; dv: [K / key_block, B, T, H, V] bf16;
      initial_gradient: [B, H, N, K, V] float32, gradient of the state that enters each piece.
    """
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    N, W, KB, VB = tiles.segments, tiles.warpgroups, tiles.key_block, tiles.value_block
    VW = max(VB // W, 64)  # value columns of one warpgroup's dv; with VB = 64 the first warpgroup does them all
    w_values = VW // 64
    key_blocks, value_blocks = K // KB, V // VB
    steps = T // CHUNK // N
    has_final, packed = final_gradient is not None, documents is not None
    interpreted = interpret is not None

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, v_g, g_g, do_g, states_g, constants_g = refs[:7]
        del refs[:7]
        final_g = refs.pop(0) if has_final else None
        documents_g = refs.pop(0) if packed else None
        dq_g, dk_g, dg_g, dv_g, initial_g, parked_g = refs[:6]
        del refs[:6]
        tiles_s, zero_s, worst, through_s, arrived, constants_arrived, met, *rest = refs
        documents_s = rest.pop(0) if packed else None
        spare = rest.pop(0) if interpreted else None

        w = lax.axis_index("warpgroup")
        program = lax.axis_index("block")
        index = program
        vb, index = index % value_blocks, index // value_blocks
        kb, index = index % key_blocks, index // key_blocks
        piece, index = index % N, index // N
        h, b = index % H, index // H
        g = h // (H // G)
        first = piece * steps
        keys, values = pl.ds(kb * KB, KB), pl.ds(vb * VB, VB)
        own = pl.ds(w * 64, 64)  # this warpgroup's key channels within the block
        own_keys = pl.ds(kb * KB + w * 64, 64)
        own_values = pl.ds(w * VW, VW) if VB > 64 else pl.ds(0, VW)
        product = Products(None if spare is None else spare.at[w])
        barrier = met if W > 1 else None

        def shared_memory():
            """The tiles, at an index 0 that the compiler cannot see through: it would hoist their addresses into scarce registers."""
            zero = zero_s[0]
            return {name: ref.at[zero] for name, ref in tiles_s.items()}

        def fetch(step):
            s = shared_memory()
            rows = pl.ds((first + step) * CHUNK, CHUNK)

            @pl.when(w == 0)
            def _():
                for j in range(W):  # a tile for each warpgroup: it leaves as their gate gradient
                    plgpu.copy_gmem_to_smem(g_g.at[b, rows, g, pl.ds(kb * KB + 64 * j, 64)], s["g"].at[j], arrived)
                plgpu.copy_gmem_to_smem(q_g.at[b, rows, h, keys], s["q"], arrived)
                plgpu.copy_gmem_to_smem(k_g.at[b, rows, g, keys], s["k"], arrived)
                plgpu.copy_gmem_to_smem(v_g.at[b, rows, g, values], s["v"], arrived)
                plgpu.copy_gmem_to_smem(do_g.at[b, rows, h, values], s["do"], arrived)
                plgpu.copy_gmem_to_smem(states_g.at[b, h, first + step, keys, values], s["S"], arrived)
                if packed:
                    plgpu.copy_gmem_to_smem(documents_g.at[b, rows], documents_s, arrived)

        @pl.when(w == 0)
        def _():
            zero_s[0] = jnp.int32(0)
            plgpu.copy_gmem_to_smem(constants_g.at[pl.ds(0, RESIDENT + 64)], tiles_s["constants"].at[0], constants_arrived)

        plgpu.barrier_wait(constants_arrived)
        plgpu.commit_smem()
        meet(barrier)
        fetch(steps - 1)

        def chunk(i, carry):
            dS, document = carry  # gradient of the state that leaves the chunk, and the document it goes to
            step = steps - 1 - i
            rows = pl.ds((first + step) * CHUNK, CHUNK)
            plgpu.barrier_wait(arrived)
            s = shared_memory()
            q_c, k_c, v_c, do_c, S_s, dS_s, constants = (s[n] for n in ("q", "k", "v", "do", "S", "dS", "constants"))
            out_q, out_k, limb = (s["out"].at[w, n] for n in range(3))
            depths = lambda: load(constants.at[pl.ds(DEPTHS, 64)]).astype(F32)
            depths_t = lambda: load(constants.at[pl.ds(DEPTHS_T, 64)]).astype(F32)
            q_own, k_own, g_own = q_c.at[:, own], k_c.at[:, own], s["g"].at[w]

            if packed:
                own_document = along_rows(load(documents_s, ROW), TILE)
                opens, closes = documents_s[0], documents_s[63]
                dS = dS * (closes == document).astype(F32)
                document = opens
                same = own_document == along_columns(load(documents_s, COLUMN), TILE)
                together = lambda x: jnp.where(same, x, jnp.zeros((), x.dtype))
                of_first = lambda x: jnp.where(own_document == opens, x, 0.0)
                of_last = lambda x: jnp.where(own_document == closes, x, 0.0)
                unbroken = (opens == closes).astype(F32)
            else:
                together = of_first = of_last = lambda x: x
                unbroken = 1.0

            def totals(start):
                sums = product(g_own.T, constants.at[pl.ds(start, 8)].T, (64, 8))
                return jnp.exp(jnp.max(sums, axis=1))

            D = product(constants.at[pl.ds(0, 64)], g_own, TILE)
            q_own[...] = (load(q_own).astype(F32) * (jnp.exp(D) * scale)).astype(BF16)
            k_own[...] = (load(k_own).astype(F32) * jnp.exp(-D)).astype(BF16)
            worst.at[w][...] = beyond_limit(D)
            dS_s.at[own][...] = (dS * along_rows(totals(SECOND), (64, VB))).astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            within = jnp.bool_(True)
            for j in range(W):
                within &= (worst[j, 0] == 0.0) & (worst[j, 63] == 0.0)

            def pair_gradients():
                """dP and its transpose, [64, 64] float32."""
                return together(product(do_c, v_c.T, TILE)), together(product(v_c, do_c.T, TILE))

            def diagonal(dP):
                """dP_ii, per row."""
                return along_rows(jnp.sum(jnp.where(depths() == -1.0, dP, 0.0), axis=1), TILE)

            def from_state(onto=None):
                """do S^T, what the state that enters gives dq, [64, 64]."""
                if packed:
                    entering = of_first(product(do_c, S_s.at[own].T, TILE))
                    return entering if onto is None else entering + onto
                return product(do_c, S_s.at[own].T, TILE, onto=onto)

            def tier_1():
                PT = jnp.where(bounded_pairs(depths_t(), 6), product(k_c, q_c.T, TILE), 0.0).astype(BF16)
                dP, dPT = pair_gradients()
                diag = diagonal(dP)
                L = jnp.where((depths() >= 0.0) & bounded_pairs(depths(), 6), dP, 0.0).astype(BF16)
                for_q = product(L, k_own, TILE)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                qt, kt = load(q_own).astype(F32), load(k_own).astype(F32)
                D = product(constants.at[pl.ds(0, 64)], g_own, TILE)
                change = from_state(onto=for_q)
                out_q[...] = ((change + diag * kt) * (jnp.exp(D) * scale)).astype(BF16)
                change = qt * change
                LT = jnp.where((depths_t() >= 0.0) & bounded_pairs(depths_t(), 6), dPT, 0.0).astype(BF16)
                for_k = product(LT, q_own, TILE)
                change = change - kt * for_k
                later = of_last(product(v_c, dS_s.at[own].T, TILE))
                out_k[...] = ((for_k + later + diag * qt) * jnp.exp(-D)).astype(BF16)
                later = (kt * later).astype(BF16)
                return PT, change, later, dS, totals(SECOND), totals(FIRST)

            def tiers_2_and_3():
                PT, change, later, kept = hard_chunk(step, dS, s, depths, depths_t, pair_gradients, diagonal, from_state, of_last)
                whole = totals(FIRST) * totals(SECOND)
                return PT, change, later, kept, whole, jnp.ones_like(whole)

            PT, change, later, dS, after, before = lax.cond(within, tier_1, tiers_2_and_3)
            PT = together(PT)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_q, dq_g.at[vb, b, rows, h, own_keys])
            plgpu.copy_smem_to_gmem(out_k, dk_g.at[vb, b, rows, h, own_keys])

            dS = dS * along_rows(after * unbroken, (64, VB))
            through_s.at[w][...] = jnp.sum(load(S_s.at[own]).astype(F32) * dS, axis=1)

            # Gate gradient: sums within the chunk as products, of float32 values as two bf16 limbs where terms cancel.
            matrix = lambda row: load(constants_g.at[pl.ds(row, 64)], optimized=False)
            high = change.astype(BF16)
            g_own[...] = high
            limb[...] = (change - high.astype(F32)).astype(BF16)
            plgpu.commit_smem()
            sums_from = together(matrix(FROM))
            dg = product.total([(sums_from, g_own), (sums_from, limb)], TILE)
            g_own[...] = later
            plgpu.commit_smem()
            dg = product(together(matrix(BEFORE)), g_own, TILE, onto=dg + along_columns(load(through_s.at[w], COLUMN), TILE))
            dg = lax.cond(
                within,
                lambda: dg,
                lambda: jnp.where(load(g_g.at[b, rows, g, own_keys], optimized=False).astype(F32) > FLOOR, dg, 0.0),
            )
            g_own[...] = dg.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(g_own, dg_g.at[vb, b, rows, h, own_keys])

            for c in range(w_values):
                @pl.when((w == 0) | (VB > 64))
                def _(c=c):
                    part = pl.ds(own_values.start + 64 * c, 64)
                    if packed:
                        dv = product(PT, do_c.at[:, part], TILE, onto=of_last(product(k_c, dS_s.at[:, part], TILE)))
                    else:
                        dv = product.total([(PT, do_c.at[:, part]), (k_c, dS_s.at[:, part])], TILE)
                    if c:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    limb[...] = dv.astype(BF16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(limb, dv_g.at[kb, b, rows, h, pl.ds(vb * VB + part.start, 64)])

            if packed:

                @pl.when(opens != closes)
                def _():
                    meet(barrier)
                    q_own[...] = of_first(load(q_own).astype(F32)).astype(BF16)
                    plgpu.commit_smem()

            dS = product(q_own.T, do_c, (64, VB), onto=dS) * along_rows(before, (64, VB))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # g_own is read before it is loaded again
            plgpu.commit_smem()
            meet(barrier)

            @pl.when(step > 0)
            def _():
                fetch(step - 1)

            return dS, document

        def hard_chunk(step, dS, s, depths, depths_t, pair_gradients, diagonal, from_state, of_last):
            """Tiers 2 and 3: P^T, the parts of the gate gradient and dS; dq and dk to their buffers; q, k, dS_s as the rest expects them."""
            parked_g.at[program, own][...] = dS
            rows = pl.ds((first + step) * CHUNK, CHUNK)
            q_c, k_c, v_c, do_c, S_s, dS_s = (s[n] for n in ("q", "k", "v", "do", "S", "dS"))
            q_own, k_own, g_own = q_c.at[:, own], k_c.at[:, own], s["g"].at[w]
            out_q, out_k = s["out"].at[w, 0], s["out"].at[w, 1]
            raw_q = lambda: load(q_g.at[b, rows, h, own_keys], optimized=False).astype(F32) * scale
            raw_k = lambda: load(k_g.at[b, rows, g, own_keys], optimized=False).astype(F32)
            matrix = lambda row: load(constants_g.at[pl.ds(row, 64)], optimized=False)
            meet(barrier)
            g_own[...] = jnp.maximum(load(g_own), jnp.asarray(FLOOR, BF16))
            plgpu.commit_smem()
            worst.at[w][...] = beyond_limit(product(matrix(ANCHORS + 64 * 2), g_own, TILE))
            plgpu.commit_smem()
            meet(barrier)
            within = jnp.bool_(True)
            for j in range(W):
                for row in range(0, 64, 16):
                    within &= (worst[j, row] == 0.0) & (worst[j, row + 15] == 0.0)
            levels = jnp.where(within, 2, 6)
            zeros = plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA)

            def level(i, carry):
                PT, dq, dk, change = carry
                right = in_right_half(32 >> i)
                e = jnp.exp(-jnp.abs(product(matrix(ANCHORS + 64 * i), g_own, TILE)))
                X = (jnp.where(right, raw_q(), raw_k()) * e).astype(BF16)
                q_own[...] = X
                plgpu.commit_smem()
                meet(barrier)
                depth = (5 - i).astype(F32)
                PT = PT + jnp.where(level_pairs(depths_t(), depth), product(q_c, q_c.T, TILE), 0.0)
                dP, dPT = pair_gradients()
                Z = jnp.where(level_pairs(depths(), depth), dP, jnp.where(level_pairs(depths_t(), depth), dPT, 0.0))
                Y = product(Z.astype(BF16), q_own, TILE)
                e = jnp.exp(-jnp.abs(product(matrix(ANCHORS + 64 * i), g_own, TILE)))
                dq = dq + jnp.where(right, Y * (e * scale), 0.0)
                dk = dk + jnp.where(right, 0.0, Y * e)
                Y = Y * load(q_own).astype(F32)
                change = change + jnp.where(right, Y, -Y)
                meet(barrier)
                return PT, dq, dk, change

            PT, dq, dk, change = lax.fori_loop(0, levels, level, (zeros,) * 4)

            # Bounded blocks of 16 rows in tier 2; in tier 3 single rows, whose only pair is the diagonal.
            def around_middle():
                return product(matrix(ANCHORS + 64 * 2), g_own, TILE) * within.astype(F32)

            D = around_middle()
            q_own[...] = (raw_q() * jnp.exp(D)).astype(BF16)
            k_own[...] = (raw_k() * jnp.exp(-D)).astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            size = (6 - levels).astype(F32)
            PT = PT + jnp.where(bounded_pairs(depths_t(), size), product(k_c, q_c.T, TILE), 0.0)
            dP, dPT = pair_gradients()
            diag = diagonal(dP)
            inside = lambda depth: (depth >= 0.0) & bounded_pairs(depth, size)
            for_q = product(jnp.where(inside(depths()), dP, 0.0).astype(BF16), k_own, TILE)
            for_k = product(jnp.where(inside(depths_t()), dPT, 0.0).astype(BF16), q_own, TILE)
            D = around_middle()
            dq = dq + for_q * (jnp.exp(D) * scale) + diag * (raw_k() * scale)
            dk = dk + for_k * jnp.exp(-D) + diag * raw_q()
            change = change + for_q * load(q_own).astype(F32) - for_k * load(k_own).astype(F32)
            plgpu.commit_smem()
            meet(barrier)

            dS = load(parked_g.at[program, own], optimized=False)
            dS_s.at[own][...] = dS.astype(BF16)
            q_own[...] = (raw_q() * jnp.exp(product(matrix(PREFIX), g_own, TILE))).astype(BF16)
            k_own[...] = (raw_k() * jnp.exp(product(matrix(SUFFIX), g_own, TILE))).astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            for_q = from_state()
            change = change + for_q * load(q_own).astype(F32)
            dq = dq + for_q * (jnp.exp(product(matrix(PREFIX), g_own, TILE)) * scale)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_q[...] = dq.astype(BF16)
            for_k = of_last(product(v_c, dS_s.at[own].T, TILE))
            later = (for_k * load(k_own).astype(F32)).astype(BF16)
            out_k[...] = (dk + for_k * jnp.exp(product(matrix(SUFFIX), g_own, TILE))).astype(BF16)
            return PT.astype(BF16), change, later, dS

        if has_final:
            dS = load(final_g.at[b, h, piece, own_keys, values], optimized=False)
        else:
            dS = plgpu.layout_cast(jnp.zeros((64, VB), F32), WGMMA)
        document = documents_g[b, jnp.minimum((first + steps) * CHUNK, T - 1)] if packed else jnp.int32(0)
        dS, _ = lax.fori_loop(0, steps, chunk, (dS, document))
        initial_g.at[b, h, piece, own_keys, values][...] = dS
        plgpu.wait_smem_to_gmem(0)

    programs = B * H * N * key_blocks * value_blocks
    of_keys = jax.ShapeDtypeStruct((value_blocks, B, T, H, K), BF16)
    out_type = [of_keys, of_keys, of_keys, jax.ShapeDtypeStruct((key_blocks, B, T, H, V), BF16)]
    out_type += [jax.ShapeDtypeStruct((B, H, N, K, V), F32), jax.ShapeDtypeStruct((programs, KB, VB), F32)]
    tiles_s = dict(
        q=shared((1, CHUNK, KB)),
        k=shared((1, CHUNK, KB)),
        v=shared((1, CHUNK, VB)),
        g=shared((1, W, CHUNK, 64)),
        do=shared((1, CHUNK, VB)),
        S=shared((1, KB, VB)),
        dS=shared((1, KB, VB)),
        out=shared((1, W, 3, CHUNK, 64)),
        constants=shared((1, RESIDENT + 64, 64)),
    )
    scratch = [
        tiles_s,
        plgpu.SMEM((1,), jnp.int32),
        plgpu.SMEM((W, 64), F32),
        plgpu.SMEM((W, 64), F32),
        plgpu.Barrier(num_arrivals=5 + W + packed),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=W),
    ]
    scratch += [plgpu.SMEM((CHUNK,), jnp.int32)] if packed else []
    scratch += [shared((W, 64, 64))] if interpreted else []
    operands = [q, k, v, log_alpha, do, states, constant_rows()] + ([final_gradient] if has_final else [])
    operands += [documents] if packed else []
    dq, dk, dg, dv, initial, _ = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("block",),
        num_threads=W,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **(dict(interpret=interpret) if interpreted else {}),
    )(*operands)
    return dq, dk, dg, dv, initial

"""The backward walk: all gradients of one block of a head in one pass over its chunks, last to first.

The forward leaves the states that enter each chunk (S_hat, in the frame of the chunk's tier), so one kernel sees S
and its gradient dS together, and nothing but the gradients themselves is written:

    dq = exp(b) (do S^T + tril(dP) k~)
    dk = exp(b_63 - b) (v dS^T) + exp(-b) tril(dP)^T q~
    dv = P^T do + (k exp(b_63 - b)) dS

with dP = do v^T. The gate at t weighs every pair (i, j) of tokens with j < t <= i, and the closed form sum of (q dq -
k dk) over i >= t finds them as a difference of large sums. Here they are added up by where i and j lie, so that
rounding cannot pile up along the sequence:

    dlog_alpha_t = [both in the chunk]      sum over i >= t of (q dq - k dk), rounded alike, the diagonal left out
                 + [j before the chunk]     sum over i >= t of q (do S^T)
                 + [i after it]             sum over j < t of k (v dS^T)
                 + [j before, i after]      exp(b_63) sum over v of S dS
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
    DEPTHS_T,
    FIRST,
    FLOOR,
    PREFIX,
    RESIDENT,
    SECOND,
    SUFFIX,
    beyond_limit,
    bounded_pairs,
    constant_rows,
    document_depths,
    in_right_half,
    level_pairs,
)
from .warpgroup import BF16, COLUMN, F32, ROW, TILE, WGMMA, Products, along_columns, along_rows, load, meet, pin, shared


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile choices of one backward launch."""

    key_block: int  # key channels per block: 64 for each warpgroup
    value_block: int  # value channels per block: 64 or 128
    segments: int = 1  # pieces of the sequence walked side by side

    @property
    def warpgroups(self) -> int:
        return self.key_block // 64


def backward(
    q, k, v, log_alpha, do, states, *, scale, tiles: BackwardTiles, final_gradient=None, documents=None, interpret=None
):
    """Gradients, summed over nothing: one part per value block (dq, dk, dlog_alpha) or key block (dv), for the caller
    to add up.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K], v [B, T, G, V], do [B, T, H, V]: bf16, as the forward had them.
      states: [B, H, T / 64, K, V] bf16, the chunk states that `forward` saved.
      final_gradient: [B, H, N, K, V] float32, gradient of the state that leaves each of the N = tiles.segments
        pieces, or None.
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
        documents_g, depths_g, goes_on_g = (refs.pop(0), refs.pop(0), refs.pop(0)) if packed else (None, None, None)
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

        class Views:
            """A chunk's tiles in shared memory and its rows in device memory.

            Each `Views` indexes them by a zero read from shared memory, which the compiler cannot see through. It
            would otherwise compute all
            addresses once, before the loop over chunks, and fill the registers with them; a fresh `Views` ends the
            life of the last one's.
            """

            def __init__(self, step):
                zero = zero_s[0]
                self.rows = pl.ds((first + step) * CHUNK + zero * CHUNK, CHUNK)
                tiles = {name: ref.at[zero] for name, ref in tiles_s.items()}
                self.q, self.k, self.v, self.do = (tiles[name] for name in ("q", "k", "v", "do"))
                self.S, self.dS, self.constants = (tiles[name] for name in ("S", "dS", "constants"))
                self.q_own, self.k_own, self.g_own, self.g = (
                    self.q.at[:, own],
                    self.k.at[:, own],
                    tiles["g"].at[w],
                    tiles["g"],
                )
                self.out_q, self.out_k, self.limb = (tiles["out"].at[w, n] for n in range(3))

            def raw_q(self):
                return load(q_g.at[b, self.rows, h, own_keys], optimized=False).astype(F32) * scale

            def raw_k(self):
                return load(k_g.at[b, self.rows, g, own_keys], optimized=False).astype(F32)

            def matrix(self, row):
                return load(constants_g.at[pl.ds(row, 64)], optimized=False)

            def depths(self):
                return load(self.constants.at[pl.ds(DEPTHS, 64)]).astype(F32)

            def depths_t(self):
                return load(self.constants.at[pl.ds(DEPTHS_T, 64)]).astype(F32)

            def totals(self, start):
                """exp of the gates summed over one half of the chunk, per key channel of this warpgroup. [64]."""
                sums = product(self.g_own.T, self.constants.at[pl.ds(start, 8)].T, (64, 8))
                return jnp.exp(jnp.max(sums, axis=1))

        def fetch(step):
            v = Views(step)

            @pl.when(w == 0)
            def _():
                for j in range(W):  # a tile for each warpgroup: it leaves as their gate gradient
                    plgpu.copy_gmem_to_smem(g_g.at[b, v.rows, g, pl.ds(kb * KB + 64 * j, 64)], v.g.at[j], arrived)
                plgpu.copy_gmem_to_smem(q_g.at[b, v.rows, h, keys], v.q, arrived)
                plgpu.copy_gmem_to_smem(k_g.at[b, v.rows, g, keys], v.k, arrived)
                plgpu.copy_gmem_to_smem(v_g.at[b, v.rows, g, values], v.v, arrived)
                plgpu.copy_gmem_to_smem(do_g.at[b, v.rows, h, values], v.do, arrived)
                plgpu.copy_gmem_to_smem(states_g.at[b, h, first + step, keys, values], v.S, arrived)
                if packed:
                    plgpu.copy_gmem_to_smem(documents_g.at[b, v.rows], documents_s, arrived)
                    for side, start in enumerate((DEPTHS, DEPTHS_T)):
                        depths_s = v.constants.at[pl.ds(start, 64)]
                        plgpu.copy_gmem_to_smem(depths_g.at[b, first + step, side], depths_s, arrived)

        @pl.when(w == 0)
        def _():
            zero_s[0] = jnp.int32(0)
            plgpu.copy_gmem_to_smem(
                constants_g.at[pl.ds(0, RESIDENT + 64)], tiles_s["constants"].at[0], constants_arrived
            )

        plgpu.barrier_wait(constants_arrived)
        plgpu.commit_smem()
        meet(barrier)
        fetch(steps - 1)

        def chunk(i, carry):
            dS, document = carry  # gradient of the state that leaves the chunk, and the document it goes to
            step = steps - 1 - i
            plgpu.barrier_wait(arrived)
            v = Views(step)
            if packed:
                opens, closes = documents_s[0], documents_s[63]
                dS = dS * (closes == document).astype(F32)
                document = opens

                def of(chosen):
                    """Keeps the rows of one document. (Factors, not selects: layouts of selects are searched for
                    without end.)"""

                    def keep(x):
                        rows = jnp.where(load(documents_s, ROW) == chosen, 1.0, 0.0)
                        return x * plgpu.layout_cast(along_rows(plgpu.layout_cast(rows, ROW), TILE), WGMMA)

                    return keep

                of_first, of_last = of(opens), of(closes)
                unbroken = (opens == closes).astype(F32)
            else:
                of_first = of_last = lambda x: x
                unbroken = 1.0

            D = product(v.constants.at[pl.ds(0, 64)], v.g_own, TILE)
            v.q_own[...] = (load(v.q_own).astype(F32) * (jnp.exp(D) * scale)).astype(BF16)
            v.k_own[...] = (load(v.k_own).astype(F32) * jnp.exp(-D)).astype(BF16)
            worst.at[w][...] = beyond_limit(D)
            v.dS.at[own][...] = (dS * along_rows(v.totals(SECOND), (64, VB))).astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            within = jnp.bool_(True)
            for j in range(W):
                within &= (worst[j, 0] == 0.0) & (worst[j, 63] == 0.0)

            below = lambda depth: (depth >= 0.0) & bounded_pairs(depth, 6)

            def diagonal(v, dP):
                """dP_ii, per row."""
                return along_rows(jnp.sum(jnp.where(v.depths() == -1.0, dP, 0.0), axis=1), TILE)

            def tier_1():
                v = Views(step)
                dP = product(v.do, v.v.T, TILE)
                diag = diagonal(v, dP)
                for_q = product(jnp.where(below(v.depths()), dP, 0.0).astype(BF16), v.k_own, TILE)
                if packed:
                    for_q = for_q + of_first(product(v.do, v.S.at[own].T, TILE))
                else:
                    for_q = product(v.do, v.S.at[own].T, TILE, onto=for_q)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                D = product(v.constants.at[pl.ds(0, 64)], v.g_own, TILE)
                v.out_q[...] = ((for_q + diag * load(v.k_own).astype(F32)) * (jnp.exp(D) * scale)).astype(BF16)
                change = pin(load(v.q_own).astype(F32) * for_q)
                v = Views(step)
                dPT = product(v.v, v.do.T, TILE)
                for_k = product(jnp.where(below(v.depths_t()), dPT, 0.0).astype(BF16), v.q_own, TILE)
                kt = load(v.k_own).astype(F32)
                change = pin(change - kt * for_k)
                later = of_last(product(v.v, v.dS.at[own].T, TILE))
                D = product(v.constants.at[pl.ds(0, 64)], v.g_own, TILE)
                v.out_k[...] = ((for_k + later + diag * load(v.q_own).astype(F32)) * jnp.exp(-D)).astype(BF16)
                later = (kt * later).astype(BF16)
                v = Views(step)
                PT = pin(jnp.where(bounded_pairs(v.depths_t(), 6), product(v.k, v.q.T, TILE), 0.0).astype(BF16))
                return PT, change, later, dS, v.totals(SECOND), v.totals(FIRST)

            def tiers_2_and_3():
                PT, change, later, kept = hard_chunk(step, dS, diagonal, of_first, of_last)
                v = Views(step)
                whole = v.totals(FIRST) * v.totals(SECOND)
                return PT, change, later, kept, whole, jnp.ones_like(whole)

            PT, change, later, dS, after, before = lax.cond(within, tier_1, tiers_2_and_3)
            v = Views(step)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v.out_q, dq_g.at[vb, b, v.rows, h, own_keys])
            plgpu.copy_smem_to_gmem(v.out_k, dk_g.at[vb, b, v.rows, h, own_keys])
            dS = dS * along_rows(after * unbroken, (64, VB))
            through_s.at[w][...] = jnp.sum(load(v.S.at[own]).astype(F32) * dS, axis=1)

            # Gate gradient: sums within the chunk as products, of float32 values as two bf16 limbs where terms cancel.
            high = change.astype(BF16)
            v.g_own[...] = high
            v.limb[...] = (change - high.astype(F32)).astype(BF16)
            plgpu.commit_smem()
            sums_from = jnp.where(v.depths_t() < 6.0, 1.0, 0.0).astype(BF16)
            dg = product.total([(sums_from, v.g_own), (sums_from, v.limb)], TILE)
            v.g_own[...] = later
            plgpu.commit_smem()
            dg = dg + along_columns(load(through_s.at[w], COLUMN), TILE)
            dg = product(jnp.where(below(v.depths()), 1.0, 0.0).astype(BF16), v.g_own, TILE, onto=dg)
            dg = lax.cond(
                within,
                lambda: dg,
                lambda: jnp.where(load(g_g.at[b, v.rows, g, own_keys], optimized=False).astype(F32) > FLOOR, dg, 0.0),
            )
            if packed:  # no pair spans a gate between documents: what is left there is rounding
                goes_on = load(goes_on_g.at[b, v.rows], ROW, optimized=False)
                dg = dg * plgpu.layout_cast(along_rows(goes_on, TILE), WGMMA)
            v.g_own[...] = dg.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v.g_own, dg_g.at[vb, b, v.rows, h, own_keys])

            v = Views(step)
            for c in range(w_values):

                @pl.when((w == 0) | (VB > 64))
                def _(c=c):
                    part = pl.ds(own_values.start + 64 * c, 64)
                    if packed:
                        dv = product(PT, v.do.at[:, part], TILE, onto=of_last(product(v.k, v.dS.at[:, part], TILE)))
                    else:
                        dv = product.total([(PT, v.do.at[:, part]), (v.k, v.dS.at[:, part])], TILE)
                    if c:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    v.limb[...] = dv.astype(BF16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(v.limb, dv_g.at[kb, b, v.rows, h, pl.ds(vb * VB + part.start, 64)])

            if packed:

                @pl.when(opens != closes)
                def _():
                    meet(barrier)
                    v.q_own[...] = of_first(load(v.q_own).astype(F32)).astype(BF16)
                    plgpu.commit_smem()

            v = Views(step)
            dS = product(v.q_own.T, v.do, (64, VB), onto=dS) * along_rows(before, (64, VB))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # g_own is read before it is loaded again
            plgpu.commit_smem()
            meet(barrier)

            @pl.when(step > 0)
            def _():
                fetch(step - 1)

            return dS, document

        def hard_chunk(step, dS, diagonal, of_first, of_last):
            """Tiers 2 and 3: P^T, the parts of the gate gradient and dS; dq and dk to their buffers; q, k, dS_s as
            the rest expects them."""
            parked_g.at[program, own][...] = dS
            meet(barrier)
            v = Views(step)
            v.g_own[...] = jnp.maximum(load(v.g_own), jnp.asarray(FLOOR, BF16))
            plgpu.commit_smem()
            worst.at[w][...] = beyond_limit(product(v.matrix(ANCHORS + 64 * 2), v.g_own, TILE))
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
                v = Views(step)
                right = in_right_half(32 >> i)
                depth = (5 - i).astype(F32)
                e = jnp.exp(-jnp.abs(product(v.matrix(ANCHORS + 64 * i), v.g_own, TILE)))
                v.q_own[...] = (jnp.where(right, v.raw_q(), v.raw_k()) * e).astype(BF16)
                plgpu.commit_smem()
                meet(barrier)
                PT = pin(PT + jnp.where(level_pairs(v.depths_t(), depth), product(v.q, v.q.T, TILE), 0.0))
                v = Views(step)
                Z = jnp.where(level_pairs(v.depths(), depth), product(v.do, v.v.T, TILE), 0.0)
                Z = jnp.where(level_pairs(v.depths_t(), depth), product(v.v, v.do.T, TILE), Z).astype(BF16)
                Y = product(Z, v.q_own, TILE)
                e = jnp.exp(-jnp.abs(product(v.matrix(ANCHORS + 64 * i), v.g_own, TILE)))
                dq = pin(dq + jnp.where(right, Y * (e * scale), 0.0))
                dk = pin(dk + jnp.where(right, 0.0, Y * e))
                Y = Y * load(v.q_own).astype(F32)
                change = pin(change + jnp.where(right, Y, -Y))
                meet(barrier)
                return PT, dq, dk, change

            PT, dq, dk, change = lax.fori_loop(0, levels, level, (zeros,) * 4)

            # Bounded blocks of 16 rows in tier 2; in tier 3 single rows, whose only pair is the diagonal.
            def around_middle(v):
                return product(v.matrix(ANCHORS + 64 * 2), v.g_own, TILE) * within.astype(F32)

            v = Views(step)
            D = around_middle(v)
            v.q_own[...] = (v.raw_q() * jnp.exp(D)).astype(BF16)
            v.k_own[...] = (v.raw_k() * jnp.exp(-D)).astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            v = Views(step)
            size = (6 - levels).astype(F32)
            inside = lambda depth: (depth >= 0.0) & bounded_pairs(depth, size)
            PT = pin(PT + jnp.where(bounded_pairs(v.depths_t(), size), product(v.k, v.q.T, TILE), 0.0))
            PT = PT.astype(BF16)
            dP = product(v.do, v.v.T, TILE)
            diag = diagonal(v, dP)
            for_q = product(jnp.where(inside(v.depths()), dP, 0.0).astype(BF16), v.k_own, TILE)
            dq = pin(dq + for_q * (jnp.exp(around_middle(v)) * scale) + diag * (v.raw_k() * scale))
            change = pin(change + for_q * load(v.q_own).astype(F32))
            v = Views(step)
            dPT = product(v.v, v.do.T, TILE)
            for_k = product(jnp.where(inside(v.depths_t()), dPT, 0.0).astype(BF16), v.q_own, TILE)
            dk = pin(dk + for_k * jnp.exp(-around_middle(v)) + diag * v.raw_q())
            change = pin(change - for_k * load(v.k_own).astype(F32))
            plgpu.commit_smem()
            meet(barrier)

            v = Views(step)
            dS = load(parked_g.at[program, own], optimized=False)
            v.dS.at[own][...] = dS.astype(BF16)
            v.q_own[...] = (v.raw_q() * jnp.exp(product(v.matrix(PREFIX), v.g_own, TILE))).astype(BF16)
            v.k_own[...] = (v.raw_k() * jnp.exp(product(v.matrix(SUFFIX), v.g_own, TILE))).astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            v = Views(step)
            for_q = of_first(product(v.do, v.S.at[own].T, TILE))
            change = pin(change + for_q * load(v.q_own).astype(F32))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            v.out_q[...] = (dq + for_q * (jnp.exp(product(v.matrix(PREFIX), v.g_own, TILE)) * scale)).astype(BF16)
            v = Views(step)
            for_k = of_last(product(v.v, v.dS.at[own].T, TILE))
            later = (for_k * load(v.k_own).astype(F32)).astype(BF16)
            v.out_k[...] = (dk + for_k * jnp.exp(product(v.matrix(SUFFIX), v.g_own, TILE))).astype(BF16)
            return PT, change, later, dS

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
    tiles_s = {
        "q": shared((1, CHUNK, KB)),
        "k": shared((1, CHUNK, KB)),
        "v": shared((1, CHUNK, VB)),
        "g": shared((1, W, CHUNK, 64)),
        "do": shared((1, CHUNK, VB)),
        "S": shared((1, KB, VB)),
        "dS": shared((1, KB, VB)),
        "out": shared((1, W, 3, CHUNK, 64)),
        "constants": shared((1, RESIDENT + 64, 64)),
    }
    scratch = [
        tiles_s,
        plgpu.SMEM((1,), jnp.int32),
        plgpu.SMEM((W, 64), F32),
        plgpu.SMEM((W, 64), F32),
        plgpu.Barrier(num_arrivals=5 + W + 3 * packed),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=W),
    ]
    scratch += [plgpu.SMEM((CHUNK,), jnp.int32)] if packed else []
    scratch += [shared((W, 64, 64))] if interpreted else []
    operands = [q, k, v, log_alpha, do, states, constant_rows()] + ([final_gradient] if has_final else [])
    if packed:
        goes_on = jnp.diff(documents, axis=1, prepend=documents[:, :1]) == 0
        operands += [documents, document_depths(documents), goes_on.astype(F32)]
    dq, dk, dg, dv, initial, _ = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("block",),
        num_threads=W,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpreted else {}),
    )(*operands)
    return dq, dk, dg, dv, initial

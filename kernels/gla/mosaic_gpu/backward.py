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

from ...once import once
from .anchors import CHUNK, FLOOR
from .backward_chunk import MASK, Walk
from .backward_tiers import tier_1, tiers_2_and_3
from .gating import Middle
from .pieces import WHOLE, Cut, Pieces, carry_in
from .tables import FUTURE, document_codes
from .warpgroup import (
    BF16,
    COLUMN,
    F32,
    ROW,
    TILE,
    Products,
    along_columns,
    along_rows,
    choose,
    launch,
    load,
    meet,
    result,
    settle,
    shared,
    store,
    where,
)


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile choices of one backward launch."""

    value_block: int  # value channels per block: 64 or 128
    warpgroups: int  # each owns 64 key channels
    cut: Cut = WHOLE  # of the sequence, into pieces that are walked side by side


@once
def backward(
    q,
    k,
    v,
    log_alpha,
    do,
    chunk_tiers,
    states,
    codes,
    matrices,
    *,
    scale,
    tiles: BackwardTiles,
    final_gradient=None,
    pieces: Pieces | None = None,
    documents=None,
    interpret=None,
):
    """Gradients; of dq, dk and dlog_alpha one part per value block, for the caller to add up.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K], v [B, T, G, V], do [B, T, H, V]: bf16, as the forward had them.
      chunk_tiers, states: what `forward` saved: [B, H, T / 64] int32, and [B, T, H, V] bf16 for each 64 key channels.
      codes, matrices: tables.codes(), tables.matrices().
      final_gradient: [B, H, K, V] float32, gradient of the final state, or None.
      pieces: of a sequence that is cut, what each piece gives the one before it, from `own_gradients`.
      documents: [B, T] int32 as in `forward`, or None.

    Returns:
      dq, dk, dlog_alpha: [V / value_block, B, T, H, K] bf16; dv: [B, T, H, V] bf16;
      initial_gradient: [B, H, K, V] float32.
    """
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    N, W, VB = tiles.cut.pieces, tiles.warpgroups, tiles.value_block
    VW = max(VB // W, 64)  # value columns of one warpgroup's dv; with VB = 64 the first warpgroup does them all
    each_has_values = VB > 64 or W == 1
    value_blocks = V // VB
    has_final, packed = final_gradient is not None, documents is not None
    interpreted = interpret is not None
    # Two warpgroups are short of registers more than of shared memory, which then has no room for FUTURE.
    middle = Middle(stored=W > 1)
    masks = not (packed or middle.stored)

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, v_g, g_g, do_g, tiers_g, codes_g, matrices_g = refs[:8]
        del refs[:8]
        states_g = [refs.pop(0) for _ in range(W)]
        final_g = refs.pop(0) if has_final else None
        own_g, decay_g = (refs.pop(0), refs.pop(0)) if N > 1 else (None, None)
        documents_g, pairs_g, goes_on_g = (refs.pop(0), refs.pop(0), refs.pop(0)) if packed else (None, None, None)
        dq_g, dk_g, dg_g, initial_g = refs[:4]
        del refs[:4]
        dv_g = states_g[0]  # a chunk's dv takes the place of the first 64 rows of its state, read by then
        tiles_s, zero_s, rows_s, arrived, tables_arrived, met, *rest = refs
        documents_s, goes_on_s, pairs_arrived = (rest.pop(0) for _ in range(3)) if packed else (None,) * 3
        spare = rest.pop(0) if interpreted else None

        w = lax.axis_index("warpgroup")
        own_values = pl.ds(w * VW, VW) if VB > 64 else pl.ds(0, VW)
        product = Products(None if spare is None else spare.at[w])
        barrier = met if W > 1 else None
        walk = Walk(
            tiles_s, zero_s, product, middle, masks, barrier, pairs_arrived, w, W, value_blocks=value_blocks,
            value_block=VB, heads=H, group=H // G, batch=B, chunks=T // CHUNK, cut=tiles.cut,
        )  # fmt: skip

        def fetch(step):
            v = walk.at(step)
            at = v.place()

            @pl.when(w == 0)
            def _():
                for j in range(W):  # a tile for each warpgroup: it leaves as their gate gradient
                    part = pl.ds(64 * j, 64)
                    plgpu.copy_gmem_to_smem(g_g.at[at.b, at.rows, at.g, part], v.g_of[j], arrived)
                    plgpu.copy_gmem_to_smem(states_g[j].at[at.b, at.rows, at.h, at.values], v.S_of[j], arrived)
                plgpu.copy_gmem_to_smem(q_g.at[at.b, at.rows, at.h], v.q, arrived)
                plgpu.copy_gmem_to_smem(k_g.at[at.b, at.rows, at.g], v.k, arrived)
                plgpu.copy_gmem_to_smem(v_g.at[at.b, at.rows, at.g, at.values], v.v, arrived)
                plgpu.copy_gmem_to_smem(do_g.at[at.b, at.rows, at.h, at.values], v.do, arrived)
                if packed:
                    plgpu.copy_gmem_to_smem(documents_g.at[at.b, at.rows], documents_s, arrived)
                    plgpu.copy_gmem_to_smem(goes_on_g.at[at.b, at.rows], goes_on_s, arrived)

        def fetch_pairs(step):
            """Apart, since the gate gradient needs those of the chunk before until its end."""
            v = walk.at(step)
            if packed:
                at = v.place()

                @pl.when(w == 0)
                def _():
                    plgpu.copy_gmem_to_smem(pairs_g.at[at.b, at.chunk], v.tile("codes", 0), pairs_arrived)

        @pl.when(w == 0)
        def _():
            zero_s[0] = jnp.int32(0)
            plgpu.copy_gmem_to_smem(codes_g.at[pl.ds(0, 2)], tiles_s["codes"].at[0, pl.ds(0, 2)], tables_arrived)
            if masks:
                plgpu.copy_gmem_to_smem(codes_g.at[FUTURE], tiles_s["codes"].at[0, MASK], tables_arrived)
            plgpu.copy_gmem_to_smem(matrices_g.at[pl.ds(0, middle.rows)], tiles_s["matrices"].at[0], tables_arrived)

        plgpu.barrier_wait(tables_arrived)
        plgpu.commit_smem()
        meet(barrier)
        steps = walk.at(0).place().steps
        fetch(steps - 1)
        fetch_pairs(steps - 1)

        def chunk(i, carry):
            dS, document, tier = carry  # gradient of the state that leaves the chunk, and the document it goes to
            step = steps - 1 - i
            v = walk.at(step)
            plgpu.barrier_wait(arrived)
            if packed:
                opens, closes = documents_s[0], documents_s[63]
                leaves = (closes == document).astype(F32)  # whether the state that leaves is of the next chunk too
                document, mixed = opens, opens != closes

                def of(chosen):
                    """Keeps the rows of one document; there are others where a chunk is mixed."""

                    def keep(x):
                        rows = lambda: where(load(documents_s, ROW) == chosen, 1.0, 0.0)
                        return lax.cond(mixed, lambda: x * along_rows(rows(), TILE), lambda: x)

                    return keep

                of_first, of_last = of(opens), of(closes)
            else:
                leaves, of_first, of_last = None, lambda x: x, lambda x: x

            def bounded():
                return tier_1(walk, step, dS, leaves, of_first, of_last, scale=scale)

            def any_gates():
                # dS waits in the place of the result, which is of this walk alone and free until its end.
                def parking(v):
                    at = v.place()
                    return initial_g.at[at.b, at.h, at.piece, v.own, at.values]

                return tiers_2_and_3(walk, step, tier == 2, dS, leaves, of_first, of_last, parking, scale=scale)

            results = result(TILE), result((64, VB)), result((64,), layout=ROW)
            change, dS, before = choose(tier != 1, any_gates, bounded, *results)
            v = walk.at(step)
            at = v.place()
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v.g_own, dq_g.at[at.vb, at.b, at.rows, at.h, v.own])
            plgpu.copy_smem_to_gmem(v.out_k, dk_g.at[at.vb, at.b, at.rows, at.h, v.own])
            if packed:
                dS = lax.cond(mixed, lambda: dS * 0.0, lambda: dS)
            through = jnp.sum(load(v.S_own).astype(F32) * dS, axis=1)
            rows_s.at[w][...] = through

            if packed:

                @pl.when(mixed)
                def _():
                    settle(barrier)
                    store(v.q_own, of_first(load(v.q_own).astype(F32)).astype(BF16))
                    store(v.k_own, of_last(load(v.k_own).astype(F32)).astype(BF16))
                    plgpu.commit_smem()
                    meet(barrier)

            def send_dv(dv, part, tile):
                store(tile, dv.astype(BF16))
                plgpu.commit_smem()
                at = v.place()
                plgpu.copy_smem_to_gmem(tile, dv_g.at[at.b, at.rows, at.h, pl.ds(at.vb * VB + part.start, 64)])

            v = walk.at(step)
            if each_has_values and VW == 64:
                do, of_dS = (v.tile(name, slice(None), own_values) for name in ("do", "dS"))
                dS, dv = product.beside([(v.q_own.T, v.do)], dS, ([(v.out_q, do), (v.k, of_dS)], TILE))
                settle()
                send_dv(dv, own_values, v.out_q)
                dS = dS * along_rows(before, (64, VB))
            else:
                for c in range(VW // 64):

                    @pl.when((w == 0) | (VB > 64))
                    def _(c=c):
                        part = pl.ds(own_values.start + 64 * c, 64)
                        do, of_dS = (v.tile(name, slice(None), part) for name in ("do", "dS"))
                        dv = product.total([(v.out_q, do), (v.k, of_dS)], TILE)
                        if c + 1 == VW // 64:
                            settle()
                            send_dv(dv, part, v.out_q)
                        else:  # P^T is still needed; dq has left, or does so now
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            send_dv(dv, part, v.g_own)

                v = walk.at(step)
                dS = product(v.q_own.T, v.do, (64, VB), onto=dS) * along_rows(before, (64, VB))
            if packed:  # of each row, whether it is of the document of the row before
                goes_on, starts = load(goes_on_s, ROW), mixed | (goes_on_s[0] == 0.0)
            # out_q and out_k are read (what may be under way is the last dv).
            plgpu.wait_smem_to_gmem(int(each_has_values), wait_read_only=True)
            plgpu.commit_smem()
            meet(barrier)

            @pl.when(step > 0)
            def _():
                fetch(step - 1)

            at = v.place()
            next_tier = tiers_g[at.b, at.h, jnp.maximum(at.chunk - 1, 0)]

            # Gate gradient: sums within the chunk as products, of float32 values as two bf16 limbs where terms cancel,
            # while the next chunk arrives. Tiles that are no part of it take the operands.
            v = walk.at(step)
            high = change.astype(BF16)
            store(v.dS_tile, high)
            store(v.out_k, (change - high.astype(F32)).astype(BF16))
            plgpu.commit_smem()
            v = walk.at(step)
            sums_from, sums_before = v.sums()
            dg = product.total([(sums_from, v.dS_tile), (sums_from, v.out_k), (sums_before, v.limb)], TILE)
            dg = dg + along_columns(load(rows_s.at[w], COLUMN), TILE)
            at = v.place()
            gates = g_g.at[at.b, at.rows, at.g, v.own]
            dg = lax.cond(
                tier != 1,
                lambda: where(load(gates, optimized=False).astype(F32) > FLOOR, dg, 0.0),
                lambda: dg,
            )
            if packed:  # no pair spans a gate between documents: what is left there is rounding
                dg = lax.cond(starts, lambda: dg * along_rows(goes_on, TILE), lambda: dg)
            settle()
            store(v.out_k, dg.astype(BF16))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v.out_k, dg_g.at[at.vb, at.b, at.rows, at.h, v.own])
            if packed:
                meet(barrier)

                @pl.when(step > 0)
                def _():
                    fetch_pairs(step - 1)

            return dS, document, next_tier

        v = walk.at(0)
        at = v.place()
        dS = carry_in(
            None if final_g is None else load(final_g.at[at.b, at.h, v.own, at.values], optimized=False),
            None if N == 1 else lambda n: load(own_g.at[at.b, at.h, n, v.own, at.values], optimized=False),
            lambda n: load(decay_g.at[at.b, at.h, n, v.own], ROW, optimized=False),
            VB, N - 1 - at.piece, lambda i: N - 2 - i,
        )  # fmt: skip
        document = documents_g[at.b, jnp.minimum((at.first + steps) * CHUNK, T - 1)] if packed else jnp.int32(0)
        tier = tiers_g[at.b, at.h, at.first + steps - 1]
        dS, *_ = lax.fori_loop(0, steps, chunk, (dS, document, tier))
        v = walk.at(0)
        at = v.place()
        initial_g.at[at.b, at.h, at.piece, v.own, at.values][...] = dS
        plgpu.wait_smem_to_gmem(0)

    of_keys = jax.ShapeDtypeStruct((value_blocks, B, T, H, K), BF16)
    out_type = [of_keys, of_keys, of_keys, jax.ShapeDtypeStruct((B, H, N, K, V), F32)]
    tiles_s = {
        "q": shared((1, CHUNK, K)),
        "k": shared((1, CHUNK, K)),
        "v": shared((1, CHUNK, VB)),
        "g": shared((1, W, CHUNK, 64)),
        "do": shared((1, CHUNK, VB)),
        "S": shared((1, K, VB)),
        "dS": shared((1, K, VB)),
        "out": shared((1, W, 3, CHUNK, 64)),
        "codes": shared((1, 2 + masks, CHUNK, CHUNK), jnp.int16),
        "matrices": shared((1, middle.rows, CHUNK)),
    }
    scratch = [
        tiles_s,
        plgpu.SMEM((1,), jnp.int32),
        plgpu.SMEM((W, 64), F32),
        plgpu.Barrier(num_arrivals=4 + 2 * W + 2 * packed),
        plgpu.Barrier(num_arrivals=2 + masks),
        plgpu.Barrier(num_arrivals=W),
    ]
    scratch += [plgpu.SMEM((CHUNK,), jnp.int32), plgpu.SMEM((CHUNK,), F32), plgpu.Barrier()] if packed else []
    scratch += [shared((W, 64, 64))] if interpreted else []
    operands = [q, k, v, log_alpha, do, chunk_tiers, codes, matrices]
    others = states[1:]
    others += [final_gradient] if has_final else []
    others += [*pieces] if N > 1 else []
    if packed:
        goes_on = jnp.diff(documents, axis=1, prepend=documents[:, :1]) == 0
        others += [documents, document_codes(codes, documents), goes_on.astype(F32)]
    walk_chunks = launch(
        kernel,
        name="gla_backward",
        blocks=B * H * N * value_blocks,
        out_type=out_type,
        scratch_types=scratch,
        warpgroups=W,
        interpret=interpret,
    )

    def in_place(refs):
        dv, *gradients = refs
        for gradient, value in zip(gradients, walk_chunks(*operands, dv, *others), strict=True):
            gradient[...] = value

    # (run_state and no mutable array: that is an effect, which custom_partitioning does not lower.)
    before = (states[0], *(jnp.zeros(x.shape, x.dtype) for x in out_type))
    dv, dq, dk, dg, initial = pl.run_state(in_place)(before)
    return dq, dk, dg, dv, initial[:, :, 0]

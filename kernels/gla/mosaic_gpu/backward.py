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

from .anchors import CHUNK, FLOOR
from .pieces import Pieces, carry_in
from .tables import (
    DIAGONAL,
    FIRST,
    LEVELS,
    LOWER,
    LOWER_IN_16,
    MATRIX_ROWS,
    MIDDLE,
    PREFIX,
    SECOND,
    SUFFIX,
    UPPER,
    UPPER_IN_16,
    codes,
    document_codes,
    has,
    has_all,
    level_of,
    matrices,
    matrix,
    to_exponents,
)
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
    iota,
    load,
    meet,
    pin,
    shared,
    split,
    where,
)


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
    q,
    k,
    v,
    log_alpha,
    do,
    chunk_tiers,
    states,
    *,
    scale,
    tiles: BackwardTiles,
    final_gradient=None,
    pieces: Pieces | None = None,
    documents=None,
    interpret=None,
):
    """Gradients, summed over nothing: one part per value block (dq, dk, dlog_alpha) or key block (dv), for the caller
    to add up.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K], v [B, T, G, V], do [B, T, H, V]: bf16, as the forward had them.
      chunk_tiers, states: what `forward` saved: [B, H, T / 64] int32, and [B, T, H, V] bf16 for each 64 key channels.
      final_gradient: [B, H, K, V] float32, gradient of the final state, or None.
      pieces: with tiles.segments > 1, what each piece gives the one before it, from `own_gradients`.
      documents: [B, T] int32 as in `forward`, or None.

    Returns:
      dq, dk, dlog_alpha: [V / value_block, B, T, H, K] bf16; dv: [K / key_block, B, T, H, V] bf16;
      initial_gradient: [B, H, K, V] float32.
    """
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    N, W, KB, VB = tiles.segments, tiles.warpgroups, tiles.key_block, tiles.value_block
    VW = max(VB // W, 64)  # value columns of one warpgroup's dv; with VB = 64 the first warpgroup does them all
    key_blocks, value_blocks = K // KB, V // VB
    steps = T // CHUNK // N
    has_final, packed = final_gradient is not None, documents is not None
    interpreted = interpret is not None
    # A chunk's dv takes the place of its state (or of the first 64 rows of it), which has been read by then.
    in_place = key_blocks == 1

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, v_g, g_g, do_g, tiers_g, codes_g, matrices_g = refs[:8]
        del refs[:8]
        states_g = [refs.pop(0) for _ in range(K // 64)]
        final_g = refs.pop(0) if has_final else None
        own_g, decay_g = (refs.pop(0), refs.pop(0)) if N > 1 else (None, None)
        documents_g, pairs_g, goes_on_g = (refs.pop(0), refs.pop(0), refs.pop(0)) if packed else (None, None, None)
        dq_g, dk_g, dg_g, initial_g = refs[:4]
        del refs[:4]
        dv_g = states_g[0] if in_place else refs.pop(0)
        tiles_s, zero_s, rows_s, arrived, tables_arrived, met, *rest = refs
        documents_s, goes_on_s = (rest.pop(0), rest.pop(0)) if packed else (None, None)
        spare = rest.pop(0) if interpreted else None

        w = lax.axis_index("warpgroup")
        own = pl.ds(w * 64, 64)  # this warpgroup's key channels within the block
        own_values = pl.ds(w * VW, VW) if VB > 64 else pl.ds(0, VW)
        product = Products(None if spare is None else spare.at[w])
        barrier = met if W > 1 else None

        class Views:
            """A chunk's tiles in shared memory and its place in device memory.

            Each `Views` indexes them by a zero read from shared memory, which the compiler cannot see through. It
            would otherwise compute all addresses once, before the loop over chunks, and fill the registers with them;
            a fresh `Views` ends the life of the last one's.
            """

            def __init__(self, step):
                zero = zero_s[0]
                index = lax.axis_index("block") + zero
                (self.vb, self.kb, self.piece, self.h), self.b = split(index, value_blocks, key_blocks, N, H)
                self.g = lax.div(self.h, H // G)
                self.chunk = self.piece * steps + step
                self.rows = pl.ds(self.chunk * CHUNK, CHUNK)
                self.values = pl.ds(self.vb * VB, VB)
                self.own_keys = pl.ds(self.kb * KB + w * 64, 64)
                tiles = {name: ref.at[zero] for name, ref in tiles_s.items()}
                self.q, self.k, self.v, self.do = (tiles[name] for name in ("q", "k", "v", "do"))
                self.S, self.dS, self.codes, self.matrices = (tiles[n] for n in ("S", "dS", "codes", "matrices"))
                self.q_own, self.k_own, self.gates = self.q.at[:, own], self.k.at[:, own], tiles["g"]
                self.g_own, self.S_own, self.dS_own = self.gates.at[w], self.S.at[own], self.dS.at[own]
                self.out_q, self.out_k, self.limb = (tiles["out"].at[w, n] for n in range(3))
                self.out_q_of = [tiles["out"].at[j, 0] for j in range(W)]

            def pairs(self):
                return load(self.codes.at[0])

            def exponents(self, table, bit):
                """Sums of gates, in log2: those that `bit` says."""
                return product(matrix(self.codes, table, bit), self.g_own, TILE) * to_exponents(bit)

            def around_middle(self):
                return product(self.matrices.at[pl.ds(MIDDLE, 64)], self.g_own, TILE)

            def totals(self, start):
                """exp of the gates summed over one half of the chunk, per key channel of this warpgroup. [64]."""
                sums = product(self.g_own.T, self.matrices.at[pl.ds(start, 8)].T, (64, 8))
                return jnp.exp(jnp.max(sums, axis=1))

        def fetch(step):
            v = Views(step)

            @pl.when(w == 0)
            def _():
                keys = pl.ds(v.kb * KB, KB)
                for j in range(W):  # a tile for each warpgroup: it leaves as their gate gradient
                    part = pl.ds(v.kb * KB + 64 * j, 64)
                    plgpu.copy_gmem_to_smem(g_g.at[v.b, v.rows, v.g, part], v.gates.at[j], arrived)
                plgpu.copy_gmem_to_smem(q_g.at[v.b, v.rows, v.h, keys], v.q, arrived)
                plgpu.copy_gmem_to_smem(k_g.at[v.b, v.rows, v.g, keys], v.k, arrived)
                plgpu.copy_gmem_to_smem(v_g.at[v.b, v.rows, v.g, v.values], v.v, arrived)
                plgpu.copy_gmem_to_smem(do_g.at[v.b, v.rows, v.h, v.values], v.do, arrived)
                for n, state_g in enumerate(states_g):

                    @pl.when(v.kb == n // W)
                    def _(n=n, state_g=state_g):
                        part = v.S.at[pl.ds(n % W * 64, 64)]
                        plgpu.copy_gmem_to_smem(state_g.at[v.b, v.rows, v.h, v.values], part, arrived)

                if packed:
                    plgpu.copy_gmem_to_smem(documents_g.at[v.b, v.rows], documents_s, arrived)
                    plgpu.copy_gmem_to_smem(goes_on_g.at[v.b, v.rows], goes_on_s, arrived)
                    plgpu.copy_gmem_to_smem(pairs_g.at[v.b, v.chunk], v.codes.at[0], arrived)

        @pl.when(w == 0)
        def _():
            zero_s[0] = jnp.int32(0)
            plgpu.copy_gmem_to_smem(codes_g, tiles_s["codes"].at[0], tables_arrived)
            plgpu.copy_gmem_to_smem(matrices_g, tiles_s["matrices"].at[0], tables_arrived)

        plgpu.barrier_wait(tables_arrived)
        plgpu.commit_smem()
        meet(barrier)
        fetch(steps - 1)

        def chunk(i, carry):
            dS, document, tier = carry  # gradient of the state that leaves the chunk, and the document it goes to
            step = steps - 1 - i
            v = Views(step)
            next_tier = tiers_g[v.b, v.h, jnp.maximum(v.chunk - 1, 0)]
            plgpu.barrier_wait(arrived)
            if packed:
                opens, closes = documents_s[0], documents_s[63]
                dS = dS * (closes == document).astype(F32)
                document = opens

                def of(chosen):
                    """Keeps the rows of one document. (Factors, not selects: layouts of selects are searched for
                    without end.)"""

                    def keep(x):
                        rows = where(load(documents_s, ROW) == chosen, 1.0, 0.0)
                        return x * plgpu.layout_cast(along_rows(plgpu.layout_cast(rows, ROW), TILE), WGMMA)

                    return keep

                of_first, of_last = of(opens), of(closes)
                unbroken = (opens == closes).astype(F32)
            else:
                of_first = of_last = lambda x: x
                unbroken = 1.0

            def tier_1():
                v = Views(step)
                D = v.around_middle()
                v.dS_own[...] = (dS * along_rows(v.totals(SECOND), (64, VB))).astype(BF16)
                v.q_own[...] = (load(v.q_own).astype(F32) * (jnp.exp(D) * scale)).astype(BF16)
                v.k_own[...] = (load(v.k_own).astype(F32) * jnp.exp(-D)).astype(BF16)
                plgpu.commit_smem()
                meet(barrier)
                PT, dP = product.several(([(v.k, v.q.T)], TILE), ([(v.do, v.v.T)], TILE))
                PT = pin(where(has(v.pairs(), UPPER | DIAGONAL), PT, 0.0).astype(BF16))
                diagonal = jnp.sum(where(has(v.pairs(), DIAGONAL), dP, 0.0), axis=1)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                v.limb[...] = where(has(v.pairs(), LOWER), dP, 0.0).astype(BF16)
                plgpu.commit_smem()
                v = Views(step)
                chains = [[(v.limb, v.k_own)], [(v.limb.T, v.q_own)], [(v.v, v.dS_own.T)]]
                before = (v.do, v.S_own.T)
                if packed:
                    for_q, for_k, later, before = product.several(*((pairs, TILE) for pairs in [*chains, [before]]))
                    for_q, later = for_q + of_first(before), of_last(later)
                else:
                    chains[0].append(before)
                    for_q, for_k, later = product.several(*((pairs, TILE) for pairs in chains))
                v = Views(step)
                change = pin(load(v.k_own).astype(F32) * -for_k)
                for_k = pin(for_k + later)
                later = pin((load(v.k_own).astype(F32) * later).astype(BF16))
                v = Views(step)
                change = pin(change + load(v.q_own).astype(F32) * for_q)
                diagonal = along_rows(diagonal, TILE)
                for_k = pin(for_k + diagonal * load(v.q_own).astype(F32))
                for_q = pin(for_q + diagonal * load(v.k_own).astype(F32))
                v = Views(step)
                D_again = v.around_middle()
                v.out_q[...] = (for_q * (jnp.exp(D_again) * scale)).astype(BF16)
                v.out_k[...] = (for_k * jnp.exp(-D_again)).astype(BF16)
                return PT, change, later, dS, v.totals(SECOND), v.totals(FIRST)

            def tiers_2_and_3():
                PT, change, later, kept = hard_chunk(step, tier == 2, dS, of_first, of_last)
                v = Views(step)
                whole = v.totals(FIRST) * v.totals(SECOND)
                return PT, change, later, kept, whole, plgpu.layout_cast(jnp.ones((64,), F32), ROW)

            # (The smaller branch last: Pallas lowers that one twice.)
            PT, change, later, dS, after, before = lax.cond(tier != 1, tiers_2_and_3, tier_1)
            v = Views(step)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v.out_q, dq_g.at[v.vb, v.b, v.rows, v.h, v.own_keys])
            plgpu.copy_smem_to_gmem(v.out_k, dk_g.at[v.vb, v.b, v.rows, v.h, v.own_keys])
            dS = dS * along_rows(after * unbroken, (64, VB))
            through = jnp.sum(load(v.S_own).astype(F32) * dS, axis=1)
            rows_s.at[0, w][...] = through

            # Gate gradient: sums within the chunk as products, of float32 values as two bf16 limbs where terms cancel.
            # Tiles that have been read by now take the operands: the gates, the state, the limb.
            high = change.astype(BF16)
            v.g_own[...] = high
            v.limb[...] = (change - high.astype(F32)).astype(BF16)
            v.S_own.at[:, pl.ds(0, 64)][...] = later
            plgpu.commit_smem()
            if packed:

                @pl.when(opens != closes)
                def _():
                    meet(barrier)
                    v.q_own[...] = of_first(load(v.q_own).astype(F32)).astype(BF16)
                    plgpu.commit_smem()

            v = Views(step)
            one_where = lambda bits: where(has(v.pairs(), bits), 1.0, 0.0).astype(BF16)
            sums_from = one_where(UPPER | DIAGONAL)
            sums_before = one_where(LOWER)
            dg_chain = [(sums_from, v.g_own), (sums_from, v.limb), (sums_before, v.S_own.at[:, pl.ds(0, 64)])]

            def finish_dg(dg):
                dg = dg + along_columns(load(rows_s.at[0, w], COLUMN), TILE)
                gates = g_g.at[v.b, v.rows, v.g, v.own_keys]
                dg = lax.cond(
                    tier != 1,
                    lambda: where(load(gates, optimized=False).astype(F32) > FLOOR, dg, 0.0),
                    lambda: dg,
                )
                if packed:  # no pair spans a gate between documents: what is left there is rounding
                    dg = dg * plgpu.layout_cast(along_rows(load(goes_on_s, ROW), TILE), WGMMA)
                v.g_own[...] = dg.astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(v.g_own, dg_g.at[v.vb, v.b, v.rows, v.h, v.own_keys])

            finish_dg(product.total(dg_chain, TILE))
            v = Views(step)
            for c in range(VW // 64):

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
                    to = dv_g if in_place else dv_g.at[v.kb]
                    plgpu.copy_smem_to_gmem(v.limb, to.at[v.b, v.rows, v.h, pl.ds(v.vb * VB + part.start, 64)])

            v = Views(step)
            dS = product(v.q_own.T, v.do, (64, VB), onto=dS) * along_rows(before, (64, VB))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # g_own is read before it is loaded again
            plgpu.commit_smem()
            meet(barrier)

            @pl.when(step > 0)
            def _():
                fetch(step - 1)

            return dS, document, next_tier

        def hard_chunk(step, within, dS, of_first, of_last):
            """Tiers 2 and 3: P^T, the parts of the gate gradient and dS; dq and dk to their buffers; q, k, dS_s as
            the rest expects them. The buffers meanwhile hold P^T (out_k), dP (limb), and q or k as gated (out_q)."""
            parked = True  # in the place of the result: of this walk alone, and free until its end
            parking = lambda v: initial_g.at[v.b, v.h, v.piece, v.own_keys, v.values]
            v = Views(step)
            if parked:
                parking(v)[...] = dS
            v.g_own[...] = jnp.maximum(load(v.g_own), jnp.asarray(FLOOR, BF16))
            plgpu.commit_smem()
            zeros = plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA)

            v = Views(step)
            dP, dPT = product.several(([(v.do, v.v.T)], TILE), ([(v.v, v.do.T)], TILE))
            diagonal = jnp.sum(where(has(v.pairs(), DIAGONAL), dP, 0.0), axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            both = where(has(v.pairs(), UPPER), dPT, where(has(v.pairs(), LOWER), dP, 0.0))
            v.limb[...] = both.astype(BF16)
            v.out_k[...] = zeros.astype(BF16)

            def chosen_dP(v, bits):
                """dP of some pairs, for either side of them; an operand in registers."""
                return where(has(v.pairs(), bits), load(v.limb), jnp.zeros((), BF16))

            def add_pairs(v, pairs, chosen):
                v.out_k[...] = where(chosen, pairs.astype(BF16), load(v.out_k))

            def level(i, carry):
                dq, dk, change = carry
                n = 5 - i
                v = Views(step)
                right = (iota(0) & (1 << n)) != 0
                e = jnp.exp2(v.exponents(*level_of(n)))
                q_or_k = where(right, load(v.q_own).astype(F32) * scale, load(v.k_own).astype(F32))
                v.out_q[...] = (q_or_k * e).astype(BF16)
                plgpu.commit_smem()
                Y = product(chosen_dP(v, 1 << n), v.out_q, TILE)
                change = pin(change + Y * where(right, 1.0, -1.0) * load(v.out_q).astype(F32))
                Y = Y * e
                dq = pin(dq + where(right, Y, 0.0))
                dk = pin(dk + where(right, 0.0, Y))
                meet(barrier)
                v = Views(step)
                pairs = product.total([(x, x.T) for x in v.out_q_of], TILE)
                add_pairs(v, pairs, has_all(v.pairs(), UPPER | (1 << n)))
                meet(barrier)
                return dq, dk, change

            # dq is multiplied by the scale at the end.
            dq, dk, change = lax.fori_loop(0, jnp.where(within, 2, 6), level, (zeros,) * 3)

            def bounded():
                """Blocks of 16 rows around their middles, without the diagonal."""
                v = Views(step)

                def around_middle(v):
                    e = v.exponents(*LEVELS[3])
                    return where((iota(0) & 8) != 0, e, -e)

                e = around_middle(v)
                queries, keys = v.out_q, v.dS_own.at[:, pl.ds(0, 64)]
                queries[...] = (load(v.q_own).astype(F32) * (jnp.exp2(e) * scale)).astype(BF16)
                keys[...] = (load(v.k_own).astype(F32) * jnp.exp2(-e)).astype(BF16)
                plgpu.commit_smem()
                meet(barrier)
                sides = [(v.dS.at[pl.ds(64 * j, 64), pl.ds(0, 64)], v.out_q_of[j].T) for j in range(W)]
                add_pairs(v, product.total(sides, TILE), has(v.pairs(), UPPER_IN_16))
                v = Views(step)
                queries, keys = v.out_q, v.dS_own.at[:, pl.ds(0, 64)]
                for_q = product(chosen_dP(v, LOWER_IN_16), keys, TILE)
                changed = pin(change + for_q * load(queries).astype(F32))
                dq_more = pin(dq + for_q * jnp.exp2(around_middle(v)))
                v = Views(step)
                queries, keys = v.out_q, v.dS_own.at[:, pl.ds(0, 64)]
                for_k = product(chosen_dP(v, UPPER_IN_16), queries, TILE)
                changed = pin(changed - for_k * load(keys).astype(F32))
                return dq_more, pin(dk + for_k * jnp.exp2(-around_middle(v))), changed

            dq, dk, change = lax.cond(within, bounded, lambda: (dq, dk, change))
            meet(barrier)

            v = Views(step)
            dq = pin(dq + along_rows(diagonal, TILE) * load(v.k_own).astype(F32))
            v = Views(step)
            dk = pin(dk + along_rows(diagonal * scale, TILE) * load(v.q_own).astype(F32))
            v = Views(step)
            rows_s.at[1, w][...] = jnp.sum(load(v.q_own).astype(F32) * load(v.k_own).astype(F32), axis=1) * scale
            v = Views(step)
            v.q_own[...] = (load(v.q_own).astype(F32) * (jnp.exp2(v.exponents(*PREFIX)) * scale)).astype(BF16)
            v = Views(step)
            v.k_own[...] = (load(v.k_own).astype(F32) * jnp.exp2(v.exponents(*SUFFIX))).astype(BF16)
            dS_again = lambda: load(parking(v), optimized=False) if parked else dS
            v.dS_own[...] = dS_again().astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            v = Views(step)
            for_q = of_first(product(v.do, v.S_own.T, TILE))
            change = pin(change + for_q * load(v.q_own).astype(F32))
            v.out_q[...] = ((dq + for_q * jnp.exp2(v.exponents(*PREFIX))) * scale).astype(BF16)
            v = Views(step)
            for_k = of_last(product(v.v, v.dS_own.T, TILE))
            later = pin((for_k * load(v.k_own).astype(F32)).astype(BF16))
            dk = (dk + for_k * jnp.exp2(v.exponents(*SUFFIX))).astype(BF16)
            v = Views(step)
            total = load(rows_s.at[1, 0], ROW)
            for j in range(1, W):
                total = total + load(rows_s.at[1, j], ROW)
            PT = pin(where(has(v.pairs(), DIAGONAL), along_rows(total, TILE).astype(BF16), load(v.out_k)))
            v.out_k[...] = dk
            return PT, change, later, dS_again()

        v = Views(0)
        dS = carry_in(
            None if final_g is None else load(final_g.at[v.b, v.h, v.own_keys, v.values], optimized=False),
            None if N == 1 else lambda n: load(own_g.at[v.b, v.h, n, v.own_keys, v.values], optimized=False),
            lambda n: load(decay_g.at[v.b, v.h, n, v.own_keys], ROW, optimized=False),
            VB, N - 1 - v.piece, lambda i: N - 2 - i,
        )  # fmt: skip
        document = documents_g[v.b, jnp.minimum((v.piece + 1) * steps * CHUNK, T - 1)] if packed else jnp.int32(0)
        tier = tiers_g[v.b, v.h, (v.piece + 1) * steps - 1]
        dS, *_ = lax.fori_loop(0, steps, chunk, (dS, document, tier))
        v = Views(0)
        initial_g.at[v.b, v.h, v.piece, v.own_keys, v.values][...] = dS
        plgpu.wait_smem_to_gmem(0)

    of_keys = jax.ShapeDtypeStruct((value_blocks, B, T, H, K), BF16)
    out_type = [of_keys, of_keys, of_keys, jax.ShapeDtypeStruct((B, H, N, K, V), F32)]
    out_type += [] if in_place else [jax.ShapeDtypeStruct((key_blocks, B, T, H, V), BF16)]
    tiles_s = {
        "q": shared((1, CHUNK, KB)),
        "k": shared((1, CHUNK, KB)),
        "v": shared((1, CHUNK, VB)),
        "g": shared((1, W, CHUNK, 64)),
        "do": shared((1, CHUNK, VB)),
        "S": shared((1, KB, VB)),
        "dS": shared((1, KB, VB)),
        "out": shared((1, W, 3, CHUNK, 64)),
        "codes": shared((1, 2, CHUNK, CHUNK), jnp.int16),
        "matrices": shared((1, MATRIX_ROWS, CHUNK)),
    }
    scratch = [
        tiles_s,
        plgpu.SMEM((1,), jnp.int32),
        plgpu.SMEM((2, W, 64), F32),
        plgpu.Barrier(num_arrivals=4 + 2 * W + 3 * packed),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=W),
    ]
    scratch += [plgpu.SMEM((CHUNK,), jnp.int32), plgpu.SMEM((CHUNK,), F32)] if packed else []
    scratch += [shared((W, 64, 64))] if interpreted else []
    states = [jax.new_ref(states[0]), *states[1:]] if in_place else states
    operands = [q, k, v, log_alpha, do, chunk_tiers, codes(), matrices(), *states]
    operands += [final_gradient] if has_final else []
    operands += [*pieces] if N > 1 else []
    if packed:
        goes_on = jnp.diff(documents, axis=1, prepend=documents[:, :1]) == 0
        operands += [documents, document_codes(documents), goes_on.astype(F32)]
    dq, dk, dg, initial, *dv = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(B * H * N * key_blocks * value_blocks,),
        grid_names=("block",),
        kernel_name="gla_backward",
        num_threads=W,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpreted else {}),
    )(*operands)
    dv = jax.freeze(states[0])[None] if in_place else dv[0]
    return dq, dk, dg, dv, initial[:, :, 0]

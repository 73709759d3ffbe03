"""The forward walk: a block per (batch, head, value block, piece of the sequence), one pass, state in registers.

Per chunk of 64 tokens (equations of kernels/gla/chunked.py, anchors of tables.py):

    o  = (q exp(b)) S + tril(P) v          S' = exp(b_63) S + (k exp(b_63 - b))^T v

In tier 1 q and k are gated once, around the middle of the chunk, and serve every product: the state is kept in the same
frame by S_hat = exp(b_31) S, so that S' = exp(b_63 - b_31) (S_hat + k~^T v) costs one multiply of the state and no
further exponentials. S_hat in bf16 is also what the backward needs of the forward, so it can be written out from
shared memory as it stands. Tiers 2 and 3: forward_tiers.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...once import once
from . import forward_tiers
from .anchors import CHUNK, beyond_limit
from .gating import Middle, around_middle, half_sums
from .pieces import WHOLE, Cut, Pieces, carry_in
from .tables import PAST, keep
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
    choose,
    launch,
    load,
    meet,
    result,
    settle,
    shared,
    split,
    store,
    where,
)


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile choices of one forward launch."""

    value_block: int  # columns of v per block: 64 or 128
    warpgroups: int  # each owns 64 key channels, so rows of the state, and value_block / warpgroups columns of o
    stages: int = 2  # chunks of q, k, v, log_alpha in shared memory
    cut: Cut = WHOLE  # of the sequence, into pieces that are walked side by side


@once
def forward(
    q,
    k,
    v,
    log_alpha,
    codes,
    matrices,
    *,
    scale,
    tiles: ForwardTiles,
    initial_state=None,
    pieces: Pieces | None = None,
    documents=None,
    save_states=False,
    interpret=None,
):
    """o, the final state and (on request) the states that enter each chunk.

    Args:
      q: [B, T, H, K] bf16, T a multiple of 64; K 64 or 128 (wider: wide.py).
      k, log_alpha: [B, T, G, K] bf16. v: [B, T, G, V] bf16, V a multiple of tiles.value_block.
      codes, matrices: tables.codes(), tables.matrices().
      scale: multiplies q.
      initial_state: [B, H, K, V] float32, or None for zero.
      pieces: of a sequence that is cut, what each piece adds to the state, from `own_states`.
      documents: [B, T] int32, a number that changes, and never comes back, where the state restarts; or None.
      save_states: also return what the backward needs of the walk.

    Returns:
      o [B, T, H, V] bf16; the final state, [B, H, K, V] float32; and on request, else an empty list, the tier of each
      chunk, [B, H, T / 64] int32, and the states that enter the chunks, in the frame that the chunk's tier uses: for
      each 64 key channels an array [B, T, H, V] bf16, whose rows of a chunk are the rows of its state.
    """
    B, T, H, K = q.shape
    G, V = v.shape[2:]
    N, W, VB, stages = tiles.cut.pieces, tiles.warpgroups, tiles.value_block, tiles.stages
    VW, blocks = max(VB // W, 64), V // VB
    has_state, packed = initial_state is not None, documents is not None
    interpreted = interpret is not None
    middle = Middle(stored=W > 1)

    def kernel(*refs):
        refs = list(refs)
        q_g, k_g, v_g, g_g, codes_g, matrices_g = refs[:6]
        del refs[:6]
        state_g = refs.pop(0) if has_state else None
        own_g, decay_g = (refs.pop(0), refs.pop(0)) if N > 1 else (None, None)
        documents_g = refs.pop(0) if packed else None
        o_g, final_g = refs[:2]
        del refs[:2]
        tiers_g = refs.pop(0) if save_states else None
        saved_g = [refs.pop(0) for _ in range(K // 64)] if save_states else None
        q_s, k_s, v_s, g_s, states_s, codes_s, matrices_s, zero_s, rows_s, *refs = refs
        o_s = None if VB == 64 else refs.pop(0)
        arrived, tables_arrived, met, *rest = refs
        documents_s = rest.pop(0) if packed else None
        spare = rest.pop(0) if interpreted else None

        w = lax.axis_index("warpgroup")
        (block, h, b), piece = split(lax.axis_index("block"), blocks, H, B)
        piece = N - 1 - piece if N > 1 else 0  # the first, which may be shorter, last
        g = lax.div(h, H // G)
        first, steps = tiles.cut.span(piece, T // CHUNK, shorter_last=False)
        columns = pl.ds(block * VB, VB)
        own = pl.ds(w * 64, 64)  # this warpgroup's key channels
        own_values = pl.ds(w * VW, VW) if VB >= 64 * W else pl.ds(0, VW)
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
            plgpu.copy_gmem_to_smem(codes_g.at[pl.ds(0, PAST + 1)], codes_s.at[0], tables_arrived)
            plgpu.copy_gmem_to_smem(matrices_g.at[pl.ds(0, middle.rows)], matrices_s.at[0], tables_arrived)

        for step in range(min(stages, tiles.cut.shortest(T // CHUNK))):
            fetch(step)
        plgpu.barrier_wait(tables_arrived)
        meet(barrier)

        def gate_products(gates, table, of_gates):
            """Of this warpgroup's channels: exponents around the middle of the chunk, and sums over its halves."""
            return middle.product(gates, table, of_gates), *half_sums(gates, of_gates)

        def noted(D, *halves):
            """D, and exp of the halves' sums per row of the state, after noting where D exceeds its limit."""
            rows_s.at[0, w][...] = beyond_limit(D, middle.nat)  # rows 0 and 63 are the largest exponents of tier 1
            return D, *(jnp.exp(jnp.max(half, axis=1)) for half in halves)

        def note_tier(step, tier):
            if save_states:

                @pl.when((w == 0) & (block == 0))
                def _():
                    tiers_g[b, h, first + step] = jnp.asarray(tier, jnp.int32)

        def chunk(step, carry):
            S, document, (D, before, after) = carry
            slot = lax.rem(step, stages)
            q_c, k_c, v_c = q_s.at[slot], k_s.at[slot], v_s.at[slot]
            q_own, k_own, gates = (x.at[slot, :, own] for x in (q_s, k_s, g_s))
            # A zero that the compiler cannot see through: what it indexes is not hoisted out of the loop into scarce
            # registers.
            zero = zero_s[0]
            S_s, table, of_gates = (lambda *index, x=x: x.at[zero, *index] for x in (states_s, codes_s, matrices_s))
            if VB > 64:
                o_tile, tile = o_s.at[w], lambda j, i: S_s(pl.ds(64 * j, 64), pl.ds(64 * i, 64))
            else:
                o_tile, tile = S_s(pl.ds(K + 64 * w, 64)), lambda j, i: S_s(pl.ds(64 * j + K * i, 64))

            def agreed(use, rows):
                """Whether no warpgroup noted, for this use, an exceeded limit in any of `rows`."""
                within = jnp.bool_(True)
                for i in range(W):
                    for row in rows:
                        within &= rows_s[use, i, row] == 0.0
                return within

            if packed:
                opens, closes = documents_s[slot, 0], documents_s[slot, 63]
                entering, leaving = (opens == document).astype(F32), (opens == closes).astype(F32)
                document = closes

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def tier_1():
                entered = before * entering if packed else before
                around_middle(q_own, k_own, middle.exponents(D))
                store(S_s(own), (S * along_rows(entered, (64, VB))).astype(BF16))
                plgpu.commit_smem()
                meet(barrier)
                note_tier(step, 1)
                return keep(product(q_c, k_c.T, TILE), table(PAST)), entered, after

            def tiers_2_and_3():
                P, whole = forward_tiers.tiers_2_and_3(
                    q_own, k_own, gates, tile, table, of_gates, rows_s, w, warpgroups=W, product=product,
                    barrier=barrier, agreed=agreed, note_tier=functools.partial(note_tier, step),
                )  # fmt: skip
                store(S_s(own), (S * entering if packed else S).astype(BF16))
                plgpu.commit_smem()
                meet(barrier)
                return P, whole * entering if packed else whole, plgpu.layout_cast(jnp.ones((64,), F32), ROW)

            of_rows = result((64,), layout=ROW)
            P, before, after = choose(~agreed(0, (0, 63)), tiers_2_and_3, tier_1, result(TILE, BF16), of_rows, of_rows)

            if packed:

                def mixed():
                    """The state that enters belongs to the rows of the chunk's first document, and only rows of its
                    last go into the state that leaves."""
                    settle(barrier)  # P is made of q and k as they were
                    own_document = load(documents_s.at[slot], ROW)
                    for x, chosen in ((q_own, opens), (k_own, closes)):
                        rows = where(own_document == chosen, 1.0, 0.0)
                        rows = plgpu.layout_cast(along_rows(plgpu.layout_cast(rows, ROW), TILE), WGMMA)
                        store(x, (load(x).astype(F32) * rows).astype(BF16))
                    plgpu.commit_smem()
                    meet(barrier)
                    return where(
                        along_rows(own_document, TILE) == along_columns(load(documents_s.at[slot], COLUMN), TILE),
                        P,
                        jnp.zeros((), BF16),
                    )

                P = lax.cond(opens != closes, mixed, lambda: P)
                before = before * leaving

            if save_states:
                rows = pl.ds((first + step) * CHUNK, CHUNK)
                for n, to in enumerate(saved_g):

                    @pl.when(w == n)
                    def _(to=to):
                        plgpu.copy_smem_to_gmem(S_s(own), to.at[b, rows, h, columns])

            @pl.when((w == 0) | (VB >= 64 * W))  # 64 columns are one warpgroup's work
            def _():
                o = product.total([(q_c, S_s(pl.ds(0, K), own_values)), (P, v_s.at[slot, :, own_values])], (64, VW))
                store(o_tile, (o * scale).astype(BF16))
                plgpu.commit_smem()
                out = pl.ds(block * VB + own_values.start, VW)
                plgpu.copy_smem_to_gmem(o_tile, o_g.at[b, pl.ds((first + step) * CHUNK, CHUNK), h, out])

            following = lax.rem(step + 1, stages)

            @pl.when(step + 1 < steps)
            def _():
                plgpu.barrier_wait(arrived.at[following])

            # The gates of the next chunk come along with the state (after the last chunk: no matter).
            onto = S * along_rows(before, (64, VB))
            gate = gate_products(g_s.at[following, :, own], table, of_gates)
            moved, *ahead = product.beside([(k_own.T, v_c)], onto, *gate)
            moved = moved * along_rows(after, (64, VB))
            ahead = noted(*ahead)
            plgpu.commit_smem()
            meet(barrier)

            @pl.when(step + stages < steps)
            def _():
                fetch(step + stages)

            return moved, document, ahead

        S = carry_in(
            None if state_g is None else load(state_g.at[b, h, own, columns], optimized=False),
            None if N == 1 else lambda n: load(own_g.at[b, g, n, own, columns], optimized=False),
            lambda n: load(decay_g.at[b, g, n, own], ROW, optimized=False),
            VB, piece, lambda i: i,
        )  # fmt: skip
        document = documents_g[b, jnp.maximum(first * CHUNK - 1, 0)] if packed else jnp.int32(0)
        plgpu.barrier_wait(arrived.at[0])
        table, of_gates = (lambda *index, x=x: x.at[zero_s[0], *index] for x in (codes_s, matrices_s))
        gated = noted(*product.several(*gate_products(g_s.at[0, :, own], table, of_gates)))
        plgpu.commit_smem()
        meet(barrier)
        S, *_ = lax.fori_loop(0, steps, chunk, (S, document, gated))

        @pl.when(piece == N - 1)
        def _():
            final_g.at[b, h, own, columns][...] = S

        plgpu.wait_smem_to_gmem(0)

    out_type = [jax.ShapeDtypeStruct((B, T, H, V), BF16), jax.ShapeDtypeStruct((B, H, K, V), F32)]
    if save_states:
        out_type += [jax.ShapeDtypeStruct((B, H, T // CHUNK), jnp.int32)]
        out_type += [jax.ShapeDtypeStruct((B, T, H, V), BF16)] * (K // 64)
    operands = [q, k, v, log_alpha, codes, matrices]
    operands += [initial_state] if has_state else []
    operands += [pieces.own, pieces.decay] if N > 1 else []
    operands += [documents] if packed else []
    copies = 5 if packed else 4
    scratch = [
        shared((stages, CHUNK, K)),
        shared((stages, CHUNK, K)),
        shared((stages, CHUNK, VB)),
        shared((stages, CHUNK, K)),
        shared((1, K + (CHUNK * W if VB == 64 else 0), VB)),  # and, of one width with it, o
        shared((1, PAST + 1, CHUNK, CHUNK), jnp.int16),
        shared((1, middle.rows, CHUNK)),
        plgpu.SMEM((1,), jnp.int32),
        plgpu.SMEM((2, W, 64), F32),
        *([] if VB == 64 else [shared((W, CHUNK, VW))]),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=W),
    ]
    scratch += [plgpu.SMEM((stages, CHUNK), jnp.int32)] if packed else []
    scratch += [shared((W, 64, 64))] if interpreted else []
    o, final_state, *states = launch(
        kernel,
        name="gla_forward_saving" if save_states else "gla_forward",
        blocks=B * H * N * blocks,
        out_type=out_type,
        scratch_types=scratch,
        warpgroups=W,
        interpret=interpret,
    )(*operands)
    return o, final_state, states

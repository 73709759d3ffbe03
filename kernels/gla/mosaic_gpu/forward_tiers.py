"""Tiers 2 and 3 of the forward: P of a chunk level by level, each gated into tiles of its own."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import gating
from .anchors import FLOOR, beyond_limit
from .tables import (
    DIAGONAL,
    LEVELS,
    LOG2_E,
    LOWER_IN_16,
    PAST,
    PREFIX,
    SUFFIX,
    any_of,
    bits_of,
    has,
    keep,
    level_of,
    matrix,
    to_exponents,
)
from .warpgroup import BF16, F32, TILE, load, meet, pin, where


def tiers_2_and_3(
    q_c, k_c, q, k, gates, S, o_s, codes, matrices, rows_s, w, *, value_block, product, barrier, agreed, note_tier
) -> tuple[jax.Array, jax.Array]:
    """P in bf16, and exp of all the chunk's gates. q and k are left gated from its start and to its end.

    Args:
      q_c, k_c: the chunk's tiles, of all channels. q, k, gates: of warpgroup w.
      S, o_s: where the state and o will be; free until then, and the room of the levels' tiles.
      S, codes, matrices: functions of an index. rows_s: row 1 is free.
      agreed(use, rows): whether all of row `use` noted no exceeded limit.
      note_tier: called with the tier.
    """
    W, wide = o_s.shape[0], value_block > 64
    own = pl.ds(w * 64, 64)
    gates[...] = jnp.maximum(load(gates), jnp.asarray(FLOOR, BF16))
    plgpu.commit_smem()

    def sums(table, bit):
        return [(matrix(codes(table), bit), gates)], TILE

    # Of q and k as they came the diagonal is right, and no level takes it.
    P, D, following = product.several(([(q_c, k_c.T)], TILE), sums(*LEVELS[3]), sums(*LEVELS[5]))
    rows_s.at[1, w][...] = beyond_limit(D * (to_exponents(LEVELS[3][1]) / LOG2_E))
    plgpu.commit_smem()
    meet(barrier)
    within = agreed(1, [row + end for row in range(0, 64, 16) for end in (0, 15)])
    note_tier(jnp.where(within, 2, 3))

    # What a level finds for pairs of finer levels is overwritten by those, so it takes all pairs of its blocks.
    def level(i, carry):
        P, D, q_or_k = carry
        n = 5 - i
        coming = jnp.maximum(n - 1, 0)
        # A tile for every other level, where there is room: nobody waits for those who still read the last one.
        columns = pl.ds((i & 1) * 64, 64) if wide else pl.ds(0, 64)
        e = pin(D * to_exponents(level_of(n)[1]))

        def gate():
            S(own, columns)[...] = (q_or_k.astype(F32) * jnp.exp2(e)).astype(BF16)
            plgpu.commit_smem()
            meet(barrier)
            return [(x, x.T) for x in (S(pl.ds(64 * j, 64), columns) for j in range(W))]

        def beside():
            return pin(gating.halves(q, k, coming)), pin(bits_of(load(codes(0)), jnp.left_shift(2, n) - 1))

        D, pairs, (q_or_k, taken) = product.during(sums(*level_of(coming)), gate, beside)
        P = pin(where(any_of(taken), pairs, P))
        if not wide:
            meet(barrier)
        return P, D, q_or_k

    P, *_ = lax.fori_loop(0, jnp.where(within, 2, 6), level, (P, following, gating.halves(q, k, 5)))
    if wide:
        meet(barrier)

    def bounded():
        queries, keys = (
            [S(pl.ds(64 * j, 64), pl.ds(0, 64)) for j in range(W)],
            [S(pl.ds(64 * j, 64), pl.ds(64, 64)) if wide else o_s.at[j] for j in range(W)],
        )
        own_keys = S(own, pl.ds(64, 64)) if wide else o_s.at[w]
        table, bit = LEVELS[3]
        e = gating.signed_in_16(product.total(*sums(table, bit)) * to_exponents(bit))
        gating.blocks_of_16(q, k, S(own, pl.ds(0, 64)), own_keys, e)
        plgpu.commit_smem()
        meet(barrier)
        pairs = product.total([(x, y.T) for x, y in zip(queries, keys, strict=True)], TILE)
        return where(has(load(codes(0)), LOWER_IN_16 | DIAGONAL), pairs, P)

    P = pin(keep(lax.cond(within, bounded, lambda: P), codes(PAST)))
    before, after, *halves = product.several(sums(*PREFIX), sums(*SUFFIX), *gating.half_sums(gates, matrices))
    gating.whole_chunk(q, k, before * to_exponents(PREFIX[1]), after * to_exponents(SUFFIX[1]))
    meet(barrier)  # the tiles are read, and S can be written
    return P, jnp.exp(jnp.max(halves[0], axis=1) + jnp.max(halves[1], axis=1))

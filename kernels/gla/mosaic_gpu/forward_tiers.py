"""Tiers 2 and 3 of the forward: P of a chunk level by level, each gated into a tile of its own.

P is a sum over key channels, so each warpgroup makes that of its own, waiting for nobody, and they add up at the end.
"""

import jax
import jax.numpy as jnp
from jax import lax
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
    has,
    indicator,
    keep,
    level_of,
    matrix,
    to_exponents,
)
from .warpgroup import BF16, F32, TILE, load, meet, pin, settle, store, where


def tiers_2_and_3(
    q, k, gates, tile, codes, matrices, rows_s, w, *, warpgroups, product, barrier, agreed, note_tier
) -> tuple[jax.Array, jax.Array]:
    """P in bf16, and exp of all the chunk's gates. q and k are left gated from its start and to its end.

    Args:
      q, k, gates: the tiles of warpgroup w.
      tile: of a warpgroup (0) and (1), [64, 64] bf16, free until the state is written.
      codes, matrices: functions of an index. rows_s: row 1 is free.
      agreed(use, rows): whether all of row `use` noted no exceeded limit.
      note_tier: called with the tier.
    """
    store(gates, jnp.maximum(load(gates), jnp.asarray(FLOOR, BF16)))
    plgpu.commit_smem()

    def sums(table, bit):
        return [(matrix(codes(table), bit), gates)], TILE

    # Of q and k as they came the diagonal is right, and no level takes it.
    P, D = product.several(([(q, k.T)], TILE), sums(*LEVELS[3]))
    rows_s.at[1, w][...] = beyond_limit(D * (to_exponents(LEVELS[3][1]) / LOG2_E))
    plgpu.commit_smem()
    meet(barrier)
    within = agreed(1, [row + end for row in range(0, 64, 16) for end in (0, 15)])
    note_tier(jnp.where(within, 2, 3))

    tiles = tile(w, 0), tile(w, 1)

    # Two levels at a time, which wait less than one. What a level finds for pairs of finer levels is overwritten by
    # those, so it takes all pairs of its blocks.
    def two_levels(i, P):
        levels = 5 - 2 * i, 4 - 2 * i
        D = product.several(*(sums(*level_of(n)) for n in levels))
        settle()
        for x, n, exponents in zip(tiles, levels, D, strict=True):
            store(x, gating.halves(q, k, n) * jnp.exp2(exponents * to_exponents(level_of(n)[1])).astype(BF16))
        plgpu.commit_smem()
        coarse, fine, code = product.several(*(([(x, x.T)], TILE) for x in tiles), during=lambda: pin(load(codes(0))))
        of_either, of_fine = (has(code, jnp.left_shift(2, n) - 1) for n in levels)
        return pin(where(of_either, where(of_fine, fine, coarse), P))

    P = lax.fori_loop(0, jnp.where(within, 1, 3), two_levels, P)
    settle()

    def bounded():
        queries, keys = tiles
        table, bit = LEVELS[3]
        e = gating.signed_in_16(product.total(*sums(table, bit)) * to_exponents(bit))
        gating.blocks_of_16(q, k, queries, keys, e)
        plgpu.commit_smem()
        return where(has(load(codes(0)), LOWER_IN_16 | DIAGONAL), product(queries, keys.T, TILE), P)

    P = lax.cond(within, bounded, lambda: P)
    whole = sums(*PREFIX), sums(*SUFFIX), *gating.half_sums(gates, matrices)
    if warpgroups > 1:
        settle()
        high, low = tiles
        rounded = P.astype(BF16)
        store(high, rounded)
        store(low, (P - rounded.astype(F32)).astype(BF16))
        plgpu.commit_smem()
        meet(barrier)
        # (Added by products, which need no address in a thread's registers.)
        one = indicator(load(codes(0)), DIAGONAL)
        others = [tile(lax.rem(w + n, warpgroups), i) for n in range(1, warpgroups) for i in (0, 1)]
        P, before = product.beside([(one, x) for x in others], P, whole[0])
        after, *halves = product.several(*whole[1:])
    else:
        before, after, *halves = product.several(*whole)
    P = pin(keep(P, codes(PAST)))
    gating.whole_chunk(q, k, before * to_exponents(PREFIX[1]), after * to_exponents(SUFFIX[1]))
    settle(barrier)  # S can be written
    return P, jnp.exp(jnp.max(halves[0], axis=1) + jnp.max(halves[1], axis=1))

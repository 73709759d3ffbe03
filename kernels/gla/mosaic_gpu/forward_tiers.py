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
    any_of,
    bits_of,
    has,
    indicator,
    keep,
    level_of,
    matrix,
    to_exponents,
)
from .warpgroup import BF16, F32, TILE, load, meet, pin, settle, where


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
    gates[...] = jnp.maximum(load(gates), jnp.asarray(FLOOR, BF16))
    plgpu.commit_smem()

    def sums(table, bit):
        return [(matrix(codes(table), bit), gates)], TILE

    # Of q and k as they came the diagonal is right, and no level takes it.
    P, D, following = product.several(([(q, k.T)], TILE), sums(*LEVELS[3]), sums(*LEVELS[5]))
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
        x = tile(w, i & 1)  # no warp waits for those that still read the last one
        e = pin(D * to_exponents(level_of(n)[1]))

        def gate():
            x[...] = q_or_k * jnp.exp2(e).astype(BF16)
            plgpu.commit_smem()
            return [(x, x.T)]

        def beside():
            return pin(gating.halves(q, k, coming)), pin(bits_of(load(codes(0)), jnp.left_shift(2, n) - 1))

        D, pairs, (q_or_k, taken) = product.during(sums(*level_of(coming)), gate, beside)
        P = pin(where(any_of(taken), pairs, P))
        return P, D, q_or_k

    P, *_ = lax.fori_loop(0, jnp.where(within, 2, 6), level, (P, following, gating.halves(q, k, 5)))
    settle()

    def bounded():
        queries, keys = tile(w, 0), tile(w, 1)
        table, bit = LEVELS[3]
        e = gating.signed_in_16(product.total(*sums(table, bit)) * to_exponents(bit))
        gating.blocks_of_16(q, k, queries, keys, e)
        plgpu.commit_smem()
        return where(has(load(codes(0)), LOWER_IN_16 | DIAGONAL), product(queries, keys.T, TILE), P)

    P = lax.cond(within, bounded, lambda: P)
    if warpgroups > 1:
        settle()
        high, low = tile(w, 0), tile(w, 1)
        rounded = P.astype(BF16)
        high[...], low[...] = rounded, (P - rounded.astype(F32)).astype(BF16)
        plgpu.commit_smem()
        meet(barrier)
        # (Added by products, which need no address in a thread's registers.)
        one = indicator(load(codes(0)), DIAGONAL)
        others = [tile(lax.rem(w + n, warpgroups), i) for n in range(1, warpgroups) for i in (0, 1)]
        P = product.total([(one, x) for x in others], TILE, onto=P)
    P = pin(keep(P, codes(PAST)))
    before, after, *halves = product.several(sums(*PREFIX), sums(*SUFFIX), *gating.half_sums(gates, matrices))
    gating.whole_chunk(q, k, before * to_exponents(PREFIX[1]), after * to_exponents(SUFFIX[1]))
    settle(barrier)  # S can be written
    return P, jnp.exp(jnp.max(halves[0], axis=1) + jnp.max(halves[1], axis=1))

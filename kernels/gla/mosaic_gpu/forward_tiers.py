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
    LOWER,
    LOWER_IN_16,
    PREFIX,
    SUFFIX,
    has,
    level_of,
    matrix,
    to_exponents,
)
from .warpgroup import BF16, F32, ROW, TILE, WGMMA, along_rows, iota, load, meet, pin, where


def tiers_2_and_3(
    q, k, gates, S, o_s, codes, matrices, rows_s, zero, w, *, value_block, scale, product, barrier, agreed, note_tier
) -> tuple[jax.Array, jax.Array]:
    """P in bf16, and exp of all the chunk's gates. q and k are left gated from its start and to its end.

    Args:
      q, k, gates: the chunk's tiles of warpgroup w.
      S, o_s: where the state and o will be; free until then, and the room of the levels' tiles.
      S, codes, matrices: functions of an index. zero: an int32 read from shared memory.
      rows_s: rows 1 and 2 are free. agreed(use, rows): whether all of row `use` noted no exceeded limit.
      note_tier: called with the tier.
    """
    W, wide = o_s.shape[0], value_block > 64
    own = pl.ds(w * 64, 64)
    gates[...] = jnp.maximum(load(gates), jnp.asarray(FLOOR, BF16))
    plgpu.commit_smem()

    def sums(table, bit):
        return [(matrix(codes(table), bit), gates)], TILE

    D, following = product.several(sums(*LEVELS[3]), sums(*LEVELS[5]))
    rows_s.at[1, w][...] = beyond_limit(D * (to_exponents(LEVELS[3][1]) / LOG2_E))
    plgpu.commit_smem()
    meet(barrier)
    within = agreed(1, [row + end for row in range(0, 64, 16) for end in (0, 15)])
    note_tier(jnp.where(within, 2, 3))

    # What a level finds for pairs of finer levels is overwritten by those, so its pairs are those of its blocks. Bit 0
    # counts for no level: without it both columns of a register have one comparison. `zero` is not seen through.
    apart = ((iota(0) + zero) ^ iota(1)) & ~1

    def level(i, carry):
        P, D = carry
        n = 5 - i
        # A tile for every other level, where there is room: nobody waits for those who still read the last one.
        columns = pl.ds((i & 1) * 64, 64) if wide else pl.ds(0, 64)
        _, bit = level_of(n)
        S(own, columns)[...] = (gating.halves(q, k, n) * jnp.exp2(D * to_exponents(bit))).astype(BF16)
        plgpu.commit_smem()
        meet(barrier)
        tiles = [S(pl.ds(64 * j, 64), columns) for j in range(W)]
        pairs, D = product.several(([(x, x.T) for x in tiles], TILE), sums(*level_of(jnp.maximum(n - 1, 0))))
        P = pin(where(apart < (2 << n), pairs, P))
        if not wide:
            meet(barrier)
        return P, D

    zeros = plgpu.layout_cast(jnp.zeros(TILE, F32), WGMMA)
    P, _ = lax.fori_loop(0, jnp.where(within, 2, 6), level, (zeros, following))
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

    def diagonal():
        total = jnp.sum(load(q).astype(F32) * load(k).astype(F32), axis=1)
        if W > 1:
            rows_s.at[2, w][...] = total
            plgpu.commit_smem()
            meet(barrier)
            total = load(rows_s.at[2, 0], ROW) + load(rows_s.at[2, 1], ROW)
        return where(has(load(codes(0)), DIAGONAL), along_rows(total, TILE), P)

    P = where(has(load(codes(0)), LOWER | DIAGONAL), lax.cond(within, bounded, diagonal), 0.0)
    P = pin((P * scale).astype(BF16))
    before, after, *halves = product.several(sums(*PREFIX), sums(*SUFFIX), *gating.half_sums(gates, matrices))
    gating.whole_chunk(q, k, before * to_exponents(PREFIX[1]), after * to_exponents(SUFFIX[1]), scale)
    meet(barrier)  # the tiles are read, and S can be written
    return P, jnp.exp(jnp.max(halves[0], axis=1) + jnp.max(halves[1], axis=1))

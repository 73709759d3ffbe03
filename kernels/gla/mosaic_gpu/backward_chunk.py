"""What the backward has of a chunk: its tiles in shared memory and its place in device memory."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .anchors import CHUNK
from .gating import Middle, half_sums
from .pieces import Cut
from .tables import DIAGONAL, LOWER, UPPER, has, indicator, keep, matrix, ones, to_exponents
from .warpgroup import BF16, TILE, Products, load, pin, split, where

MASK = 2


@dataclasses.dataclass(frozen=True)
class Walk:
    """What stays over a walk of a block of threads, for one of its warpgroups."""

    tiles: dict[str, Any]  # shared memory
    zero_s: Any  # [1] int32, a zero
    product: Products
    middle: Middle
    masks: bool  # whether shared memory holds the table FUTURE, at MASK
    barrier: Any
    pairs_arrived: Any  # barrier for the chunk's own table of pairs, if rows are packed
    warpgroup: jax.Array
    warpgroups: int
    value_blocks: int
    value_block: int
    heads: int
    group: int  # query heads of a group
    batch: int
    chunks: int  # of a sequence
    cut: Cut

    def at(self, step) -> "Chunk":
        return Chunk(self, step)


class Place(NamedTuple):
    """Where a chunk is in device memory."""

    b: jax.Array
    h: jax.Array
    g: jax.Array  # the group of head h
    vb: jax.Array  # value block
    piece: jax.Array  # of the sequence, cut
    first: jax.Array  # chunk of the piece
    steps: jax.Array  # chunks of the piece
    chunk: jax.Array
    rows: Any  # tokens of the chunk
    values: Any  # value channels of the block


class Chunk:
    """Chunk `step` of the walk's piece.

    Each `Chunk` indexes everything by a zero read from shared memory, which the compiler cannot see through. It would
    otherwise compute all addresses once, before the loop over chunks, and fill the registers with them; a fresh `Chunk`
    ends the life of the last one's. (Each tile by one index: what Pallas lowers is one more operation for each.)
    """

    def __init__(self, walk: Walk, step):
        self.walk, self.step, self.zero = walk, step, walk.zero_s[0]
        self.product, self.middle, self.masks = walk.product, walk.middle, walk.masks
        self.w = w = walk.warpgroup + self.zero
        self.own = own = pl.ds(w * 64, 64)  # this warpgroup's key channels
        everyone = range(walk.warpgroups)
        tile = self.tile
        self.q, self.k, self.v, self.do = (tile(name) for name in ("q", "k", "v", "do"))
        self.q_own, self.k_own = (tile(name, slice(None), own) for name in ("q", "k"))
        self.g_own, self.g_of = tile("g", w), [tile("g", j) for j in everyone]
        self.S_own, self.S_of = tile("S", own), [tile("S", pl.ds(64 * j, 64)) for j in everyone]
        self.dS_own = tile("dS", own)
        self.out_q, self.out_k, self.limb = (tile("out", w, n) for n in range(3))
        self.out_k_of = [tile("out", j, 1) for j in everyone]
        # The first 64 columns of dS, as a tile for something else.
        self.dS_tile = tile("dS", own, pl.ds(0, 64))

    def tile(self, name, *index):
        return self.walk.tiles[name].at[self.zero, *index]

    def place(self) -> "Place":
        """(For those that ask: each of its divisions is three operations to lower.)"""
        walk = self.walk
        index = lax.axis_index("block") + self.zero
        (vb, h, b), piece = split(index, walk.value_blocks, walk.heads, walk.batch)
        first, steps = walk.cut.span(piece, walk.chunks, shorter_last=True)
        chunk = first + self.step
        rows, values = pl.ds(chunk * CHUNK, CHUNK), pl.ds(vb * walk.value_block, walk.value_block)
        return Place(b, h, lax.div(h, walk.group), vb, piece, first, steps, chunk, rows, values)

    def pairs(self) -> jax.Array:
        return load(self.tile("codes", 0))

    def of_keys(self, pairs: jax.Array) -> jax.Array:
        """Pairs [keys, queries] in bf16, without those whose key comes later or is of another document."""
        if self.masks:
            return keep(pairs, self.tile("codes", MASK))
        return pin(where(has(self.pairs(), UPPER | DIAGONAL), pairs, 0.0)).astype(BF16)

    def sums(self) -> tuple[jax.Array, jax.Array]:
        """Matrices that sum, within documents, the rows from each one on, and those before it."""
        if self.masks:
            return ones(self.tile("codes", MASK)), ones(self.tile("codes", MASK), False)
        return tuple(indicator(self.pairs(), bits) for bits in (UPPER | DIAGONAL, LOWER))

    def exponents(self, table, bit) -> jax.Array:
        """Sums of gates, in log2: those that `bit` of a table says."""
        return self.product(matrix(self.tile("codes", table), bit), self.g_own, TILE) * to_exponents(bit)

    def around_middle(self) -> jax.Array:
        return self.middle.exponents(self.product.total(*self._of_middle()))

    def _of_middle(self):
        return self.middle.product(self.g_own, lambda i: self.tile("codes", i), lambda i: self.tile("matrices", i))

    def around_middle_and_totals(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Exponents around the middle; exp of the gates summed over the second half of the chunk, and the first."""
        first, second = half_sums(self.g_own, lambda rows: self.tile("matrices", rows))
        D, *sums = self.product.several(self._of_middle(), second, first)
        return self.middle.exponents(D), *(jnp.exp(jnp.max(x, axis=1)) for x in sums)

    def totals(self, start) -> jax.Array:
        """exp of the gates summed over one half of the chunk, per key channel of this warpgroup. [64]."""
        sums = self.product(self.g_own.T, self.tile("matrices", pl.ds(start, 8)).T, (64, 8))
        return jnp.exp(jnp.max(sums, axis=1))

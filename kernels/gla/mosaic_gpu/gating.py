"""q and k of a chunk, gated: factors whose products are the weights of pairs. Tiles in shared memory, in and out.

`exponents` are powers of two (`tables.to_exponents`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .anchors import right_half
from .tables import FIRST, LEVELS, LOG2_E, MIDDLE, SECOND, matrix, to_exponents
from .warpgroup import BF16, F32, ROW, TILE, along_rows, load, store, where


def half_sums(gates, matrices) -> list:
    """Products whose rows are the sums of a key channel's gates over the first half of the chunk, and the second."""
    return [([(gates.T, matrices(pl.ds(start, 8)).T)], (64, 8)) for start in (FIRST, SECOND)]


def exp2(exponents: jax.Array, scale: float) -> jax.Array:
    """scale * exp2(exponents), with no multiplication where a scale is an exponent too."""
    if scale > 0:
        return jnp.exp2(exponents + math.log2(scale))
    return jnp.exp2(exponents) * scale


@dataclasses.dataclass(frozen=True)
class Middle:
    """Sums of gates around the middle of a chunk.

    Their matrix is `matrices`' where shared memory has room for it. Else it is level 5's: a bit of a table, masked in
    registers, with no signs.
    """

    stored: bool

    @property
    def rows(self) -> int:
        """How much of `matrices` to have in shared memory."""
        return MIDDLE + 64 if self.stored else MIDDLE

    def product(self, gates, table, matrices) -> tuple:
        """Operands and shape of the sums; `table` and `matrices`: functions of an index."""
        number, bit = LEVELS[5]
        return [(matrices(pl.ds(MIDDLE, 64)) if self.stored else matrix(table(number), bit), gates)], TILE

    @property
    def nat(self) -> float:
        return 1.0 if self.stored else LOG2_E / to_exponents(LEVELS[5][1])

    def exponents(self, sums: jax.Array) -> jax.Array:
        """Those of q: negative in the right half of the chunk, positive in the left."""
        factor = LOG2_E / self.nat
        return sums * (factor if self.stored else where(right_half(5), factor, -factor))


def around_middle(q, k, exponents: jax.Array, scale=1.0) -> None:
    """Tier 1, in place: scale * q exp2(D) and k exp2(-D)."""
    store(q, (load(q).astype(F32) * exp2(exponents, scale)).astype(BF16))
    store(k, (load(k).astype(F32) * jnp.exp2(-exponents)).astype(BF16))


def blocks_of_16(q, k, queries, keys, exponents: jax.Array) -> None:
    """Tier 2: `exponents`, positive in the right half of each block of 16 rows and negative in the left, into
    `queries` and `keys`."""
    store(queries, (load(q).astype(F32) * jnp.exp2(exponents)).astype(BF16))
    store(keys, (load(k).astype(F32) * jnp.exp2(-exponents)).astype(BF16))


def signed_in_16(exponents: jax.Array) -> jax.Array:
    """Level 3's exponents, none of which is positive, as `blocks_of_16` takes them."""
    return where(right_half(3), exponents, -exponents)


def right_rows(level) -> jax.Array:
    """-1 for rows in the right halves of a level's blocks, else 0. [64] int32."""
    rows = plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=ROW)
    sign = lax.shift_left(rows, jnp.broadcast_to(jnp.int32(31 - level), (64,)))
    return lax.shift_right_arithmetic(sign, jnp.full((64,), 31, jnp.int32))


def halves(q, k, level) -> jax.Array:
    """q in the right halves of a level's blocks and k in the left. (By bits: a select takes bf16 pairs apart.)"""
    right = along_rows(right_rows(level).astype(jnp.int16), TILE)
    q, k = (lax.bitcast_convert_type(load(x), jnp.int16) for x in (q, k))
    return lax.bitcast_convert_type(k ^ ((q ^ k) & right), BF16)


def whole_chunk(q, k, from_start: jax.Array, to_end: jax.Array) -> None:
    """Tiers 2 and 3, in place: for the state that enters, and for the state that leaves."""
    store(q, (load(q).astype(F32) * jnp.exp2(from_start)).astype(BF16))
    store(k, (load(k).astype(F32) * jnp.exp2(to_end)).astype(BF16))

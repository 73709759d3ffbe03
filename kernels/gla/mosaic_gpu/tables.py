"""Which gates make up an exponent, and which pairs a level takes: one table of bits per pair of tokens of a chunk.

With b the running sum of log_alpha, the weight of key j in output i is exp(b_i - b_j), a sum of the gates between
them. It is split at an anchor between j and i: what lies after the anchor goes to the query row, what lies before it
to the key row, and the products run on tensor cores. Every such exponent is a sum of gates, and so a 0/1 matrix times
the gates gives it exactly (bf16 operands, float32 sums): no cumulative sum is differenced.

A *level* l cuts the chunk into blocks of 2^(l+1) rows and takes the pairs (right half, left half) of each, anchored
between the halves: both exponents are <= 0, for any gate. A *bounded* block takes all its pairs at once around the same
anchor: exponents of either sign, right only while they stay within LIMIT.

    tier 1  no level, one bounded block of 64     the chunk decays by less than LIMIT on either side of its middle
    tier 2  levels 5, 4, bounded blocks of 16     every 16-row block does
    tier 3  levels 5 to 0 and the diagonal        anything, hard resets (-inf) included

The matrices of tiers 2 and 3 are single bits of 16-bit codes. Masked by one bit out of 11..14 a code is 0 or, read as
bf16, a power of two: `wgmma` takes it from registers as it stands, and the power goes into the factor of exp2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .anchors import CHUNK, mask, power
from .warpgroup import BF16, load, where

LOG2_E = 1.4426950408889634

# Bits of a code. Of pairs (row i, row t): level l (0 to 5) of any i != t; what i and t are to each other.
DIAGONAL, LOWER, UPPER, LOWER_IN_16, UPPER_IN_16 = (1 << n for n in (6, 7, 8, 9, 10))
PAIRS = 0x7FF
# Bits that are matrices, as (table, bit): the exponents of each level; sums through row i of the chunk, and after it.
LEVELS = {0: (1, 14), 1: (0, 11), 2: (0, 12), 3: (0, 13), 4: (0, 14), 5: (1, 13)}
PREFIX, SUFFIX = (1, 12), (1, 11)

# Tables that are masks, -1 or 0: of pairs (query i, key t) with t <= i, and of (key t, query i).
PAST, FUTURE = 2, 3

# Rows of `matrices`: 8 that sum the first half of the chunk, 8 its second; exponents around the middle, signed.
FIRST, SECOND, MIDDLE = 0, 8, 16


def codes() -> np.ndarray:
    """The tables, [4, 64, 64] int16; table 0 also has the bits of pairs, and 2 and 3 are PAST and FUTURE.

    (A constant of the program: made of jax operations it would be one more kernel to compile, and to launch each time.)
    """
    i, t = np.arange(64)[:, None], np.arange(64)[None]
    apart = i ^ t

    def level(n):  # within a half: through row i in a right one, after row i in a left one
        return (apart < 1 << n) & np.where((i >> n) & 1 == 1, t <= i, t > i)

    matrices = {**{where: level(n) for n, where in LEVELS.items()}, PREFIX: t <= i, SUFFIX: t > i}
    pairs = {1 << n: (apart >> n) == 1 for n in range(6)}
    pairs |= {DIAGONAL: i == t, LOWER: i > t, UPPER: i < t}
    pairs |= {LOWER_IN_16: (i > t) & (apart < 16), UPPER_IN_16: (i < t) & (apart < 16)}
    tables = np.zeros((4, 64, 64), np.int16)
    tables[0] = sum(np.where(set_, bit, 0) for bit, set_ in pairs.items())
    for (table, bit), set_ in matrices.items():
        tables[table] |= np.where(set_, 1 << bit, 0).astype(np.int16)
    tables[PAST], tables[FUTURE] = -(t <= i).astype(np.int16), -(t >= i).astype(np.int16)
    return tables


def matrices() -> np.ndarray:
    """[80, 64] bf16: see FIRST, SECOND and MIDDLE."""
    i, t = np.arange(64)[:, None], np.arange(64)[None]
    halves = [np.broadcast_to(1.0 * rows, (8, 64)) for rows in (t < 32, t >= 32)]
    middle = 1.0 * ((t >= 32) & (t <= i)) - 1.0 * ((t < 32) & (t > i))
    return np.concatenate([*halves, middle]).astype(BF16)


def document_codes(codes: jax.Array, documents: jax.Array) -> jax.Array:
    """Table 0 of `codes` for each chunk, with no bit for pairs of different documents. [B, T / 64, 64, 64] int16."""
    rows = documents.reshape(documents.shape[0], -1, CHUNK)
    together = rows[..., :, None] == rows[..., None, :]
    table = codes[0]
    return jnp.where(together, table, table & ~jnp.int16(PAIRS))


def level_of(n):
    """(table, bit) of level n, a number of the device."""
    outer = (n == 0) | (n == 5)
    return outer.astype(jnp.int32), jnp.where(outer, 14 - (n == 5).astype(jnp.int32), n + 10)


def to_exponents(bit):
    """The factor that makes log2 of the weight out of a product of masked codes and gates, for exp2."""
    if isinstance(bit, int):
        return LOG2_E * 2.0 ** power(bit)
    values = [LOG2_E * 2.0 ** power(n) for n in (11, 12, 13, 14)]
    return jnp.where(bit < 13, jnp.where(bit == 11, values[0], values[1]), jnp.where(bit == 13, values[2], values[3]))


def has(code: jax.Array, bits) -> jax.Array:
    """Where a code has any of `bits`, which are bits of pairs. (One comparison of bf16 is two of 16-bit integers.)"""
    found = lax.bitcast_convert_type((code & mask(bits)) | jnp.int16(0x4000), BF16)  # 2 where none, else more
    return found > jnp.asarray(2, BF16)


def indicator(code: jax.Array, bits) -> jax.Array:
    """A register operand of `wgmma`: 1 where a code has any of `bits`, else 0."""
    return where(has(code, bits), 1.0, 0.0).astype(BF16)


def keep(x: jax.Array, mask_s) -> jax.Array:
    """x in bf16 where a table in shared memory is -1, else 0. (A select would take pairs of bf16 apart.)"""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x.astype(BF16), jnp.int16) & load(mask_s), BF16)


def ones(mask_s, where=True) -> jax.Array:
    """A register operand of `wgmma`: 1 where a table is -1 (or, of `where` False, 0), else 0."""
    table = load(mask_s) if where else ~load(mask_s)
    return lax.bitcast_convert_type(table & jnp.int16(0x3F80), BF16)


def matrix(table_s, bit) -> jax.Array:
    """A register operand of `wgmma`: `bit` of a table in shared memory."""
    return lax.bitcast_convert_type(load(table_s) & mask(1 << bit), BF16)

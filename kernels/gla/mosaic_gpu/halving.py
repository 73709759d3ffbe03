"""Pairs of tokens within a chunk, for any gates, by halving: what the kernels of wide heads do in place of tiers.

With b the running sum of log_alpha, the weight of key j in output i >= j is exp(b_i - b_j), a sum of the gates between
them. A chunk is a block of 64 rows; a block of 2h rows is split at its middle m into a left and a right half. What lies
between m and a row goes to that row, as an exponent that is a sum of gates (`exponents`, <= 0 on either side), and:

    fits        no exponent of any block is below -LIMIT: all pairs of each block come from one product, with exp of
                the exponent in the right halves and of minus the exponent in the left ones, or the other way round
    does not    the pairs (right half, left half) come from one product, with exp of the exponents as they are, for
                any gate, hard resets included; then the halves are blocks themselves

GLA's own gates fit at once. Blocks of 64, 32 and 16 rows are asked; smaller ones are halved down to single rows. All
0/1 matrices and masks are bits of one table of 16-bit codes (bits 7 to 14, alone, are powers of two to bf16).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from .anchors import LIMIT, mask, power, right_half
from .warpgroup import BF16, F32, TILE, choose, load, result, where

# Bits of the code of (row i, row t). Bits 0 to 5: i and t are of one block of 2^(n+1) rows, and not of one half of it.
LOWER = 1 << 6  # t < i
SUFFIX, PREFIX = 7, 8  # matrices: t > i, t <= i
LEVEL = 9  # + n, matrices: t lies between i and the middle of its block of 2^(n+1) rows
DIAGONAL = -(1 << 15)  # the sign: t == i

TWO = 0x4000  # as bf16, whose last 7 bits are free

WHOLE = 5  # n of the chunk itself: blocks of 2^(n+1) = 64 rows
SMALLEST = 3  # n of the smallest blocks that are asked
ENDS = tuple(row for start in range(0, 64, 16) for row in (start, start + 15))  # where such blocks decay the most


def table() -> np.ndarray:
    """The codes, [64, 64] int16."""
    i, t = np.arange(64)[:, None], np.arange(64)[None]
    apart = i ^ t
    code = (t < i) * LOWER + ((t > i) << SUFFIX) + ((t <= i) << PREFIX) + (t == i) * DIAGONAL
    for n in range(6):
        between = (apart < 1 << n) & np.where((i >> n) & 1 == 1, t <= i, t > i)
        code += (((apart >> n) == 1) << n) + (between << (LEVEL + n))
    return code.astype(np.int16)


def matrix(table_s, bit) -> jax.Array:
    """A register operand of `wgmma`: that bit of the table (a number, of the device or not), as 0 and 1."""
    if isinstance(bit, int):
        one = jnp.asarray(2.0 ** power(bit), BF16)
    else:
        # 0 for the single rows, of n = -1, that are no level.
        one = jnp.where(bit < LEVEL, 0.0, jnp.exp2(power(bit).astype(F32))).astype(BF16)
    return lax.bitcast_convert_type(load(table_s) & mask(1 << bit), BF16) * one


def pairs_within(table_s, n) -> jax.Array:
    """Where i and t are of one block of 2^(n+1) rows."""
    return (load(table_s) & mask(((1 << (n + 1)) - 1) | DIAGONAL)) != jnp.int16(0)


def up_to(table_s) -> jax.Array:
    """Where t <= i."""
    return (load(table_s) & jnp.int16(LOWER | DIAGONAL)) != jnp.int16(0)


def pairs_across(table_s, n) -> jax.Array:
    """Where i and t are of one block of 2^(n+1) rows, and of different halves."""
    return (load(table_s) & mask(1 << n)) != jnp.int16(0)


def indicator(table_s, bits) -> jax.Array:
    """1 where a code has any of `bits`, all below bit 6, else 0: a factor of pairs in bf16. (By arithmetic, as a select
    takes pairs of bf16 apart: 2 + bits / 64 is one bit more.)"""
    code = lax.bitcast_convert_type((load(table_s) & mask(bits)) | jnp.int16(TWO), BF16)
    return jnp.minimum((code - jnp.asarray(2, BF16)) * jnp.asarray(64, BF16), jnp.asarray(1, BF16))


def triangles(table_s) -> tuple[jax.Array, jax.Array]:
    """1 where t < i, else 0; 1 where t >= i, else 0."""
    code = lax.bitcast_convert_type((load(table_s) & jnp.int16(LOWER)) | jnp.int16(TWO), BF16)
    return code - jnp.asarray(2, BF16), jnp.asarray(3, BF16) - code


def by_halves(product, gates, table_s, worst_s, bounded, level, carry, *, down_to: int):
    """Goes through all pairs of a chunk: `level` while blocks do not fit, then `bounded`, which ends it.

    Args:
      gates: shared ref [64, 64] bf16, none of them -inf.
      worst_s: shared memory for 64 float32.
      bounded, level: (n, exponents, *carry) to carry.
      down_to: the last n; -1 has `bounded` see single rows too, with exponents of 0.
    """

    def body(state):
        n, *carry = state
        exponents = product(matrix(table_s, n + LEVEL), gates, TILE)
        worst_s[...] = jnp.min(exponents, axis=1)
        plgpu.commit_smem()
        fits = (n >= SMALLEST) | (n < 0)
        for row in ENDS:
            fits &= worst_s[row] >= -LIMIT
        found = [lambda f=f: f(n, exponents, *carry) for f in (bounded, level)]
        carry = choose(fits, *found, *(result(x.shape) for x in carry))
        return jnp.where(fits, down_to - 1, n - 1), *carry

    return lax.while_loop(lambda state: state[0] >= down_to, body, (jnp.int32(WHOLE), *carry))[1:]


def around_middle(n, exponents) -> jax.Array:
    """Exponents of queries in blocks that fit: keys have minus these."""
    return where(right_half(n), exponents, -exponents)

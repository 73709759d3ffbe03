"""Gates inside a chunk of 64 tokens, with no exponent that can overflow.

With b the running sum of log_alpha, the weight of key j in output i is exp(b_i - b_j), a sum of the gates between
them. It is split at an anchor m between the two: exp(b_i - b_m) goes to the query row, exp(b_m - b_j) to the key row,
and the products run on tensor cores. Every such exponent is a sum of gates, so a 0/1/-1 matrix times the gates gives
it exactly (bf16 operands, float32 sums): no cumulative sum is differenced.

A *level* with half width h cuts the chunk into blocks of 2h and takes the pairs (right half, left half) of each,
anchored at the first row of the right half: both exponents are <= 0, for any gate. A *bounded* block of 2h rows takes
all its pairs at once around the same anchor: exponents of either sign, right only while they stay within LIMIT.

    tier 1  no level, one bounded block of 64       the chunk decays by less than LIMIT on either side of its middle
    tier 2  levels 32, 16, bounded blocks of 16     every 16-row block does
    tier 3  levels 32, 16, 8, 4, 2, 1, diagonal     anything, hard resets (-inf) included
"""

import jax
import jax.numpy as jnp

from .warpgroup import BF16

CHUNK = 64
LIMIT = 40.0  # nats: exp(2 * LIMIT) times a product of ordinary values stays finite in float32
FLOOR = -200.0  # nats: exp(FLOOR) is 0 in float32, so gates below it are as good as -inf, and 0 * FLOOR is not NaN

# Rows of `constant_rows`: after D, 8 rows that sum the gates through the middle row, 8 that sum the rest, and the sums
# through row i.
FIRST, SECOND, PREFIX = 64, 72, 80


def beyond_limit(exponents: jax.Array) -> jax.Array:
    """Per row: 1 where an exponent is larger than LIMIT either way, or NaN (a reset among the gates); else 0."""
    return jnp.max(jnp.where(jnp.abs(exponents) <= LIMIT, 0.0, 1.0), axis=1)


def constant_rows() -> jax.Array:
    """The matrices that multiply gates, stacked: [144, 64] bf16.

    The first 64 rows are D: (D @ gates)[i] = b_i - b_m, m the chunk's middle row: >= 0 left of m, <= 0 right of it.
    """
    i, t = jnp.arange(64)[:, None], jnp.arange(64)[None]
    D = jnp.where((t > 32) & (t <= i), 1.0, 0.0) - jnp.where((t > i) & (t <= 32), 1.0, 0.0)
    first, second = (jnp.broadcast_to(jnp.where(rows, 1.0, 0.0), (8, 64)) for rows in (t <= 32, t > 32))
    return jnp.concatenate([D, first, second, jnp.tril(jnp.ones((64, 64)))]).astype(BF16)

"""What all Hopper kernels share about a chunk: limits of its gates, halves of its blocks, masks of coded pairs.

How they use it is in tables.py and halving.py.
"""

import jax
import jax.numpy as jnp

from .warpgroup import iota

CHUNK = 64
LIMIT = 40.0  # nats: exp(2 * LIMIT) times a product of ordinary values stays finite in float32
FLOOR = -200.0  # nats: exp(FLOOR) is 0 in float32, so gates below it are as good as -inf, and 0 * FLOOR is not NaN


def beyond_limit(exponents: jax.Array, unit=1.0) -> jax.Array:
    """Per row: 1 where an exponent is larger than LIMIT either way, or NaN (a reset among the gates); else 0.

    (`unit`: what a nat is.)
    """
    return jnp.max(jnp.where(jnp.abs(exponents) <= LIMIT * unit, 0.0, 1.0), axis=1)


def right_half(level) -> jax.Array:
    """Rows in the right halves of blocks of 2^(level + 1) rows, [64, 64]."""
    return (iota(0) & (1 << level)) != 0


def mask(bits) -> jax.Array:
    """Bits, a number of the device or not, to be masked with a table of 16-bit codes."""
    return jnp.int16(bits) if isinstance(bits, int) else bits.astype(jnp.int16)


def power(bit):
    """1 / the power of two that a code masked by that bit alone (7 to 14) is to bf16, as an exponent of two."""
    return 127 - (1 << (bit - 7))

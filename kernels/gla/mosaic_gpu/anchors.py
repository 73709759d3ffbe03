"""What all Hopper kernels take for granted of the gates of a chunk; how they use it is in tables.py and halving.py."""

import jax
import jax.numpy as jnp

CHUNK = 64
LIMIT = 40.0  # nats: exp(2 * LIMIT) times a product of ordinary values stays finite in float32
FLOOR = -200.0  # nats: exp(FLOOR) is 0 in float32, so gates below it are as good as -inf, and 0 * FLOOR is not NaN


def beyond_limit(exponents: jax.Array) -> jax.Array:
    """Per row: 1 where an exponent is larger than LIMIT either way, or NaN (a reset among the gates); else 0."""
    return jnp.max(jnp.where(jnp.abs(exponents) <= LIMIT, 0.0, 1.0), axis=1)

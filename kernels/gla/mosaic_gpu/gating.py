"""q and k of a chunk, gated: factors whose products are the weights of pairs. Tiles in shared memory, in and out.

`exponents` are those of the exponential function for tier 1, of two elsewhere (`tables.to_exponents`).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .anchors import right_half
from .tables import FIRST, SECOND
from .warpgroup import BF16, F32, load, where


def half_sums(gates, matrices) -> list:
    """Products whose rows are the sums of a key channel's gates over the first half of the chunk, and the second."""
    return [([(gates.T, matrices(pl.ds(start, 8)).T)], (64, 8)) for start in (FIRST, SECOND)]


def around_middle(q, k, exponents: jax.Array, scale) -> None:
    """Tier 1, in place: scale * q exp(D) and k exp(-D)."""
    q[...] = (load(q).astype(F32) * (jnp.exp(exponents) * scale)).astype(BF16)
    k[...] = (load(k).astype(F32) * jnp.exp(-exponents)).astype(BF16)


def blocks_of_16(q, k, queries, keys, exponents: jax.Array, scale=1.0) -> None:
    """Tier 2: `exponents`, positive in the right half of each block of 16 rows and negative in the left, into
    `queries` and `keys`."""
    queries[...] = (load(q).astype(F32) * (jnp.exp2(exponents) * scale)).astype(BF16)
    keys[...] = (load(k).astype(F32) * jnp.exp2(-exponents)).astype(BF16)


def signed_in_16(exponents: jax.Array) -> jax.Array:
    """Level 3's exponents, none of which is positive, as `blocks_of_16` takes them."""
    return where(right_half(3), exponents, -exponents)


def halves(q, k, level) -> jax.Array:
    """q in the right halves of a level's blocks and k in the left, float32."""
    return where(right_half(level), load(q), load(k)).astype(F32)


def whole_chunk(q, k, from_start: jax.Array, to_end: jax.Array, scale) -> None:
    """Tiers 2 and 3, in place: for the state that enters, and for the state that leaves."""
    q[...] = (load(q).astype(F32) * (jnp.exp2(from_start) * scale)).astype(BF16)
    k[...] = (load(k).astype(F32) * jnp.exp2(to_end)).astype(BF16)

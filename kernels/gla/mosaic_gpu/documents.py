"""What packed documents mean to a chunk, as factors of its rows: kernels multiply and know nothing else of them."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from .anchors import CHUNK
from .warpgroup import COLUMN, F32, ROW, TILE, along_columns, along_rows, load

# What `factors` has of a chunk, 64 float32 each, in one row: layout inference takes two dimensions for tiles, and TMA
# brings 256 numbers at once.
NUMBER, NUMBER_AGAIN = 0, 1  # of the document, from 0 for that of the token before the chunk; see `together`
REACHING = 2  # 1 where a token belongs to the document of its chunk's last token, else 0
GOES_ON = 3  # 1 where it belongs to that of the token before it
SIZE = 4 * CHUNK


def factors(numbers: Int[Array, "B T"] | None) -> Float[Array, "B C 256"] | None:
    """From numbers of documents that only grow, by less than 2^24 in a chunk; C = T / 64 chunks. None of none."""
    if numbers is None:
        return None
    rows = numbers.reshape(numbers.shape[0], -1, CHUNK)
    before = jnp.concatenate([numbers[:, :1], numbers[:, :-1]], axis=1).reshape(rows.shape)
    own = rows - before[..., :1]
    return jnp.concatenate([own, own, rows == rows[..., -1:], rows == before], axis=2, dtype=F32)


def of_rows(factors_s, which) -> jax.Array:
    """One of a chunk's factors, [SIZE] in shared memory, for each row. [64, 64]."""
    return along_rows(load(factors_s.at[pl.ds(which * CHUNK, CHUNK)], ROW), TILE)


def reached(factors_s) -> jax.Array:
    """1 in rows of the document of the token before the chunk, else 0. [64, 64]."""
    return jnp.maximum(1.0 - of_rows(factors_s, NUMBER), 0.0)


def goes_through(factors_s, *slot) -> jax.Array:
    """1 if the chunk's last token belongs to the document of the token before the chunk, else 0."""
    return jnp.maximum(1.0 - factors_s[*slot, NUMBER * CHUNK + CHUNK - 1], 0.0)


def together(factors_s) -> jax.Array:
    """1 where two tokens of a chunk are of one document, else 0. [64, 64].

    Not of NUMBER alone: loads of one place in two layouts become one load, and no layout of it serves both.
    """
    number = load(factors_s.at[pl.ds(NUMBER_AGAIN * CHUNK, CHUNK)], COLUMN)
    apart = of_rows(factors_s, NUMBER) - along_columns(number, TILE)
    return jnp.maximum(1.0 - jnp.abs(apart), 0.0)

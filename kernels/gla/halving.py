"""Pairs of tokens within a chunk, split so that no exponent is ever positive and no cumulative sum is differenced.

The weight of key j in output i is exp(g_{j+1} + ... + g_i), g the log gates. At the level of half width h the chunk is
cut into blocks of 2h tokens, and the pairs (right half, left half) of each block are anchored at its middle m:

    exp(g_m + ... + g_i) to query row i of the right half, exp(g_{j+1} + ... + g_{m-1}) to key row j of the left

Every pair i > j belongs to exactly one of the levels C/2, ..., 2, 1, so P is one product per level plus its diagonal.
Each exponent is a sum of gates, a 0/1 matrix times the gates: exact to rounding for any gate. A hard reset is a gate of
FLOOR.

A level has C/2 rows of each kind; the functions below take them out of a chunk and put them back. C is a power of two.
"""

import jax
import jax.numpy as jnp
import numpy as np

FLOOR = -128.0  # nats; exp is 0 in float32 already at -104, and 0 * FLOOR is not NaN


def half_widths(chunk: int) -> list[int]:
    return [1 << level for level in reversed(range(chunk.bit_length() - 1))]


def anchored_sums(chunk: int, half: int) -> np.ndarray:
    """[C, C] of 0 and 1: times the gates, a row's sum between it and the middle of its block."""
    i, t = np.arange(chunk)[:, None], np.arange(chunk)[None]
    middle = i // (2 * half) * (2 * half) + half
    return np.where(i >= middle, (t >= middle) & (t <= i), (t > i) & (t < middle))


def prefix_sums(chunk: int) -> np.ndarray:
    """[C, C] of 0 and 1: times the gates, a row's sum from the start of the chunk, its own gate included."""
    return np.tri(chunk, dtype=bool)


def suffix_sums(chunk: int) -> np.ndarray:
    """[C, C] of 0 and 1: times the gates, a row's sum to the end of the chunk, its own gate left out."""
    return np.tri(chunk, k=-1, dtype=bool).T


def same_block(chunk: int, half: int) -> np.ndarray:
    """[C/2, C/2]: whether a right row and a left row belong to the same block."""
    block = np.arange(chunk // 2) // half
    return block[:, None] == block[None]


def left_rows(x: jax.Array, half: int) -> jax.Array:
    """[..., C, W] -> [..., C/2, W]"""
    return _halves(x, half)[..., 0, :, :].reshape(*x.shape[:-2], -1, x.shape[-1])


def right_rows(x: jax.Array, half: int) -> jax.Array:
    """[..., C, W] -> [..., C/2, W]"""
    return _halves(x, half)[..., 1, :, :].reshape(*x.shape[:-2], -1, x.shape[-1])


def from_left_rows(x: jax.Array, half: int) -> jax.Array:
    """[..., C/2, W] -> [..., C, W], zero in the right halves."""
    return _pad_halves(x, half, (0, 1))


def from_right_rows(x: jax.Array, half: int) -> jax.Array:
    """[..., C/2, W] -> [..., C, W], zero in the left halves."""
    return _pad_halves(x, half, (1, 0))


def pairs(x: jax.Array, half: int) -> jax.Array:
    """[..., C, C] -> [..., C/2, C/2]: right rows against left rows, zero where they are not in the same block."""
    rows = right_rows(x, half)
    columns = jnp.swapaxes(left_rows(jnp.swapaxes(rows, -1, -2), half), -1, -2)
    return jnp.where(same_block(x.shape[-1], half), columns, 0)


def from_pairs(x: jax.Array, half: int) -> jax.Array:
    """[..., C/2, C/2] -> [..., C, C]: what is in the same block, in its place, zero elsewhere."""
    x = jnp.where(same_block(2 * x.shape[-1], half), x, 0)
    columns = jnp.swapaxes(from_left_rows(jnp.swapaxes(x, -1, -2), half), -1, -2)
    return from_right_rows(columns, half)


def _halves(x, half):
    return x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])


def _pad_halves(x, half, padding):
    *lead, rows, width = x.shape
    x = x.reshape(*lead, rows // half, 1, half, width)
    x = jnp.pad(x, ((0, 0),) * (len(lead) + 1) + (padding, (0, 0), (0, 0)))
    return x.reshape(*lead, 2 * rows, width)

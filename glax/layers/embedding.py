"""Rows of an embedding table."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from glax.layers.sequence_parallel import sequence_axis
from glax.layers.sharding import constrain

BLOCK = 128  # tokens


def embed(table: Float[Array, "vocab D"], tokens: Int[Array, "*B T"], dtype: DTypeLike) -> Float[Array, "*B T D"]:
    """table[tokens] in ``dtype``. The gradient of the table is summed in float32, whatever ``dtype`` is.

    On a GPU the gradient of a lookup adds each token's share to its row by atomic operations, and those of one row wait
    for each other: for a space among bytes, or for padding, thousands of them. So a product sums the equal tokens of
    each block of a row first, and the first of them adds for all.
    """
    return _lookup(dtype, table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(dtype, table, tokens):
    # The table is gathered over its width; else tokens are, and what is looked up is exchanged between devices.
    table = constrain(table.astype(dtype), "vocab", None)
    return constrain(table[tokens], "batch", *["length"] * (tokens.ndim - 1), None)


def _forward(dtype, table, tokens):
    return _lookup(dtype, table, tokens), (table, tokens)


def _backward(dtype, residuals, d_rows):
    table, tokens = residuals
    length, axis = tokens.shape[-1], sequence_axis()
    shards = 1 if axis is None else jax.sharding.get_abstract_mesh().shape[axis]
    block = math.gcd(length // shards, BLOCK)
    tokens = tokens.reshape(-1, length // block, block)
    d_rows = d_rows.reshape(*tokens.shape, -1)
    same = tokens[..., :, None] == tokens[..., None, :]
    sums = jnp.einsum(
        "bnst,bntd->bnsd",
        same.astype(dtype),
        d_rows,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    is_first = jnp.argmax(same, -1) == jnp.arange(block)
    rows = jnp.where(is_first, tokens, table.shape[0])  # a row that is not there: nothing is added
    d_table = jnp.zeros(table.shape, jnp.float32).at[rows].add(sums, mode="drop")
    return constrain(d_table, "vocab", None).astype(table.dtype), None


_lookup.defvjp(_forward, _backward)

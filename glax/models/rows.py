"""Rows of a state: chosen, repeated."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from glax.errors import UserError
from glax.models.decoder import Decoder
from glax.models.language_model import LanguageModel


def choose_rows(model: LanguageModel | Decoder, state: list[Any], rows: Int[Array, "N"]) -> list[Any]:
    """Those rows of a state, in that order, also more than once."""
    return jax.tree.map(lambda leaf, axis: jnp.take(leaf, rows, axis), state, _batch_axes(model))


def repeat_rows(model: LanguageModel | Decoder, state: list[Any], batch: int) -> list[Any]:
    """A state of one row as one of ``batch`` rows; one that has them already is returned as it is."""
    axes = _batch_axes(model)
    rows = {leaf.shape[axis] for leaf, axis in zip(jax.tree.leaves(state), jax.tree.leaves(axes), strict=True)}
    if rows == {batch}:
        return state
    if rows != {1}:
        raise UserError(f"the prefix has {max(rows)} rows and there are {batch} prompts: read one for all, or for each")
    return jax.tree.map(lambda leaf, axis: jnp.repeat(leaf, batch, axis), state, axes)


def _batch_axes(model: LanguageModel | Decoder) -> list[Any]:
    """The axis of rows in each leaf: the one that grows with the batch."""
    one, two = (jax.eval_shape(lambda model, n=n: model.init_state(n, 1), model) for n in (1, 2))
    return jax.tree.map(lambda a, b: next(axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]), one, two)

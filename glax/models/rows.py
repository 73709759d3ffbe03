"""Rows of a state: chosen, repeated."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from glax.errors import UserError
from glax.layers import SoftmaxAttentionState
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


def check_room(model: LanguageModel | Decoder, state: list[Any], tokens: int) -> None:
    """Raises UserError where a state cannot take that many tokens more, as softmax attention's may not."""
    caches = [layer for layer in model.by_layer(state) if isinstance(layer, SoftmaxAttentionState)]
    if not caches or model.config.attention_window is not None:
        return
    room = min(cache.positions.shape[1] - int(jnp.max(cache.length)) for cache in caches)
    if tokens > room:
        raise UserError(
            f"the state of what stands before has room for {room} tokens more, and {tokens} are to follow: read that "
            "again with more room (a larger --max-new-tokens, on the command line)"
        )


def _batch_axes(model: LanguageModel | Decoder) -> list[Any]:
    """The axis of rows in each leaf: the one that grows with the batch."""
    one, two = (jax.eval_shape(lambda model, n=n: model.init_state(n, 1), model) for n in (1, 2))
    return jax.tree.map(lambda a, b: next(axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]), one, two)

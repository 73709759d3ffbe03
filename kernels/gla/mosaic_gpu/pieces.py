"""Long sequences of few heads: cut into pieces that are walked side by side.

A first walk from zero gives each piece's own state; with the decay of whole pieces, S_out = decay * S_in + S_own, an
associative scan of [K, V] matrices gives the state that enters each, and a second walk the outputs. The backward is
the mirror image. (Gla-math, "Sequence parallelism": here the devices are the multiprocessors of one card.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def entering_states(
    own: Float[Array, "B H N K V"],
    initial_state: Float[Array, "B H 1 K V"] | None,
    log_alpha: Float[Array, "B T G K"],
    documents: Int[Array, "B T"] | None,
) -> Float[Array, "B H N K V"]:
    """The state that enters each piece, from those that the pieces build from zero."""
    first = jnp.zeros_like(own[:, :, :1]) if initial_state is None else initial_state
    decay = _decay(own, log_alpha, documents)
    _, states = jax.lax.associative_scan(_then, (decay[:, :, :-1], own[:, :, :-1]), axis=2)
    carried = jnp.cumprod(decay[:, :, :-1], axis=2) * first
    return jnp.concatenate([first, states + carried], axis=2)


def leaving_gradients(
    own: Float[Array, "B H N K V"],
    final_gradient: Float[Array, "B H 1 K V"] | None,
    log_alpha: Float[Array, "B T G K"],
    documents: Int[Array, "B T"] | None,
) -> Float[Array, "B H N K V"]:
    """The gradient of the state that leaves each piece, from those that the pieces give their entering state on their
    own."""
    last = jnp.zeros_like(own[:, :, :1]) if final_gradient is None else final_gradient
    decay = _decay(own, log_alpha, documents)[:, :, 1:]
    if documents is not None:  # a document that starts with a piece owes the tokens before nothing
        before, rows = _rows(documents, own.shape[2])
        own = jnp.where((before == rows[:, :, 0])[:, None, :, None, None], own, 0.0)
    _, gradients = jax.lax.associative_scan(_then, (decay, own[:, :, 1:]), axis=2, reverse=True)
    carried = jnp.flip(jnp.cumprod(jnp.flip(decay, 2), axis=2), 2) * last
    return jnp.concatenate([gradients + carried, last], axis=2)


def _then(one, other):
    """(d1, S1) followed by (d2, S2): (d1 d2, d2 S1 + S2)."""
    return one[0] * other[0], other[0] * one[1] + other[1]


def _decay(own, log_alpha, documents):
    """exp of the gates summed over each piece, 0 where no document runs through it from the token before. [B, H, N,
    K, 1]."""
    (B, T, G, K), (H, N) = log_alpha.shape, own.shape[1:3]
    decay = jnp.exp(log_alpha.reshape(B, N, T // N, G, K).sum(2, dtype=jnp.float32))
    if documents is not None:
        before, rows = _rows(documents, N)
        decay = jnp.where((before == rows[:, :, -1])[..., None, None], decay, 0.0)
    return jnp.repeat(jnp.moveaxis(decay, 1, 2), H // G, axis=1)[..., None]


def _rows(documents, N):
    """The document before each piece (its own, for the first), [B, N], and those of its tokens, [B, N, T / N]."""
    rows = documents.reshape(documents.shape[0], N, -1)
    return jnp.concatenate([rows[:, :1, 0], rows[:, :-1, -1]], axis=1), rows

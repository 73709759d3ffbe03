"""Pairs of tokens around a whole chunk, one before it and one after: what they give to the gates of that chunk."""

import jax.numpy as jnp
from jaxtyping import Array, Float

ANCHOR = 4  # chunks between two boundaries where states and their gradients are compared themselves
NOTHING = 2.0**-8  # of a state: less cannot be told from the rounding of bf16


def pairs_across(
    known: Float[Array, "B H S+1 K"],
    entered: Float[Array, "B H C K"],
    left: Float[Array, "B H C K"],
    decay: Float[Array, "B H C K"],
) -> Float[Array, "B H C K"]:
    """decay_c sum over v of S_c dS_{c+1}, S_c the state before chunk c and dS_{c+1} the gradient of that after it.

    With W_c the sum over v of S_c dS_c, it is W_{c+1} - left_c, and W_c - entered_c too: from W at one boundary it
    follows for all chunks, in either direction, but rounding piles up on the way. Between two boundaries where W is
    known the two directions are weighted by how far each has come; and where next to nothing passes a chunk, it is 0.

    Args:
      known: W before chunks 0, ANCHOR, 2 ANCHOR, ..., and at the end.
      entered: sum of q~ dq~ over a chunk's tokens. left: the same of k~ dk~.
      decay: what a chunk leaves of a state.
    """
    B, H, C, K = entered.shape
    spans = known.shape[2] - 1

    def by_span(x, filler):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, spans * ANCHOR - C), (0, 0)), constant_values=filler)
        x = x.reshape(B, H, spans, ANCHOR, K)
        return [x[:, :, :, i] for i in range(ANCHOR)]

    passes = by_span((decay > NOTHING).astype(jnp.float32), 1.0)
    entered, left = by_span(entered, 0.0), by_span(left, 0.0)
    forward, backward = [], []
    W = known[:, :, :-1]
    for i in range(ANCHOR):
        forward.append(passes[i] * (W - entered[i]))
        W = forward[i] + left[i]
    W = known[:, :, 1:]
    for i in reversed(range(ANCHOR)):
        backward.insert(0, passes[i] * (W - left[i]))
        W = backward[0] + entered[i]
    way = lambda i: (i + 1) / (ANCHOR + 1)  # that `forward` has come, of the distance between the boundaries
    # Exactly 0 is what comes of nothing: no state before the chunk, or no gradient after it.
    mixed = lambda i: jnp.where(
        (forward[i] == 0.0) | (backward[i] == 0.0), 0.0, way(i) * backward[i] + (1 - way(i)) * forward[i]
    )
    across = [mixed(i) for i in range(ANCHOR)]
    return jnp.stack(across, axis=3).reshape(B, H, spans * ANCHOR, K)[:, :, :C]

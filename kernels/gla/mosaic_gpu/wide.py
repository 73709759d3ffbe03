"""Wide heads: gates first, then walks of plain products, so that gating is not done again for every block of a state.

    forward    prepare -> walk (o)
    backward   prepare, pair_gradients -> walk (dv), walk (dq~), walk (dk~) -> finish

Only the inputs, and the states that enter the pieces of a cut sequence, are kept for the backward.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .anchors import CHUNK
from .finish import finish, pair_gradients
from .prepare import prepare
from .walk import WalkTiles, walk


ANCHOR = 4  # chunks between two boundaries where the backward compares states with their gradients
NOTHING = 2.0**-8  # of a state; what is less cannot be told from the rounding of bf16


@dataclasses.dataclass(frozen=True)
class WideTiles:
    """Tile choices of a wide head."""

    pieces: int = 1  # of the sequence, walked side by side

    def walk(self, columns: int) -> WalkTiles:
        """Tiles of a walk over states of so many columns."""
        return WalkTiles(columns=next(n for n in (256, 128, 64) if columns % n == 0), pieces=self.pieces)


@dataclasses.dataclass(frozen=True)
class Documents:
    """What packed documents mean to a chunk, as factors of its rows."""

    numbers: Int[Array, "B T"]  # that never come back
    reached: Float[Array, "B T"]  # 1 where the token belongs to the document of the token before the chunk
    reaching: Float[Array, "B T"]  # 1 where it belongs to that of the chunk's last token
    goes_on: Float[Array, "B T"]  # 1 where it belongs to that of the token before it
    through: Float[Array, "B C"]  # 1 where both ends of the chunk, the token before it and its last, are of one

    @classmethod
    def of(cls, numbers):
        """The factors, from the numbers of documents."""
        B, T = numbers.shape
        rows = numbers.reshape(B, T // CHUNK, CHUNK)
        before = jnp.concatenate([numbers[:, :1], rows[:, :-1, -1]], axis=1)
        factor = lambda mask: mask.astype(jnp.float32).reshape(B, -1)
        return cls(
            numbers=numbers,
            reached=factor(rows == before[..., None]),
            reaching=factor(rows == rows[..., -1:]),
            goes_on=factor(jnp.diff(numbers, axis=1, prepend=numbers[:, :1]) == 0),
            through=factor(before == rows[..., -1]),
        )


def forward(q, k, v, log_alpha, *, scale, tiles, initial_state=None, documents=None, interpret=None):
    """o [B, T, H, V] bf16, the final state [B, H, K, V] float32, and the states [B, H, N, V, K] that enter the pieces
    (None where the sequence is whole)."""
    H, K, V = q.shape[2], q.shape[-1], v.shape[-1]
    documents = None if documents is None else Documents.of(documents)
    q_in, k_out, P, decay = _prepare(q, k, log_alpha, scale, documents, interpret)
    entering = None if initial_state is None else _pieced(initial_state.swapaxes(2, 3))
    go = dict(tiles=tiles.walk(K), heads=H, reverse=False, decay_along="columns", interpret=interpret)
    if tiles.pieces > 1:
        (own,) = walk(v, k_out, decay, **go)
        entering = _joined(own, _piece_decay(decay, H, tiles)[..., None, :], entering)
    (o,), final_state = walk(v, k_out, decay, read=q_in, P=P, entering=entering, **go)
    return o, final_state[:, :, -1].swapaxes(2, 3), entering if tiles.pieces > 1 else None


def backward(
    q, k, v, log_alpha, do, *, scale, tiles, initial_state=None, entering=None, final_state=None, final_gradient=None,
    documents=None, interpret=None,
):  # fmt: skip
    """dq, dk, dlog_alpha [B, T, H, K] and dv [B, T, H, V] bf16, per query head, and the initial state's gradient.

    `entering` and `final_state` are what `forward` found; the latter is needed where it has a gradient.
    """
    H, K, V = q.shape[2], q.shape[-1], v.shape[-1]
    documents = None if documents is None else Documents.of(documents)
    q_in, k_out, P, decay = _prepare(q, k, log_alpha, scale, documents, interpret)
    pairs, diagonal = pair_gradients(
        do, v, documents=None if documents is None else documents.numbers, interpret=interpret
    )
    by_columns = dict(tiles=tiles.walk(K), heads=H, decay_along="columns", interpret=interpret)
    by_rows = dict(tiles=tiles.walk(V), heads=H, decay_along="rows", interpret=interpret)

    leaving = None if final_gradient is None else _pieced(final_gradient)
    if tiles.pieces > 1:
        (own,) = walk(q_in, do, decay, reverse=True, **by_rows)
        leaving = _joined(own, _piece_decay(decay, H, tiles)[..., None], leaving, reverse=True)
        entering = entering.swapaxes(3, 4)
    elif initial_state is not None:
        entering = _pieced(initial_state)
    leaving_T = None if leaving is None else leaving.swapaxes(3, 4)
    (dv,), _ = walk(do, q_in, decay, read=k_out, P=P, entering=leaving_T, reverse=True, **by_columns)
    dq_carried, _, entered, *snapshots = walk(
        k_out, v, decay, read=do, totals_with=q_in, entering=entering, reverse=False, snapshot_every=ANCHOR, **by_rows
    )
    dk_carried, d_initial, left, *overlaps = walk(
        q_in, do, decay, read=v, totals_with=k_out, entering=leaving, reverse=True, snapshot_every=ANCHOR,
        snapshots=snapshots[0] if snapshots else None, **by_rows,
    )  # fmt: skip
    none = jnp.zeros((*q.shape[:1], H, K), jnp.float32)
    at_start = none if initial_state is None else jnp.sum(initial_state * d_initial[:, :, 0], axis=-1)
    at_end = none if final_gradient is None else jnp.sum(final_state * final_gradient, axis=-1)
    known = jnp.concatenate([at_start[:, :, None], *(x.sum(0) for x in overlaps), at_end[:, :, None]], axis=2)
    decay = jnp.repeat(decay, H // decay.shape[1], axis=1)
    across = pairs_across(known, entered.sum(0), left.sum(0), decay)
    dq, dk, dg = finish(
        q, k, log_alpha, pairs, diagonal, dq_carried, dk_carried, across,
        scale=scale, documents=documents, interpret=interpret,
    )  # fmt: skip
    return dq, dk, dg, dv, d_initial[:, :, 0]


def pairs_across(known, entered, left, decay):
    """decay_c sum over v of S_c dS_{c+1}, S_c the state before chunk c and dS_{c+1} the gradient of that after it.

    With W_c the sum over v of S_c dS_c, it is W_{c+1} - left_c and also W_c - entered_c, so it follows from W at one
    chunk boundary, in either direction. Rounding piles up on the way; between two boundaries where W is known, the two
    directions are weighted by how far each has come. Where next to nothing passes the chunk, it is 0.

    Args:
      known: [B, H, S + 1, K], W before chunks 0, ANCHOR, 2 ANCHOR, ... and at the end.
      entered: [B, H, C, K], sum of q~ dq~ over the chunk's tokens. left: the same of k~ dk~.
      decay: [B, H, C, K].

    Returns: [B, H, C, K] float32.
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
        backward.append(passes[i] * (W - left[i]))
        W = backward[-1] + entered[i]
    weight = lambda i: (i + 1) / (ANCHOR + 1)  # of the way from the left, and so of what comes from the right
    across = [weight(i) * backward[-1 - i] + (1 - weight(i)) * forward[i] for i in range(ANCHOR)]
    return jnp.stack(across, axis=3).reshape(B, H, spans * ANCHOR, K)[:, :, :C]


def _prepare(q, k, log_alpha, scale, documents, interpret):
    q_in, k_out, P, decay = prepare(q, k, log_alpha, scale=scale, documents=documents, interpret=interpret)
    if documents is not None:
        decay = decay * documents.through[:, None, :, None]
    return q_in, k_out, P, decay


def _pieced(state):
    return state[:, :, None]


def _joined(own, decay, first, *, reverse=False):
    """The state that enters each piece, in walking order, from those that the pieces build from zero, the decay of
    whole pieces, and the state that enters the first. [B, H, N, M, N']."""
    if reverse:
        return jnp.flip(_joined(jnp.flip(own, 2), jnp.flip(decay, 2), first), 2)

    def then(one, other):
        return one[0] * other[0], other[0] * one[1] + other[1]

    total, states = jax.lax.associative_scan(then, (decay[:, :, :-1], own[:, :, :-1]), axis=2)
    if first is None:
        return jnp.pad(states, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    return jnp.concatenate([first, total * first + states], axis=2)


def _piece_decay(decay, heads, tiles):
    """What is left of a state after each piece, per query head. [B, H, N, K]."""
    B, G, C, K = decay.shape
    return jnp.repeat(decay.reshape(B, G, tiles.pieces, -1, K).prod(axis=3), heads // G, axis=1)

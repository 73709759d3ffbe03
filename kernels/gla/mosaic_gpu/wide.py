"""Wide heads: gates first, then walks of plain products, so that no block of a state does the gating again.

    forward    prepare -> walk (o)
    backward   prepare, pair_gradients -> walk (dv), walk (dq~), walk (dk~) -> pairs_across -> finish

Only the inputs are kept for the backward, and of sequences cut into pieces the states that enter those.
"""

import dataclasses

import jax
import jax.numpy as jnp

from .across import ANCHOR, pairs_across
from .documents import Documents
from .finish import finish, pair_gradients
from .prepare import prepare
from .walk import WalkTiles, walk


@dataclasses.dataclass(frozen=True)
class WideTiles:
    """Tile choices of a wide head."""

    pieces: int = 1  # of the sequence, walked side by side

    def walk(self, columns: int) -> WalkTiles:
        """Tiles of a walk over states of so many columns."""
        return WalkTiles(columns=next(n for n in (256, 128) if columns % n == 0), pieces=self.pieces)


def forward(q, k, v, log_alpha, *, scale, tiles: WideTiles, initial_state=None, documents=None, interpret=None):
    """o, the final state, and the states that enter pieces.

    Args:
      q [B, T, H, K], k and log_alpha [B, T, G, K], v [B, T, G, V]: bf16; T a multiple of 64 * tiles.pieces, K 128 or
        256, V a multiple of 128.
      scale: multiplies q.
      initial_state: [B, H, K, V] float32 or None for zero.
      documents: [B, T] int32, a number that changes, and never comes back, where the state restarts; or None.

    Returns:
      o [B, T, H, V] bf16; [B, H, K, V] float32; [B, H, N, V, K] float32, or None where the sequence is whole.
    """
    H, K = q.shape[2], q.shape[-1]
    q_in, k_out, P, decay = _prepare(q, k, log_alpha, scale, Documents.of(documents), interpret)
    entering = None if initial_state is None else initial_state.swapaxes(2, 3)[:, :, None]
    how = {"tiles": tiles.walk(K), "heads": H, "reverse": False, "decay_along": "columns", "interpret": interpret}
    if tiles.pieces > 1:
        (own,) = walk(v, k_out, decay, name="states", **how)
        entering = _joined(own, _through_pieces(decay, H, tiles)[..., None, :], entering)
    (o,), final_state = walk(v, k_out, decay, name="o", read=q_in, P=P, entering=entering, **how)
    return o, final_state[:, :, -1].swapaxes(2, 3), entering if tiles.pieces > 1 else None


def backward(
    q, k, v, log_alpha, do, *, scale, tiles: WideTiles, initial_state=None, entering=None, final_state=None,
    final_gradient=None, documents=None, interpret=None,
):  # fmt: skip
    """dq, dk, dlog_alpha [B, T, H, K] and dv [B, T, H, V], bf16, per query head; the initial state's gradient.

    `entering` and `final_state` are what `forward` found, the latter needed where it has a gradient; the rest as there.
    """
    H, K, V = q.shape[2], q.shape[-1], v.shape[-1]
    documents = Documents.of(documents)
    q_in, k_out, P, decay = _prepare(q, k, log_alpha, scale, documents, interpret)
    pairs, diagonal = pair_gradients(do, v, documents=documents, interpret=interpret)
    by_columns = {"tiles": tiles.walk(K), "heads": H, "decay_along": "columns", "interpret": interpret}
    by_rows = {"tiles": tiles.walk(V), "heads": H, "decay_along": "rows", "interpret": interpret}

    leaving = None if final_gradient is None else final_gradient[:, :, None]
    if tiles.pieces > 1:
        (own,) = walk(q_in, do, decay, name="state_gradients", reverse=True, **by_rows)
        leaving = _joined(own, _through_pieces(decay, H, tiles)[..., None], leaving, reverse=True)
        entering = entering.swapaxes(3, 4)
    elif initial_state is not None:
        entering = initial_state[:, :, None]
    leaving_T = None if leaving is None else leaving.swapaxes(3, 4)

    (dv,), _ = walk(do, q_in, decay, name="dv", read=k_out, P=P, entering=leaving_T, reverse=True, **by_columns)
    dq_carried, _, entered, *snapshots = walk(
        k_out,
        v,
        decay,
        name="dq",
        read=do,
        totals_with=q_in,
        entering=entering,
        reverse=False,
        snapshot_every=ANCHOR,
        **by_rows,
    )
    dk_carried, d_initial, left, *overlaps = walk(
        q_in, do, decay, name="dk", read=v, totals_with=k_out, entering=leaving, reverse=True, snapshot_every=ANCHOR,
        snapshots=snapshots[0] if snapshots else None, **by_rows,
    )  # fmt: skip
    d_initial = d_initial[:, :, 0]

    overlap = lambda state, gradient: jnp.sum(state * gradient, axis=-1)[:, :, None]
    none = jnp.zeros((q.shape[0], H, 1, K), jnp.float32)
    at_start = none if initial_state is None else overlap(initial_state, d_initial)
    at_end = none if final_gradient is None else overlap(final_state, final_gradient)
    known = jnp.concatenate([at_start, *(x.sum(0) for x in overlaps), at_end], axis=2)
    decay = jnp.repeat(decay, H // decay.shape[1], axis=1)
    across = pairs_across(known, entered.sum(0), left.sum(0), decay)
    dq, dk, dg = finish(
        q, k, log_alpha, pairs, diagonal, dq_carried, dk_carried, across,
        scale=scale, documents=documents, interpret=interpret,
    )  # fmt: skip
    return dq, dk, dg, dv, d_initial


def _prepare(q, k, log_alpha, scale, documents, interpret):
    q_in, k_out, P, decay = prepare(q, k, log_alpha, scale=scale, documents=documents, interpret=interpret)
    if documents is not None:
        decay = decay * documents.through[:, None, :, None]
    return q_in, k_out, P, decay


def _through_pieces(decay, heads, tiles):
    """What is left of a state after each piece, per query head. [B, H, N, K]."""
    B, G, _, K = decay.shape
    return jnp.repeat(decay.reshape(B, G, tiles.pieces, -1, K).prod(axis=3), heads // G, axis=1)


def _joined(own, decay, first, *, reverse=False):
    """The state that enters each piece, [B, H, N, M, N'], from those that the pieces build from zero, the decay of
    whole pieces, and the state that enters the first, in walking order."""
    if reverse:
        return jnp.flip(_joined(jnp.flip(own, 2), jnp.flip(decay, 2), first), 2)
    through = lambda one, other: (one[0] * other[0], other[0] * one[1] + other[1])
    total, states = jax.lax.associative_scan(through, (decay[:, :, :-1], own[:, :, :-1]), axis=2)
    if first is None:
        return jnp.pad(states, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0)))
    return jnp.concatenate([first, total * first + states], axis=2)

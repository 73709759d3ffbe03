"""Wide heads: gates first, then walks of plain products, so that no block of a state does the gating again.

    forward    prepare -> walk (o)
    backward   prepare, pair_gradients -> walk (dv), walk (dq~), walk (dk~) -> pairs_across -> finish

Only the inputs are kept for the backward, and of sequences cut into pieces the states that enter those.
"""

import dataclasses

import jax
import jax.numpy as jnp

from .across import ANCHOR, pairs_across
from .documents import factors
from .finish import finish, pair_gradients
from .prepare import prepare
from .walk import WalkTiles, walk


@dataclasses.dataclass(frozen=True)
class WideTiles:
    """Tile choices of a wide head."""

    pieces: int = 1  # of the sequence, walked side by side
    prepared: int = 4  # chunks that one block of threads of `prepare` works through
    finished: int = 8  # chunks that one of `finish` does

    def walk(self, columns: int) -> WalkTiles:
        """Tiles of a walk over states of so many columns."""
        return WalkTiles(columns=next(n for n in (256, 128) if columns % n == 0), pieces=self.pieces)


def forward(
    q, k, v, log_alpha, *, scale, tiles: WideTiles, initial_state=None, documents=None, return_final_state=True,
    interpret=None,
):  # fmt: skip
    """o, the final state (None if it is not to be returned), and the states that enter pieces.

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
    q_in, k_out, P, decay = prepare(
        q, k, log_alpha, scale=scale, documents=factors(documents), chunks_per_block=tiles.prepared, interpret=interpret
    )
    entering = None if initial_state is None else initial_state.swapaxes(2, 3)[:, :, None]
    how = {"tiles": tiles.walk(K), "heads": H, "reverse": False, "decay_along": "columns", "interpret": interpret}
    if tiles.pieces > 1:
        (own,) = walk(v, k_out, decay, name="states", **how)
        entering = _joined(own, _through_pieces(decay, H, tiles)[..., None, :], entering)
    (o,), *leaving = walk(
        v, k_out, decay, name="o", read=q_in, P=P, entering=entering, leaves=return_final_state, **how
    )  # fmt: skip
    final_state = leaving[0][:, :, -1].swapaxes(2, 3) if leaving else None
    return o, final_state, entering if tiles.pieces > 1 else None


def backward(
    q, k, v, log_alpha, do, *, scale, tiles: WideTiles, initial_state=None, entering=None, final_state=None,
    final_gradient=None, documents=None, interpret=None,
):  # fmt: skip
    """dq, dk, dlog_alpha [B, T, H, K] and dv [B, T, H, V], bf16, per query head; the initial state's gradient or None.

    `entering` and `final_state` are what `forward` found, the latter needed where it has a gradient; the rest as there.
    """
    H, K, V = q.shape[2], q.shape[-1], v.shape[-1]
    documents = factors(documents)
    gated = {"scale": scale, "documents": documents, "interpret": interpret}
    q_in, k_out, P, decay = prepare(q, k, log_alpha, chunks_per_block=tiles.prepared, **gated)
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

    ((dv,),) = walk(
        do, q_in, decay, name="dv", read=k_out, P=P, entering=leaving_T, leaves=False, reverse=True, **by_columns
    )  # fmt: skip
    dq_carried, entered, *snapshots = walk(
        k_out, v, decay, name="dq", read=do, totals_with=q_in, entering=entering, leaves=False, reverse=False,
        snapshot_every=ANCHOR, **by_rows,
    )  # fmt: skip
    starts = initial_state is not None
    found = walk(
        q_in, do, decay, name="dk", read=v, totals_with=k_out, entering=leaving, leaves=starts, reverse=True,
        snapshot_every=ANCHOR, snapshots=snapshots[0] if snapshots else None, **by_rows,
    )  # fmt: skip
    dk_carried, d_initial = found[0], found[1][:, :, 0] if starts else None
    left, *overlaps = found[1 + starts :]

    overlap = lambda state, gradient: jnp.sum(state * gradient, axis=-1)[:, :, None]
    none = jnp.zeros((q.shape[0], H, 1, K), jnp.float32)
    at_start = none if initial_state is None else overlap(initial_state, d_initial)
    at_end = none if final_gradient is None else overlap(final_state, final_gradient)
    known = jnp.concatenate([at_start, *(x.sum(0) for x in overlaps), at_end], axis=2)
    decay = jnp.repeat(decay, H // decay.shape[1], axis=1)
    across = pairs_across(known, entered.sum(0), left.sum(0), decay)
    dq, dk, dg = finish(
        q, k, log_alpha, pairs, diagonal, dq_carried, dk_carried, across, chunks_per_block=tiles.finished, **gated
    )
    return dq, dk, dg, dv, d_initial


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

"""One walk over gated chunks: a state in registers, read and updated chunk by chunk. Wide heads use it four times.

`prepare` has dealt with gates and documents. What is left of the recurrence, per chunk of 64 tokens, is products:

    out = Z read^T (+ left^T P^T)          Z' = decay Z + left^T right

with Z a state of rows M (from `left`) and columns N (from `right` and `read`). Because the rows of Z are the rows of a
tensor-core product, Z serves as its left operand from registers: it never passes through shared memory.

    use                          Z    rows  columns  left  right  read  order     decay along  P
    o                            S^T  V     K        v     k~     q~    forward   columns      P
    dv                           dS^T V     K        do    q~     k~    backward  columns      P^T
    dq~  (of the carried state)  S    K     V        k~    v      do    forward   rows         -
    dk~  (of the state it feeds) dS   K     V        q~    do     v     backward  rows         -

A block of threads owns 2 x 64 rows and up to 256 columns of one head's Z, one warpgroup each 64 rows; a third brings
the chunks by TMA. The two never meet: while one's products run, the other converts, scales and stores.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...once import once
from .anchors import CHUNK
from .warpgroup import BF16, COLUMN, F32, ROW, WGMMA, along_columns, along_rows, launch, load, shared, split

COMPUTE = 2  # warpgroups that hold a state; one more fetches
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


@dataclasses.dataclass(frozen=True)
class WalkTiles:
    """Tile choices of one walk."""

    columns: int  # of the state per block: 64, 128 or 256
    stages: int = 2  # chunks in shared memory
    pieces: int = 1  # of the sequence, walked side by side, each from its own state

    @property
    def rows(self) -> int:
        """Rows of the state per block."""
        return 64 * COMPUTE


@once
def walk(
    left,
    right,
    decay,
    *,
    tiles: WalkTiles,
    name: str,
    heads: int,
    reverse: bool,
    decay_along: str,
    read=None,
    P=None,
    entering=None,
    leaves: bool = True,
    totals_with=None,
    snapshot_every: int = 0,
    snapshots=None,
    interpret=None,
):
    """Walks every head's chunks, first to last or last to first.

    Args:
      left [B, T, ., M], right [B, T, ., N]: bf16, of query heads or of key/value heads: head h of `heads` reads head
        h // (heads / their number). T a multiple of 64 * tiles.pieces, M of 128, N of tiles.columns.
      name: of what is made, for profiles.
      decay: [B, G, T / 64, K] float32, what is left of the state after a chunk, along "rows" (M = K) or "columns".
      read: [B, T, ., N] bf16, or None for a walk that only finds the states that leave the pieces.
      P: [B, heads, T / 64, 64, 64] bf16 (i, j), weights within the chunk, or None: out gets P left going forward,
        P^T left going backward.
      entering: [B, heads, pieces, M, N] float32, the state that enters each piece (in walking order), or None for 0.
      leaves: whether the states that leave the pieces are wanted.
      totals_with: [B, T, ., M] bf16, to be multiplied with out and summed over the tokens of each chunk; or None.
      snapshot_every: a number of chunks A. Going forward, the states before chunks A, 2A, ... are kept. Going
        backward, `snapshots` are those states, and their products with the gradients there are summed over N.

    Returns:
      out [N / tiles.columns, B, T, heads, M] bf16, a part per block of columns (absent without `read`);
      with `leaves`, leaving [B, heads, pieces, M, N] float32;
      with `totals_with`, [N / tiles.columns, B, heads, T / 64, M] float32;
      with `snapshot_every`, [B, heads, ceil(T / 64 / A) - 1, M, N] bf16 going forward, and going backward
      [N / tiles.columns, B, heads, ceil(T / 64 / A) - 1, M] float32.
    """
    B, T, _, M = left.shape
    N, chunks = right.shape[-1], T // CHUNK
    NB, stages, pieces = tiles.columns, tiles.stages, tiles.pieces
    steps = chunks // pieces
    row_blocks, column_blocks = M // tiles.rows, N // NB
    reads, by_rows = read is not None, decay_along == "rows"
    kept = max(-(-chunks // snapshot_every) - 1, 0) if snapshot_every else 0
    interpreted = interpret is not None
    head_of = lambda x, h, axis=2: lax.div(h, heads // x.shape[axis])

    def kernel(*refs):
        refs = list(refs)
        left_g, right_g, decay_g = refs[:3]
        del refs[:3]
        read_g = refs.pop(0) if reads else None
        P_g = refs.pop(0) if P is not None else None
        totals_with_g = refs.pop(0) if totals_with is not None else None
        entering_g = refs.pop(0) if entering is not None else None
        snapshots_g = refs.pop(0) if kept and reverse else None
        out_g = refs.pop(0) if reads else None
        leaving_g = refs.pop(0) if leaves else None
        totals_g = refs.pop(0) if totals_with is not None else None
        kept_g = refs.pop(0) if kept else None
        left_s, right_s, decay_s, full, free = refs[:5]
        del refs[:5]
        read_s = refs.pop(0) if reads else None
        P_s = refs.pop(0) if P is not None else None
        totals_with_s = refs.pop(0) if totals_with is not None else None
        out_s = refs.pop(0) if reads else None
        spare = refs.pop(0) if interpreted else None

        w = lax.axis_index("warpgroup")
        (row_block, column_block, piece, h), b = split(
            lax.axis_index("block"), row_blocks, column_blocks, pieces, heads
        )
        rows, columns = pl.ds(row_block * tiles.rows, tiles.rows), pl.ds(column_block * NB, NB)
        chunk_of = lambda step: piece * steps + (steps - 1 - step if reverse else step)

        @pl.when(w == COMPUTE)
        def fetch():
            plgpu.set_max_registers(24, action="decrease")

            def body(step, _):
                slot = lax.rem(step, stages)
                tokens = pl.ds(chunk_of(step) * CHUNK, CHUNK)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])
                if reads:
                    copy(read_g.at[b, tokens, head_of(read, h), columns], read_s)
                copy(left_g.at[b, tokens, head_of(left, h), rows], left_s)
                if P is not None:
                    copy(P_g.at[b, h, chunk_of(step)], P_s)
                if totals_with is not None:
                    copy(totals_with_g.at[b, tokens, head_of(totals_with, h), rows], totals_with_s)
                copy(right_g.at[b, tokens, head_of(right, h), columns], right_s)
                of_decay = rows if by_rows else columns
                copy(decay_g.at[b, head_of(decay, h, 1), chunk_of(step), of_decay], decay_s)
                return ()

            lax.fori_loop(0, steps, body, ())
            for step in range(max(steps - stages, 0), steps):
                plgpu.barrier_wait(free.at[step % stages])

        @pl.when(w < COMPUTE)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            own = pl.ds(w * 64, 64)
            own_rows = pl.ds(row_block * tiles.rows + w * 64, 64)
            parts = [pl.ds(c, min(NB, 128)) for c in range(0, NB, 128)]
            of_block = lambda c: pl.ds(column_block * NB + c.start, c.size)

            def body(step, Z):
                Z = list(Z)
                slot = lax.rem(step, stages)
                chunk = chunk_of(step)
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                left_T = left_s.at[slot, :, own].T
                plgpu.barrier_wait(full.at[slot])

                def updated(i, *others, meanwhile=None):
                    """decay Z + left^T right, of one part of the columns, with other products in flight beside it."""
                    c = parts[i]
                    if by_rows:
                        z = Z[i] * along_rows(load(decay_s.at[slot, own], ROW), Z[i].shape)
                    else:
                        z = Z[i] * along_columns(load(decay_s.at[slot, c], COLUMN), Z[i].shape)
                    *others, Z[i] = products([*others, (z, [(left_T, right_s.at[slot, :, c])])], spare, w, meanwhile)
                    return others

                if reads:
                    # By parts of the columns, since the bf16 copy that the product reads needs registers too.
                    out = jnp.zeros((64, CHUNK), F32)
                    for i, c in enumerate(parts):
                        pairs = [(Z[i].astype(BF16), read_s.at[slot, :, c].T)]
                        if P is not None and i == 0:
                            pairs.append((left_T, P_s.at[slot] if reverse else P_s.at[slot].T))
                        (out,) = updated(i - 1, (out, pairs)) if i else products([(out, pairs)], spare, w)

                    def store():
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_s.at[w].T[...] = plgpu.layout_cast(out.astype(BF16), TRANSPOSED)
                        if totals_with is not None:
                            other = load(totals_with_s.at[slot, :, own].T, TRANSPOSED)
                            total = jnp.sum(out * plgpu.layout_cast(other, WGMMA).astype(F32), axis=1)
                            totals_g.at[column_block, b, h, chunk, own_rows][...] = total
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(out_s.at[w], out_g.at[column_block, b, tokens, h, own_rows])

                    updated(len(parts) - 1, meanwhile=store)
                else:
                    for i in range(len(parts)):
                        updated(i)
                plgpu.barrier_arrive(free.at[slot])

                if kept:
                    after = chunk if reverse else chunk + 1  # the chunk that the state now stands before
                    at = lax.div(after, snapshot_every) - 1

                    @pl.when((lax.rem(after, snapshot_every) == 0) & (at >= 0) & (at < kept))
                    def _():
                        sums = 0.0
                        for c, z in zip(parts, Z, strict=True):
                            if reverse:
                                S = load(snapshots_g.at[b, h, at, own_rows, of_block(c)], optimized=False)
                                sums = sums + jnp.sum(S.astype(F32) * z, axis=1)
                            else:
                                kept_g.at[b, h, at, own_rows, of_block(c)][...] = z.astype(BF16)
                        if reverse:
                            kept_g.at[column_block, b, h, at, own_rows][...] = sums

                return tuple(Z)

            def first(c):
                if entering is None:
                    return plgpu.layout_cast(jnp.zeros((64, c.size), F32), WGMMA)
                return load(entering_g.at[b, h, piece, own_rows, of_block(c)], optimized=False)

            Z = lax.fori_loop(0, steps, body, tuple(map(first, parts)))
            if leaves:
                for c, z in zip(parts, Z, strict=True):
                    leaving_g.at[b, h, piece, own_rows, of_block(c)][...] = z
            if reads:
                plgpu.wait_smem_to_gmem(0)

    operands, out_type = [left, right, decay], []
    scratch = [
        shared((stages, CHUNK, tiles.rows)),
        shared((stages, CHUNK, NB)),
        plgpu.SMEM((stages, tiles.rows if by_rows else NB), F32),
        plgpu.Barrier(num_arrivals=3 + reads + (P is not None) + (totals_with is not None), num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    ]
    if reads:
        operands.append(read)
        scratch.append(shared((stages, CHUNK, NB)))
        out_type.append(jax.ShapeDtypeStruct((column_blocks, B, T, heads, M), BF16))
    if P is not None:
        operands.append(P)
        scratch.append(shared((stages, CHUNK, CHUNK)))
    if totals_with is not None:
        operands.append(totals_with)
        scratch.append(shared((stages, CHUNK, tiles.rows)))
    if entering is not None:
        operands.append(entering)
    if leaves:
        out_type.append(jax.ShapeDtypeStruct((B, heads, pieces, M, N), F32))
    if totals_with is not None:
        out_type.append(jax.ShapeDtypeStruct((column_blocks, B, heads, chunks, M), F32))
    if kept and reverse:
        operands.append(snapshots)
        out_type.append(jax.ShapeDtypeStruct((column_blocks, B, heads, kept, M), F32))
    elif kept:
        out_type.append(jax.ShapeDtypeStruct((B, heads, kept, M, N), BF16))
    if reads:
        scratch.append(shared((COMPUTE, CHUNK, 64)))
    if interpreted:
        scratch.append(shared((COMPUTE, 64, 128)))
    return launch(
        kernel,
        name=f"gla_walk_{name}",
        blocks=B * heads * pieces * column_blocks * row_blocks,
        out_type=out_type,
        scratch_types=scratch,
        warpgroups=COMPUTE + 1,
        interpret=interpret,
    )(*operands)


def products(sums, spare, w, meanwhile=None):
    """For each (start, [(a, b), ...]) of `sums`: start + sum of a @ b, all in flight together and waited for once.

    `meanwhile` runs while they are. `spare`: as in `Products`, [., 64, 128] bf16.
    """
    if spare is None:

        def run(accumulators):
            for accumulator, (_, pairs) in zip(accumulators, sums, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(accumulator, a, b)
            if meanwhile is not None:
                meanwhile()

        return pl.run_state(run)([plgpu.ACC.init(plgpu.layout_cast(start, WGMMA)) for start, _ in sums])
    if meanwhile is not None:
        meanwhile()
    results = []
    for total, pairs in sums:
        for a, b in pairs:
            if isinstance(a, jax.Array):
                a_s = spare.at[w, :, pl.ds(0, a.shape[1])]
                a_s[...] = a
                plgpu.commit_smem()
                a = a_s

            def run(accumulator, a=a, b=b):
                plgpu.wgmma(accumulator, a, b)
                return accumulator[...]

            total = total + pl.run_scoped(run, plgpu.ACC(total.shape, F32))
        results.append(total)
    return results

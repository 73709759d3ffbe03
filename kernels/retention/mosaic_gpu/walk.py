"""One walk over chunks of 64 tokens, a state in registers: retention, and each of its gradients.

With b the running sum of log decays within a chunk, b_63 its total, per token r that reads and c that writes:

    out_r = reading_r (read_r Z^T) + sum over c <= r of scale exp(b_r - b_c) (read_r right_c) left_c
    Z' = decay Z + sum over c of writing_c left_c^T right_c

(going backward, c >= r and exp(b_c - b_r)). Decays are scalars, so they are factors of rows and of pairs, and no
operand needs another form for each pair of tokens:

    use   Z     rows  columns  left  right  read  order     reading           writing
    o     S^T   V     K        v     k      q     forward   scale exp(b)      exp(b_63 - b)
    dv    dS^T  V     K        do    q      k     backward  exp(b_63 - b)     scale exp(b)
    dq    S     K     V        k     v      do    forward   scale exp(b)      exp(b_63 - b)
    dk    dS    K     V        q     do     v     backward  exp(b_63 - b)     scale exp(b)

A block of threads owns up to 2 x 64 rows, one warpgroup each 64, and up to 256 columns of one head's Z. As the rows of
Z are the rows of a tensor-core product, Z is its left operand from registers, and never passes through shared memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...gla.mosaic_gpu.warpgroup import (
    BF16,
    COLUMN,
    F32,
    ROW,
    TILE,
    WGMMA,
    Products,
    along_columns,
    along_rows,
    iota,
    load,
    meet,
    pin,
    shared,
)

CHUNK = 64
FACTORS = 4  # rows of what a chunk's decays are to a walk: b, reading, writing, decay
STAGES = 2
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile choices of one walk."""

    rows: int  # of the state per block: 64 for each warpgroup
    columns: int  # 64, 128 or 256

    @classmethod
    def of(cls, M, N):
        """For states of M rows and N columns."""
        return cls(128 if M % 128 == 0 else 64, next(n for n in (256, 128, 64) if N % n == 0))


def walk(left, right, read, factors, *, scale, reverse, entering=None, totals_with=None, kept=None, every=0,
         interpret=None):  # fmt: skip
    """Walks every head's chunks, first to last or last to first.

    Args:
      left [B, T, H, M]; right and read [B, T, H, N]: bf16; T, M and N multiples of 64.
      factors: [B, H, T / 64, FACTORS, 64] float32.
      scale: of the pairs within a chunk.
      entering: [B, H, M, N] float32, the state that enters the first chunk walked, or None for zero.
      totals_with: [B, T, H, M] bf16: also return, per token, the product of this and of out without the pair of the
        token and itself. For the gradient of the decays.
      every: with totals, a number of chunks. Going forward, the states before chunks `every`, 2 `every`, ... are kept.
        Going backward, `kept` are those, and their products with the states there are returned.

    Returns:
      out [N / tiles.columns, B, T, H, M] bf16, a part per block of columns, to be added up;
      the state that leaves the last chunk walked, [B, H, M, N] float32;
      with totals, [column blocks, M / 64, B, H, T] float32, parts to be added up;
      and [B, H, ceil(T / 64 / every) - 1, M, N] bf16 going forward (absent where none), or going backward
      [column blocks, B, H, ceil(T / 64 / every) - 1, M] float32, parts again.
    """
    B, T, H, M = left.shape
    N, chunks = right.shape[-1], T // CHUNK
    tiles = Tiles.of(M, N)
    W, NB = tiles.rows // 64, tiles.columns
    row_blocks, column_blocks = M // tiles.rows, N // NB
    parts = [pl.ds(c, min(NB, 128)) for c in range(0, NB, 128)]
    has_totals = totals_with is not None
    anchors = -(-chunks // every) - 1 if every else 0
    interpreted = interpret is not None

    def kernel(*refs):
        refs = list(refs)
        left_g, right_g, read_g, factors_g = refs[:4]
        del refs[:4]
        entering_g = refs.pop(0) if entering is not None else None
        other_g = refs.pop(0) if has_totals else None
        kept_g = refs.pop(0) if anchors and reverse else None
        out_g, leaving_g = refs[:2]
        del refs[:2]
        totals_g = refs.pop(0) if has_totals else None
        anchors_g = refs.pop(0) if anchors else None
        left_s, right_s, read_s, factors_s, P_s, out_s, zero_s, arrived, met, *rest = refs
        spare = rest.pop(0) if interpreted else None

        w = lax.axis_index("warpgroup")
        index = lax.axis_index("block")
        row_block, index = index % row_blocks, index // row_blocks
        column_block, index = index % column_blocks, index // column_blocks
        h, b = index % H, index // H
        rows, columns = pl.ds(row_block * tiles.rows, tiles.rows), pl.ds(column_block * NB, NB)
        own = pl.ds(w * 64, 64)
        own_rows = pl.ds(row_block * tiles.rows + w * 64, 64)
        of_block = lambda c: pl.ds(column_block * NB + c.start, c.size)
        product = Products(None if spare is None else spare.at[w])
        barrier = met if W > 1 else None
        chunk_of = lambda step: chunks - 1 - step if reverse else step

        def fetch(step):
            slot, chunk = lax.rem(step, STAGES), chunk_of(step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)

            @pl.when(w == 0)
            def _():
                plgpu.copy_gmem_to_smem(read_g.at[b, tokens, h, columns], read_s.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(right_g.at[b, tokens, h, columns], right_s.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(left_g.at[b, tokens, h, rows], left_s.at[slot], arrived.at[slot])
                plgpu.copy_gmem_to_smem(factors_g.at[b, h, chunk], factors_s.at[slot], arrived.at[slot])

        @pl.when(w == 0)
        def _():
            zero_s[0] = jnp.int32(0)

        meet(barrier)
        for step in range(min(STAGES, chunks)):
            fetch(jnp.int32(step))

        def body(step, Z):
            Z = list(Z)
            slot, chunk = lax.rem(step, STAGES), chunk_of(step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            along_tokens = lambda n: load(factors_s.at[slot, n], ROW)
            across_tokens = lambda n: load(factors_s.at[slot, n], COLUMN)
            left_own = left_s.at[slot, :, own]
            # A zero that the compiler cannot see through: masks that use it are not made before the loop, once and for
            # all, to fill the registers.
            row, column = lambda: iota(0) + zero_s[0], lambda: iota(1) + zero_s[0]
            plgpu.barrier_wait(arrived.at[slot])

            scores = product(read_s.at[slot], right_s.at[slot].T, TILE)
            of_rows = lambda x: plgpu.layout_cast(along_rows(x, TILE), WGMMA)
            of_columns = lambda x: plgpu.layout_cast(along_columns(x, TILE), WGMMA)
            # Pinned: the layout of a difference of two broadcasts is searched for without end.
            exponents = pin(of_rows(along_tokens(0))) - pin(of_columns(across_tokens(0)))
            exponents = plgpu.layout_cast(jnp.minimum(-exponents if reverse else exponents, 0.0), WGMMA)
            written = (column() >= row()) if reverse else (column() <= row())
            P = plgpu.layout_cast(jnp.where(written, scores * (jnp.exp(exponents) * scale), 0.0), WGMMA)
            if has_totals:
                diagonal = jnp.sum(jnp.where(row() == column(), P, 0.0), axis=1)
                P = jnp.where(row() == column(), 0.0, P)
            P_s.at[w][...] = P.astype(BF16)
            plgpu.commit_smem()
            out = None
            for c, z in zip(parts, Z, strict=True):
                out = product(z.astype(BF16), read_s.at[slot, :, c].T, TILE, onto=out)
            out = out * of_columns(across_tokens(1))
            out = plgpu.layout_cast(product(left_own.T, P_s.at[w].T, TILE, onto=plgpu.layout_cast(out, WGMMA)), WGMMA)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            high = out.astype(BF16)
            out_s.at[w].T[...] = plgpu.layout_cast(high, TRANSPOSED)
            if has_totals:  # turned around as two limbs, since sums over tokens of the totals cancel
                P_s.at[w].T[...] = plgpu.layout_cast((out - high.astype(F32)).astype(BF16), TRANSPOSED)
                plgpu.commit_smem()
                out = load(out_s.at[w]).astype(F32) + load(P_s.at[w]).astype(F32)
                other = load(other_g.at[b, tokens, h, own_rows], optimized=False)
                total = jnp.sum(out * other.astype(F32), axis=1)
                totals_g.at[column_block, row_block * W + w, b, h, tokens][...] = total
                out = out + of_rows(plgpu.layout_cast(diagonal, ROW)) * load(left_own).astype(F32)
                out_s.at[w][...] = out.astype(BF16)
            left_own[...] = (load(left_own).astype(F32) * of_rows(along_tokens(2))).astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[w], out_g.at[column_block, b, tokens, h, own_rows])
            decay = factors_s[slot, 3, 0]
            for i, c in enumerate(parts):
                Z[i] = product(
                    left_own.T, right_s.at[slot, :, c], (64, c.size), onto=plgpu.layout_cast(Z[i] * decay, WGMMA)
                )
            plgpu.commit_smem()
            meet(barrier)

            @pl.when(step + STAGES < chunks)
            def _():
                fetch(step + STAGES)

            if anchors:
                after = chunk if reverse else chunk + 1  # the chunk that the state now stands before
                at = lax.div(after, every) - 1

                @pl.when((lax.rem(after, every) == 0) & (at >= 0) & (at < anchors))
                def _():
                    sums = 0.0
                    for c, z in zip(parts, Z, strict=True):
                        if reverse:
                            S = load(kept_g.at[b, h, at, own_rows, of_block(c)], optimized=False)
                            sums = sums + jnp.sum(S.astype(F32) * z.astype(BF16).astype(F32), axis=1)
                        else:
                            anchors_g.at[b, h, at, own_rows, of_block(c)][...] = z.astype(BF16)
                    if reverse:
                        anchors_g.at[column_block, b, h, at, own_rows][...] = sums

            return tuple(Z)

        def first(c):
            if entering is None:
                return plgpu.layout_cast(jnp.zeros((64, c.size), F32), WGMMA)
            return load(entering_g.at[b, h, own_rows, of_block(c)], optimized=False)

        Z = lax.fori_loop(0, chunks, body, tuple(map(first, parts)))
        for c, z in zip(parts, Z, strict=True):
            leaving_g.at[b, h, own_rows, of_block(c)][...] = z
        plgpu.wait_smem_to_gmem(0)

    operands = [left, right, read, factors]
    operands += [entering] if entering is not None else []
    operands += [totals_with] if has_totals else []
    operands += [kept] if anchors and reverse else []
    out_type = [
        jax.ShapeDtypeStruct((column_blocks, B, T, H, M), BF16),
        jax.ShapeDtypeStruct((B, H, M, N), F32),
    ]
    out_type += [jax.ShapeDtypeStruct((column_blocks, M // 64, B, H, T), F32)] if has_totals else []
    if anchors and reverse:
        out_type.append(jax.ShapeDtypeStruct((column_blocks, B, H, anchors, M), F32))
    elif anchors:
        out_type.append(jax.ShapeDtypeStruct((B, H, anchors, M, N), BF16))
    scratch = [
        shared((STAGES, CHUNK, tiles.rows)),
        shared((STAGES, CHUNK, NB)),
        shared((STAGES, CHUNK, NB)),
        plgpu.SMEM((STAGES, FACTORS, CHUNK), F32),
        shared((W, CHUNK, CHUNK)),
        shared((W, CHUNK, 64)),
        plgpu.SMEM((1,), jnp.int32),
        plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=W),
    ]
    scratch += [shared((W, 64, parts[0].size))] if interpreted else []
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(B * H * column_blocks * row_blocks,),
        grid_names=("block",),
        num_threads=W,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": interpret} if interpreted else {}),
    )(*operands)
